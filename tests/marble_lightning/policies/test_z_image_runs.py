"""ZImagePolicy in whole runs: gradients, fit and resume, held-out prompts, images, and LoRA files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file

from balancers import MARBLE
from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.hub import export
from marble_lightning.policies.base import ADAPTERS
from marble_lightning.policies.lora_files import FILE
from marble_lightning.policies.z_image import ZImagePolicy
from tests.helpers.command_line import differences, fit_with, last, options, state
from tests.helpers.measured_memory import Estimated
from tests.helpers.small_policies import shake
from tests.helpers.small_runs import reference, run
from tests.helpers.small_z_image import generate, make_z_image, new_z_image, sample, stock_z_image
from tests.helpers.stock_pipeline import make, make_three_adapters, save_adapters

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


def test_two_passes_are_the_per_reward_gradients(checkpoints, z_image, tmp_path):
    """Of autograd, and of one backward pass for each reward."""
    recorded = {}
    for passes in ("two", "per_reward"):
        module, recorded[passes] = run(
            checkpoints, tmp_path, MARBLE(refresh_every=1, ema_decay=0.0), rounds=2, kl_weight=0.5,
            policy=new_z_image(z_image), gradient_passes=passes,
        )  # fmt: skip
    for two, per_reward in zip(recorded["two"].gradients, recorded["per_reward"].gradients, strict=True):
        assert two.abs().max() > 0
        torch.testing.assert_close(two, per_reward, rtol=1e-4, atol=1e-7)
    gradients, kl = reference(module, recorded["two"], 1)
    weighted = recorded["two"].gradients[1] - 0.5 * kl  # a combination of the rewards' gradients
    solution = torch.linalg.lstsq(gradients.double().T, weighted.double()[:, None])
    torch.testing.assert_close(gradients.double().T @ solution.solution, weighted.double()[:, None], rtol=1e-3, atol=1e-6)
    assert kl.abs().max() > 0


def test_gradient_checkpointing_changes_nothing(checkpoints, z_image, tmp_path):
    plain, _ = run(checkpoints, tmp_path, MARBLE(), policy=new_z_image(z_image))
    saving, _ = run(checkpoints, tmp_path, MARBLE(), policy=new_z_image(z_image, gradient_checkpointing=True))
    for ours, theirs in zip(plain.trainable, saving.trainable, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_the_memory_estimate_counts_the_longest_prompts(checkpoints, z_image, tmp_path):
    estimates = []
    for length in (32, 96):
        estimated = Estimated()
        policy = new_z_image(z_image, text_length=length)
        run(checkpoints, tmp_path, MARBLE(), rounds=0, callbacks=[estimated], policy=policy)
        estimates.append(estimated.estimate)
    shorter, longer = estimates
    assert longer.total("training") > shorter.total("training")
    assert longer.parts["latents and prompts"] - shorter.parts["latents and prompts"] == 4 * 64 * 16 * 4  # of 4 prompts
    assert longer.parts["transformer"] == shorter.parts["transformer"]


def z_image_options(checkpoints: Path, z_image: Path, folder: Path) -> list[str]:
    """A run of the tiny configuration with another policy."""
    given = options(checkpoints, folder, **{"trainer.max_epochs": 2, "trainer.check_val_every_n_epoch": 2})
    pairs = [pair for pair in zip(given[::2], given[1::2], strict=True) if not pair[0].startswith("--model.policy")]
    flags = [part for pair in pairs for part in pair]
    settings = {"path": z_image, "resolution": 16, "rank": 2, "alpha": 4, "text_length": 96, "dtype": "float32"}
    named = [part for name, value in settings.items() for part in (f"--model.policy.{name}", str(value))]
    return [*flags, "--model.policy", "ZImagePolicy", *named]


class FailsInTheSecondRound(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 2):  # after an optimizer step
            raise ZeroDivisionError


@pytest.fixture(scope="module")
def finished(checkpoints, z_image, tmp_path_factory) -> Path:
    """The folder of a run of two rounds, and of one that fails in the second and is resumed."""
    folder = tmp_path_factory.mktemp("run")
    main(["fit", *z_image_options(checkpoints, z_image, folder / "whole")])
    stopped = z_image_options(checkpoints, z_image, folder / "stopped")
    with pytest.raises(ZeroDivisionError):
        fit_with(stopped, FailsInTheSecondRound())
    main(["fit", *stopped, "--ckpt_path", str(last(folder / "stopped"))])
    return folder


def test_a_resumed_run_is_equal_bit_for_bit(finished):
    whole, resumed = state(last(finished / "whole")), state(last(finished / "stopped", 1))
    assert whole["epoch"] == 1 and whole["base_model"]["pipeline"] == "ZImagePipeline"
    assert differences(whole, resumed) == []


def test_validate_and_predict(checkpoints, z_image, finished, tmp_path, capsys):
    flags = z_image_options(checkpoints, z_image, tmp_path)
    main(["validate", *flags, "--ckpt_path", str(last(finished / "whole"))])
    assert "clipscore" in capsys.readouterr().out
    main(["predict", *flags, "--ckpt_path", str(last(finished / "whole"))])
    assert len(list(tmp_path.rglob("*.png"))) >= 4


def test_an_exported_run_in_the_stock_pipeline(z_image, finished, tmp_path):
    """The LoRA, and the merged transformer, generate what the run's policy does."""
    checkpoint = last(finished / "whole")
    policy = make_z_image(z_image)
    policy.load_state_dict(
        {
            name.removeprefix("policy."): tensor
            for name, tensor in torch.load(checkpoint, weights_only=True)["state_dict"].items()
        },
        strict=False,
    )
    latents = sample(policy, "ema")
    written = export(checkpoint, tmp_path / "lora")
    by_lora = generate(stock_z_image(z_image, written.parent))
    torch.testing.assert_close(by_lora, latents, rtol=0, atol=1e-5)
    export(checkpoint, tmp_path / "fused", fuse=True)
    fused = stock_z_image(z_image)
    fused.transformer = type(fused.transformer).from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(generate(fused), latents, rtol=0, atol=1e-5)
    assert (latents - generate(stock_z_image(z_image))).abs().max() > 1e-4


