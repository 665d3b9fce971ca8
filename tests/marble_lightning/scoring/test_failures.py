"""Failures of rewards: retried, skipped or fatal, and named with reward, prompt and image."""

from __future__ import annotations

import re
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from marble_lightning.checks import check_prompts, check_rewards_apply
from marble_lightning.scoring.failures import RewardError, RewardExit, load_rewards
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.distributed import OnAllRanks
from rewards import Prompt
from tests.helpers.scored_images import IMAGES, PROMPTS, Blocked, Brightness, Broken, Even, Flaky, Ranks, scores


@pytest.mark.parametrize("infinite", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_failing_reward_is_named_with_prompt_and_image(tmp_path, infinite, overlap):
    rewards = {"bright": Brightness(), "spelling": Broken(["image 3"], infinite)}
    with pytest.raises(
        RewardError, match=r"`rewards\.spelling` .*'image 3' .*(ZeroDivisionError|Found inf)?.*on_error: skip"
    ) as caught:
        scores(rewards, tmp_path, overlap=overlap)
    assert ("Found inf" if infinite else "no letters") in str(caught.value)
    saved = Image.open(tmp_path / "failed_spelling.png")
    assert saved.size == (4, 4) and saved.getpixel((0, 0)) == (153, 153, 153)  # 3 / 5 of white


def test_skipping_loses_only_the_failed_images(tmp_path, caplog):
    rewards = {"bright": Brightness(), "spelling": Broken(["image 3"])}
    result, skipped = scores(rewards, tmp_path, size=3, on_error="skip", max_skipped=0.2)
    expected = IMAGES.mean((1, 2, 3)).repeat(2, 1).T.clone()
    expected[3, 1] = torch.nan
    torch.testing.assert_close(result, expected, equal_nan=True)
    assert skipped == {"bright": 0, "spelling": 1}
    assert "image 3" in caplog.text and "no letters" in caplog.text


def test_skipping_too_much_is_an_error(tmp_path):
    with pytest.raises(RewardError, match=r"share of 0\.1 .*`scoring\.max_skipped`.* Found 1 of 6"):
        scores({"spelling": Broken(["image 3"])}, tmp_path, on_error="skip")


def test_the_share_is_of_the_images_a_reward_applies_to(tmp_path):
    class Rare(Broken):
        def applies_to(self, prompt):
            return prompt.text in ("image 1", "image 2")

    with pytest.raises(RewardError, match="Found 1 of 2"):
        scores({"rare": Rare(["image 2"])}, tmp_path, on_error="skip", max_skipped=0.4)


def test_an_image_that_cannot_be_saved_hides_no_failure(tmp_path, caplog):
    """The folder is below a file."""
    (tmp_path / "file").touch()
    rewards, folder = {"spelling": Broken(["image 3"])}, tmp_path / "file/run"
    result, skipped = scores(rewards, folder, on_error="skip", max_skipped=0.2)
    assert result[:, 0].isnan().tolist() == [False, False, False, True, False, False] and skipped == {"spelling": 1}
    assert re.search(r"ZeroDivisionError .* could not be saved as .*failed_spelling\.png: .*\): no letters", caplog.text)
    with pytest.raises(RewardError, match=r"ZeroDivisionError .* could not be saved as .*: no letters"):
        scores(rewards, folder)


class NoMemory(torch.Tensor):
    """Images that do not fit on a reward's device."""

    def to(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_images_that_do_not_fit_on_the_device_have_failed(tmp_path):
    scorer = Scorer({"bright": Brightness()}, Scoring())
    scorer.setup(tmp_path, "")
    assert scorer(IMAGES.as_subclass(NoMemory), PROMPTS).isnan().all()
    with pytest.raises(RewardError, match=r"OutOfMemoryError on 6 of 6 images, .*'image 0' \(image in .*CUDA out of memory"):
        scorer.check(Ranks())


def test_external_failures_are_retried(tmp_path):
    result, _ = scores({"remote": Flaky(2)}, tmp_path, size=6, retries=2)
    torch.testing.assert_close(result[:, 0], IMAGES.mean((1, 2, 3)))
    with pytest.raises(RewardError, match="ConnectionError on 6 of 6 images.*refused"):
        scores({"remote": Flaky(3)}, tmp_path, size=6, retries=2)


def test_other_failures_are_not_retried(tmp_path):
    class Counted(Broken):
        calls = 0

        def score(self, *, images, prompts):
            self.calls += 1
            return super().score(images=images, prompts=prompts)

    reward = Counted(["image 0"])
    with pytest.raises(RewardError):
        scores({"wrong": reward}, tmp_path, size=1, retries=5)
    assert reward.calls <= len(PROMPTS)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_too_little_memory_fails_a_batch_at_once(tmp_path, error):
    """Images are not scored one by one then, and the memory of the failed call is free again."""
    activations, sizes = [], []

    class Large(Brightness):
        def score(self, *, images, prompts):
            large = images * 2
            activations.append(weakref.ref(large))
            sizes.append(len(images))
            raise error

    with pytest.raises(RewardError, match=rf"{type(error).__name__} on 3 of 3 images, .*'image 0'") as failed:
        scores({"large": Large()}, tmp_path, size=3)
    assert sizes == [3] * len(sizes) and not any(large() for large in activations)
    assert failed.value.__cause__ is error


def test_a_batch_that_fails_as_a_whole_has_no_scores(tmp_path):
    class Squeezed(Brightness):
        def score(self, *, images, prompts):
            return images.mean((1, 2, 3))[:1]

    with pytest.raises(RewardError, match=r"on 6 of 6 images.*shape \(6,\)"):
        scores({"squeezed": Squeezed()}, tmp_path, size=6)


def test_a_failure_on_one_rank_stops_all_of_them(tmp_path):
    scorer = Scorer({"bright": Brightness()}, Scoring())
    scorer.setup(tmp_path, "_0")
    scorer(IMAGES, PROMPTS)
    before = threading.active_count()
    with pytest.raises(RewardError, match="on another process"):
        scorer.check(Ranks([1.0, 0.0, 0.0, 0.0]))  # failed, skipped, applied, missing
    deadline = time.monotonic() + 5
    while threading.active_count() == before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before - 1  # the thread of the reward ends


def test_the_share_is_counted_over_ranks_and_batches(tmp_path):
    scorer = Scorer({"spelling": Broken(["image 3"])}, Scoring(on_error="skip", max_skipped=0.1))
    scorer.setup(tmp_path, "_0")
    for _ in range(2):
        scorer(IMAGES, PROMPTS)
    assert scorer.check(Ranks([0.0, 0.0, 8.0, 0.0])) == {"spelling": 2}  # of 20
    scorer(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="Found 1 of 9"):  # counts are reset by each check
        scorer.check(Ranks([0.0, 0.0, 3.0, 0.0]))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_reward_without_a_single_score_has_failed(tmp_path, caplog, on_error):
    """A score on another rank is enough."""

    class Silent(Even):
        def score(self, *, images, prompts):
            return torch.full((len(prompts),), torch.nan)

    scorer = Scorer({"bright": Brightness(), "silent": Silent()}, Scoring(on_error=on_error))
    scorer.setup(tmp_path, "_0")
    scorer(IMAGES, PROMPTS)
    assert scorer.check(Ranks([0, 0, 0, 0, 1, 0, 0])) == {"bright": 0, "silent": 0}
    scorer(IMAGES, PROMPTS)
    with pytest.raises(
        RewardError,
        match=r"`rewards\.silent` must score some of the images that it applies to\. Found no score for any of the 5; "
        r"correct its `score`, or narrow its `applies_to`\.$",
    ):
        scorer.check(Ranks([0, 0, 0, 0, 2, 0, 2]))


def test_many_missing_scores_are_a_warning(tmp_path, caplog):
    """One per round and reward, over all ranks, where more than half are missing."""

    class Silent(Even):
        def score(self, *, images, prompts):
            return torch.full((len(prompts),), torch.nan)

    scorer = Scorer({"bright": Brightness(), "silent": Silent()}, Scoring(), ["silent"])
    scorer.setup(tmp_path, "_0")
    for others, messages in ((3, []), (2, ["`metrics.silent` has no score for 3 of the 5 images it applies to."])):
        caplog.clear()
        scorer(IMAGES, PROMPTS)
        scorer.check(Ranks([0, 0, 0, 0, others, 0, 0]))
        assert caplog.messages == messages


def test_a_reward_that_fails_on_all_images_has_no_score(tmp_path, caplog):
    with pytest.raises(RewardError, match="Found no score for any of the 6; the log above says why"):
        scores({"spelling": Broken([prompt.text for prompt in PROMPTS])}, tmp_path, on_error="skip")
    assert "no letters" in caplog.text


def test_messages_call_a_metric_a_metric(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("marble_lightning.scoring.scorer.REPORT_EVERY", 0.1)
    slow = Blocked()
    threading.Timer(0.4, slow.released.set).start()
    scorer = Scorer({"bright": Brightness(), "slow": slow, "spelling": Broken(["image 3"])}, Scoring(), ["slow", "spelling"])
    scorer.setup(tmp_path, "")
    scorer(IMAGES, PROMPTS)
    assert "Rank 0 waits for `metrics.slow`" in caplog.text
    with pytest.raises(RewardError, match=r"^`metrics\.spelling` must score every image"):
        scorer.check(Ranks())


def test_a_reward_that_applies_to_nothing_has_not_failed(tmp_path):
    class Never(Brightness):
        def applies_to(self, prompt):
            return False

    assert scores({"never": Never()}, tmp_path)[1] == {"never": 0}


def raising(error):
    """A reward that raises an error."""
    reward = Brightness()
    reward.score = lambda **_: (_ for _ in ()).throw(error)
    return {"raising": reward}


class BrokenStr(Exception):
    def __str__(self):
        raise AttributeError("no text")


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(0), "Found SystemExit on"),
        (GeneratorExit(), "Found GeneratorExit on"),
        (BrokenStr(), r"Found BrokenStr on .*its `__str__` raises AttributeError"),
        (ValueError("no" * 10**6), "Found ValueError on"),
    ],
)
def test_every_exception_of_a_reward_is_a_failure(tmp_path, overlap, error, message):
    with pytest.raises(RewardError, match=rf"`rewards\.raising` .*{message}") as caught:
        scores(raising(error), tmp_path, overlap=overlap)
    assert "'image 0'" in str(caught.value) and len(str(caught.value)) < 3000


