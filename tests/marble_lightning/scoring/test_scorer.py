"""Scoring in the background, and failures of rewards."""

from __future__ import annotations

import re
import threading
import time

import pytest
import torch

from marble_lightning.checks import prompts_without_a_score
from marble_lightning.scoring.failures import RewardError
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring
from rewards import OCR, Prompt
from tests.helpers.scored_images import IMAGES, PROMPTS, Blocked, Brightness, Broken, Even, Ranks, scores


@pytest.mark.parametrize("overlap", [True, False])
def test_scores_are_in_the_order_of_submission(overlap):
    result, skipped = scores({"bright": Brightness(), "even": Even()}, overlap=overlap)
    bright = IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(result[:, 0], bright)
    torch.testing.assert_close(result[:, 1], torch.where(torch.arange(6) % 2 == 0, bright, torch.nan), equal_nan=True)
    assert skipped == {"bright": 0, "even": 0}


def test_submitting_does_not_wait_and_rewards_do_not_wait_for_each_other():
    one, other = Blocked(), Blocked()
    scorer = Scorer({"one": one, "other": other}, Scoring())
    for _ in range(2):
        scorer.submit(IMAGES, PROMPTS, ["one", "other"])  # would block here if it waited
    other.released.set()
    while not (one.threads and other.threads):
        time.sleep(0)
    one.released.set()
    assert scorer.collect().shape == (12, 2)
    assert len(one.threads) == len(other.threads) == 1 and one.threads != other.threads
    assert threading.current_thread().name not in one.threads


def test_a_reward_keeps_its_thread():
    scorer = Scorer({"bright": Brightness(), "even": Even()}, Scoring())
    scorer(IMAGES, PROMPTS)
    before = threading.active_count()
    for _ in range(5):
        scorer(IMAGES, PROMPTS)
    assert threading.active_count() == before


def test_a_reward_over_the_time_limit_has_failed(tmp_path):
    stuck = Blocked(["image 2"])
    stuck.released.set()
    with pytest.raises(RewardError, match=r"TimeoutError on 2 of 2 images.*'image 2'.*time_limit"):
        scores({"stuck": stuck}, tmp_path, time_limit=0.2)
    result, skipped = scores({"stuck": stuck}, tmp_path, time_limit=0.2, on_error="skip", max_skipped=0.5)
    assert result[:, 0].isnan().tolist() == [False, False, True, True, False, False]
    assert skipped == {"stuck": 2}


def test_a_reward_that_others_wait_for_is_named(monkeypatch, caplog):
    monkeypatch.setattr("marble_lightning.scoring.scorer.REPORT_EVERY", 0.1)
    slow = Blocked()
    threading.Timer(0.4, slow.released.set).start()
    Scorer({"slow": slow}, Scoring())(IMAGES, PROMPTS)
    assert re.match(r"Rank 0 waits for `rewards\.slow`, which took \d s so far\.", caplog.messages[0])


def test_prompts_without_a_score_are_counted():
    """Counted in the reward's sources, and in sources with a prompt that it applies to; without quotes OCR has no target."""
    signs = [Prompt('a sign "A"', "ocr"), Prompt("a sign", "ocr"), Prompt("a" * 10**6, "ocr")]
    prompts = [*signs, Prompt("a cat", "plain"), Prompt('a "cat"', "quoted"), Prompt("a dog", "plain")]
    (sentence,) = prompts_without_a_score({"spelling": OCR(), "bright": Brightness()}, prompts)
    assert sentence.startswith("`spelling` does not apply to 2 of 3 prompts of the source 'ocr'") and "'a sign'" in sentence
    assert len(prompts_without_a_score({"spelling": OCR(sources=["ocr", "plain"])}, prompts)) == 2
    assert not prompts_without_a_score({"spelling": OCR(sources=["quoted"])}, prompts)


def test_no_batch_is_scored_after_a_fatal_failure(tmp_path):
    bright = Blocked()
    bright.released.set()
    scorer = Scorer({"spelling": Broken(["image 3"]), "bright": bright}, Scoring(overlap=False))
    scorer.setup(tmp_path, "")
    assert scorer(IMAGES, PROMPTS).isnan()[:, 1].all() and not bright.threads
    with pytest.raises(RewardError, match=r"rewards\.spelling"):
        scorer.check(Ranks())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": {"blur": "cpu"}}, "`scoring.devices` must use names of rewards: bright. Found 'blur'"),
        ({"devices": {"bright": "toaster"}}, "`scoring.devices` must hold devices like cpu.*toaster"),
        ({"max_skipped": 1.0}, r"`scoring.max_skipped` must be in \[0, 1\)"),
        ({"retries": -1}, "`scoring.retries` must be >= 0"),
        ({"time_limit": 0.0}, "`scoring.time_limit` must be > 0"),
        ({"time_limit": 1.0, "overlap": False}, "needs `overlap`"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scorer({"bright": Brightness()}, Scoring(**settings))