@pytest.fixture
def lora(z_image, tmp_path) -> tuple[ZImagePolicy, Path]:
    """A policy with three different adapters, and the file of its adapter `ema`."""
    policy = make_z_image(z_image)
    for adapter in ADAPTERS:
        shake(policy, adapter)
    return policy, export(save_adapters(policy, tmp_path), tmp_path / "lora")


def kohya(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The format of sd-scripts: underscores for dots, and alpha, here the rank."""
    renamed = {}
    for name, tensor in state.items():
        layer, _, side = name.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        key = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{key}.lora_{'down' if side == 'lora_A' else 'up'}.weight"] = tensor
        renamed[f"{key}.alpha"] = torch.tensor(2.0)
    return renamed


FORMATS = {
    "exported": (lambda state: state, 4),
    "comfyui": (lambda state: {name.replace("transformer.", "diffusion_model."): state[name] for name in state}, 2),
    "kohya": (kohya, 2),
}
"""How a file is made from an exported one, and the alpha that it has."""


@pytest.mark.parametrize("form", FORMATS)
def test_init_lora_reads_what_the_pipeline_reads(z_image, lora, tmp_path, form):
    policy, file = lora
    convert, alpha = FORMATS[form]
    if form != "exported":
        file = tmp_path / "other.safetensors"
        save_file(convert(load_file(tmp_path / "lora" / FILE)), file)
    started = make_z_image(z_image, init_lora=str(file), alpha=alpha)
    torch.testing.assert_close(sample(started, "trained"), sample(policy, "ema"), rtol=0, atol=1e-5)
    torch.testing.assert_close(sample(started, "old"), generate(stock_z_image(z_image, file)), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"must have the policy's rank and alpha, 2 and 7. Found 2 and {alpha} in"):
        new_z_image(z_image, init_lora=str(file), alpha=7).check()


def test_init_lora_of_another_kind(checkpoints, z_image, lora, tmp_path):
    state = load_file(lora[1])
    save_file(state | {"transformer.layers.0.attention.to_q.dora_scale": torch.ones(16, 1)}, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="must be a plain LoRA. Found .*dora_scale"):
        new_z_image(z_image, init_lora=str(tmp_path / "dora.safetensors")).check()
    odd = kohya(state) | {"lora_unet_layers_0_odd.weight": torch.ones(1)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="must be a LoRA file for a ZImagePipeline. Found"):
        new_z_image(z_image, init_lora=str(tmp_path / "odd.safetensors")).check()
    of_sd3 = export(save_adapters(make_three_adapters(checkpoints), tmp_path), tmp_path / "sd3")
    with pytest.raises(ValueError, match="must be for layers that the transformer has. Found 'transformer_blocks.0"):
        make_z_image(z_image, init_lora=str(of_sd3))
    with pytest.raises(ValueError, match="must be for layers that the transformer has. Found 'context_refiner.0"):
        make(checkpoints, init_lora=str(lora[1]))
