"""The beginning of a round, which every checkpoint asked for in its middle holds."""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info


class RoundStart:
    """Keeps the state at the beginning of a round, and puts it in the place of a half-trained one.

    A round's images are in no checkpoint, and the optimizer's steps depend on all of them. So a checkpoint asked for in
    the middle (by SLURM's signal, `Trainer.save_checkpoint`, or a ModelCheckpoint with `every_n_train_steps`) gets the
    state of the beginning; going on from it does the round again, bit for bit. One asked for once the round's validation
    has been judged holds the trained state, as the best of several validations must, and counts the round as done.
    Checkpoints of weights only hold those of the moment.
    """

    def __init__(self) -> None:
        self._kept = b""
        self._round: int | None = None
        """The round whose beginning is kept."""
        self._judged: int | None = None
        """The round that was last trained on and judged to the end."""

    def keep(self, trainer: Trainer) -> None:
        """Keep the present state, the beginning of a round; call it before anything of the round has happened."""
        self._round = self._judged = None
        # as it would be written, so that nothing in it changes any more; by rank 0, which is the one to write
        state, stream = trainer._checkpoint_connector.dump_checkpoint(weights_only=False), io.BytesIO()
        if trainer.is_global_zero:
            torch.save(state, stream)
        self._kept = stream.getvalue()
        self._round = _progress(trainer).processed

    def judged(self, trainer: Trainer) -> None:
        """Take note that a validation has ended. Where it was after the last micro-batch, the round's training is over."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_last_batch:
            self._judged = _progress(trainer).processed

    def put_into(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Make a whole checkpoint out of one that was asked for in the middle of a round; others stay as they are."""
        progress = _progress(trainer)
        if progress.ready == progress.processed or "optimizer_states" not in checkpoint:
            return
        loops = checkpoint["loops"]["fit_loop"]
        if self._judged == progress.processed:
            _count(loops, "processed", 1)
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        elif self._round != progress.processed:
            _count(loops, "ready", -1)
        elif self._kept:
            live = checkpoint["callbacks"]
            checkpoint.clear()
            checkpoint |= torch.load(io.BytesIO(self._kept), map_location="cpu", weights_only=False)
            # which files there are is of the present
            files = [callback.state_key for callback in trainer.checkpoint_callbacks]
            checkpoint["callbacks"] |= {key: live[key] for key in files if key in live}
            rank_zero_info(f"A checkpoint in the middle of round {self._round} holds the round's beginning.")


def _progress(trainer: Trainer) -> Any:
    """Lightning's counters of rounds: one is `ready` before it begins and `processed` after its training and validation."""
    return trainer.fit_loop.epoch_progress.current


def _count(loops: dict[str, Any], what: str, by: int) -> None:
    for counter in loops["epoch_progress"].values():
        counter[what] += by
