"""Checkpoint files: written whole or not at all, checked before they are loaded, found again, and left behind by a stop."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from marble_lightning.run_folder import folder_of_runs
from marble_lightning.stops import Stopped, job, link_of_job
from marble_lightning.whole_files import folder_to_disk, written_whole

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

LAST = "last.ckpt"


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, or None where it is whole: every record is there and matches its checksum.

    torch.load itself compares no checksums.
    """
    file = Path(path)
    if not file.exists():
        return f"it points to {os.readlink(file)}, which is gone" if file.is_symlink() else f"no such file from {Path.cwd()}"
    try:
        if not is_zipfile(file):
            return f"its end is missing, or it is no checkpoint ({file.stat().st_size} bytes)"
        with ZipFile(file) as archive:
            if any(record.compress_size != record.file_size or record.external_attr for record in archive.infolist()):
                return "its directory of records is wrong"  # torch compresses nothing and sets no attribute
            broken = archive.testzip()
    except (BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"it cannot be read: {error}"
    return f"its record {broken} does not match its checksum" if broken else None


def must_be_of_fit(found: Any, file: str | Path | None) -> None:
    """Refuse what another program has written.

    Args:
        found: What a checkpoint holds.
        file: Which it is.

    Raises:
        ValueError: It lacks what `fit` writes.
    """
    if not isinstance(found, dict) or not {"lora", "state_dict", "epoch", "global_step"} <= found.keys():
        raise ValueError(
            "`ckpt_path` must be a checkpoint that `marble-lightning fit` wrote. Found another program's, "
            f"{file}, without the adapters' settings."
        )


def newest_whole(damaged: Path) -> Path | None:
    """The newest whole checkpoint beside a damaged one, or else of the other runs of its name."""
    folder = damaged.parent
    for found in (folder.glob("*.ckpt"), folder.parent.parent.glob(f"*/{folder.name}/*.ckpt")):
        others = {file.resolve() for file in found if file.exists()} - {damaged.resolve()}
        for file in sorted(others, key=lambda file: file.stat().st_mtime_ns, reverse=True):
            if damage(file) is None:
                return file
    return None


def last_of(trainer: Trainer) -> Path | None:
    """The newest `last.ckpt` of the trainer's runs of one name, if there is one."""
    root, logger = folder_of_runs(trainer), trainer.logger
    found = [*root.glob(f"*/checkpoints/{LAST}"), *root.glob(f"checkpoints/{LAST}")]  # earlier runs without a logger
    if isinstance(logger, WandbLogger):  # where Lightning keeps checkpoints
        found += Path(logger.save_dir or root).glob(f"{logger.name}/*/checkpoints/{LAST}")
    return max(found, key=_time, default=None)  # also a link that leads nowhere: loading says so


def _time(file: Path) -> int:
    return (file.stat() if file.exists() else file.lstat()).st_mtime_ns


def point(link: Path, to: Path) -> None:
    """Make a symbolic link lead elsewhere in one step, so that it leads somewhere at any moment."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(os.path.relpath(to, link.parent), temporary)
    except OSError:  # on Windows a privilege of few
        shutil.copy(to, temporary)
    os.replace(temporary, link)
    folder_to_disk(link.parent)


def _is_newest(trainer: Trainer, file: Path, link: Path) -> None:
    """Have a run's link, and the SLURM job's if this is one, lead to its newest checkpoint."""
    point(link, file)
    if name := job():
        point(link_of_job(folder_of_runs(trainer), name), file)


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, whole on disk before they get their name, and checked before they are loaded.

    Lightning writes to the system's temporary folder and moves the file from there. Between two file systems that is a copy,
    which a kill cuts short under the final name; and nothing makes sure that the disk has it. Files that are not local are
    left to Lightning. The command line uses it; in Python: `Trainer(plugins=[WholeCheckpointIO()])`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it as `written_whole` does."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_whole(Path(path)) as beside, beside.open("wb") as stream:
            torch.save(checkpoint, stream)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint that is whole.

        Raises:
            ValueError: It is not, or another program's; says what is wrong and which one to give instead.
        """
        if "://" not in str(path):
            if Path(path).is_dir():
                inside = max(Path(path).rglob(LAST), key=_time, default=None)
                raise ValueError(
                    f"`ckpt_path` must be a file. Found the folder {path}" + (f"; give {inside}" if inside else "")
                )
            if wrong := damage(path):
                raise _refused(Path(path), wrong)
        try:
            return super().load_checkpoint(path, *arguments, **options)
        except UnpicklingError as error:
            said = str(error).splitlines()
            why = next((line.strip() for line in said if "GLOBAL" in line or "Unsupported" in line), said[0])
            raise ValueError(
                "`ckpt_path` must be a checkpoint that `marble-lightning fit` wrote. Found another program's, or one in "
                f"which a callback of yours keeps what torch will not load, {path}: {why.partition('. Please')[0]}."
            ) from error
        except RuntimeError as error:  # a flaw in the directory of records that only torch minds
            raise _refused(Path(path), str(error)) from error


def _refused(file: Path, wrong: str) -> ValueError:
    other = newest_whole(file)
    remedy = f"give the newest whole one: --ckpt_path {other}" if other else "there is no whole one beside it"
    return ValueError(f"`ckpt_path` must be a whole checkpoint. Found {file}: {wrong}; {remedy}")


def options_of(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer was made with, as far as that is plain; neither its steps nor a schedule change it."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in optimizer.defaults.items()}
    return {name: value for name, value in plain.items() if isinstance(value, bool | int | float | str | list)}


class RoundCheckpoint(ModelCheckpoint):
    """Writes a checkpoint after a round, `checkpoints/last.ckpt` leading to the newest; one more where a run is stopped.

    A stop (SIGTERM, Ctrl-C, an error) in a round leaves a checkpoint of its beginning, unless there is one as new.

    Args:
        every_n_rounds: Rounds from one checkpoint to the next, >= 1; the last round has one anyway.
        keep: Newest checkpoints that are kept, >= 2, so that there is another should one be damaged; -1 keeps all.
    """

    def __init__(self, every_n_rounds: int = 1, keep: int = 2) -> None:
        if every_n_rounds < 1:
            raise ValueError(f"`checkpoints.every_n_rounds` must be >= 1. Found {every_n_rounds}.")
        if keep < 2 and keep != -1:
            raise ValueError(
                f"`checkpoints.keep` must be >= 2, or -1 for all. Found {keep}; the newest may turn out to be damaged."
            )
        super().__init__(
            filename="round_{epoch:04d}", auto_insert_metric_name=False, monitor="step", mode="max", save_top_k=keep,
            save_last="link", every_n_epochs=every_n_rounds, save_on_train_epoch_end=True,
        )  # fmt: skip
        self.resumed: tuple[int, str] | None = None
        """Optimizer step and path of the checkpoint that the run goes on from."""
        self.options: dict[str, Any] = {}
        """What the optimizer was made with, where the run began."""

    @property
    def state_key(self) -> str:
        return "RoundCheckpoint"  # another `every_n_rounds` may go on from it

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"options": self.options}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.options = state_dict.get("options", {})
        super().load_state_dict(state_dict)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:  # Lightning removes the link, then makes it anew
            _is_newest(trainer, Path(filepath), Path(linkpath))
        trainer.strategy.barrier()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path:
            self.resumed = (trainer.global_step, str(trainer.ckpt_path))
        asked = options_of(trainer.optimizers[0])
        self.options = self.options or asked
        if odd := [
            f"{name} {kept} instead of {asked.get(name)}" for name, kept in self.options.items() if kept != asked.get(name)
        ]:
            warn(
                f"The optimizer goes on as in {trainer.ckpt_path}: {', '.join(odd)}. For a run of its own with these "
                "adapters export them and begin with `policy.init_lora`."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            found = self._monitor_candidates(trainer)
            found["epoch"] = found["epoch"] - 1  # by now the number of rounds
            self._save_topk_checkpoint(trainer, found)
            self._save_last_checkpoint(trainer, found)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        begun = trainer.fit_loop.epoch_progress.current.ready  # a round
        try:
            if trainer.state.fn == "fit" and not trainer.sanity_checking and begun and trainer.is_global_zero:
                self._keep_beginning(trainer)
        finally:
            if isinstance(exception, Stopped):  # on all ranks; none may end, and have its launcher end the others, before
                trainer.strategy.barrier()

    def _keep_beginning(self, trainer: Trainer) -> None:
        # no hook of ours may wait for other ranks here, as Trainer.save_checkpoint would: they may not come
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        rounds = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        there = [self.resumed] if self.resumed else []
        if self.best_model_score is not None:
            there.append((int(self.best_model_score), self.best_model_path))
        step, path = max(there, default=(-1, ""))
        if step < state["global_step"]:
            path = str(Path(self.dirpath or ".") / f"before_round_{rounds:04d}.ckpt")
            trainer.strategy.save_checkpoint(state, path)
            _is_newest(trainer, Path(path), Path(path).with_name(LAST))
        warn(f"Stopped after {rounds} whole round(s). Go on from there: --ckpt_path {path}")
