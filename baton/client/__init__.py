"""A small client of the ZeroMQ door: `BatonClient` (blocking) and `AsyncBatonClient`.

    from baton.client import BatonClient

    with BatonClient("127.0.0.1:5571") as client:
        for delta in client.stream("Hello", max_tokens=32):
            print(delta.text, end="", flush=True)

Both raise the exceptions of `baton.contract.errors`; closing aborts what still runs.
"""

from baton.client.asynchronous import AsyncBatonClient, AsyncStream
from baton.client.blocking import BatonClient, Generation

__all__ = ["AsyncBatonClient", "AsyncStream", "BatonClient", "Generation"]
