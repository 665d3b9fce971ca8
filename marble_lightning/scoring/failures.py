"""Failures of rewards: errors on images, retries, and rewards that end the program."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from balancers import Balancer
from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.distributed import OnAllRanks
from rewards import Prompt, Reward
from rewards.texts import excerpt

log = logging.getLogger(__name__)


class RewardError(OnAllRanks, RuntimeError):
    """A reward failed on an image, and the settings do not allow a missing score."""


class RewardExit(RuntimeError):
    """A reward ended the program. It may be on one rank only, which must not wait for the others."""


@contextmanager
def exit_is_failure(name: str) -> Iterator[None]:
    """Turn the SystemExit of a reward or metric into an error; otherwise the program would end without an error.

    Args:
        name: Of the reward or metric, for the error message.

    Raises:
        RewardExit: SystemExit was raised within the context.
    """
    try:
        yield
    except SIGTERMException:
        raise
    except SystemExit as error:
        raise RewardExit(
            f"`{name}` must not end the program. Found {excerpt(error)}; raise another error where it cannot continue."
        ) from error


def load_rewards(rewards: Mapping[str, Reward]) -> None:
    """Load the weights of rewards and metrics, freeze them, and switch them to eval mode.

    Raises:
        RewardExit: One of them ended the program.
    """
    for name, reward in rewards.items():
        with exit_is_failure(name):
            reward.setup()
        reward.requires_grad_(False).eval()


def infinite_to_nan(
    values: Float[Tensor, "sample column"], applies: Bool[Tensor, "sample reward"], balancer: Balancer, settings: Scoring
) -> Float[Tensor, "sample column"]:
    """Replace infinities in merged rewards or advantages by NaN, and count them as failures of the reward.

    A column with nothing but NaN counts as a failure on all images that it can have a value for.

    Args:
        values: Merged rewards or advantages of all ranks. They are the same on each rank, so all ranks raise or none.
        applies: Where there is a score.
        balancer: Has merged the scores.
        settings: What happens on failure.

    Raises:
        RewardError: There are infinities and `on_error` is not `skip`, or there are more than `max_skipped` allows.
    """
    share = settings.max_skipped if settings.on_error == "skip" else 0.0
    each = values.shape == applies.shape
    covered, names = (applies, balancer.reward_names) if each else (balancer.covered(applies), balancer.names)
    wrong = values.isinf() | (values.isnan().all(0) & covered)
    counts, totals = wrong.sum(0).tolist(), (wrong | ~values.isnan()).sum(0).tolist()
    for name, count, total in zip(names, counts, totals, strict=True):
        if not count:
            continue
        message = (
            f"The balancer must merge scores to finite rewards and advantages. Found {count} of {total} of `{name}` that "
            "are not; scale weights and rewards down, or correct its `merge_rewards` or `merge_advantages`"
        )
        rank_zero_only(log.warning)(f"{message}. They are left out.")
        if count > share * total:
            raise RewardError(f"{message}. `scoring` (`on_error`, `max_skipped`) allows a share of {share}.")
    return values.masked_fill(values.isinf(), torch.nan)


ScoreResult = tuple[Float[Tensor, " image"], dict[int, BaseException]]
"""Scores, NaN where there is none; and for each image that the reward failed on, its index and the error."""


def score_with_retries(
    reward: Reward, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt], retries: int
) -> ScoreResult:
    """Score a batch with a reward; after a failure, score image by image to find the images that it fails on.

    External failures (OSError: connections, time-outs, files) are retried after 1, 2, 4, ... seconds. They do not depend on
    a single image, so the whole batch counts as failed. A reward with an attribute `retries` retries by itself, and gets no
    further attempts. Too little memory fails the whole batch at once: single images would hide that the batch is too large.

    Any other exception of the reward, SystemExit included, counts as a failure. KeyboardInterrupt and SIGTERMException pass
    through.

    Args:
        reward: The reward or metric.
        images: Pixels in [0, 1].
        prompts: One per image.
        retries: Further attempts after an external failure, >= 0.
    """
    retries = 0 if hasattr(reward, "retries") else retries
    for attempt in range(retries + 1):
        try:
            return reward(images=images, prompts=prompts), {}
        except (KeyboardInterrupt, SIGTERMException):
            raise
        except OSError as error:
            if attempt == retries:
                return failed_batch(reward, images, prompts, error)
            time.sleep(2**attempt)
        except (torch.OutOfMemoryError, MemoryError) as error:
            traceback.clear_frames(error.__traceback__)  # they would keep the batch's activations in memory
            return failed_batch(reward, images, prompts, error)
        except BaseException as error:  # noqa: BLE001 - any failure is reported with the reward's name and an image
            if len(prompts) == 1:
                return failed_batch(reward, images, prompts, error)
            return _one_by_one(reward, images, prompts, error)
    raise AssertionError  # the last attempt returns


def failed_batch(
    reward: Reward, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt], error: BaseException
) -> ScoreResult:
    """The result of a batch that failed as a whole: no scores, and the same error for all images the reward applies to."""
    missing = torch.full((len(prompts),), torch.nan, device=images.device)
    return missing, {index: error for index, prompt in enumerate(prompts) if reward.supports(prompt)}


def _one_by_one(
    reward: Reward, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt], error: BaseException
) -> ScoreResult:
    parts = [score_with_retries(reward, images[i : i + 1], prompts[i : i + 1], retries=0) for i in range(len(prompts))]
    failures = {i: errors[0] for i, (_, errors) in enumerate(parts) if errors}
    if not failures:  # the reward scores each image alone but not the batch: no score can be trusted
        return failed_batch(reward, images, prompts, error)
    return torch.cat([scores for scores, _ in parts]), failures
