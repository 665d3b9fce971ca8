"""A transformer with a merged adapter: exact sums, the precision of the base, and errors about the base."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel

from marble_lightning.hub import export
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers.exported_runs import finished_run
from tests.helpers.stock_pipeline import make_three_adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_the_rounded_sum(checkpoints, tmp_path, dtype, capsys):
    policy = make_three_adapters(checkpoints, dtype=str(dtype)[6:])
    file = finished_run(policy, tmp_path / "run", str(checkpoints / "sd3"))
    export(file, tmp_path / "fused", fuse=True)
    fused, report = SD3Transformer2DModel.from_pretrained(tmp_path / "fused", dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    weights = fused.state_dict()
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {dtype}
    for name, module in policy.transformer.named_modules():
        if hasattr(module, "lora_A"):
            expected = (module.get_base_layer().weight.float() + module.get_delta_weight("ema").float()).to(dtype)
            torch.testing.assert_close(
                weights[f"{name}.weight"], expected, rtol=0, atol=1e-7 if dtype == torch.float32 else 0
            )
    assert ("Merged in float32: 0.0%" in capsys.readouterr().out) == (dtype == torch.float32)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")
def test_errors_name_the_base(checkpoints, tmp_path, monkeypatch):
    policy: SD3Policy = make_three_adapters(checkpoints)
    file = finished_run(policy, tmp_path / "run", "owner/gated")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"`base` must hold a whole pipeline\. Found 'owner/gated', .*HF_HUB_OFFLINE is set"
    ):
        export(file, tmp_path / "fused", fuse=True)
    other = SD3Transformer2DModel(num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16)
    other.save_pretrained(tmp_path / "other/transformer")
    with pytest.raises(ValueError, match=r"`base` must be the model .*Found no such layer in .*other"):
        export(file, tmp_path / "fused", fuse=True, base=str(tmp_path / "other"))
    assert not list((tmp_path / "fused").glob("*.safetensors"))
