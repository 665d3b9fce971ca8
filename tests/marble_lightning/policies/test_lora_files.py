"""Training starts from an exported LoRA or from any that a stock pipeline loads; other files raise errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from marble_lightning.hub import export
from marble_lightning.policies.base import ADAPTERS
from marble_lightning.policies.lora_files import FILE, read_lora
from marble_lightning.policies.sd3 import TARGETS, SD3Policy
from tests.helpers.small_policies import outputs, shake
from tests.helpers.stock_pipeline import (
    adapter,
    differ,
    generate_by_pipeline,
    make,
    make_three_adapters,
    sample_by_policy,
    save_adapters,
    stock,
)


@pytest.fixture(scope="module")
def policy(checkpoints) -> SD3Policy:
    """A policy that tests only read."""
    return make_three_adapters(checkpoints)


@pytest.fixture
def exported(policy, tmp_path) -> Path:
    """A folder with the adapter `ema`."""
    return export(save_adapters(policy, tmp_path), tmp_path / "lora").parent


@pytest.mark.parametrize("alpha", [4, 3])
@pytest.mark.parametrize("as_file", [True, False])
def test_training_starts_from_an_exported_lora(checkpoints, tmp_path, alpha, as_file):
    before = make(checkpoints, alpha=alpha)
    shake(before, "ema")
    written = export(save_adapters(before, tmp_path), tmp_path / "lora")
    policy = make(checkpoints, alpha=alpha, init_lora=str(written if as_file else written.parent))
    for name in ADAPTERS:
        torch.testing.assert_close(outputs(policy, name), outputs(before, "ema"))
        for key, tensor in adapter(before, "ema").items():
            torch.testing.assert_close(adapter(policy, name)[key], tensor, rtol=1e-6 if alpha == 3 else 0, atol=0)
    assert differ(outputs(policy, "trained"), outputs(policy, None)) > 1e-3
    trainable = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    assert trainable == set(map(id, policy.parameters_of("trained")))


@pytest.mark.parametrize("kind", ["metadata", "none", "lora.up", "bin"])
def test_training_starts_from_loras_of_other_programs(checkpoints, policy, tmp_path, kind):
    """With alpha in a LoraConfig, without one (alpha is the rank), and in older formats."""
    layers = adapter(policy, "ema")
    if kind == "lora.up":
        layers = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor for key, tensor in layers.items()}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS)).to_dict() if kind == "metadata" else None
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, layers, transformer_lora_adapter_metadata=config, safe_serialization=kind != "bin"
    )
    started = make(checkpoints, alpha=4 if kind == "metadata" else 2, init_lora=str(tmp_path))
    pipeline = stock(checkpoints, tmp_path)
    assert differ(generate_by_pipeline(pipeline, "latent"), sample_by_policy(started, "old")) < 1e-5


def rewritten(folder: Path, change) -> Path:
    """A copy of the exported file with edited tensors."""
    state = load_file(folder / FILE)
    with safe_open(folder / FILE, "pt") as opened:
        header = opened.metadata()
    change(state)
    save_file(state, folder / "other.safetensors", metadata=header)
    return folder / "other.safetensors"


LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{LAYER}.lora_A.weight"), r"Found 1 missing and 0 too many .*attn\.to_q\.lora_A"),
        (lambda state: [state.pop(key) for key in list(state) if "add_out" in key], "`targets`, .*to_add_out.* Found "),
        (
            lambda state: state.update({"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": torch.ones(2, 16)}),
            r"Found 'transformer_blocks\.9\.attn\.to_q' in .*other\.safetensors",
        ),
        (
            lambda state: state.update({"text_encoder.layers.0.fc1.lora_A.weight": torch.ones(2, 16)}),
            "transformer's linear layers only. Found 'text_encoder",
        ),
        (lambda state: state.update({f"{LAYER}.lora_A.weight": torch.ones(2, 8)}), r"attn\.to_q.*\(2, 16\). Found \(2, 8\)"),
        (lambda state: state[f"{LAYER}.lora_A.weight"].fill_(torch.nan), "finite numbers. Found others in .*attn.to_q"),
    ],
)
def test_a_lora_that_does_not_fit_raises(checkpoints, exported, change, message):
    with pytest.raises(ValueError, match=rf"(?s)`policy\.init_lora` must .*{message}"):
        make(checkpoints, init_lora=str(rewritten(exported, change)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, r"the policy's rank and alpha, 3 and 4\. Found 2 and 4"),
        ({"alpha": 5}, r"the policy's rank and alpha, 2 and 5\. Found 2 and 4"),
        ({"init_lora": "nowhere"}, "Found no such file nowhere from"),
    ],
)
def test_rank_alpha_and_file_are_checked_before_weights_load(checkpoints, exported, options, message, monkeypatch):
    def loading(*arguments, **keywords):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("marble_lightning.policies.sd3.load_pipeline", loading)
    with pytest.raises(ValueError, match=message):
        make(checkpoints, **{"init_lora": str(exported), **options})


def test_other_targets_raise_an_error_with_both(checkpoints, exported):
    with pytest.raises(ValueError, match=r"`targets`, attn2\.to_k, attn2\.to_q\. Found attn\.add_k_proj, .*attn\.to_v in"):
        make(checkpoints, init_lora=str(exported), targets=["attn2.to_q", "attn2.to_k"])


def test_files_without_a_plain_lora_raise(exported, tmp_path):
    def reading(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_lora(str(path), rank=2, alpha=4)

    (tmp_path / "empty").mkdir()
    reading(tmp_path / "empty", "Found 0 in")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((exported / FILE).read_bytes()[:-10])
    reading(damaged, r"Found a damaged or another file, .*damaged\.safetensors")
    layers = {key.removeprefix("transformer."): tensor for key, tensor in load_file(exported / FILE).items()}
    config = LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=list(TARGETS)).to_dict()
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "rs", layers, transformer_lora_adapter_metadata=config)
    reading(tmp_path / "rs", "plain LoRA of one rank and alpha. Found {'use_rslora': True}")
    first = next(key for key in layers if ".lora_A." in key)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "ranks", {**layers, first: torch.ones(1, 16)})
    reading(tmp_path / "ranks", r"one rank\. Found ranks \[1, 2\]")
    for name in ("one", "two"):
        save_file(layers, tmp_path / "empty" / f"{name}.safetensors")
    reading(tmp_path / "empty", "Found 2 in .*use the path of the file")
