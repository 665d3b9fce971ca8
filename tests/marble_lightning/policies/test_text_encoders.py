"""Three text encoders: offloading, the cache on disk, and policies without the third encoder."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.policies.embedding_cache import PromptCache, fingerprint
from marble_lightning.policies.sd3 import SD3Policy

TEXTS = ["a red circle", "two squares", "a red circle"]


def policy_of(checkpoints, name: str = "sd3_t5", **options) -> SD3Policy:
    policy = SD3Policy(str(checkpoints / name), resolution=16, rank=2, text_length=6, dtype="float32", **options)
    policy.setup(seed=0)
    return policy


def equal(one, other) -> bool:
    return torch.equal(one.embeds, other.embeds) and torch.equal(one.pooled, other.pooled)


def test_t5_is_used(checkpoints):
    """Its tokens follow CLIP's, and are zeros if T5 is left out."""
    with_t5, without = policy_of(checkpoints), policy_of(checkpoints, text_encoder_3=None)
    clip_tokens = with_t5.max_prompt_tokens
    one, other = with_t5.encode(TEXTS), without.encode(TEXTS)
    assert one.embeds.shape == other.embeds.shape == (3, clip_tokens + 6, 32)
    torch.testing.assert_close(one.embeds[:, :clip_tokens], other.embeds[:, :clip_tokens])
    assert one.embeds[:, clip_tokens:].abs().max() > 0.1
    assert (one.embeds[0] - one.embeds[1])[clip_tokens:].abs().max() > 0.1
    assert not other.embeds[:, clip_tokens:].any()
    assert without.pipeline.text_encoder_3 is None


def test_offloaded_encoders_are_no_submodules(checkpoints):
    """So they stay on the CPU when Lightning moves the module."""
    offloaded, resident = policy_of(checkpoints), policy_of(checkpoints, offload_text_encoders=False)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert not any(name.startswith(names) for name, _ in offloaded.named_parameters())
    assert {name for name, _ in resident.named_children()} >= set(names)
    assert equal(offloaded.encode(TEXTS), resident.encode(TEXTS))
    assert not any(parameter.requires_grad for e in offloaded.text_encoders.values() for parameter in e.parameters())


def test_offloaded_encoders_are_on_the_device_while_they_encode(checkpoints, monkeypatch):
    """The device is `meta` here. Afterwards they have the same tensors on the CPU again; `meta` has none to copy back."""
    policy = policy_of(checkpoints)
    policy.transformer.to("meta")
    encoders = torch.nn.ModuleList(policy.text_encoders.values())
    for part in encoders.modules():
        part._buffers.clear()  # they would be copied back
    before, devices = [parameter.data_ptr() for parameter in encoders.parameters()], []

    def record_devices(texts):
        devices.extend(encoder.device.type for encoder in policy.text_encoders.values())
        raise InterruptedError

    monkeypatch.setattr(policy, "encode_batch", record_devices)
    with pytest.raises(InterruptedError):
        policy.encode(TEXTS)
    assert devices == ["meta"] * 3
    assert [parameter.data_ptr() for parameter in encoders.parameters()] == before


def test_the_sampler_has_no_text_encoders(checkpoints):
    """So it runs on the transformer's device, wherever the encoders are."""
    policy = policy_of(checkpoints)
    assert [policy.sampler.components[name] for name in policy.text_encoders] == [None] * 3
    assert policy.sampler.transformer is policy.transformer


def test_the_cache_equals_encoding(checkpoints, tmp_path, monkeypatch):
    plain = policy_of(checkpoints).encode(TEXTS)
    policy = policy_of(checkpoints, prompt_cache=str(tmp_path))
    first = policy.encode(TEXTS)
    torch.testing.assert_close(first.embeds, plain.embeds)
    torch.testing.assert_close(first.pooled, plain.pooled)

    again = policy_of(checkpoints, prompt_cache=str(tmp_path))
    monkeypatch.setattr(again, "encode_batch", None)  # nothing is left to encode
    assert equal(again.encode(TEXTS), first)
    assert equal(again.encode(TEXTS[1:2]), first[torch.tensor([1])])


def test_cached_encodings_do_not_depend_on_other_prompts(checkpoints, tmp_path):
    alone = policy_of(checkpoints, prompt_cache=str(tmp_path / "a")).encode(TEXTS[:1])
    together = policy_of(checkpoints, prompt_cache=str(tmp_path / "b")).encode(["a cross", *TEXTS])
    assert equal(alone, together[torch.tensor([1])])


def test_other_encoders_and_lengths_have_other_caches(checkpoints, tmp_path):
    policies = [
        policy_of(checkpoints, prompt_cache=str(tmp_path)),
        policy_of(checkpoints, text_encoder_3=None, prompt_cache=str(tmp_path)),
        policy_of(checkpoints, "sd3", prompt_cache=str(tmp_path)),
    ]
    assert len({policy.cache.folder for policy in policies[:2]}) == 2
    assert policies[1].cache.folder != policies[0].cache.folder
    encoders = policies[0].text_encoders
    assert fingerprint(encoders, 6) != fingerprint(encoders, 7)
    before = fingerprint(encoders, 6)
    next(iter(encoders["text_encoder_3"].parameters())).data.view(-1)[-1] += 1
    assert fingerprint(encoders, 6) != before


def test_a_damaged_file_raises(checkpoints, tmp_path):
    policy = policy_of(checkpoints, prompt_cache=str(tmp_path))
    policy.encode(TEXTS)
    (file,) = [file for file in policy.cache.folder.iterdir() if file == policy.cache._file(TEXTS[0])]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"`prompt_cache` must hold whole files. Found a damaged one, {file}, for 'a red"):
        policy.encode(TEXTS)


def test_no_temporary_file_is_left(checkpoints, tmp_path):
    cache = PromptCache(tmp_path, "encoders")
    cache.put("a", policy_of(checkpoints).encode(["a"]))
    assert [file.suffix for file in cache.folder.iterdir()] == [".safetensors"]
