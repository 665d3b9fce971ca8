"""Results of a run, as tables and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.content import LAST
from marble_lightning.checkpoints.files import warn
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.comparison import check_comparable, compare_runs, scorer_differences
from marble_lightning.evaluation.results import HeldOutScores, document, read, write
from marble_lightning.evaluation.tables import comparison_table, held_out_table, tags_table
from marble_lightning.module import DiffusionNFT
from marble_lightning.run_folder import CONFIG, RESULTS, run_folder


class Results(Callback):
    """Tables of held-out scores by prompt set, and results.json and results.csv in the run's folder.

    After `fit` they have the base beside the trained policy, and are followed by what to do next.

    Args:
        compare_with: Other runs, each by its results.json or the folder it is in: the composite score, the mean over rewards
            of z-scores over the runs, is shown beside. Settings and prompts must be the same; null for none.
        columns: Rewards and metrics that the composite counts; null for all.
    """

    def __init__(self, compare_with: list[str] | None = None, columns: list[str] | None = None) -> None:
        self.compare_with, self.columns = compare_with or [], columns
        self.others: dict[str, dict[str, Any]] = {}
        self.loaded_step: int | None = None
        """Optimizer step of the checkpoint that is judged."""
        self.trained = False
        """Whether there was anything to train."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be compare_runs before anything is sampled."""
        every, rounds = trainer.check_val_every_n_epoch, trainer.max_epochs or 0  # -1: no end
        if stage == "fit" and trainer.limit_val_batches and every and rounds > 0 and rounds % every:
            raise ValueError(
                f"`max_epochs` must be a multiple of `check_val_every_n_epoch`, {every}, for the last round to be judged. "
                f"Found {rounds}."
            )
        if stage == "predict" or not isinstance(pl_module, DiffusionNFT):
            return
        if unknown := sorted(set(self.columns or []) - set(pl_module.reward_models)):
            raise ValueError(
                f"`results.columns` must name rewards or metrics: {', '.join(pl_module.reward_models)}. "
                f"Found {unknown[0]!r}."
            )
        self.others = {path: read(path, "`results.compare_with`") for path in self.compare_with}
        prompts = dict(enumerate(get_datamodule(trainer).held_out[:: get_datamodule(trainer).held_out_images]))
        planned = {
            "settings": self._settings(trainer, pl_module),
            "judges": {name: reward_model.identity for name, reward_model in pl_module.reward_models.items()},
            "prompts": [{"index": index, "set": each.source, "prompt": each.text} for index, each in prompts.items()],
        }
        for path, other in self.others.items():
            check_comparable(planned, other, path, self._columns(pl_module))
            if differences := scorer_differences(planned, other, self._columns(pl_module)):
                warn(f"`results.compare_with`: {path} was judged otherwise, with {', '.join(differences)}.")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loaded_step = checkpoint["global_step"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        self._show(trainer, pl_module, folder)
        written = [own.dirpath for own in trainer.checkpoint_callbacks if isinstance(own, RoundCheckpoint)]
        config, checkpoint = folder / CONFIG, Path(next(iter(written), None) or folder / "checkpoints") / LAST
        if not self.trained:
            begun = f"{trainer.ckpt_path} is after {trainer.current_epoch}" if trainer.ckpt_path else "`max_epochs` is 0"
            print(f"\nNothing was left to train: {begun} rounds.")
            return
        curves = [logger.root_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        print(
            f"\nThis run:       {folder}\n"
            f"Judge it again: marble-lightning validate -c {config} --ckpt_path {checkpoint}\n"
            + "".join(f"See it:         tensorboard --logdir {Path(root)}\n" for root in curves)
            + f"The plain sum:  marble-lightning fit -c {config} -c balancers/weighted_sum --ckpt_path null"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            folder = run_folder(trainer)
            if trainer.is_global_zero:
                self._show(trainer, pl_module, folder)

    on_test_end = on_validation_end

    def _show(self, trainer: Trainer, module: LightningModule, folder: Path) -> None:
        """Print the tables and write the files."""
        if not isinstance(module, DiffusionNFT) or module.evaluator.trained_scores is None:
            return
        console, data = Console(width=110), get_datamodule(trainer)
        heading = "base" if module.evaluator.adapter(trainer) == "none" else "trained"
        base = None if heading == "base" else module.evaluator.base_scores
        prompts = dict(enumerate(data.held_out[:: data.held_out_images]))
        measured = HeldOutScores(module.reward_models, prompts, module.evaluator.trained_scores, base).sampled()
        found = document(measured, judged=self._judged(trainer, module), settings=self._settings(trainer, module))
        for facts in (found["judged"], found["settings"]):
            console.print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None), soft_wrap=True)
        for name, own in measured.sets().items():
            title = f"{name}, {len(own.prompts)} prompts"
            console.print(held_out_table(list(own.reward_models), own.scores, heading=heading, base=own.base, title=title))
        if tags := measured.tags():
            console.print(tags_table(tags, heading=heading, base=measured.base_tags()))
        if base is None and heading != "base":
            how = (
                "`num_sanity_val_steps: -1` measures it"
                if trainer.state.fn == "fit"
                else "measure it with the same settings and `--model.policy.adapter none`, then use `--results.compare_with`"
            )
            console.print(f"No base beside it: it was not measured, or otherwise than this; {how}.", soft_wrap=True)

        write(folder, found)
        if self.others:
            found["comparison"] = compare_runs({"this run": found, **self.others}, self._columns(module))
            write(folder, found)
            console.print(comparison_table(found["comparison"]))
        console.print(f"All of it: {folder / RESULTS}", soft_wrap=True)

    def _columns(self, module: DiffusionNFT) -> list[str]:
        return self.columns or list(module.reward_models)

    @staticmethod
    def _settings(trainer: Trainer, module: DiffusionNFT) -> dict[str, Any]:
        return {**module.evaluator.settings, "images_per_prompt": get_datamodule(trainer).held_out_images}

    def _judged(self, trainer: Trainer, module: DiffusionNFT) -> dict[str, Any]:
        """What was judged: the model, the adapter of which checkpoint, and after `fit` its balancer and cadence."""
        fitted = trainer.state.fn == "fit"
        written = [own.best_model_path for own in trainer.checkpoint_callbacks if isinstance(own, RoundCheckpoint)]
        path = next(iter(written), None) if fitted else trainer.ckpt_path
        path = path or module.policy.init_lora
        return {
            "command": trainer.state.fn.value if trainer.state.fn else None,
            **module.policy.identity,
            "adapter": module.evaluator.adapter(trainer),
            "checkpoint": str(Path(path).resolve()) if path else None,
            "optimizer_step": trainer.global_step if fitted else self.loaded_step,
            **({"balancer": type(module.balancer).__name__, **module.balancer.cadence} if fitted else {}),
        }
