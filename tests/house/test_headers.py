"""What files say of their tensors, sharded or not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from burnish.config import ConfigError
from burnish.headers import stored_bytes, tensors, weight_files

ONE, TWO = {"a": torch.ones(3, 5)}, {"b": torch.ones(7, dtype=torch.bfloat16)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards, an index, and a file that the index does not name."""
    save_file(ONE, tmp_path / "model-1.safetensors")
    save_file(TWO, tmp_path / "model-2.safetensors")
    save_file(ONE, tmp_path / "other.safetensors")
    where = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(where))
    return tmp_path


def test_shards_are_those_of_the_index(sharded: Path) -> None:
    """Each tensor in its own type; without an index every file counts."""
    assert {one.name: one.num_bytes for one in tensors(sharded)} == {"a": 60, "b": 14}
    assert stored_bytes(sharded) == {torch.float32: 60, torch.bfloat16: 14}
    (sharded / "model.safetensors.index.json").unlink()
    assert stored_bytes(sharded).total() == 134
    # Nobody asks for a variant.
    save_file(ONE, sharded / "other.fp16.safetensors")
    assert stored_bytes(sharded).total() == 134


def test_what_is_missing_or_broken_is_said(sharded: Path, tmp_path: Path) -> None:
    """Before anything is loaded, in one line."""
    (sharded / "model-2.safetensors").write_bytes(b"no header")
    with pytest.raises(ConfigError, match="model-2"):
        stored_bytes(sharded)
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-2\.safetensors missing"):
        weight_files(sharded)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="no file"):
        weight_files(empty)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 1}'])
def test_a_broken_index_is_said(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match="need the names of weights and their files in"):
        weight_files(sharded)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn]
)
def test_every_type_has_its_size(tmp_path: Path, dtype: torch.dtype) -> None:
    """As torch has it."""
    stored = torch.zeros(4, 3, dtype=dtype)
    save_file({"x": stored}, tmp_path / "model.safetensors")
    assert stored_bytes(tmp_path) == {dtype: stored.nbytes}
