"""Where the runs of a sweep run: processes of this machine, or jobs of a SLURM cluster."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Process(Protocol):
    """A run that has been started."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs or waits for a place."""

    def terminate(self) -> None:
        """Ask it to save its round and stop."""


class Launcher(Protocol):
    """Starts runs."""

    places: int
    """Runs that may be started at a time."""

    def start(self, command: Sequence[str], output: Path) -> Process:
        """Start a command that writes its messages to the end of a file.

        Raises:
            OSError, RuntimeError: It cannot be started.
        """


class Local:
    """Processes of this machine.

    Args:
        jobs: Runs at a time.
        threads: CPU threads of each; None for the default.
    """

    def __init__(self, jobs: int, threads: int | None) -> None:
        self.places = jobs
        self.environment = {**os.environ, **of_threads(threads)}

    def start(self, command: Sequence[str], output: Path) -> Process:
        """Start a process; it gets no signals from the terminal, only from `terminate`."""
        with output.open("a") as messages:
            fcntl.flock(messages, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, also if the sweep is killed
            return subprocess.Popen(
                command, stdout=messages, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )


def in_use(output: Path) -> bool:
    """Whether a process that `Local` has started still writes to a file."""
    if not output.exists():
        return False
    with output.open() as messages:
        try:
            fcntl.flock(messages, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Slurm:
    """Jobs of a SLURM cluster, through submitit.

    Args:
        jobs: Jobs that run at a time.
        threads: CPU threads of each; None for the default.
        folder: Folder of submitit's files.
        options: Options of `submitit.AutoExecutor.update_parameters`, and `cluster` for another of its executors.

    Raises:
        ValueError: submitit is not installed, or refuses the options.
    """

    def __init__(self, jobs: int, threads: int | None, folder: Path, options: dict[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError("`slurm` needs submitit. Found none; install it: pip install submitit") from error
        self.places, self.variables = jobs, of_threads(threads)
        cluster = options.get("cluster", "slurm")
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=cluster)
            self.executor.update_parameters(**{name: value for name, value in options.items() if name != "cluster"})
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"`slurm` must be options that submitit accepts on this machine. Found {options}: {error}"
            ) from error

    def start(self, command: Sequence[str], output: Path) -> Process:
        """Submit a job; it creates the file of messages when it begins.

        Raises:
            OSError: There is no sbatch, or a file of submitit cannot be written.
            RuntimeError: sbatch refuses the job; with its message.
        """
        return SlurmJob(self.executor.submit(run, list(command), str(output), self.variables))


class SlurmJob:
    """A submitted job."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def poll(self) -> int | None:
        """0 after success, 1 after any failure, also a lost node or a time limit."""
        return None if not self.job.done() else int(self.job.exception() is not None)

    def terminate(self) -> None:
        """Cancel it; SLURM sends SIGTERM first."""
        self.job.cancel(check=False)


def run(command: list[str], output: str, variables: dict[str, str]) -> None:
    """Run a command on the node with more environment variables, and fail as it does."""
    with open(output, "a") as messages:
        environment = {**os.environ, **variables}
        subprocess.run(command, check=True, stdout=messages, stderr=subprocess.STDOUT, env=environment)


def of_threads(threads: int | None) -> dict[str, str]:
    """The environment variables that set the CPU threads of a run; none for the default."""
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
