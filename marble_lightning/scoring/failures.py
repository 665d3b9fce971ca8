"""What becomes of images that a reward fails on, and of rewards that end the program."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.distributed import OnAllRanks
from rewards import Prompt, Reward
from rewards.texts import excerpt

log = logging.getLogger(__name__)


class RewardError(OnAllRanks, RuntimeError):
    """A reward failed on an image, and the run was not told to go on without its score."""


@contextmanager
def exit_is_failure(name: str) -> Iterator[None]:
    """A reward or metric that ends the program before it scores has failed; the program would end as if all were well.

    Raises:
        RewardError: SystemExit was raised within.
    """
    try:
        yield
    except SIGTERMException:
        raise
    except SystemExit as error:
        raise RewardError(
            f"`{name}` must not end the program. Found {excerpt(error)}; raise another error where it cannot go on."
        ) from error


def only_finite(
    values: Float[Tensor, "sample column"], scores: Float[Tensor, "sample reward"], names: Sequence[str], settings: Scoring
) -> Float[Tensor, "sample column"]:
    """What a balancer merged, with NaN, no value, in place of infinities, which count as images that a reward failed on.

    A column of NaN alone counts as a failure on all images that have a score.

    Args:
        values: Merged rewards or advantages of all ranks, the same on each, so that all of them raise or none does.
        scores: What they were merged from.
        names: Of the columns.
        settings: What happens on failure.

    Raises:
        RewardError: There are infinities and the settings do not say to skip, or there are too many.
    """
    share = settings.max_skipped if settings.on_error == "skip" else 0.0
    scored = ~scores.isnan() if scores.shape == values.shape else ~scores.isnan().all(1, keepdim=True)
    wrong = values.isinf() | (values.isnan().all(0) & scored)
    counts, applied = wrong.sum(0).tolist(), (wrong | ~values.isnan()).sum(0).tolist()
    for name, count, of in zip(names, counts, applied, strict=True):
        if not count:
            continue
        message = (
            f"The balancer must merge scores to finite rewards and advantages. Found {count} of {of} of `{name}` that are "
            "not; scale weights and rewards down, or correct its `merge_rewards` or `merge_advantages`"
        )
        rank_zero_only(log.warning)(f"{message}. They are left out.")
        if count > share * of:
            raise RewardError(f"{message}. `scoring` (`on_error`, `max_skipped`) allows a share of {share}.")
    return values.masked_fill(values.isinf(), torch.nan)


ScoreResult = tuple[Float[Tensor, " image"], dict[int, BaseException]]
"""Scores, NaN where there is none, and why, for the images that the reward failed on."""


def score_with_retries(
    reward: Reward, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt], retries: int
) -> ScoreResult:
    """A reward's scores of a batch; where it fails, image by image, to tell which ones it fails on.

    Failures of the world outside (OSError: connections, time-outs, files) are tried again after 1, 2, 4, ... seconds.
    They say nothing of a single image, so that the whole batch counts as failed. A reward with `retries` of its own has
    used them, and is not asked again.

    A reward that ends the program (SystemExit and the like) has failed as one that raises an error has; what the user or the
    system ends a run with goes on its way.

    Args:
        reward: Who scores.
        images: Pixels in [0, 1].
        prompts: One per image.
        retries: Further attempts after a failure of the world outside, >= 0.
    """
    retries = 0 if hasattr(reward, "retries") else retries
    for attempt in range(retries + 1):
        try:
            return reward(images=images, prompts=prompts), {}
        except (KeyboardInterrupt, SIGTERMException):
            raise
        except OSError as error:
            if attempt == retries:
                return failed(reward, images, prompts, error)
            time.sleep(2**attempt)
        except BaseException as error:  # noqa: BLE001 - whatever a reward trips over is told with its name and image
            if len(prompts) == 1:
                return failed(reward, images, prompts, error)
            return _one_by_one(reward, images, prompts, error)
    raise AssertionError  # the last attempt returns


def failed(
    reward: Reward, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt], error: BaseException
) -> ScoreResult:
    """No score for any image of a batch, and the same reason for all that the reward applies to."""
    missing = torch.full((len(prompts),), torch.nan, device=images.device)
    return missing, {index: error for index, prompt in enumerate(prompts) if reward.supports(prompt)}


def _one_by_one(
    reward: Reward, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt], error: BaseException
) -> ScoreResult:
    parts = [score_with_retries(reward, images[i : i + 1], prompts[i : i + 1], retries=0) for i in range(len(prompts))]
    failures = {i: own[0] for i, (_, own) in enumerate(parts) if own}
    if not failures:  # it takes single images but not this batch: nobody knows which scores to trust
        return failed(reward, images, prompts, error)
    return torch.cat([scores for scores, _ in parts]), failures
