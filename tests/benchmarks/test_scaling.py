"""The arithmetic of the model of a round's time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.scaling import Rates, Round, Work, counted, row, seconds
from marble_lightning.memory.estimate import Phase

WORK = Work(encode=10, step=1, decode=5, score=2, train=3, encoders=40, adapter=25)
RATES = Rates(tflops=10, network=5, latency=0.5, host=20, disk=25, ocr=4, readers=2)
SIZE = Round(prompts=12, images=10, steps=5, times=2, held_out=7, every=2, held_out_steps=3)


def test_the_work_of_each_part_is_that_of_a_round_divided_by_its_size():
    phases = {"encoding prompts": 120, "sampling": 600, "decoding": 600, "scoring": 240, "training": 720}
    parts = {"text encoders": 40, "adapters": 75}
    found = SimpleNamespace(phases={name: Phase((), 0, flops * 1e12) for name, flops in phases.items()}, parts=parts)
    assert counted(found, SIZE) == WORK


def test_one_gpu_sends_nothing_and_does_all_the_work():
    assert seconds(WORK, SIZE, RATES, 1) == {
        "sampling": (12 * 10 + 120 * (5 * 1 + 5)) / 10,
        "scoring": 120 * 2 / 10,  # 4 prompts of `ocr` x 10 images x 4 s / 2 = 80 s, less than the sampling
        "training": 120 * 2 * 3 / 10,
        "communication": 0,
        "evaluation": 7 * (3 * 1 + 5 + 2) / 10 / 2,
        "fixed": 40 / 20 + 5 * 25 / 25,
    }


def test_parts_of_several_gpus():
    parts = seconds(WORK, SIZE, RATES, 4)
    assert parts["sampling"] == pytest.approx(132 / 4)
    assert parts["communication"] == pytest.approx(2 * 3 / 4 * 25 / 5 * 2 + 6 * 0.5 * 1.1)
    assert parts["evaluation"] == 2 * 10 / 10 / 2  # the GPU with the most held-out images
    assert parts["fixed"] == 7
    slow = seconds(WORK, SIZE, replace(RATES, ocr=8), 4)
    assert slow["scoring"] == pytest.approx(30 * 2 / 10 + 10 * 8 / 2 - 33)  # the round waits for OCR
    assert row(WORK, SIZE, RATES, 1).endswith("| 100.0% |")


def test_a_gpu_with_prompts_of_one_source_only_waits_for_its_reward():
    few = [seconds(WORK, replace(SIZE, steps=1), replace(RATES, ocr=20), ranks)["scoring"] for ranks in (4, 12)]
    assert few == pytest.approx([30 * 2 / 10 + 100 - 21, 10 * 2 / 10 + 100 - 7])  # of twelve too, one reads ten images


def test_prompts_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match=r"multiple of the number of GPUs, 5. Found 12"):
        seconds(WORK, SIZE, RATES, 5)
