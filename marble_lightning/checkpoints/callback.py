"""When checkpoints are written: after rounds, and where a run is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from marble_lightning.checkpoints.content import LAST
from marble_lightning.checkpoints.files import _is_newest, warn
from marble_lightning.run_folder import folder_of_runs
from marble_lightning.utils.atomic_files import remove_unfinished
from marble_lightning.utils.distributed import OnAllRanks


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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if trainer.is_global_zero:  # what kills have left in any run of this name
            runs = folder_of_runs(trainer)
            remove_unfinished([runs, *runs.glob("*/"), *runs.glob("*/*/")])

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
            if isinstance(exception, OnAllRanks):  # none may end, and have its launcher end the others, before
                trainer.strategy.barrier()

    def _keep_beginning(self, trainer: Trainer) -> None:
        # no hook of ours may wait for other ranks here, as Trainer.save_checkpoint would: they may not come
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        rounds = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        written = [(int(step), path) for path, step in self.best_k_models.items()]  # or not, where a write has failed
        there = [each for each in [*written, *([self.resumed] if self.resumed else [])] if Path(each[1]).exists()]
        step, path = max(there, default=(-1, ""))
        if step < state["global_step"]:
            beginning = Path(self.dirpath or ".") / f"before_round_{rounds:04d}.ckpt"
            try:
                trainer.strategy.save_checkpoint(state, beginning)
                path = str(beginning)
                _is_newest(trainer, beginning, beginning.with_name(LAST))
            except OSError as error:
                newest = f"The newest checkpoint is there: --ckpt_path {path}" if path else "There is none to resume from."
                warn(f"Stopped after {rounds} whole round(s), and that state is lost. {error} {newest}")
                return
        warn(f"Stopped after {rounds} whole round(s). Go on from there: --ckpt_path {path}")
