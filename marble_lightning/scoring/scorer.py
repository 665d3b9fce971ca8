"""The scorer: scores images while others are sampled, and records the images that a reward fails on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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

from marble_lightning.scoring.failures import RewardError, failed_batch, score_with_retries
from marble_lightning.scoring.settings import Scoring
from marble_lightning.scoring.worker import Worker
from marble_lightning.utils.atomic_files import atomic_write
from marble_lightning.utils.cpu_weights import CPUWeights
from marble_lightning.utils.distributed import REPORT_EVERY
from marble_lightning.utils.images import to_image
from rewards import Prompt, Reward
from rewards.texts import excerpt, reason

log = logging.getLogger(__name__)

POLL = 0.05
"""Seconds between two checks of the time limit and of a requested stop."""


@dataclass
class Outcome:
    """A reward's result for a batch: scores (image,), NaN where there is none; errors by index of image; seconds taken."""

    scores: Float[Tensor, " image"]
    failures: dict[int, BaseException]
    seconds: float


@dataclass
class _Job:
    """A batch that one reward scores."""

    name: str
    images: Float[Tensor, "image 3 pixel pixel"]
    prompts: Sequence[Prompt]
    future: Future[Outcome] | None = None


class Scorer:
    """Scores batches in the background, one thread per reward, and collects the scores in the order of submission.

    `collect` raises no RewardError, since other ranks would wait for this one; `check` raises it on all ranks.

    Args:
        rewards: Rewards and metrics, by name.
        settings: What happens on failure, and where rewards run.
        metrics: Names of those that are metrics, for messages.

    Raises:
        ValueError: `devices` has a key that is not the name of a reward.
    """

    def __init__(self, rewards: Mapping[str, Reward], settings: Scoring, metrics: Container[str] = ()) -> None:
        if unknown := sorted(set(settings.devices) - set(rewards)):
            raise ValueError(f"`scoring.devices` must use names of rewards: {', '.join(rewards)}. Found {unknown[0]!r}.")
        self.rewards, self.settings = rewards, settings
        self.labels = {name: f"{'metrics' if name in metrics else 'rewards'}.{name}" for name in rewards}
        """How messages name each reward."""
        self.seconds: dict[str, float] = {}
        """Time that each reward took for the last collected scores, while the other rewards and the sampling ran."""
        self.unscored: dict[str, float] = {}
        """Images without a score among those that each reward applies to, over all ranks, as counted by the last `check`."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run is about to stop. If so, `collect` does not wait: scores that are not ready are NaN."""
        self._workers: dict[str, Worker] = {}
        self.setup(Path(), "")

    def setup(self, folder: Path, rank: str) -> None:
        """Start a run.

        Args:
            folder: Folder for images that a reward failed on.
            rank: Suffix of this process's image files; empty for a single process.
        """
        self.stop()  # workers of a run that ended with an error
        self.folder, self.rank = folder, rank
        self._jobs: list[_Job] = []
        self._placed, self._on_cpu = False, CPUWeights()
        self._reset_counts()

    def stop(self) -> None:
        """Stop all workers; queued batches are not scored. Later batches start new ones."""
        for worker in self._workers.values():
            worker.stop()
        self._workers = {}

    def _reset_counts(self) -> None:
        self.failure: RewardError | None = None
        self.skipped, self.applied, self.missing = (dict.fromkeys(self.rewards, 0) for _ in range(3))

    def __call__(
        self, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "image reward"]:
        """Score images by all rewards and wait for the scores, see `collect`."""
        self.submit(images, prompts, self.rewards)
        return self.collect()

    def submit(self, images: Float[Tensor, "image 3 pixel pixel"], prompts: Sequence[Prompt], names: Iterable[str]) -> None:
        """Start to score a batch.

        Args:
            images: Pixels in [0, 1].
            prompts: One per image.
            names: Rewards that score; the same ones for all batches until `collect`.
        """
        self._place(images.device)
        for name in names:
            job = _Job(name, images, prompts)
            self._jobs.append(job)
            if self.settings.overlap and self.failure is None:
                job.future = self._begin(job)

    def collect(self, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> Float[Tensor, "image reward"]:
        """Wait for the scores of all submitted batches: float32, NaN where a reward does not apply or failed.

        Args:
            progress: Wraps the iteration over batches, for a progress bar.
        """
        jobs, self._jobs = self._jobs, []
        names = list(dict.fromkeys(job.name for job in jobs))
        columns: dict[str, list[Tensor]] = {name: [] for name in names}
        self.seconds = dict.fromkeys(names, 0.0)
        for index, job in enumerate(progress(jobs)):
            outcome = self._outcome(job, jobs[index + 1 :])
            columns[job.name].append(outcome.scores.to(job.images.device))
            self.seconds[job.name] += outcome.seconds
            self.skipped[job.name] += len(outcome.failures)
            applies = torch.tensor([self.rewards[job.name].supports(prompt) for prompt in job.prompts])
            self.applied[job.name] += int(applies.sum())
            self.missing[job.name] += int((applies & outcome.scores.isnan().cpu()).sum())
            if outcome.failures and self.failure is None:
                self._report(job, outcome.failures)
        return torch.stack([torch.cat(columns[name]) for name in names], dim=1)

    def check(self, strategy: Strategy) -> dict[str, float]:
        """Number of images that each reward failed on, over all ranks, since the last check; all ranks must call it.

        Raises:
            RewardError: A reward failed on any rank and `on_error` is not `skip`, or it failed too often, or it has no score
                on any rank.
        """
        failure, counts = self.failure, (self.skipped, self.applied, self.missing)
        of_rank = [float(failure is not None), *(count for by_name in counts for count in by_name.values())]
        failed, *totals = strategy.reduce(torch.tensor(of_rank, device=strategy.root_device), reduce_op="sum").tolist()
        self._reset_counts()
        if failure is not None or failed:
            self.stop()
        if failure is not None:
            raise failure
        if failed:
            raise RewardError("A reward failed on another process; the message of that process names it and the reason.")
        number = len(self.rewards)
        skipped, applied, missing = (dict(zip(self.rewards, totals[i * number :], strict=False)) for i in range(3))
        for name, total in applied.items():
            if 0 < total == missing[name]:
                why = "the log above says why" if skipped[name] else "correct its `score`, or narrow its `applies_to`"
                raise RewardError(
                    f"`{self.labels[name]}` must score some of the images that it applies to. Found no score for any of the "
                    f"{total:.0f}; {why}."
                )
            if missing[name] > total / 2:
                rank_zero_only(log.warning)(
                    f"`{self.labels[name]}` has no score for {missing[name]:.0f} of the {total:.0f} images it applies to."
                )
            if skipped[name] > self.settings.max_skipped * total:
                raise RewardError(
                    f"`{self.labels[name]}` may fail on a share of {self.settings.max_skipped} of the images "
                    f"(`scoring.max_skipped`). Found {skipped[name]:.0f} of {total:.0f}; the log above says why."
                )
        self.unscored = missing
        return skipped

    def release(self) -> None:
        """Move rewards to the CPU between rounds, if `offload` is set."""
        if self.settings.offload:
            self.move_to_cpu()

    def move_to_cpu(self) -> None:
        """Move all rewards to the CPU. With `offload`, their weights have stayed there and are not copied."""
        self._on_cpu.restore()
        self._move(dict.fromkeys(self.rewards, torch.device("cpu")))
        self._placed = False

    def _place(self, device: torch.device) -> None:
        """Move each reward from the CPU to its device. The policy moves none, so weights go nowhere else."""
        if self._placed:
            return
        self._devices = devices = {name: self._device_of(name, device) for name in self.rewards}
        owners: dict[torch.nn.Parameter, str] = {}
        for name, reward in self.rewards.items():
            for parameter in reward.parameters():
                other = owners.setdefault(parameter, name)
                if devices[other] != devices[name]:
                    raise ValueError(
                        f"`scoring.devices` must put rewards that share a model on one device. Found {other} on "
                        f"{devices[other]} and {name} on {devices[name]}; name the same device for both."
                    )
        self._on_cpu = CPUWeights(self.rewards.values() if self.settings.offload else ())
        self._move(devices)
        self._placed = True

    def _move(self, devices: Mapping[str, torch.device]) -> None:
        with torch.inference_mode(False):  # validation has it; buffers made in it could not be changed afterwards
            for name, reward in self.rewards.items():
                reward.to(devices[name])

    def _device_of(self, name: str, policy_device: torch.device) -> torch.device:
        """Device of a reward; a type without a number, such as `cuda`, means the policy's device if that has the type."""
        device = torch.device(self.settings.devices.get(name, policy_device))
        return policy_device if device.index is None and device.type == policy_device.type else device

    def _begin(self, job: _Job) -> Future[Outcome]:
        if job.name not in self._workers:
            self._workers[job.name] = Worker()
        return self._workers[job.name].submit(lambda: self._score(job))

    def _score(self, job: _Job) -> Outcome:
        begun, reward = time.perf_counter(), self.rewards[job.name]
        try:
            images = job.images.to(self._devices[job.name])
        except Exception as error:  # noqa: BLE001 - such as too little memory; `check` raises it on all ranks
            return Outcome(*failed_batch(reward, job.images, job.prompts, error), time.perf_counter() - begun)
        with torch.cuda.device(images.device) if images.is_cuda else nullcontext():  # a new thread uses the first GPU
            scores, failures = score_with_retries(reward, images, job.prompts, self.settings.retries)
        return Outcome(scores, failures, time.perf_counter() - begun)

    def _outcome(self, job: _Job, later: Sequence[_Job]) -> Outcome:
        """Wait for a batch. A batch over the time limit has failed; the reward's later batches go to a new worker."""
        not_scored = Outcome(torch.full((len(job.prompts),), torch.nan), {}, 0.0)
        if self.failure is not None or self.stopping():  # the remaining scores are not needed
            return not_scored
        job.future = job.future or self._begin(job)  # in a thread, so that this one can react to a stop
        limit, worker, report_at = self.settings.time_limit, self._workers[job.name], REPORT_EVERY
        while not job.future.done():
            if self.stopping():
                self.stop()
                return not_scored
            if limit is not None and worker.busy_for > limit:
                self._workers.pop(job.name).stop()
                for other in later:
                    if other.name == job.name:
                        other.future = self._begin(other)
                timeout = TimeoutError(f"no answer within `scoring.time_limit`, {limit} s")
                return Outcome(*failed_batch(self.rewards[job.name], job.images, job.prompts, timeout), worker.busy_for)
            if worker.busy_for > report_at:
                report_at += REPORT_EVERY
                rank = getattr(rank_zero_only, "rank", 0)
                label = self.labels[job.name]
                log.warning("Rank %d waits for `%s`, which took %.0f s so far.", rank, label, worker.busy_for)
            wait([job.future], timeout=POLL)
        return job.future.result()

    def _report(self, job: _Job, failures: Mapping[int, BaseException]) -> None:
        """Save the first image that failed, then log a warning (`on_error: skip`) or keep an error for `check`."""
        index, error = next(iter(failures.items()))
        file = self.folder / f"failed_{job.name}{self.rank}.png"
        place = f"image in {file}"
        try:
            with atomic_write(file) as scratch:
                to_image(job.images[index]).save(scratch)
        except OSError as os_error:  # the failure of the reward matters more than its image
            place = f"its image could not be saved as {file}: {reason(os_error)}"
        message = (
            f"`{self.labels[job.name]}` must score every image. Found {type(error).__name__} on {len(failures)} of "
            f"{len(job.prompts)} images, first on the prompt {excerpt(job.prompts[index].text)} ({place}): {reason(error)}"
        ).rstrip(".")
        if self.settings.on_error == "skip":
            log.warning("%s. Their scores are left out.", message)
            return
        self.failure = RewardError(
            f"{message}. Fix it and resume from the last checkpoint, or leave such scores out: `scoring.on_error: skip`."
        )
        self.failure.__cause__ = error
