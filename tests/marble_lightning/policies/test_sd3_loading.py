"""Errors for damaged copies of a pipeline, which name the damaged part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marble_lightning.policies.sd3 import SD3Policy
from rewards import CLIPScore

PARTS = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]


def set_up(folder: Path, dtype: str = "float32") -> None:
    SD3Policy(str(folder), resolution=16, rank=2, text_length=4, dtype=dtype).setup(seed=0)


@pytest.fixture
def copy(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / "sd3_t5", tmp_path / "copy"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor], str], None]) -> str:
    """Edit the tensors of a folder's weights file; returns the name of one tensor."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[3]
    edit(tensors, name)
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor(copy: Path, part: str) -> None:
    name = change(copy / part, lambda tensors, name: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"every tensor of its {part}\. Found 1 missing .*, such as {name}\. "):
        set_up(copy)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_is_not_finite(copy: Path, part: str, value: float) -> None:
    name = change(copy / part, lambda tensors, name: tensors[name].view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match=rf"finite numbers. Found others in 1 tensors of the {part} .*, such as {name}"):
        set_up(copy)


def test_weights_must_be_finite_in_the_dtype_of_the_policy(copy: Path) -> None:
    """Numbers are checked after conversion to the policy's `dtype`."""
    change(copy / "vae", lambda tensors, name: tensors[name].fill_(1e30))
    set_up(copy)
    with pytest.raises(ValueError, match=r"of the vae .*read as float16. .*choose `policy.dtype` bfloat16 or float32"):
        set_up(copy, "float16")


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
@pytest.mark.parametrize("files", ["*", "tokenizer.json"])
def test_a_missing_tokenizer(copy: Path, name: str, files: str) -> None:
    for file in (copy / name).glob(files):
        file.unlink()
    with pytest.raises(ValueError, match=rf"must hold a {name} with the \d+ tokens of its text encoder\. Found"):
        set_up(copy)


def test_a_tokenizer_without_a_maximum_length(copy: Path) -> None:
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="`model_max_length` of at most 20, .* Found 1e.30"):
        set_up(copy)


@pytest.mark.parametrize("part", PARTS)
def test_a_truncated_or_missing_file(copy: Path, part: str) -> None:
    (file,) = (copy / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"must hold a whole pipeline. Found .*, whose {part} cannot be loaded"):
        set_up(copy)
    file.unlink()
    with pytest.raises(ValueError, match=f"whose {part} cannot be loaded: .*o file named"):
        set_up(copy)


def test_weights_of_a_reward_must_be_finite(checkpoints: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoints / "clip", tmp_path / "clip"))
    name = change(copy, lambda tensors, name: tensors[name].view(-1)[:1].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"CLIPScore: .* finite numbers. Found others in 1 weights, such as {name}"):
        CLIPScore(str(copy)).setup()
    change(copy, lambda tensors, name: tensors[name].fill_(1e30))
    CLIPScore(str(copy)).setup()
    with pytest.raises(ValueError, match="CLIPScore: .* must hold finite numbers"):
        CLIPScore(str(copy), dtype="float16").setup()
