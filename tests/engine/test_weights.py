"""Two folders with the same name need not hold the same model."""

from __future__ import annotations

from pathlib import Path

from baton.engine.weights import SAMPLE_BYTES, weights_identity


def model(folder: Path, weights: bytes = bytes(5 * SAMPLE_BYTES)) -> str:
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text(folder.name)
    return str(folder)


def test_copies_are_equal_and_other_weights_are_not(tmp_path: Path) -> None:
    """What is no weight does not count."""
    ours = weights_identity(model(tmp_path / "a"))
    assert ours == weights_identity(model(tmp_path / "b"))
    tuned = bytearray(5 * SAMPLE_BYTES)
    tuned[-1] = 1
    assert weights_identity(model(tmp_path / "c", bytes(tuned))) != ours
    assert weights_identity(model(tmp_path / "d", bytes(5 * SAMPLE_BYTES + 1))) != ours


def test_a_name_of_the_hub_is_known_by_its_revision(tmp_path: Path) -> None:
    assert weights_identity("some/model", "abc123") == "abc123"
    assert weights_identity("some/model") is None
    (tmp_path / "empty").mkdir()
    assert weights_identity(str(tmp_path / "empty")) is None
