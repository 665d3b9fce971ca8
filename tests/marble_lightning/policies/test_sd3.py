"""SD3Policy: the pipeline and its three adapters."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from benchmarks.random_sd35m import networks
from marble_lightning.checks import warn_about_prompts
from marble_lightning.policies.base import ADAPTERS
from marble_lightning.policies.pipeline_checks import pipeline_index
from marble_lightning.policies.pipeline_kinds import SD3
from marble_lightning.policies.sd3 import TARGETS, SD3Policy
from marble_lightning.utils.seeds import generator
from rewards import Prompt
from tests.helpers.small_policies import outputs, shake


@pytest.fixture
def policy(checkpoints) -> SD3Policy:
    policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, alpha=4, text_length=4, dtype="float32")
    policy.setup(seed=0)
    return policy


def test_adapters_start_at_the_base_and_only_one_is_trainable(policy):
    base = outputs(policy, None)
    for adapter in ADAPTERS:
        torch.testing.assert_close(outputs(policy, adapter), base)
    trainable = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in policy.parameters_of("trained")}


def test_adapters_are_independent_and_the_base_never_changes(policy):
    base = outputs(policy, None)
    shake(policy, "trained")
    assert (outputs(policy, "trained") - base).abs().max() > 1e-3
    for adapter in (None, "old", "ema"):
        torch.testing.assert_close(outputs(policy, adapter), base)


def test_lerp_adapter_is_a_weighted_mean(policy):
    shake(policy, "trained")
    shake(policy, "old")
    before = [parameter.clone() for parameter in policy.parameters_of("old")]
    policy.lerp_adapter("old", towards="trained", by=0.25)
    for after, start, goal in zip(policy.parameters_of("old"), before, policy.parameters_of("trained"), strict=True):
        torch.testing.assert_close(after, 0.75 * start + 0.25 * goal)


def test_use_adapter_does_not_change_requires_grad(policy):
    flags = [parameter.requires_grad for parameter in policy.parameters()]
    for adapter in ("old", None):
        with policy.use_adapter(adapter):
            assert flags == [parameter.requires_grad for parameter in policy.parameters()]


def test_an_adapter_is_merged_in_float32_and_the_base_is_restored(policy):
    def velocity(error: Exception | None) -> None:
        with policy.use_adapter("old"):
            velocities.append(policy.velocity(noisy, torch.tensor([0.3, 0.9]), conditions))
            merged.append(policy._lora_layers[0].disable_adapters)
            if error:
                raise error

    shake(policy, "old")
    conditions, noisy = policy.encode(["a", "b"]), torch.randn(2, 4, 8, 8, generator=generator("noisy"))
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    velocities, merged = [], []
    velocity(None)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        velocity(ZeroDivisionError())
    assert merged == [False, True]
    torch.testing.assert_close(velocities[1], velocities[0].detach(), rtol=1e-5, atol=1e-5)
    assert not policy._lora_layers[0].disable_adapters
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("reason", ["a graph", "autocast", "coarse products", "half precision"])
def test_an_adapter_is_not_merged_with_gradients_or_low_precision(policy, monkeypatch, reason):
    if reason == "coarse products":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    if reason == "half precision":
        policy.transformer.to(torch.bfloat16)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast")
    with torch.set_grad_enabled(reason == "a graph"), autocast, policy.use_adapter("old"):
        assert not any(layer.disable_adapters for layer in policy._lora_layers)


def test_use_adapter_does_not_nest(policy):
    with policy.use_adapter("old"), pytest.raises(RuntimeError, match="must not be nested"), policy.use_adapter(None):
        pass
    assert outputs(policy, "old").isfinite().all()


def test_the_joint_attention_has_a_lora_and_the_second_one_optionally(checkpoints, policy):
    """SD3.5 Medium's dual blocks have `attn2`, which the published run does not adapt."""

    def adapted(policy: SD3Policy) -> set[str]:
        return {name.split(".lora_")[0] for name, _ in policy.transformer.named_parameters() if ".lora_A.trained" in name}

    joint = {f"transformer_blocks.0.{target}" for target in TARGETS}
    assert {name for name in adapted(policy) if "blocks.0." in name} == joint
    wide = SD3Policy(str(checkpoints / "sd3"), 16, rank=2, targets=[name.removeprefix("attn.") for name in TARGETS])
    wide.setup(seed=0)
    second = {f"transformer_blocks.0.attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert {name for name in adapted(wide) if "blocks.0." in name} == joint | second


@pytest.mark.parametrize(("prefix", "layers", "millions"), [("attn.", 191, 18.78), ("", 243, 23.89)])
def test_the_published_run_adapts_191_layers(prefix, layers, millions):
    policy = SD3Policy("stabilityai/stable-diffusion-3.5-medium", targets=[prefix + name[5:] for name in TARGETS])
    with torch.device("meta"):
        policy.transformer = networks()["transformer"]
        policy.add_adapters(seed=0)
    assert len(policy._lora_layers) == layers
    assert round(sum(parameter.numel() for parameter in policy.parameters_of("trained")) / 1e6, 2) == millions


def test_initial_adapters_depend_on_the_seed_only(checkpoints):
    def first(seed: int) -> torch.Tensor:
        torch.randn(3)  # the global generator must not matter
        policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, dtype="float32")
        policy.setup(seed)
        return policy.parameters_of("trained")[0].detach()

    torch.testing.assert_close(first(0), first(0), rtol=0, atol=0)
    assert (first(0) - first(1)).abs().max() > 0


