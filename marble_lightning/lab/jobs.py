"""The runs of a sweep: their settings, commands and folders."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from marble_lightning.command_line import check_fit
from marble_lightning.config_files import locate
from marble_lightning.evaluation.results import read
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
        """Whether a run of it has ended, with held-out results."""
        return any(command_of(file) == "fit" for file in self.folder.glob(f"version_*/{RESULTS}"))

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

    @property
    def content(self) -> str:
        """Content of the file of its settings; it tells whether a configuration has been edited since."""
        before = "".join(f"# after {config} ({digest(config)})\n" for config in self.configs)
        return f"{before}{self.settings}"

    def check_earlier_runs(self) -> None:
        """Check that its runs so far have its settings; those that failed before they had a folder do not count.

        Raises:
            ValueError: They have other settings.
        """
        file, begun = self.folder / SWEEP, any(self.folder.glob("version_*"))
        if begun and file.exists() and file.read_text(encoding="utf-8") != self.content:
            raise ValueError(
                f"The settings of {self.name}, and the configurations before them, must be those of its earlier runs. Found "
                f"others in {file}; choose another `folder` or another name of the variant, or delete the folder."
            )

    def check(self) -> None:
        """Parse its configuration in this process; nothing is written to its folder.

        Raises:
            ValueError: `fit` would refuse it.
        """
        with TemporaryDirectory() as scratch:
            copy = replace(self, folder=Path(scratch))
            copy.prepare()
            try:
                check_fit(copy.arguments)
            except ValueError as error:
                raise ValueError(f"`fit` must accept the settings of {self.variant}. Found {error}") from error

    def prepare(self) -> None:
        """Write its settings to its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SWEEP).write_text(self.content, encoding="utf-8")


def digest(config: str) -> str:
    """Twelve digits of the sha256 of a configuration's content, without its comments.

    Args:
        config: A name, file or text, as for `-c`.

    Raises:
        ValueError: There is no such file or configuration.
    """
    found = locate(config)
    content = yaml.safe_load(Path(found).read_text(encoding="utf-8")) if Path(found).is_file() else found
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:12]


def command_of(file: Path) -> str | None:
    """The command that wrote a results.json, since `validate` and `test` write theirs beside those of `fit`."""
    try:
        command: str | None = read(file).get("evaluated", {}).get("command")
    except (OSError, ValueError):  # damaged or removed: the run resumes from its last round and writes its results again
        return None
    return command
