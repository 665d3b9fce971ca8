"""ZImagePolicy computes what the stock pipeline computes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from marble_lightning.hub.settings import code_of
from marble_lightning.policies.base import ADAPTERS, Conditions, concat_conditions
from marble_lightning.policies.pipeline_loading import _check_tokenizer
from marble_lightning.policies.z_image import ZImagePolicy
from marble_lightning.utils.seeds import generator
from tests.helpers.small_policies import outputs, shake
from tests.helpers.small_z_image import TEXTS, generate, make_z_image, new_z_image, noise, sample, stock_z_image


@pytest.fixture(scope="module")
def policy(z_image: Path) -> ZImagePolicy:
    """A policy that tests only read."""
    return make_z_image(z_image)


def test_sampling_equals_the_stock_pipeline(z_image, policy):
    pipeline = stock_z_image(z_image)
    latents = sample(policy, None)
    torch.testing.assert_close(latents, generate(pipeline), rtol=0, atol=1e-6)
    torch.testing.assert_close(policy.decode(latents), generate(pipeline, "pt"), rtol=0, atol=1e-6)
    assert (latents - torch.stack([torch.randn(4, 8, 8, generator=g) for g in noise()])).abs().max() > 0.1


def test_guidance_is_the_scale_of_the_pipeline_plus_one(z_image, policy):
    guided = sample(policy, None, guidance=4.5, unconditional=policy.encode([""]))
    torch.testing.assert_close(guided, generate(stock_z_image(z_image), guidance_scale=3.5), rtol=0, atol=1e-5)
    assert (guided - sample(policy, None)).abs().max() > 1e-3


def test_euler_steps_along_the_velocity_are_the_stock_pipeline(z_image, policy):
    """Its sign, its time and its grid: x + (t' - t) v(x, t) at the flow times."""
    conditions, times = policy.encode(TEXTS), [*policy.sigmas(4).tolist(), 0.0]
    assert times[0] == 1 and times == sorted(times, reverse=True)
    x = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in noise()])
    with torch.no_grad(), policy.use_adapter(None):
        for t, following in pairwise(times):
            x = x + (following - t) * policy.velocity(x, torch.full((2,), t), conditions)
    torch.testing.assert_close(x, generate(stock_z_image(z_image)), rtol=0, atol=1e-5)


def test_the_velocity_is_what_the_scheduler_steps_along(z_image, policy, monkeypatch):
    """In every denoising step of the stock pipeline."""
    pipeline, calls = stock_z_image(z_image), []
    step = pipeline.scheduler.step

    def record(velocity, timestep, x, **options):
        calls.append((velocity, timestep, x))
        return step(velocity, timestep, x, **options)

    monkeypatch.setattr(pipeline.scheduler, "step", record)
    generate(pipeline)
    conditions = policy.encode(TEXTS)
    assert len(calls) == 4
    for velocity, timestep, x in calls:
        with torch.no_grad(), policy.use_adapter(None):
            torch.testing.assert_close(policy.velocity(x, (timestep / 1000).expand(2), conditions), velocity)


def test_dpm2_uses_the_grid_of_the_pipeline(policy):
    latents = sample(policy, None, solver="dpm2", steps=5)
    torch.testing.assert_close(policy.sampler.scheduler.sigmas[:-1], policy.sigmas(5))
    exact = sample(policy, None, steps=50)
    assert (latents - exact).abs().max() < (sample(policy, None, steps=5) - exact).abs().max()


def test_an_image_does_not_depend_on_the_others(policy):
    """Prompts with other numbers of tokens beside it, and zeros after its own, change nothing."""
    conditions = policy.encode([*TEXTS, "a"])
    assert conditions.lengths is not None and len(set(conditions.lengths.tolist())) == 3
    noisy, t = torch.randn(3, 4, 8, 8, generator=generator("noisy")), torch.tensor([0.2, 0.6, 1.0])
    with torch.no_grad(), policy.use_adapter(None):
        together = policy.velocity(noisy, t, conditions)
        for index, text in enumerate([*TEXTS, "a"]):
            alone = policy.velocity(noisy[index : index + 1], t[index : index + 1], policy.encode([text]))
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_prompts_of_different_lengths_are_split_and_joined(policy):
    conditions = policy.encode(TEXTS)
    rows = conditions.split()
    assert [row.embeds.shape[1] for row in rows] == conditions.lengths.tolist() and rows[0].pooled is None
    joined = concat_conditions(rows, torch.device("cpu"))
    assert torch.equal(joined.embeds, conditions.embeds) and torch.equal(joined.lengths, conditions.lengths)
    assert torch.equal(conditions[torch.tensor([1, 1])].lengths, conditions.lengths[1].expand(2))
    assert list(Conditions(torch.zeros(1, 1, 1)).tensors) == ["embeds"]


def test_prompts_are_cached(z_image, policy, tmp_path, monkeypatch):
    make_z_image(z_image, prompt_cache=str(tmp_path)).encode(TEXTS)
    again = make_z_image(z_image, prompt_cache=str(tmp_path))
    monkeypatch.setattr(again, "encode_batch", None)  # nothing is left to encode
    plain, cached = policy.encode(TEXTS), again.encode(TEXTS)
    torch.testing.assert_close(cached.embeds, plain.embeds)
    assert torch.equal(cached.lengths, plain.lengths)
    assert make_z_image(z_image, prompt_cache=str(tmp_path), text_length=64).cache.folder != again.cache.folder