@pytest.mark.parametrize("solver", ["dpm2", "euler"])
def test_an_image_depends_on_its_own_generator_only(policy, solver):
    conditions = policy.encode(["a red circle", "two squares", "a cross"])

    def sample(indices: list[int]) -> torch.Tensor:
        chosen = conditions[torch.tensor(indices)]
        return policy.sample(chosen, [generator("x", i) for i in indices], "old", steps=3, solver=solver)

    together, alone = sample([0, 1, 2]), sample([1])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    images = policy.decode(together)
    assert images.shape == (3, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_prompt_of_a_megabyte(policy, caplog, monkeypatch):
    """Only the beginning is tokenised, since tokenising the whole prompt took minutes, and no message quotes it whole."""
    encoded, encode_prompt = [], policy.pipeline.encode_prompt

    def spy(**options):
        encoded.extend(options["prompt"])
        return encode_prompt(**options)

    monkeypatch.setattr(policy.pipeline, "encode_prompt", spy)
    long, short = "red cat " * 125_000, "red cat " * 100
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    embeds = policy.encode([long, short]).embeds
    assert torch.equal(embeds[0], embeds[1])
    assert max(map(len, encoded)) == 100 * policy.max_prompt_tokens and len(caplog.text) < 1000
    assert policy.truncated_prompts([long]) == [long]
    data = SimpleNamespace(training=[Prompt(long, "plain")], held_out=[])
    warn_about_prompts(policy, {}, data)
    assert "do not read the end of 1 of 1 prompts" in caplog.text and "... (1000000 characters)" in caplog.text
    assert len(caplog.text) < 1000


def test_truncated_prompts(policy):
    """Tokens after `max_prompt_tokens` do not affect the encoding, and exactly the longer texts are returned."""
    word, max_tokens = "red ", policy.max_prompt_tokens
    fits, cut, longer = (word * (max_tokens - 2 + extra) for extra in (0, 1, 2))  # there are a start and an end token
    assert policy.truncated_prompts([fits, cut, "a", longer]) == [cut, longer]
    assert policy.truncated_prompts([]) == []
    embeds = policy.encode([fits, cut, longer, word * (max_tokens - 3)]).embeds
    torch.testing.assert_close(embeds[1], embeds[0])
    torch.testing.assert_close(embeds[2], embeds[0])
    assert (embeds[3] - embeds[0]).abs().max() > 1e-3


def test_guidance_changes_the_images(policy):
    conditions, empty = policy.encode(["a red circle"]), policy.encode([""])
    plain = policy.sample(conditions, [generator("x")], None, steps=3, solver="euler")
    guided = policy.sample(conditions, [generator("x")], None, steps=3, solver="euler", guidance=5.0, unconditional=empty)
    assert (plain - guided).abs().max() > 1e-4


def test_without_an_adapter_no_lora_is_added(checkpoints, policy):
    bare = SD3Policy(str(checkpoints / "sd3"), resolution=16, text_length=4, dtype="float32", adapter="none")
    bare.setup(seed=0)
    assert not any("lora" in name for name, _ in bare.named_parameters())
    torch.testing.assert_close(outputs(bare, None), outputs(policy, None))


def test_images_can_have_another_resolution(policy):
    conditions = policy.encode(["a red circle"])
    latents = policy.sample(conditions, [generator("x")], "ema", steps=2, solver="euler", resolution=32)
    assert policy.decode(latents).shape == (1, 3, 32, 32)


def test_a_folder_without_sd3_raises_before_loading(tmp_path):
    with pytest.raises(ValueError, match="must be a folder in diffusers format or a hub id"):
        pipeline_index(SD3, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"with a model_index\.json"):
        pipeline_index(SD3, str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="Found FluxPipeline"):
        pipeline_index(SD3, str(tmp_path))


def test_a_model_with_other_velocities_raises(checkpoints, tmp_path):
    index = pipeline_index(SD3, str(checkpoints / "sd3"))

    def error_of(folder, **parts):
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps(index | parts))
        with pytest.raises(ValueError) as error:
            pipeline_index(SD3, str(folder))
        return str(error.value)

    assert "whose scheduler is a FlowMatchEulerDiscreteScheduler. Found EulerDiscreteScheduler" in error_of(
        tmp_path, scheduler=["diffusers", "EulerDiscreteScheduler"]
    )
    assert "whose transformer is a SD3Transformer2DModel. Found None" in error_of(tmp_path, transformer=[None, None])
    assert "not distilled" in error_of(tmp_path / "stable-diffusion-3.5-large-turbo")
    assert "predicts jumps" in error_of(tmp_path, _name_or_path="stabilityai/stable-diffusion-3.5-large-turbo")


