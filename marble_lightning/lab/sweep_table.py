"""Runs a sweep's jobs, and shows a table of their states."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from marble_lightning.lab.jobs import Job
from marble_lightning.lab.launchers import Launcher, Process

STOPPED = 128
"""Added to the number of a signal, it is the exit status of a stopped sweep."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a request to end, and a lost terminal."""
EVERY = 0.5
"""Seconds between two looks at the runs."""
COLOURS = {"finished": "green", "failed": "red", "running": "cyan", "stopped": "yellow", "waiting": "dim"}


class States:
    """The state of each job, the rounds that it has done, and the seconds since it was started."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.states = {job: "finished" if job.finished else "waiting" for job in jobs}
        self.began: dict[Job, float] = {}
        self.seconds: dict[Job, float] = {}

    def having(self, state: str) -> list[Job]:
        """The jobs in a state."""
        return [job for job in self.jobs if self.states[job] == state]

    def begin(self, job: Job) -> None:
        """Note that a job has been started."""
        self.states[job], self.began[job] = "running", time.monotonic()

    def end(self, job: Job, state: str) -> None:
        """Note how a job has ended."""
        self.states[job], self.seconds[job] = state, time.monotonic() - self.began[job]

    def table(self) -> Table:
        """The table of all jobs."""
        counts = {state: len(self.having(state)) for state in COLOURS}
        title = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        table = Table("variant", "seed", "state", "rounds", "time", title=title)
        for job in self.jobs:
            state, began = self.states[job], self.began.get(job)
            seconds = self.seconds.get(job, None if began is None else time.monotonic() - began)
            duration = "" if seconds is None else time.strftime("%H:%M:%S", time.gmtime(seconds))
            coloured = f"[{COLOURS[state]}]{state}[/]"
            table.add_row(job.variant, str(job.seed), coloured, str(job.rounds or ""), duration)
        return table


def follow(jobs: Sequence[Job], launcher: Launcher) -> int:
    """Run the jobs that are not finished, and show the table until all have ended.

    Returns:
        Exit status: 0 if all have finished, 1 if some failed, or 128 + the number of the signal that stopped the sweep.
    """
    states, running, refused, console = States(jobs), dict[Job, Process](), dict[Job, str](), Console()
    waiting, caught, passed_on = deque(states.having("waiting")), list[int](), 0
    with catching(caught), Live(states.table(), console=console, refresh_per_second=2) as live:
        while running or (waiting and not caught):
            while waiting and not caught and len(running) < launcher.places:
                job = waiting.popleft()
                states.begin(job)
                try:
                    running[job] = launcher.start(job.command, job.output)
                except (OSError, RuntimeError) as error:
                    states.end(job, "stopped" if caught else "failed")
                    refused[job] = f"{type(error).__name__}: {error}"
            if len(caught) > passed_on:  # a second signal stops them at once
                passed_on = len(caught)
                for process in running.values():
                    process.terminate()
            time.sleep(EVERY)
            for job, process in list(running.items()):
                if (code := process.poll()) is not None:
                    states.end(job, "stopped" if caught else "finished" if code == 0 and job.finished else "failed")
                    del running[job]
            live.update(states.table())
    if not console.is_terminal:
        console.line()  # `Live` ends its last line on a terminal only
    for job in states.having("failed"):
        message = f"{job.name} failed: {refused.get(job) or last_line(job.output)}"
        message += f"\n  All messages: {job.output}" if job.output.exists() else ""
        console.print(message, markup=False, soft_wrap=True)  # paths stay whole
    if caught:
        return STOPPED + caught[0]
    return int(bool(states.having("failed")))


@contextmanager
def catching(caught: list[int]) -> Iterator[None]:
    """Collect the signals that ask to stop, instead of ending the process; an ignored one, as under nohup, stays ignored."""

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, note) for number in STOPS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_line(file: Path) -> str:
    """The last line of a file that is not empty; a job that was lost before it began has no file."""
    if not file.exists():
        return "no messages"
    lines = [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no messages"
