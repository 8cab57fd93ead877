"""Token ids as bytes: four bytes each, little-endian, unsigned.

A 60,000-token prompt is one copy instead of 60,000 MessagePack integers, and slices by block
can be hashed without building a list.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

TOKEN_BYTES = 4


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Raises OverflowError for a negative id or one of 2**32 or more, TypeError for a non-integer."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(packed: bytes) -> list[int]:
    """Raises ValueError if the length is not a multiple of four."""
    token_ids = array("I")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids.tolist()


def num_token_ids(packed: bytes) -> int:
    return len(packed) // TOKEN_BYTES
