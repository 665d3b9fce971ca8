"""The state at the beginning of a round, for checkpoints that are requested during the round."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.content import TO_FIT, load_checked


class RoundStart:
    """Keeps the state at the beginning of a round, and puts it into checkpoints that are requested during the round.

    A round's images are in no checkpoint, and the optimizer's steps depend on all of them. So a checkpoint requested during
    a round (by SLURM's signal, `Trainer.save_checkpoint`, or a ModelCheckpoint with `every_n_train_steps`) gets the state of
    the round's beginning. A run resumed from it repeats the round bit for bit. A checkpoint requested after the round's
    validation holds the trained state, since it may be the best of several validations, and counts the round as done.
    Checkpoints with weights only hold the current weights.

    Where a RoundCheckpoint has just written that state, it is read from there, otherwise it is kept in memory.
    """

    def __init__(self) -> None:
        self._state: bytes | Path = b""
        self._round: int | None = None
        """The round of the kept state."""
        self._validated_round: int | None = None
        """The last round that has finished its training and validation."""

    def keep(self, trainer: Trainer) -> None:
        """Keep the current state as the beginning of a round; call it before the round changes any state."""
        self._round = self._validated_round = None
        self._state = _file(trainer) or _serialised(trainer)
        self._round = _progress(trainer).processed

    def note_validation_end(self, trainer: Trainer) -> None:
        """Record the end of a validation. If it followed the last micro-batch, the round's training is complete."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_last_batch:
            self._validated_round = _progress(trainer).processed

    def put_into(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Put a consistent state into a checkpoint that was requested during a round; leave other checkpoints unchanged."""
        progress = _progress(trainer)
        if progress.ready == progress.processed or "optimizer_states" not in checkpoint:
            return
        loops = checkpoint["loops"]["fit_loop"]
        if self._validated_round == progress.processed:
            _add_to_counters(loops, "processed", 1)
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        elif self._round != progress.processed:
            _add_to_counters(loops, "ready", -1)
        elif self._state and trainer.is_global_zero:  # others write no checkpoints, and may not see the file
            current = checkpoint["callbacks"]
            checkpoint.clear()
            if isinstance(self._state, Path):
                checkpoint |= load_checked(self._state, TO_FIT, map_location="cpu", weights_only=True)
            else:  # from this process's memory
                checkpoint |= torch.load(io.BytesIO(self._state), map_location="cpu", weights_only=False)
            # checkpoint callbacks keep their current state, which lists the existing files
            keys = [callback.state_key for callback in trainer.checkpoint_callbacks]
            checkpoint["callbacks"] |= {key: current[key] for key in keys if key in current}
            rank_zero_info(f"A checkpoint in the middle of round {self._round} holds the round's beginning.")


def _file(trainer: Trainer) -> Path | None:
    """A checkpoint file with the current state, as rank 0 sees it: all ranks serialise the state, or none does."""
    files = (c.file_at(trainer.global_step) for c in trainer.checkpoint_callbacks if isinstance(c, RoundCheckpoint))
    file: Path | None = trainer.strategy.broadcast(next((file for file in files if file is not None), None))
    return file


def _serialised(trainer: Trainer) -> bytes:
    """The current state, out of the reach of later changes; empty on ranks other than 0, which write no checkpoints."""
    state, stream = trainer._checkpoint_connector.dump_checkpoint(weights_only=False), io.BytesIO()
    if trainer.is_global_zero:
        torch.save(state, stream)
    return stream.getvalue()


def _progress(trainer: Trainer) -> Any:
    """Lightning's counters of rounds: `ready` counts begun rounds, `processed` trained and validated ones."""
    return trainer.fit_loop.epoch_progress.current


def _add_to_counters(loops: dict[str, Any], name: str, number: int) -> None:
    for counter in loops["epoch_progress"].values():
        counter[name] += number