def test_a_reward_that_exits_before_it_scores_has_failed():
    """It may be on one rank only, so this rank ends without waiting for the others."""

    class Impatient(Brightness):
        def setup(self):
            raise SystemExit(0)

        def applies_to(self, prompt):
            raise SystemExit(0)

    data = SimpleNamespace(training=PROMPTS, shares={"even": 1})
    for check in (
        lambda rewards: check_rewards_apply(rewards, data),
        lambda rewards: check_prompts(rewards, PROMPTS),
        load_rewards,
    ):
        with pytest.raises(RewardExit, match=r"`hasty` must not end the program. Found SystemExit\(0\)") as caught:
            check({"hasty": Impatient()})
        assert not isinstance(caught.value, OnAllRanks)


@pytest.mark.parametrize("overlap", [True, False])
def test_an_interrupt_is_not_a_failure(tmp_path, overlap):
    with pytest.raises(KeyboardInterrupt):
        scores(raising(KeyboardInterrupt()), tmp_path, overlap=overlap)


def test_a_long_prompt_is_shortened_in_messages(tmp_path):
    scorer = Scorer({"spelling": Broken(["a" * 10**6])}, Scoring())
    scorer.setup(tmp_path, "")
    scorer(IMAGES[:1], [Prompt("a" * 10**6, "even")])
    with pytest.raises(RewardError, match=r"prompt 'a+'\.\.\. \(1000000 characters\)") as caught:
        scorer.check(Ranks())
    assert len(str(caught.value)) < 1000


def test_a_reward_that_retries_by_itself_is_not_retried(tmp_path):
    reward = Flaky(2)
    reward.retries = 5
    with pytest.raises(RewardError, match="refused"):
        scores({"remote": reward}, tmp_path, size=6, retries=2)
    assert reward.times == 1
