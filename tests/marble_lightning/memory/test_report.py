"""What a run says of its memory: too little, tight, enough, not known; and that it goes on where it can."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from balancers import MARBLE, WeightedSum
from marble_lightning.cli import QUIET, main
from marble_lightning.memory.estimate import Estimator
from marble_lightning.memory.report import CUDA_CONTEXT, GIB, Memory, remedies
from marble_lightning.module import DiffusionNFT
from tests.helpers.measured_memory import Estimated
from tests.helpers.small_rewards import Brightness
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.integration, *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET)]


@pytest.fixture(scope="module")
def small_run(checkpoints, tmp_path_factory) -> Estimated:
    """A run that is over, of MARBLE on three rewards."""
    estimated = Estimated()
    run(checkpoints, tmp_path_factory.mktemp("run"), MARBLE(), callbacks=[estimated])
    return estimated


def test_too_small_a_gpu_is_refused_with_what_would_help(small_run):
    estimator, choices, estimate = small_run.estimator, small_run.choices, small_run.estimate
    training = "model.policy.gradient_checkpointing true"
    total = int(estimate.peak * 0.9 + CUDA_CONTEXT)
    with pytest.raises(ValueError, match=r"The run must fit into the GPU's 0\.\d+ GiB\. Found an estimate of") as caught:
        Memory()._score(estimator, choices, estimate, total, total)
    helped = estimator(replace(choices, gradient_checkpointing=True)).peak
    assert f"--{training}: {helped / GIB:.3f} GiB" in str(caught.value)
    assert "--memory.check warn" in str(caught.value)


def test_a_tight_gpu_is_warned_of_and_a_large_one_is_not(small_run, caplog):
    estimator, choices, estimate = small_run.estimator, small_run.choices, small_run.estimate
    needed = int(estimate.peak + CUDA_CONTEXT)
    Memory()._score(estimator, choices, estimate, 2 * needed, 2 * needed)
    assert not caplog.records
    Memory()._score(estimator, choices, estimate, 2 * needed, needed)
    Memory("warn")._score(estimator, choices, estimate, needed - 1, needed - 1)
    assert [record.getMessage().startswith("The run may not fit into the 0.") for record in caplog.records] == [True, True]


def test_settings_together_help_more_than_each_alone(small_run):
    estimator, choices = small_run.estimator, small_run.choices
    least = estimator(replace(choices, gradient_checkpointing=True, micro_batch_size=1, dtype=torch.bfloat16)).peak
    told = remedies(estimator, choices, least)
    sizes = [float(line.rsplit(": ", 1)[1].removesuffix(" GiB")) for line in told]
    assert len(told) > 2 and sizes[-1] == min(sizes)
    assert " --model." in told[-1]


def test_a_reward_that_cannot_be_followed_is_named_and_the_run_goes_on(checkpoints, tmp_path, caplog):
    class Odd(Brightness):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(256, 256))

        def score(self, *, images, prompts):
            scores = (images.flatten(1).mean(1) * self.weight.square().mean()).clamp(0, 1)
            if getattr(self.weight, "fake_mode", None) is not None:
                raise LookupError("no such thing")
            return scores

    class Curious(Odd):
        def score(self, *, images, prompts):
            return torch.full((len(images),), images.mean().item())

    class ScoreResult(DiffusionNFT):
        def __init__(self, policy, rewards, **options):
            super().__init__(policy, {**rewards, "odd": Odd(), "curious": Curious()}, **options)

    module, _ = run(checkpoints, tmp_path, WeightedSum(), callbacks=[Memory(), estimated := Estimated()], kind=ScoreResult)
    told = [record.getMessage() for record in caplog.records if record.name == "marble_lightning.memory.report"]
    assert told == ["The memory of odd is estimated in part only. Found LookupError: no such thing"]
    assert set(estimated.estimate.unknown) == {"odd", "curious"}
    assert estimated.estimate.phases["scoring"].beyond >= 4 * 256 * 256  # what was seen of it before
    assert module.global_step == 1


def test_a_policy_that_cannot_be_followed_is_told_of_and_the_run_goes_on(checkpoints, tmp_path, caplog, monkeypatch):
    def failing(self, module):
        raise LookupError("a pipeline unlike any other")

    monkeypatch.setattr(Estimator, "__init__", failing)
    module, _ = run(checkpoints, tmp_path, WeightedSum(), callbacks=[Memory()])
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["The memory this run needs was not estimated. Found LookupError: a pipeline unlike any other"]
    assert module.global_step == 1


def test_running_out_of_memory_later_says_what_helps(checkpoints, tmp_path):
    class Full(Callback):
        def on_train_batch_end(self, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(checkpoints, tmp_path, WeightedSum(), callbacks=[Memory(), Full()])
    (note,) = caught.value.__notes__
    assert note.startswith("The run needs about 0.")


def test_running_out_of_memory_where_nothing_can_be_estimated(checkpoints, tmp_path, monkeypatch):
    """The error stays the allocator's, and callbacks after this one still hear of it."""
    heard = []

    class Full(Callback):
        def on_train_batch_end(self, *arguments):
            monkeypatch.setattr(Estimator, "__init__", lambda *_: {}["a pipeline unlike any other"])
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def on_exception(self, trainer, module, exception):
            heard.append(exception)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(checkpoints, tmp_path, WeightedSum(), callbacks=[Memory(), Full()])
    assert heard == [caught.value] and not hasattr(caught.value, "__notes__")


def test_the_command_line_shows_it(small, capsys):
    main(["fit", *small, "--memory.check", "warn", "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0"])
    printed = capsys.readouterr().out
    assert "Memory this run needs" in printed and "held-out prompts" not in printed
    assert "This device has" in printed and "optimizer step" in printed
    with pytest.raises(ValueError, match="`check` must be raise, warn or off. Found 'no'"):
        Memory("no")  # type: ignore[arg-type]