def test_truncated_prompts(policy):
    """Exactly the texts of which the text encoder does not read the end; the template has three tokens."""
    fits, cut, long = ("r" * (96 - 3 + extra) for extra in (0, 1, 100_000))
    assert policy.truncated_prompts([fits, cut, "a", long]) == [cut, long]
    encoded = policy.encode([fits, cut, long])
    assert encoded.lengths.tolist() == [96] * 3
    assert policy.max_prompt_tokens == 96
    assert (encoded.embeds[0] - encoded.embeds[1]).abs().max() > 1e-3  # the template's end is cut


def test_adapters(z_image):
    policy = make_z_image(z_image)
    base = outputs(policy, None)
    for adapter in ADAPTERS:
        torch.testing.assert_close(outputs(policy, adapter), base)
    shake(policy, "trained")
    assert (outputs(policy, "trained") - base).abs().max() > 1e-3
    torch.testing.assert_close(outputs(policy, "old"), base)
    names = {name for name, _ in policy.transformer.named_parameters() if ".lora_A.trained" in name}
    assert len(names) == 4 * 4  # four layers of each of four blocks
    assert sum(parameter.numel() for parameter in policy.parameters_of("trained")) == 16 * 2 * 2 * 16


def test_text_encoders_can_stay_with_the_model(z_image, policy):
    resident = make_z_image(z_image, offload_text_encoders=False)
    assert "text_encoder" in dict(resident.named_children()) and "text_encoder" not in dict(policy.named_children())
    assert torch.equal(resident.encode(TEXTS).embeds, policy.encode(TEXTS).embeds)
    assert policy.sampler.text_encoder is None


def test_a_wrong_resolution(z_image, policy):
    for resolution in (0, 20):
        with pytest.raises(ValueError, match=f"`policy.resolution` must be a positive multiple of 16. Found {resolution}"):
            new_z_image(z_image, resolution=resolution)
    for resolution in (4, 64):
        policy.check_resolution("size", resolution)
    for resolution in (18, 68, 0):
        expected = (
            f"`size` must be a multiple of 4, at most 64: .* 16 patches of 4 pixels .*`axes_lens`.* Found {resolution}"
        )
        with pytest.raises(ValueError, match=expected):
            policy.check_resolution("size", resolution)
    assert policy.decode(sample(policy, "ema", resolution=64)).shape == (2, 3, 64, 64)


def test_a_prompt_longer_than_the_positions(z_image):
    new_z_image(z_image, text_length=128).check()
    with pytest.raises(ValueError, match=r"`policy.text_length` must be at most 128: .* has 130 positions .* Found 129\."):
        new_z_image(z_image, text_length=129).check()
    policy = make_z_image(z_image, text_length=128)
    with torch.no_grad():
        policy.velocity(torch.zeros(1, 4, 8, 8), torch.ones(1), policy.encode(["r" * 200]))


def test_other_pipelines_are_refused(z_image, checkpoints, tmp_path, monkeypatch):
    def error_of(folder: Path) -> str:
        with pytest.raises(ValueError) as error:
            make_z_image(folder)
        return str(error.value)

    assert "must hold a ZImagePipeline. Found StableDiffusion3Pipeline" in error_of(checkpoints / "sd3")
    index = json.loads((z_image / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}))
    assert "a turbo model predicts jumps" in error_of(tmp_path)
    pipeline = stock_z_image(z_image)
    monkeypatch.setattr("marble_lightning.policies.z_image.load_pipeline", lambda *_, **__: pipeline)
    pipeline.scheduler.register_to_config(use_dynamic_shifting=True)
    assert "Found `use_dynamic_shifting`" in error_of(z_image)
    pipeline.tokenizer.chat_template = None
    assert "must hold a tokenizer with a chat template" in error_of(z_image)


def test_a_tokenizer_of_the_published_size():
    """The table of Z-Image's text encoder has 267 rows more than its tokenizer has tokens."""
    config = SimpleNamespace(vocab_size=151_936, max_position_embeddings=40_960, model_type="qwen3")
    _check_tokenizer("tokenizer", range(151_669), config, "folder")
    with pytest.raises(ValueError, match="with the 151936 tokens of its text encoder. Found 1 in"):
        _check_tokenizer("tokenizer", range(1), config, "folder")


def test_the_code_of_a_model_card():
    identity = {"pipeline": "ZImagePipeline", "text_length": 512, "dtype": "bfloat16"}
    code = code_of("me/lora", "Tongyi-MAI/Z-Image", False, identity, {"steps": 40, "guidance": 4.5})
    assert "from diffusers import ZImagePipeline\n" in code and "text_encoder_3" not in code
    assert 'ZImagePipeline.from_pretrained(\n    "Tongyi-MAI/Z-Image",\n    dtype=torch.bfloat16,\n)' in code
    arguments = '"a prompt"', "num_inference_steps=40", "guidance_scale=3.5", "max_sequence_length=512"
    assert "pipeline(\n" + "".join(f"    {each},\n" for each in arguments) + ")" in code
