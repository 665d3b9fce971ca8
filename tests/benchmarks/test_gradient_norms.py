"""The table of gradient norms, on a run with known ones."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks.gradient_norms import norms_table, relative_norms
from marble_lightning.lab.runs import Run
from tests.helpers.finished_runs import finish


def test_norms_are_relative_to_those_of_the_same_refresh(tmp_path):
    finish(tmp_path / "run", seed=0)
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step, (ocr, geneval) in enumerate([(1, 3), (30, 10)]):
            writer.add_scalar("gradient_norms/ocr", ocr, step)
            writer.add_scalar("gradient_norms/geneval", geneval, step)
    # 0.5 and 1.5, then 1.5 and 0.5
    assert relative_norms(Run(tmp_path / "run")) == {"ocr": "1.00 ± 0.50", "geneval": "1.00 ± 0.50"}
    assert norms_table([Run(tmp_path / "run")]).splitlines()[0] == "| run | ocr | geneval |"


def test_a_run_without_gradients_is_refused(tmp_path):
    finish(tmp_path / "run", seed=0)
    with pytest.raises(ValueError, match="has no refreshes"):
        relative_norms(Run(tmp_path / "run"))
