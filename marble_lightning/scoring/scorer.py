"""Scoring images while others are sampled, and what becomes of an image that a reward fails on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from marble_lightning.scoring.failures import RewardError, failed, score_with_retries
from marble_lightning.scoring.settings import Scoring
from marble_lightning.scoring.worker import Worker
from marble_lightning.utils.atomic_files import atomic_write
from marble_lightning.utils.images import to_image
from rewards import Prompt, Reward
from rewards.texts import excerpt, reason

log = logging.getLogger(__name__)

POLL = 0.05
"""Seconds between two looks at the time limit and at whether the run is to stop."""


@dataclass
class Outcome:
    """What a reward said of a batch: scores (image,), NaN where there is none; why, where it failed; seconds taken."""

    scores: Float[Tensor, " image"]
    failures: dict[int, BaseException]
    seconds: float


@dataclass
class _Job:
    """A batch on its way through one reward."""

    name: str
    images: Float[Tensor, "image 3 pixel pixel"]
    prompts: Sequence[Prompt]
    future: Future[Outcome] | None = None


class Scorer:
    """Scores batches in the background, one thread per reward, and collects the scores in the order of submission.

    Nothing is raised while scores are collected, since other ranks would wait for this one; `check` raises on all.

    Args:
        rewards: By name.
        settings: What happens on failure, and where rewards run.

    Raises:
        ValueError: `devices` names something that is no reward.
    """

    def __init__(self, rewards: Mapping[str, Reward], settings: Scoring) -> None:
        if unknown := sorted(set(settings.devices) - set(rewards)):
            raise ValueError(f"`scoring.devices` must use names of rewards: {', '.join(rewards)}. Found {unknown[0]!r}.")
        self.rewards, self.settings = rewards, settings
        self.seconds: dict[str, float] = {}
        """Time each reward took for the scores collected last, beside the others and the sampling."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run is about to stop. Then nobody waits for scores: those that are not there yet are NaN."""
        self.setup(Path(), "")

    def setup(self, folder: Path, rank: str) -> None:
        """Begin a run.

        Args:
            folder: Where an image that a reward failed on is saved.
            rank: What tells this process's images from others'.
        """
        self.folder, self.rank = folder, rank
        self._workers: dict[str, Worker] = {}
        self._jobs: list[_Job] = []
        self._placed = False
        self._begin_count()

    def _stop(self) -> None:
        """Begin no more of what was submitted."""
        for worker in self._workers.values():
            worker.stop()
        self._workers = {}

    def _begin_count(self) -> None:
        self.failure: RewardError | None = None
        self.skipped, self.applied, self.missing = (dict.fromkeys(self.rewards, 0) for _ in range(3))

    def __call__(
        self, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "image reward"]:
        """Every reward of every image, as `collect` tells it."""
        self.submit(images, prompts, self.rewards)
        return self.collect()

    def submit(self, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt], names: Iterable[str]) -> None:
        """Begin to score a batch by some of the rewards, the same ones until the scores are collected."""
        self._place(images.device)
        for name in names:
            job = _Job(name, images, prompts)
            self._jobs.append(job)
            if self.settings.overlap and self.failure is None:
                job.future = self._begin(job)

    def collect(self, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> Float[Tensor, "image reward"]:
        """Wait for the scores of all that was submitted, float32, NaN where a reward does not apply or failed.

        Args:
            progress: Wraps what is iterated over, for a progress bar.
        """
        jobs, self._jobs = self._jobs, []
        names = list(dict.fromkeys(job.name for job in jobs))
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        self.seconds = dict.fromkeys(names, 0.0)
        for place, job in enumerate(progress(jobs)):
            outcome = self._outcome(job, jobs[place + 1 :])
            columns[job.name].append(outcome.scores.to(job.images.device))
            self.seconds[job.name] += outcome.seconds
            self.skipped[job.name] += len(outcome.failures)
            applies = torch.tensor([self.rewards[job.name].supports(prompt) for prompt in job.prompts])
            self.applied[job.name] += int(applies.sum())
            self.missing[job.name] += int((applies & outcome.scores.isnan().cpu()).sum())
            if outcome.failures and self.failure is None:
                self._tell(job, outcome.failures)
        return torch.stack([torch.cat(columns[name]) for name in names], dim=1)

    def check(self, strategy: Strategy) -> dict[str, float]:
        """How many images each reward failed on, over all ranks, since the last check; all ranks must ask.

        A reward without a single score, on any rank, has failed on all images that it applies to.

        Raises:
            RewardError: A reward failed on any rank and the settings do not say to skip, or it failed too often.
        """
        failure, counts = self.failure, (self.skipped, self.applied, self.missing)
        own = [float(failure is not None), *(count for each in counts for count in each.values())]
        failed, *totals = strategy.reduce(torch.tensor(own, device=strategy.root_device), reduce_op="sum").tolist()
        self._begin_count()
        if failure is not None or failed:
            self._stop()
        if failure is not None:
            raise failure
        if failed:
            raise RewardError("A reward failed on another process, whose message says which one and why.")
        number = len(self.rewards)
        skipped, applied, missing = (dict(zip(self.rewards, totals[i * number :], strict=False)) for i in range(3))
        for name, of in applied.items():
            if 0 < of == missing[name]:
                skipped[name] = of
                rank_zero_only(log.warning)(
                    f"`rewards.{name}` must score some of the images that it applies to. Found NaN for all {of:.0f} of "
                    "them; they count as images that it failed on."
                )
            if skipped[name] > self.settings.max_skipped * of:
                raise RewardError(
                    f"`rewards.{name}` may fail on a share of {self.settings.max_skipped} of the images "
                    f"(`scoring.max_skipped`). Found {skipped[name]:.0f} of {of:.0f}; the log above says why, and "
                    f"{self.folder} has an image where it raised an error."
                )
        return skipped

    def release(self) -> None:
        """Let go of the device between rounds, where the settings say so."""
        if self.settings.offload:
            for reward in self.rewards.values():
                reward.to("cpu")
            self._placed = False

    def _place(self, device: torch.device) -> None:
        if self._placed:
            return
        self._places = places = {name: self._place_of(name, device) for name in self.rewards}
        owners: dict[torch.nn.Parameter, str] = {}
        for name, reward in self.rewards.items():
            for parameter in reward.parameters():
                other = owners.setdefault(parameter, name)
                if places[other] != places[name]:
                    raise ValueError(
                        f"`scoring.devices` must put rewards that share a model in one place. Found {other} on "
                        f"{places[other]} and {name} on {places[name]}; name the same device for both."
                    )
            reward.to(places[name])
        self._placed = True

    def _place_of(self, name: str, device: torch.device) -> torch.device:
        """Where a reward runs; on the policy's own device where that kind is named without a number."""
        place = torch.device(self.settings.devices.get(name, device))
        return device if place.index is None and place.type == device.type else place

    def _begin(self, job: _Job) -> Future[Outcome]:
        if job.name not in self._workers:
            self._workers[job.name] = Worker()
        return self._workers[job.name].submit(lambda: self._score(job))

    def _score(self, job: _Job) -> Outcome:
        begun = time.perf_counter()
        images = job.images.to(self._places[job.name])
        with torch.cuda.device(images.device) if images.is_cuda else nullcontext():  # a thread begins on the first GPU
            scores, failures = score_with_retries(self.rewards[job.name], images, job.prompts, self.settings.retries)
        return Outcome(scores, failures, time.perf_counter() - begun)

    def _outcome(self, job: _Job, later: Sequence[_Job]) -> Outcome:
        """Wait for a batch. One that passes the time limit is given up, and what waits behind it begins anew."""
        given_up = Outcome(torch.full((len(job.prompts),), torch.nan), {}, 0.0)
        if self.failure is not None or self.stopping():  # nobody needs the rest
            return given_up
        job.future = job.future or self._begin(job)  # in a thread, so that whoever waits can be told to stop
        limit, worker = self.settings.time_limit, self._workers[job.name]
        while not job.future.done():
            if self.stopping():
                self._stop()
                return given_up
            if limit is not None and worker.busy_for > limit:
                self._workers.pop(job.name).stop()
                for other in later:
                    if other.name == job.name:
                        other.future = self._begin(other)
                late = TimeoutError(f"no answer within `scoring.time_limit`, {limit} s")
                return Outcome(*failed(self.rewards[job.name], job.images, job.prompts, late), worker.busy_for)
            wait([job.future], timeout=POLL)
        return job.future.result()

    def _tell(self, job: _Job, failures: Mapping[int, BaseException]) -> None:
        """Save the first image that failed, and keep an error for `check`, or log what happened."""
        index, error = next(iter(failures.items()))
        file = self.folder / f"failed_{job.name}{self.rank}.png"
        with atomic_write(file) as beside:
            to_image(job.images[index]).save(beside)
        what = (
            f"`rewards.{job.name}` must score every image. Found {type(error).__name__} on {len(failures)} of "
            f"{len(job.prompts)} images, first on the prompt {excerpt(job.prompts[index].text)} "
            f"(image in {file}): {reason(error)}"
        ).rstrip(".")
        if self.settings.on_error == "skip":
            log.warning("%s. Their scores are left out.", what)
            return
        self.failure = RewardError(
            f"{what}. Mend it and go on from the last checkpoint, or leave such scores out: `scoring.on_error: skip`."
        )
        self.failure.__cause__ = error