def test_an_unreachable_hub_id_raises(monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("offline")

    monkeypatch.setattr(StableDiffusion3Pipeline, "load_config", unreachable)
    with pytest.raises(ValueError, match=r"Found 'owner/name': no such folder from .*; of the hub: offline"):
        pipeline_index(SD3, "owner/name")


def test_invalid_options():
    with pytest.raises(ValueError, match="`policy.rank` must be >= 1"):
        SD3Policy("x/y", rank=0)
    with pytest.raises(ValueError, match="`policy.resolution` must be a positive multiple of 16. Found 500"):
        SD3Policy("x/y", resolution=500)
    with pytest.raises(ValueError, match="`policy.adapter` must be ema, trained or none. Found 'old'"):
        SD3Policy("x/y", adapter="old")
    with pytest.raises(ValueError, match="`policy.init_lora` must be null where `policy.adapter` is none. Found 'some'"):
        SD3Policy("x/y", adapter="none", init_lora="some")
    with pytest.raises(ValueError, match="`policy.targets` must name"):
        SD3Policy("x/y", targets=[])
    for alpha in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"`policy.alpha` must be > 0 and finite. Found {alpha}"):
            SD3Policy("x/y", alpha=alpha)
    with pytest.raises(ValueError, match="`policy.text_length` must be >= 1. Found 0"):
        SD3Policy("x/y", text_length=0)


def test_a_target_without_a_layer_raises(checkpoints):
    policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, targets=["to_q", "to_typo"])
    with pytest.raises(ValueError, match=r"`policy\.targets` must name linear layers.* Found no 'to_typo'"):
        policy.setup(seed=0)


@pytest.mark.parametrize("side", [8, 20])
def test_decoding_in_slices_and_tiles(checkpoints, side):
    """Slices change nothing; tiles change only images that are larger than a tile, and only at the seams."""
    latents = torch.randn(3, 4, side, side, generator=generator("latents"))
    decoded = []
    for options in ({}, {"vae_slicing": True}, {"vae_tiling": True}):
        policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, dtype="float32", **options)
        policy.setup(seed=0)
        assert (policy.vae.use_slicing, policy.vae.use_tiling) == ("vae_slicing" in options, "vae_tiling" in options)
        decoded.append(policy.decode(latents))
    torch.testing.assert_close(decoded[1], decoded[0], rtol=0, atol=1e-6)
    difference = (decoded[2] - decoded[0]).abs()
    assert difference.max() < 1e-6 if side == 8 else 0 < difference.mean() < 0.1


def test_the_autoencoder_can_have_another_precision(checkpoints):
    """As in the published run, where the autoencoder always decodes in float32."""
    latents = torch.randn(1, 4, 8, 8, generator=generator("decode"))
    decoded = []
    for dtype, vae_dtype in (("bfloat16", "float32"), ("float32", None), ("bfloat16", None)):
        policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, dtype=dtype, vae_dtype=vae_dtype)
        policy.setup(seed=0)
        assert policy.transformer.dtype == getattr(torch, dtype) and policy.vae.dtype == getattr(torch, vae_dtype or dtype)
        decoded.append(policy.decode(latents))
    assert torch.equal(decoded[0], decoded[1]) and not torch.equal(decoded[0], decoded[2])
