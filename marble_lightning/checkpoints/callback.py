"""The callback that writes checkpoints: after rounds, and when a run is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from marble_lightning.checkpoints.content import LAST
from marble_lightning.checkpoints.files import _link_newest, warn
from marble_lightning.run_folder import folder_of_runs
from marble_lightning.utils.atomic_files import remove_unfinished
from marble_lightning.utils.distributed import OnAllRanks


def options_of(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's default options that are plain values; neither optimizer steps nor a schedule change them."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in optimizer.defaults.items()}
    return {name: value for name, value in plain.items() if isinstance(value, bool | int | float | str | list)}


class RoundCheckpoint(ModelCheckpoint):
    """Writes a checkpoint after rounds, and links `checkpoints/last.ckpt` to the newest one.

    If a round is stopped by SIGTERM, Ctrl-C or an error, it also writes a checkpoint of the round's beginning, unless the
    newest checkpoint already holds that state.

    Args:
        every_n_rounds: Rounds from one checkpoint to the next, >= 1; the last round always has one.
        keep: Number of newest checkpoints that are kept, >= 2, in case the newest one is damaged; -1 keeps all.
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
        """Optimizer step and path of the checkpoint that the run was resumed from."""
        self.options: dict[str, Any] = {}
        """The optimizer's options at the beginning of the run, before any resumption."""

    @property
    def state_key(self) -> str:
        return "RoundCheckpoint"  # without the settings, so that a run can resume with another `every_n_rounds`

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"options": self.options}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.options = state_dict["options"]
        super().load_state_dict(state_dict)

    def file_at(self, step: int) -> Path | None:
        """A checkpoint that this process has written after an optimizer step, if it exists."""
        if self.resumed and self.resumed[0] == step:
            return None  # written by another process, maybe with other settings
        files = (Path(file) for file, written in self.best_k_models.items() if int(written) == step)
        return next((file for file in files if file.is_file()), None)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:  # Lightning would remove the link before it makes the new one
            _link_newest(trainer, Path(filepath), Path(linkpath))
        trainer.strategy.barrier()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero:  # scratch folders of killed processes, in any run of this name
            runs = folder_of_runs(trainer)
            remove_unfinished([runs, *runs.glob("*/"), *runs.glob("*/*/")])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path:
            self.resumed = (trainer.global_step, str(trainer.ckpt_path))
        configured = options_of(trainer.optimizers[0])
        self.options = self.options or configured
        if differences := [
            f"{name} {saved} instead of {configured.get(name)}"
            for name, saved in self.options.items()
            if saved != configured.get(name)
        ]:
            warn(
                f"The optimizer keeps the options of {trainer.ckpt_path}: {', '.join(differences)}. To train these adapters "
                "with other options, export them and start a new run with `policy.init_lora`."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            candidates["epoch"] = candidates["epoch"] - 1  # at this point it is the number of rounds
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        rounds_begun = trainer.fit_loop.epoch_progress.current.ready
        try:
            if trainer.state.fn == "fit" and not trainer.sanity_checking and rounds_begun and trainer.is_global_zero:
                self._save_round_start(trainer)
        finally:
            if isinstance(exception, OnAllRanks):  # a rank that ends earlier makes its launcher kill the others
                trainer.strategy.barrier()

    def _save_round_start(self, trainer: Trainer) -> None:
        # not Trainer.save_checkpoint, which waits for other ranks: they may never arrive here
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        rounds = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        written = [(int(step), path) for path, step in self.best_k_models.items()]  # also files whose write has failed
        candidates = [*written, *([self.resumed] if self.resumed else [])]
        step, path = max(((step, path) for step, path in candidates if Path(path).exists()), default=(-1, ""))
        if step < state["global_step"]:
            beginning = Path(self.dirpath or ".") / f"before_round_{rounds:04d}.ckpt"
            try:
                trainer.strategy.save_checkpoint(state, beginning)
                path = str(beginning)
                _link_newest(trainer, beginning, beginning.with_name(LAST))
            except OSError as error:
                newest = (
                    f"Resume from the newest checkpoint: --ckpt_path {path}" if path else "There is none to resume from."
                )
                warn(f"Stopped after {rounds} complete round(s), and that state is lost. {error} {newest}")
                return
        warn(f"Stopped after {rounds} complete round(s). Resume from there: --ckpt_path {path}")
