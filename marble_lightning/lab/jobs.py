"""The runs of a sweep: their settings, commands and folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marble_lightning.command_line import check_fit
from marble_lightning.utils.run_files import RESULTS, SWEEP

OUTPUT = "output.txt"


@dataclass(frozen=True, eq=False)
class Job:
    """One variant with one seed: a folder of runs, of which each but the first resumes the one before it."""

    variant: str
    seed: int
    folder: Path
    configs: Sequence[str]
    settings: str

    @property
    def name(self) -> str:
        """Variant and seed."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def output(self) -> Path:
        """File of its messages."""
        return self.folder / OUTPUT

    @property
    def finished(self) -> bool:
        """Whether the last of its runs has held-out results."""
        return any(self.folder.glob(f"version_*/{RESULTS}"))

    @property
    def rounds(self) -> int:
        """Rounds up to its newest checkpoint."""
        names = [file.stem for file in self.folder.glob("version_*/checkpoints/round_*.ckpt")]
        return max((int(name.removeprefix("round_").partition("-")[0]) + 1 for name in names), default=0)

    @property
    def arguments(self) -> list[str]:
        """The arguments of `marble-lightning fit`, without those for resuming."""
        files = [*self.configs, str(self.folder / SWEEP)]
        return [part for file in files for part in ("-c", file)]

    @property
    def command(self) -> list[str]:
        """The command that begins or resumes the run."""
        return [sys.executable, "-m", "marble_lightning", "fit", *self.arguments, "--ckpt_path", "last"]

    def prepare(self) -> None:
        """Write its settings, or check that earlier ones are the same.

        Raises:
            ValueError: The folder has runs with other settings.
        """
        file, text = self.folder / SWEEP, f"# after {' '.join(self.configs)}\n{self.settings}"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"The settings of {self.name} must be those of its earlier runs. Found others in {file}; "
                "choose another `folder` or another name of the variant, or delete the folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def check(self) -> None:
        """Parse its configuration in this process.

        Raises:
            ValueError: `fit` would refuse it.
        """
        try:
            check_fit(self.arguments)
        except ValueError as error:
            raise ValueError(f"`fit` must accept the settings of {self.variant}. Found {error}") from error
