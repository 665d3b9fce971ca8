"""Finished runs are read back as they were logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from balancers import PCGrad
from marble_lightning.evaluation.results import HeldOutScores, document, write
from marble_lightning.lab.runs import Run, compare
from rewards import Prompt
from tests.helpers.finished_runs import begin, finish
from tests.helpers.small_rewards import Brightness

NAN = torch.nan


def finished(
    folder: Path, base: list[list[float]] | None, trained: list[list[float]], evaluated: dict[str, Any] | None = None
) -> Run:
    with SummaryWriter(str(folder)) as writer:
        for step, value in ((3, 0.25), (5, 0.75)):
            writer.add_scalar("train/ocr", value, step)
        writer.add_image("held_out", torch.rand(3, 8, 12), 0)
    base_scores = None if base is None else torch.tensor(base)
    prompts = {index: Prompt(f"prompt {index}", "x") for index in range(len(trained))}
    held_out = HeldOutScores({"ocr": Brightness(), "geneval": Brightness()}, prompts, torch.tensor(trained), base_scores)
    write(folder, document(held_out, evaluated=evaluated or {}, settings={}))
    return Run(folder)


def test_a_run_names_its_balancer_and_cadence(tmp_path):
    balancer = PCGrad(refresh_every=5, ema_decay=0.7)
    balancer.bind(["ocr", "geneval"])
    run = finished(tmp_path / "a", None, [[1.0, 2.0]], {"balancer": "PCGrad", **balancer.cadence})
    assert run.balancer == (
        "PCGrad, refresh_every 5, ema_decay 0.7, estimate_share 1.0, normalize False, refresh_alpha smoothed, "
        "gram own, gram_decay 0.0"
    )
    assert finished(tmp_path / "b", None, [[1.0, 2.0]]).balancer == "not named in its results.json"


def test_curves_and_images(tmp_path):
    run = finished(tmp_path, None, [[1.0, 2.0]])
    assert run.curve("train/ocr") == ([3, 5], [0.25, 0.75])
    assert run.curve("train/none") == ([], [])
    assert [image.size for image in run.images("held_out")] == [(12, 8)]
    assert run.images("none") == []


def test_curves_and_images_of_a_resumed_run_are_those_of_all_its_parts(tmp_path):
    """The base is evaluated in the first part only; a step that was done again counts once, as it was done last."""
    begin(tmp_path / "version_0", 0)
    (tmp_path / "version_0" / "checkpoints").mkdir()
    finish(tmp_path / "version_1", 0, ckpt_path="last", steps=0)
    for part, widths in ((0, {0: 4, 5: 5}), (1, {5: 6, 9: 7})):
        with SummaryWriter(str(tmp_path / f"version_{part}")) as writer:
            for step, width in widths.items():
                writer.add_image("held_out", torch.zeros(3, 2, width), step)
                writer.add_scalar("kl", width, step)
    run = Run(tmp_path / "version_1")
    assert [image.width for image in run.images("held_out")] == [4, 6, 7]
    assert run.curve("kl") == ([0, 5, 9], [4, 6, 7])


def test_the_distance_of_a_run_is_that_of_its_last_tenth_of_steps(tmp_path):
    run = finished(tmp_path / "a", None, [[1.0, 2.0]])
    assert run.distance is None
    finish(tmp_path / "b", 0, steps=0)
    with SummaryWriter(str(tmp_path / "b")) as writer:
        for step in range(20):
            writer.add_scalar("kl", step, step)
    assert Run(tmp_path / "b").distance == 18.5


def test_runs_are_averaged_per_prompt_before_the_standard_error(tmp_path):
    first = finished(tmp_path / "0", [[0.0, NAN], [1.0, 4.0], [2.0, 1.0]], [[1.0, NAN], [1.0, 5.0], [2.0, 3.0]])
    second = finished(tmp_path / "1", [[0.0, NAN], [1.0, 4.0], [2.0, 1.0]], [[0.0, NAN], [2.0, 5.0], [3.0, 3.0]])
    comparison = compare([first, second])
    assert comparison["ocr"].base.mean == pytest.approx(1.0)
    assert comparison["ocr"].change.mean == pytest.approx(0.5)  # 1/2, 1/2, 1/2 of the three prompts
    assert comparison["ocr"].change.error == pytest.approx(0.0)
    assert comparison["geneval"].trained == pytest.approx((4.0, 1.0, 2))
    assert comparison["geneval"].change.mean == pytest.approx(1.5)


def test_unfinished_runs_and_runs_without_a_base_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a finished run's, with results.json"):
        Run(tmp_path)
    with pytest.raises(ValueError, match="The base must have been evaluated"):
        compare([finished(tmp_path, None, [[1.0, 2.0]])])
