"""What is estimated before a run against what the profiler measures in it, and what is said where memory is short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from balancers import MARBLE, WeightedSum
from marble_lightning.cli import QUIET
from marble_lightning.memory import Memory
from marble_lightning.memory.estimate import Choices, Estimator, smaller
from marble_lightning.memory.ledger import bytes_of, tensors_of
from marble_lightning.module import DiffusionNFT
from marble_lightning.scoring.settings import Scoring
from marble_lightning.tinyworld import WEIGHTS
from rewards import CLIPScore
from tests.helpers import ROOT, measured_memory
from tests.helpers.measured_memory import Estimated, fitted
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.integration, *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET)]


@pytest.mark.parametrize("bundled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_phase_is_near_what_a_run_takes(checkpoints, bundled):
    path = str(WEIGHTS / "sd3" if bundled else checkpoints / "sd3")
    cases = [(path, balancer, checkpointing) for balancer in ("WeightedSum", "MARBLE") for checkpointing in (False, True)]
    ended = subprocess.run(
        [sys.executable, measured_memory.__file__, json.dumps(cases)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for case, sizes in zip(cases, json.loads(ended.stdout.splitlines()[-1]), strict=True):
        off = {phase: estimated / measured - 1 for phase, (estimated, measured) in sizes.items()}
        print(case, {phase: (*sizes[phase], f"{share:+.1%}") for phase, share in off.items()})
        assert all(abs(share) < 0.15 for share in off.values()), (case, off)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("balancer", ["WeightedSum", "MARBLE"])
def test_a_gpu_allocates_what_was_estimated(checkpoints, tmp_path, balancer, checkpointing):
    class Allocated(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                torch.cuda.reset_peak_memory_stats()

        def on_train_end(self, trainer, pl_module):
            self.peak = torch.cuda.max_memory_allocated()

    allocated = Allocated()
    estimate = fitted(checkpoints / "sd3", tmp_path, balancer, checkpointing, "gpu", allocated).estimate
    assert estimate.total("training") == pytest.approx(allocated.peak, rel=0.15)


@pytest.fixture(scope="module")
def small_run(checkpoints, tmp_path_factory) -> Estimated:
    """A run that is over, of MARBLE on three rewards."""
    estimated = Estimated()
    run(checkpoints, tmp_path_factory.mktemp("run"), MARBLE(), callbacks=[estimated])
    return estimated


def on_a_gpu(monkeypatch, module) -> None:
    """Let a module that has run on the CPU pass for one that will run on a GPU."""
    monkeypatch.setattr(type(module.trainer.strategy), "root_device", torch.device("cuda", 0))


def test_parts_are_what_the_module_holds(small_run):
    parts, module = small_run.estimate.parts, small_run.estimator.module
    policy = bytes_of(tensors_of(module.policy, *module.policy.text_encoders.values()))
    assert sum(parts[name] for name in ("transformer", "adapters", "autoencoder", "text encoders")) == policy
    assert parts["adapters"] == 3 * parts["gradients"] == 3 * bytes_of(module.trainable)
    assert parts["images"] == 4 * 12 * 3 * 16 * 16


def test_an_estimate_changes_nothing_in_the_run(checkpoints, tmp_path):
    for options in ({"gradient_checkpointing": True}, {"gradient_passes": "per_reward", "precision": "bf16-mixed"}):
        plain, _ = run(checkpoints, tmp_path, MARBLE(), **options)
        watched, _ = run(checkpoints, tmp_path, MARBLE(), callbacks=[Memory()], **options)
        for ours, theirs in zip(plain.trainable, watched.trainable, strict=True):
            assert torch.equal(ours, theirs)


def test_what_saves_memory_is_seen_to(small_run):
    estimator, choices = small_run.estimator, small_run.choices
    whole = small_run.estimate
    for change, phase in (
        ({"gradient_checkpointing": True}, "training"),
        ({"micro_batch_size": 2}, "training"),
        ({"sampling_batch_size": 4}, "sampling"),
        ({"vae_slicing": True}, "decoding"),
        ({"text_encoders_stay": False}, "training"),
        ({"dtype": torch.bfloat16}, "loading weights"),
    ):
        assert estimator(replace(choices, **change)).total(phase) < whole.total(phase), change
    halved = estimator(replace(choices, dtype=torch.bfloat16)).parts["transformer"]
    assert halved == pytest.approx(whole.parts["transformer"] / 2, rel=0.05)  # buffers stay as they are


@pytest.mark.parametrize("way", ["slicing", "tiling"])
def test_slices_and_tiles_are_counted_as_if_each_were_decoded(small_run, way):
    phases, _ = small_run.estimator._worlds[torch.float32]
    phases._counted.clear()
    vae = phases.policy.pipeline.vae
    vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 8
    vae.use_slicing, vae.use_tiling = way == "slicing", way == "tiling"
    with phases.fakes.counting(latents := phases.latents(5)) as ledger:
        phases.policy.decode(latents)
    estimated = phases.decode(5, way == "slicing")
    phases._counted.clear()
    vae.use_slicing = vae.use_tiling = False
    assert estimated == ledger.peak
    assert way == "tiling" or estimated < phases.decode(5, False)  # tiles of so few pixels overlap too much to save any


def test_text_encoders_that_are_no_part_of_the_policy_only_visit_a_gpu(small_run, monkeypatch):
    module = small_run.estimator.module
    on_a_gpu(monkeypatch, module)
    encoders = module.policy.text_encoders
    visiting = Estimator(module)(Choices.of(module))
    for name, encoder in encoders.items():  # as `offload_text_encoders: false` does it
        monkeypatch.setitem(module.policy._modules, name, encoder)
    staying = Estimator(module)(Choices.of(module))
    assert visiting.parts == staying.parts
    assert staying.parts["text encoders"] >= bytes_of(tensors_of(*encoders.values())) > 0
    for name in staying.phases:
        there = ["text encoders" in estimate.phases[name].parts for estimate in (visiting, staying)]
        assert there == [name == "encoding prompts", True], name


def test_rewards_count_where_they_are_and_a_shared_model_once(checkpoints, tmp_path, monkeypatch):
    estimated, clip = Estimated(), str(checkpoints / "clip")

    class Scored(DiffusionNFT):
        def __init__(self, policy, rewards, **options):
            reward_models = {"clip": CLIPScore(clip), "same": CLIPScore(clip), "other": CLIPScore(clip, dtype="bfloat16")}
            super().__init__(policy, reward_models, scoring=Scoring(devices={"other": "cpu"}, offload=True), **options)

    module, _ = run(checkpoints, tmp_path, WeightedSum(), callbacks=[estimated], kind=Scored)
    clip_bytes, other = (bytes_of(tensors_of(module.rewards[name])) for name in ("clip", "other"))
    assert estimated.estimate.parts["rewards"] == clip_bytes + other  # on a CPU all are in one place
    scoring, choices = estimated.estimate.phases["scoring"], estimated.choices
    assert scoring.beyond > estimated.estimate.phases["sampling"].beyond
    assert scoring.beyond > estimated.estimator(replace(choices, overlap=False)).phases["scoring"].beyond > 0
    assert not estimated.estimate.unknown
    on_a_gpu(monkeypatch, module)
    estimate = Estimator(module)(Choices.of(module))
    assert estimate.parts["rewards"] >= clip_bytes > estimate.parts["rewards"] / 3  # small blocks take 512 bytes
    assert estimate.parts["rewards elsewhere"] >= other
    assert "rewards" not in estimate.phases["training"].parts
    assert "rewards elsewhere" in estimate.phases["loading weights"].parts  # Lightning brings all of them there first


def test_smaller_batches():
    assert smaller(9) == [4, 2, 1]
    assert smaller(9, divides=72) == [4, 2, 1]
    assert smaller(12, divides=90) == [6, 3, 1]
    assert smaller(1) == []
