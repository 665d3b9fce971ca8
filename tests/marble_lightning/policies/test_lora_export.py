"""An exported LoRA generates the same images in other programs as the policy."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from marble_lightning.cli import main
from marble_lightning.hub import export
from marble_lightning.policies.lora_export import about
from marble_lightning.policies.lora_files import FILE
from marble_lightning.policies.sd3 import TARGETS, SD3Policy
from marble_lightning.utils.seeds import generator
from tests.helpers.command_line import column
from tests.helpers.command_line import last as checkpoint
from tests.helpers.stock_pipeline import (
    TEXTS,
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


@pytest.mark.parametrize("name", ["ema", "trained"])
def test_a_stock_pipeline_generates_the_same_images_as_the_policy(checkpoints, policy, tmp_path, name):
    written = export(save_adapters(policy, tmp_path), tmp_path / "lora", adapter=name)
    pipeline, latents = stock(checkpoints, written.parent), sample_by_policy(policy, name)
    assert differ(generate_by_pipeline(pipeline, "latent"), latents) < 1e-5
    assert differ(generate_by_pipeline(pipeline, "pt"), policy.decode(latents)) <= 1 / 255
    without_lora = generate_by_pipeline(stock(checkpoints, None), "latent")
    assert differ(without_lora, latents) > 1e-2
    other = {"ema": "trained", "trained": "ema"}[name]
    assert differ(sample_by_policy(policy, other), latents) > 1e-2


def test_readers_without_alpha_use_the_right_scale(checkpoints, policy, exported):
    """Like older versions of diffusers, which did not read LoraConfigs from headers: alpha is the rank."""
    pipeline = stock(checkpoints, None)
    pipeline.load_lora_weights(load_file(exported / FILE))  # tensors only
    assert differ(generate_by_pipeline(pipeline, "latent"), sample_by_policy(policy, "ema")) < 1e-5


def test_a_stock_pipeline_in_bfloat16(checkpoints, policy, exported):
    pipeline = stock(checkpoints, exported, torch.bfloat16)
    loaded = {name: tensor for name, tensor in pipeline.transformer.state_dict().items() if ".lora_" in name}
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    for name, tensor in adapter(policy, "ema").items():
        scale = 2 if ".lora_B." in name else 1
        assert torch.equal(loaded[name.replace(".weight", ".default_0.weight")], (scale * tensor).bfloat16())
    base = generate_by_pipeline(stock(checkpoints, None, torch.bfloat16), "latent")
    latents = sample_by_policy(policy, "ema")
    assert differ(generate_by_pipeline(pipeline, "latent"), latents) < 0.1 * differ(base, latents)


# ComfyUI's rule: the update of a layer x is `x.lora_B.weight` @ `x.lora_A.weight`, times alpha over rank if there is a
# tensor `x.alpha`, otherwise times 1. Its names of SD3's layers are "transformer." and diffusers' name; q, k and v are
# thirds of one matrix there.
THIRDS = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
WHERE = {
    "attn": {
        "x_block.attn.qkv": ("to_q", "to_k", "to_v"), "x_block.attn.proj": ("to_out.0",),
        "context_block.attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"), "context_block.attn.proj": ("to_add_out",),
    },
    "attn2": {"x_block.attn2.qkv": ("to_q", "to_k", "to_v"), "x_block.attn2.proj": ("to_out.0",)},
}  # fmt: skip


def comfyui_updates(file: Path, blocks: int) -> tuple[dict[tuple[str, int], Tensor], set[str]]:
    """Updates by matrix and index of the third, and the keys that were read."""
    state, updates, read = load_file(file), {}, set()
    for block in range(blocks):
        for attention, matrices in WHERE.items():
            for matrix, layers in matrices.items():
                for layer in layers:
                    name = f"transformer.transformer_blocks.{block}.{attention}.{layer}"
                    keys = [f"{name}.lora_B.weight", f"{name}.lora_A.weight"]
                    if keys[0] in state:
                        up, down = (state[key] for key in keys)
                        scale = state[f"{name}.alpha"].item() / len(down) if f"{name}.alpha" in state else 1.0
                        updates[f"joint_blocks.{block}.{matrix}", THIRDS.get(layer, 0)] = scale * up @ down
                        read |= {*keys}
    return updates, read


@pytest.mark.parametrize("prefix", ["attn.", ""], ids=["joint attention", "both attentions"])
def test_comfyui_reads_every_key_and_computes_the_same_update(checkpoints, tmp_path, prefix):
    policy = make_three_adapters(checkpoints, targets=[prefix + target.removeprefix("attn.") for target in TARGETS])
    written = export(save_adapters(policy, tmp_path), tmp_path / "lora")
    updates, read = comfyui_updates(written, blocks=2)
    assert read == load_file(written).keys()
    assert (("joint_blocks.0.x_block.attn2.qkv", 2) in updates) == (prefix == "")
    assert {f"attn.{layer}" for layers in WHERE["attn"].values() for layer in layers} == set(TARGETS)
    deltas = {
        name: layer.get_delta_weight("ema") for name, layer in policy.transformer.named_modules() if hasattr(layer, "lora_A")
    }
    assert len(deltas) == len(updates)
    for name, delta in deltas.items():
        _, block, attention, target = name.split(".", 3)
        (matrix,) = [matrix for matrix, layers in WHERE[attention].items() if target in layers]
        torch.testing.assert_close(updates[f"joint_blocks.{block}.{matrix}", THIRDS.get(target, 0)], delta)


def test_the_average_of_two_checkpoints_starts_a_run(checkpoints, tmp_path, capsys):
    """Its update is the mean of the two; a lower rank prints what is lost."""
    policy, files, updates = make_three_adapters(checkpoints), [], []
    for name in "ab":
        (tmp_path / name).mkdir()
        files.append(save_adapters(policy, tmp_path / name))
        layers = {name: layer for name, layer in policy.transformer.named_modules() if hasattr(layer, "lora_A")}
        updates.append({name: layer.get_delta_weight("ema").clone() for name, layer in layers.items()})
        with torch.no_grad():  # the second update has rows and columns in another order
            for layer in layers.values():
                layer.lora_A["ema"].weight.copy_(layer.lora_A["ema"].weight.flip(1))
                layer.lora_B["ema"].weight.copy_(layer.lora_B["ema"].weight.flip(0))
    export(files[0], tmp_path / "mean", average_with=[str(files[1])])
    assert "--model.policy.rank 4 --model.policy.alpha 8" in capsys.readouterr().out
    mean = make(checkpoints, rank=4, alpha=8, init_lora=str(tmp_path / "mean"))
    for name, layer in mean.transformer.named_modules():
        if hasattr(layer, "lora_A"):
            torch.testing.assert_close(layer.get_delta_weight("ema"), (updates[0][name] + updates[1][name]) / 2)
    export(files[0], tmp_path / "short", average_with=[str(files[1])], rank=2)
    assert re.match(r"Rank 2: [1-9]\d\.\d% of the update's norm is lost\.", capsys.readouterr().out)
    make(checkpoints, rank=2, alpha=4, init_lora=str(tmp_path / "short"))


def test_other_files_and_damaged_checkpoints_raise(policy, tmp_path):
    def exporting(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=f"`ckpt_path` must .*{message}"):
            export(path, tmp_path / "lora")
        assert not (tmp_path / "lora" / FILE).exists()

    file = save_adapters(policy, tmp_path)
    whole, content = file.read_bytes(), torch.load(file, weights_only=True)
    exporting(tmp_path / "nowhere.ckpt", "Found .*nowhere.ckpt: no such file from")
    other = tmp_path / "other.ckpt"
    other.write_text("no checkpoint")
    exporting(other, "Found .*other.ckpt: its end is missing, or it is no checkpoint")
    other.write_bytes(whole[: len(whole) // 2])
    exporting(other, "Found .*other.ckpt: its end is missing.*--ckpt_path")
    tensor = content["state_dict"]["policy.transformer.transformer_blocks.0.attn.to_q.lora_A.ema.weight"]
    offset = whole.index(tensor.numpy().tobytes())
    other.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
    exporting(other, "Found .*data.* does not match its checksum")
    torch.save({"state_dict": {}, "epoch": 1, "global_step": 2}, other)
    exporting(other, "Found another program's")
    torch.save(content | {"state_dict": {}}, other)
    exporting(other, "Found 0 of ranks .* for 0 layers")
    tensor.fill_(torch.inf)
    torch.save(content, other)
    exporting(other, "Found others in 1 of")


def test_an_existing_file_is_replaced_only_with_overwrite(policy, exported, tmp_path):
    before = (exported / FILE).read_bytes()
    arguments = ["export", "--ckpt_path", str(tmp_path / "old.ckpt"), "--to", str(exported), "--adapter", "trained"]
    with pytest.raises(SystemExit, match=r"Found one in .*--overwrite true"):
        main(arguments)
    assert (exported / FILE).read_bytes() == before
    main([*arguments, "--overwrite", "true"])
    assert (exported / FILE).read_bytes() != before
    assert [path.name for path in exported.iterdir()] == [FILE]
    assert (exported / FILE).stat().st_mode == (tmp_path / "old.ckpt").stat().st_mode  # the usual permissions
    with pytest.raises(ValueError, match="`to` must be a folder. Found a file"):
        export(tmp_path / "old.ckpt", exported / FILE)


@pytest.mark.integration
def test_fit_export_load_and_fit_from_the_lora(small, checkpoints, tmp_path, capsys):
    """On the command line: the held-out scores at the start of the second run equal those at the end of the first."""
    main(["fit", *small, "--model.optimizer.init_args.lr", "0.05"])
    trained = column(capsys.readouterr().out, "trained")
    folder = tmp_path / "lora"
    main(["export", "--ckpt_path", str(checkpoint(tmp_path)), "--to", str(folder)])
    assert f"load_lora_weights('{folder}')" in capsys.readouterr().out

    with safe_open(folder / FILE, "pt") as opened:
        header = opened.metadata()
    about = {
        key.removeprefix("marble_lightning."): text for key, text in header.items() if key.startswith("marble_lightning.")
    }
    config = (tmp_path / "tiny/version_0/config.yaml").read_text()
    assert yaml.safe_load(about.pop("config")) == yaml.safe_load(config)
    assert about == {
        "version": version("marble-lightning"), "adapter": "ema", "alpha": "32.0", "round": "1", "optimizer_step": "2",
        "base_model": str(checkpoints / "sd3"), "base_text_length": "1", "base_text_encoder_3": "checkpoint",
        "base_dtype": "float32", "base_vae_tiling": "False",
        "rewards": '["pickscore", "hpsv2", "clipscore", "ocr", "geneval"]',
    }  # fmt: skip
    assert json.loads(header["lora_adapter_metadata"])["transformer.r"] == 2

    state = torch.load(checkpoint(tmp_path), weights_only=True)["state_dict"]
    layer = stock(checkpoints, folder).transformer.transformer_blocks[1].attn.add_k_proj
    up, down = (state[f"policy.transformer.transformer_blocks.1.attn.add_k_proj.lora_{part}.ema.weight"] for part in "BA")
    torch.testing.assert_close(layer.get_delta_weight("default_0"), 32 / 2 * up @ down)

    (tmp_path / "mine.txt").write_text("\n".join(TEXTS))
    options = ["--data.predict_file", str(tmp_path / "mine.txt"), "--predictions.folder", str(tmp_path / "images")]
    main(["predict", *small, *options, "--ckpt_path", str(checkpoint(tmp_path)), "--predictions.scores", "false"])
    files = [Image.open(tmp_path / f"images/{index:05d}.png") for index in range(len(TEXTS))]
    images = stock(checkpoints, folder)(
        TEXTS, height=16, width=16, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=4,
        generator=[generator(0, "held-out", index) for index in range(len(TEXTS))],
    ).images  # fmt: skip
    for predicted, image in zip(files, images, strict=True):
        assert np.abs(np.asarray(predicted).astype(int) - np.asarray(image)).max() <= 1

    one_round = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
    main(["fit", *small, *one_round, "--model.policy.init_lora", str(folder)])
    assert column(capsys.readouterr().out, "base") == trained


def test_the_header_has_no_secrets():
    """Of a checkpoint that code has written with a configuration of its own."""
    config = "model:\n  token: sk-secret\n  max_tokens: 7\n  url: http://me:pass@host\n"
    checkpoint = {"global_step": 1, "epoch": 0, "base_model": {}, "rewards": [], "config": config}
    header = about(checkpoint, "ema")
    assert yaml.safe_load(header["config"]) == {"model": {"token": None, "max_tokens": 7, "url": "http://host"}}


def test_help_lists_export(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in ("fit", "validate", "test", "predict"))
    assert "\nexport: Write a checkpoint's adapter" in text


def test_main_without_arguments_uses_sys_argv(policy, tmp_path, monkeypatch):
    file, folder = save_adapters(policy, tmp_path), tmp_path / "lora"
    monkeypatch.setattr("sys.argv", ["marble-lightning", "export", "--ckpt_path", str(file), "--to", str(folder)])
    main()
    assert load_file(folder / FILE).keys() == {f"transformer.{key}" for key in adapter(policy, "ema")}
