"""Training starts from LoRA files of PEFT; those of other programs raise an error that shows their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from marble_lightning.policies.lora_files import read_lora
from marble_lightning.policies.sd3 import TARGETS, SD3Policy
from tests.helpers.small_policies import outputs
from tests.helpers.stock_pipeline import adapter, make, make_three_adapters


@pytest.fixture(scope="module")
def policy(checkpoints) -> SD3Policy:
    """A policy that tests only read."""
    return make_three_adapters(checkpoints)


def save_with_peft(checkpoints: Path, policy: SD3Policy, folder: Path, **settings) -> Path:
    """The adapter `trained`, saved by PEFT itself, as in the checkpoints of the MARBLE authors."""
    transformer = SD3Transformer2DModel.from_pretrained(checkpoints / "sd3", subfolder="transformer")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS), **settings)
    model = get_peft_model(transformer, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                key = name.removeprefix("base_model.model.").replace(".default.", ".")
                parameter.copy_(adapter(policy, "trained")[key])
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("as_file", [True, False])
def test_training_starts_from_a_lora_of_peft(checkpoints, policy, tmp_path, as_file):
    folder = save_with_peft(checkpoints, policy, tmp_path)
    assert all(name.startswith("base_model.model.") for name in load_file(folder / "adapter_model.safetensors"))
    started = make(checkpoints, init_lora=str(folder / "adapter_model.safetensors" if as_file else folder))
    for name in ("trained", "old", "ema"):
        torch.testing.assert_close(outputs(started, name), outputs(policy, "trained"))


def test_a_lora_of_peft_without_its_settings_raises(checkpoints, policy, tmp_path):
    folder = save_with_peft(checkpoints, policy, tmp_path)
    with pytest.raises(ValueError, match=r"policy's rank and alpha, 2 and 8\. Found 2 and 4"):
        make(checkpoints, alpha=8, init_lora=str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    LoHaConfig().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"must be a LoRA\. Found a LoHaConfig in .*adapter_config\.json"):
        make(checkpoints, init_lora=str(folder))
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    with pytest.raises(ValueError, match="plain LoRA of one rank and alpha. Found {'use_rslora': True}"):
        make(checkpoints, init_lora=str(folder))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"must have adapter_config\.json .* Found none .*; copy it there"):
        make(checkpoints, init_lora=str(folder))


@pytest.mark.parametrize("layer", ["joint_blocks_0_x_block_attn_qkv", "transformer_blocks_0_attn_to_q"])
def test_a_lora_of_kohyas_programs_raises(tmp_path, layer):
    """sd-scripts write the first name; the second is diffusers' with underscores."""
    state = {f"lora_unet_{layer}.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}
    save_file(state | {f"lora_unet_{layer}.alpha": torch.tensor(4.0)}, tmp_path / "kohya.safetensors")
    shown = rf"layers only\. Found 'lora_unet_{layer}\.alpha', .* in .*kohya.*; remove .* convert names"
    with pytest.raises(ValueError, match=shown):
        read_lora(str(tmp_path), rank=2, alpha=4)


def test_odd_keys_are_shown(tmp_path):
    save_file({f"model.layer{index}.lora_A.weight": torch.ones(2, 2) for index in range(5)}, tmp_path / "odd.safetensors")
    odd = r"Found 'model\.layer0\.lora_A\.weight', '.*1.*', '.*2.*' and 2 more in .*odd\.safetensors"
    with pytest.raises(ValueError, match=odd):
        read_lora(str(tmp_path), rank=2, alpha=4)
