"""What a run says about its memory: too little, tight, enough, unknown; and the command that prints the estimate."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from balancers import MARBLE, WeightedSum
from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.memory.estimate import Estimate, Phase
from marble_lightning.memory.report import CUDA_CONTEXT, GIB, Memory, memory_table, print_estimate
from marble_lightning.module import DiffusionNFT
from tests.helpers.measured_memory import Estimated
from tests.helpers.small_rewards import Brightness
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.integration, *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET)]
NEEDED = Estimate({"transformer": 5 * GIB}, {"training": Phase(("transformer",), 5 * GIB)}, {})
ALL = int(10 * GIB + CUDA_CONTEXT)


@pytest.fixture(scope="module")
def module(checkpoints, tmp_path_factory) -> DiffusionNFT:
    """A module after a run."""
    return run(checkpoints, tmp_path_factory.mktemp("run"), MARBLE())[0]


def test_too_small_a_gpu_is_refused_with_what_helps(module):
    with pytest.raises(
        ValueError, match=r"The run must fit into the GPU's 9\.60 GiB\. Found an estimate of 10\.00"
    ) as caught:
        Memory().compare(module, NEEDED, ALL - GIB, ALL - GIB)
    message = str(caught.value)
    assert "\n  --model.policy.gradient_checkpointing true\n" in message
    assert "--model.policy.offload_text_encoders" not in message  # it is used
    assert "--model.micro_batch_size, now 6, smaller" in message
    assert "--memory.check warn" in message and "marble-lightning memory" in message


def test_a_tight_gpu_is_warned_about_and_a_large_one_is_not(module, caplog):
    Memory().compare(module, NEEDED, 2 * ALL, 2 * ALL)
    assert not caplog.records
    Memory().compare(module, NEEDED, 2 * ALL, ALL)
    Memory("warn").compare(module, NEEDED, ALL - 1, ALL - 1)
    assert [record.getMessage().startswith("The run may not fit into the 10.60 GiB") for record in caplog.records] == [
        True,
        True,
    ]


def test_a_reward_that_cannot_be_followed_is_named(checkpoints, tmp_path, caplog):
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

    estimated = Estimated()
    run(checkpoints, tmp_path, WeightedSum(), callbacks=[estimated], kind=ScoreResult)
    print_estimate(estimated.estimate)
    warned = [record.getMessage() for record in caplog.records if record.name == "marble_lightning.memory.report"]
    assert warned == ["The memory of odd is estimated in part only. Found LookupError: no such thing"]
    assert set(estimated.estimate.unknown) == {"odd", "curious"}
    assert estimated.estimate.phases["scoring"].beyond >= 4 * 256 * 256  # what was counted before it failed


def test_running_out_of_memory_says_what_helps(checkpoints, tmp_path):
    class Full(Callback):
        def on_train_batch_end(self, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(checkpoints, tmp_path, WeightedSum(), callbacks=[Memory(), Full()])
    (note,) = caught.value.__notes__
    assert note.startswith("What helps:\n  --model.policy.vae_slicing true\n")


def test_the_command_prints_it_without_a_gpu_and_writes_nothing(small, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    two = ["memory", *small, "--trainer.devices", "2", "--trainer.accelerator", "gpu"]
    with pytest.raises(ValueError, match="A round's images per rank must be a multiple"):
        main([*two, "--model.micro_batch_size", "24"])
    main([*two, "--trainer.strategy.class_path", "marble_lightning.ShardedBaseStrategy"])
    printed = capsys.readouterr().out
    assert "gathered blocks" in printed  # of a base that both GPUs share
    assert "GPU memory this run needs, an estimate" in printed and "On each of 2 GPUs." in printed
    assert "optimizer step" in printed and "held-out prompts" in printed
    assert set(tmp_path.rglob("*")) == before


def test_a_wrong_check_is_refused():
    with pytest.raises(ValueError, match="`check` must be raise, warn or off. Found 'no'"):
        Memory("no")  # type: ignore[arg-type]


def test_parts_that_are_not_counted_are_named():
    table = memory_table(Estimate(NEEDED.parts, NEEDED.phases, {"odd": LookupError("no such thing")}))
    assert str(table.caption).endswith("Not counted, or in part: odd.")
