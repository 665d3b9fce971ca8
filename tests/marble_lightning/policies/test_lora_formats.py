"""Training starts from LoRA files of PEFT and of kohya's sd-scripts; what cannot be converted raises an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from marble_lightning.policies.lora_files import read_lora
from marble_lightning.policies.sd3 import TARGETS, SD3Policy
from tests.helpers.small_policies import outputs
from tests.helpers.stock_pipeline import adapter, make, make_three_adapters

SELF_ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
"""The layers of a default target whose names diffusers converts from kohya's format."""


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


def kohya_state(policy: SD3Policy, alpha: float | None = 4.0) -> dict[str, Tensor]:
    """The adapter `trained` in kohya's format; its names are made by diffusers."""
    state = convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in adapter(policy, "trained").items()})
    alphas = {} if alpha is None else {name: torch.tensor(alpha) for name in state if name.endswith(".alpha")}
    return {name: tensor for name, tensor in state.items() if not name.endswith(".alpha")} | alphas


@pytest.mark.parametrize("alpha", [4.0, None])
def test_training_starts_from_a_lora_of_kohya(checkpoints, tmp_path, alpha):
    targets = [*SELF_ATTENTION, "attn2.to_q", "ff.net.0.proj"]
    policy = make_three_adapters(checkpoints, targets=targets, alpha=alpha or 2)
    save_file(kohya_state(policy, alpha), tmp_path / "kohya.safetensors")
    assert "lora_unet_transformer_blocks_0_attn_to_out_0.lora_up.weight" in load_file(tmp_path / "kohya.safetensors")
    started = make(checkpoints, targets=targets, alpha=alpha or 2, init_lora=str(tmp_path))
    torch.testing.assert_close(outputs(started, "old"), outputs(policy, "trained"))


def test_kohya_files_that_cannot_be_converted_raise(checkpoints, policy, tmp_path):
    def reading(state: dict[str, Tensor], message: str) -> None:
        save_file(state, tmp_path / "kohya.safetensors")
        with pytest.raises(ValueError, match=rf"`policy\.init_lora` .*{message}"):
            read_lora(str(tmp_path), rank=2, alpha=4)

    reading(kohya_state(policy), r"Found 'lora_unet_transformer_blocks_0_attn_add_\w+\.\S+', '.*', '.*' and \d+ more in")
    sd_scripts = {
        f"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")
    }
    reading(sd_scripts, r"Found 'lora_unet_joint_blocks_0_x_block_attn_qkv\.lora_down.weight', .* in .*; convert it")
    whole = kohya_state(make_three_adapters(checkpoints, targets=SELF_ATTENTION))
    first = next(iter(whole)).partition(".")[0]
    alone = {name: tensor for name, tensor in whole.items() if name != f"{first}.lora_up.weight"}
    reading(alone, rf"two tensors for every layer\. Found one of a pair .*{first}\.lora_up\.weight")
    reading(whole | {f"{first}.alpha": torch.tensor(7.0)}, r"one alpha\. Found alphas \[4\.0, 7\.0\]")
    reading(whole | {f"{first}.dora_scale": torch.ones(1, 16)}, rf"a plain LoRA\. Found '{first}\.dora_scale'")


def test_odd_keys_are_shown(tmp_path):
    save_file({f"model.layer{index}.lora_A.weight": torch.ones(2, 2) for index in range(5)}, tmp_path / "odd.safetensors")
    odd = r"Found 'model\.layer0\.lora_A\.weight', '.*1.*', '.*2.*' and 2 more in .*odd\.safetensors"
    with pytest.raises(ValueError, match=odd):
        read_lora(str(tmp_path), rank=2, alpha=4)
