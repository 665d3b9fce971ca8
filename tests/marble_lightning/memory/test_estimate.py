"""The estimate against what profiler and counter measure in a run, and which settings change it."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.flop_counter import FlopCounterMode

from balancers import MARBLE, WeightedSum
from marble_lightning.command_line import QUIET
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.memory import estimate_memory
from marble_lightning.memory.ledger import bytes_of, tensors_of
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.settings import Scoring
from marble_lightning.tinyworld import PROMPTS, WEIGHTS
from rewards import CLIPScore
from tests.helpers import forks, measured_memory
from tests.helpers.measured_memory import Estimated, fitted
from tests.helpers.small_rewards import Brightness, Contrast, Redness
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.integration, *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET)]

SETTINGS = list(product(("WeightedSum", "MARBLE"), (False, True)))


@pytest.mark.parametrize(
    ("bundled", "settings"),
    [(False, [("WeightedSum", True), ("MARBLE", False)]), pytest.param(True, SETTINGS, marks=pytest.mark.slow)],
)
def test_every_phase_is_near_what_a_run_takes(checkpoints, bundled, settings):
    path = str(WEIGHTS / "sd3" if bundled else checkpoints / "sd3")
    cases = [(path, balancer, checkpointing) for balancer, checkpointing in settings]
    for case, sizes in zip(cases, forks.call(measured_memory.measure, cases), strict=True):
        off = {phase: estimated / measured - 1 for phase, (estimated, measured) in sizes.items()}
        print(case, {phase: (*sizes[phase], f"{share:+.1%}") for phase, share in off.items()})
        assert all(abs(share) < 0.15 for share in off.values()), (case, off)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("balancer", ["WeightedSum", "MARBLE"])
def test_a_gpu_allocates_what_was_estimated(checkpoints, tmp_path, balancer, checkpointing, record_property):
    """It fails on an H200: 5.8 MB are estimated and 76.6 MB allocated (MARBLE with checkpointing).

    Workspaces of cuBLAS, which the estimate does not count, would explain most of the rest; `python -m benchmarks.gpu_check
    --steps workspaces` measures them.
    """

    class Allocated(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                torch.cuda.reset_peak_memory_stats()

        def on_train_end(self, trainer, pl_module):
            self.peak = torch.cuda.max_memory_allocated()

    allocated = Allocated()
    estimate = fitted(checkpoints / "sd3", tmp_path, balancer, checkpointing, "gpu", allocated).estimate
    record_property("estimated, bytes", estimate.total("training"))
    record_property("allocated, bytes", allocated.peak)
    assert estimate.total("training") == pytest.approx(allocated.peak, rel=0.15)


@pytest.fixture(scope="module")
def setup_module(checkpoints, tmp_path_factory):
    """A function that sets up a module with three rewards for `fit`, with options of the policy and of scoring."""

    def set_up(balancer=None, rewards=None, scoring=None, **options):
        options = {"dtype": "float32", "resolution": 16, "rank": 2, "alpha": 4, "text_length": 4, **options}
        module = DiffusionNFT(
            SD3Policy(str(checkpoints / "sd3"), **options),
            rewards=rewards or {"bright": Brightness(), "red": Redness(), "contrast": Contrast()},
            sampling=Sampling(steps=3, batch_size=12, times_per_image=1),
            scoring=scoring or Scoring(),
            micro_batch_size=12,
        )
        data = PromptDataModule(str(PROMPTS), ["ocr", "geneval"], prompts_per_round=12, images_per_prompt=12)
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=0, enable_progress_bar=False,
            num_sanity_val_steps=0, enable_model_summary=False, callbacks=[balancer or MARBLE()],
            default_root_dir=tmp_path_factory.mktemp("setup"),
        )  # fmt: skip
        trainer.fit(module, datamodule=data)  # sets up and trains no round
        return module

    return set_up


@pytest.fixture(scope="module")
def whole(setup_module):
    """A module with MARBLE, and default settings of the policy."""
    return setup_module()


@pytest.fixture(scope="module")
def estimated(whole):
    """Its estimate, which takes seconds."""
    return estimate_memory(whole)


def test_parts_are_what_the_module_holds(whole, estimated):
    module, parts = whole, estimated.parts
    policy = bytes_of(tensors_of(module.policy, *module.policy.text_encoders.values()))
    assert sum(parts[name] for name in ("transformer", "adapters", "autoencoder", "text encoders")) == policy
    assert parts["adapters"] == 3 * parts["gradients"] == 3 * bytes_of(module.trainable)
    assert parts["images"] == 4 * 144 * 3 * 16 * 16


def test_two_gpus_share_a_round_and_have_buckets(whole, estimated):
    one, two = estimated, estimate_memory(whole, gpus=2)
    assert two.parts["images"] == one.parts["images"] / 2
    assert two.parts["gradients"] == 2 * one.parts["gradients"]


@pytest.mark.parametrize(
    ("balancer", "kl_every", "options"),
    [
        (WeightedSum(), 4, {}),
        pytest.param(MARBLE(refresh_every=1), 1, {}, marks=pytest.mark.slow),
        (
            MARBLE(estimate_share=0.5, refresh_every=2), 2,
            {"gradient_checkpointing": True, "precision": "bf16-mixed"},
        ),
    ],
)  # fmt: skip
def test_the_work_of_rounds_is_what_they_compute(checkpoints, tmp_path, balancer, kl_every, options):
    """And an estimate changes nothing in the run."""
    counter, totals = FlopCounterMode(display=False), []

    class Counted(Estimated):
        """Counts what is between the start of a round or a micro-batch and the end of a backward pass."""

        def on_train_epoch_start(self, trainer, pl_module):
            counter.__enter__()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx:
                counter.__enter__()

        def on_after_backward(self, trainer, pl_module):
            counter.__exit__(None, None, None)
            totals.append(counter.get_total_flops())

    counted, options = Counted(), {"rounds": 2, "kl_every": kl_every, **options}
    fresh = copy.deepcopy(balancer)
    watched, _ = run(checkpoints, tmp_path, balancer, callbacks=[counted], **options)
    assert sum(totals) == pytest.approx(2 * counted.estimate.flops, rel=0.01)
    if "precision" in options:
        plain, _ = run(checkpoints, tmp_path, fresh, **options)
        for ours, theirs in zip(plain.trainable, watched.trainable, strict=True):
            assert torch.equal(ours, theirs)


def test_settings_that_save_memory(setup_module, estimated):
    """A setting for training and one for decoding, each without an effect on the other phase; and one for all."""
    saving = estimate_memory(setup_module(gradient_checkpointing=True, vae_slicing=True))
    assert saving.total("training") < estimated.total("training")
    assert saving.total("decoding") < estimated.total("decoding")
    half = estimate_memory(setup_module(dtype="bfloat16"))
    assert half.total("loading weights") < estimated.total("loading weights")


def test_text_encoders_that_are_offloaded_only_visit_a_gpu(setup_module, estimated):
    visiting, staying = estimated, estimate_memory(setup_module(offload_text_encoders=False))
    assert visiting.total("training") < staying.total("training")
    assert visiting.parts == staying.parts
    for name in staying.phases:
        there = ["text encoders" in found.phases[name].parts for found in (visiting, staying)]
        assert there == [name == "encoding prompts", True], name


def test_a_single_loss_and_held_out_prompts_where_no_reward_is_on_this_gpu(setup_module, estimated):
    """A single loss takes less than a refresh."""
    scoring = Scoring(devices=dict.fromkeys(("bright", "red", "contrast"), "cpu"), overlap=False)
    single = estimate_memory(setup_module(WeightedSum(), scoring=scoring))
    assert "rewards" not in {name for name, size in single.parts.items() if size}
    assert single.phases["held-out prompts"].beyond > 0
    assert estimated.phases["training"].beyond > single.phases["training"].beyond
    assert estimated.total("training") > single.total("training")


def test_rewards_count_where_they_are_and_a_shared_model_once(setup_module, checkpoints):
    clip = str(checkpoints / "clip")

    rewards = {"clip": CLIPScore(clip), "same": CLIPScore(clip), "other": CLIPScore(clip, dtype="bfloat16")}
    module = setup_module(rewards=rewards, scoring=Scoring(devices={"other": "cpu"}, offload=True, overlap=True))
    estimated = estimate_memory(module)
    assert estimated.parts["rewards"] == bytes_of(tensors_of(module.rewards["clip"]))
    assert "rewards" not in estimated.phases["training"].parts
    assert "rewards" not in estimated.phases["loading weights"].parts  # the scorer brings them there when they score
    scoring = estimated.phases["scoring"]
    assert scoring.beyond > estimated.phases["sampling"].beyond
    module.scorer.settings = replace(module.scorer.settings, overlap=False)
    assert scoring.beyond > estimate_memory(module).phases["scoring"].beyond > 0
    assert not estimated.unknown
