"""The callback that prints a run's results as tables and writes them to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.content import LAST
from marble_lightning.checkpoints.files import warn
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.comparison import check_comparable, compare_runs, scorer_differences
from marble_lightning.evaluation.fallen_metrics import fallen_metrics
from marble_lightning.evaluation.results import COLUMNS, HeldOutScores, document, mean_rows, read, write
from marble_lightning.evaluation.tables import comparison_table, held_out_table, tags_table
from marble_lightning.module import DiffusionNFT
from marble_lightning.run_folder import run_folder
from marble_lightning.utils.loggers import log_table
from marble_lightning.utils.peak_memory import peak_memory
from marble_lightning.utils.run_files import CONFIG, RESULTS


class Results(Callback):
    """Prints tables of held-out scores by prompt set, and writes results.json and results.csv to the run's folder.

    The means also go to loggers that show tables. After `fit` they include the base, and commands for the next steps are
    printed. results.json also has the peak memory of the first process. During `fit`, an evaluation in which a metric has
    fallen below the base's scores although a reward rose is reported by a warning.

    Args:
        compare_with: Other runs, each given by its results.json or its folder. The composite score of each run, the
            mean over rewards of z-scores among the runs, is printed too. All must have the same settings and prompts; null
            for none.
        columns: Rewards and metrics in the composite; null for all.
    """

    def __init__(self, compare_with: list[str] | None = None, columns: list[str] | None = None) -> None:
        self.compare_with, self.columns = compare_with or [], columns
        self.others: dict[str, dict[str, Any]] = {}
        self.loaded_step: int | None = None
        """Optimizer step of the evaluated checkpoint."""
        self.trained = False
        """Whether the run has trained at least one round."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings and runs that cannot be compared, before anything is sampled."""
        every, rounds = trainer.check_val_every_n_epoch, trainer.max_epochs or 0  # -1: unlimited
        if stage == "fit" and trainer.limit_val_batches and every and rounds > 0 and rounds % every:
            raise ValueError(
                f"`max_epochs` must be a multiple of `check_val_every_n_epoch`, {every}, so that the last round is "
                f"evaluated. Found {rounds}."
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
            "reward_models": {name: reward_model.identity for name, reward_model in pl_module.reward_models.items()},
            "prompts": [{"index": index, "set": prompt.source, "prompt": prompt.text} for index, prompt in prompts.items()],
        }
        for path, other in self.others.items():
            check_comparable(planned, other, path, self._columns(pl_module))
            if differences := scorer_differences(planned, other, self._columns(pl_module)):
                warn(f"`results.compare_with`: {path} was scored with other settings: {', '.join(differences)}.")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loaded_step = checkpoint["global_step"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or not isinstance(pl_module, DiffusionNFT):
            return
        self._show(trainer, pl_module, folder)
        folders = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, RoundCheckpoint)]
        config, checkpoint = folder / CONFIG, Path(next(iter(folders), None) or folder / "checkpoints") / LAST
        if not self.trained:
            reason = f"{trainer.ckpt_path} is after {trainer.current_epoch}" if trainer.ckpt_path else "`max_epochs` is 0"
            print(f"\nNothing was left to train: {reason} rounds.")
            return
        if 0 < (evaluated := pl_module.evaluator.evaluated_step) < trainer.global_step:
            warn(
                f"The results are those of the last evaluation, after optimizer step {evaluated}. The run stopped "
                f"after step {trainer.global_step}; `validate` evaluates its last checkpoint."
            )
        curves = [logger.root_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        validate = f"marble-lightning validate -c {config} --ckpt_path"
        print(
            f"\n{''.join(f'Stopped:        {reason}{chr(10)}' for reason in reasons_to_stop(trainer))}"
            f"This run:       {folder}\n"
            f"Evaluate again: {validate} {checkpoint}\n"
            + "".join(f"Best {name}: {validate} {path}\n" for name, path in best_checkpoints(trainer).items())
            + "".join(f"Curves:         tensorboard --logdir {Path(root)}\n" for root in curves)
            + f"Baseline:       marble-lightning fit -c {config} -c balancers/weighted_sum --ckpt_path null"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            folder = run_folder(trainer)
            if trainer.is_global_zero:
                self._show(trainer, pl_module, folder)
        elif not trainer.sanity_checking and isinstance(pl_module, DiffusionNFT):
            evaluator = pl_module.evaluator
            trained_on = {name: name in pl_module.rewards for name in pl_module.reward_models}
            if evaluator.base_scores is not None and evaluator.trained_scores is not None:
                for sentence in fallen_metrics(trained_on, evaluator.base_scores, evaluator.trained_scores):
                    warn(f"Round {trainer.current_epoch}: {sentence}")

    on_test_end = on_validation_end

    def _show(self, trainer: Trainer, module: LightningModule, folder: Path) -> None:
        """Print the tables and write the files."""
        if not isinstance(module, DiffusionNFT) or module.evaluator.trained_scores is None:
            return
        console, data = Console(width=110), get_datamodule(trainer)
        heading = "base" if module.evaluator.adapter(trainer) == "none" else "trained"
        base = None if heading == "base" else module.evaluator.base_scores
        prompts = dict(enumerate(data.held_out[:: data.held_out_images]))
        held_out = HeldOutScores(module.reward_models, prompts, module.evaluator.trained_scores, base)
        results = document(
            held_out,
            evaluated=self._evaluated_policy(trainer, module),
            settings=self._settings(trainer, module),
            peak_memory=peak_memory(module.device),
        )
        for facts in (results["evaluated"], results["settings"]):
            console.print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None), soft_wrap=True)
        for name, of_set in held_out.sets().items():
            title = f"{name}, {len(of_set.prompts)} prompts"
            names = list(of_set.reward_models)
            console.print(held_out_table(names, of_set.scores, heading=heading, base=of_set.base, title=title))
        if tags := held_out.tags():
            console.print(tags_table(tags, heading=heading, base=held_out.base_tags()))
        if base is None and heading != "base":
            remedy = (
                "`num_sanity_val_steps: -1` evaluates it"
                if trainer.state.fn == "fit"
                else "evaluate it with the same settings and `--model.policy.adapter none`, and use `--results.compare_with`"
            )
            console.print(
                f"No scores of the base to compare with: it was not evaluated, or with other settings; {remedy}.",
                soft_wrap=True,
            )

        write(folder, results)
        if self.others:
            results["comparison"] = compare_runs({"this run": results, **self.others}, self._columns(module))
            write(folder, results)
            console.print(comparison_table(results["comparison"]))
        log_table(trainer, "results", COLUMNS, mean_rows(results), trainer.global_step)
        console.print(f"All results: {folder / RESULTS}", soft_wrap=True)

    def _columns(self, module: DiffusionNFT) -> list[str]:
        return self.columns or list(module.reward_models)

    @staticmethod
    def _settings(trainer: Trainer, module: DiffusionNFT) -> dict[str, Any]:
        return {**module.evaluator.settings, "images_per_prompt": get_datamodule(trainer).held_out_images}

    def _evaluated_policy(self, trainer: Trainer, module: DiffusionNFT) -> dict[str, Any]:
        """Facts of the evaluated policy: model, adapter and checkpoint, and after `fit` the balancer and its cadence."""
        fitted, evaluated = trainer.state.fn == "fit", module.evaluator.evaluated_step
        at_end = evaluated == trainer.global_step
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RoundCheckpoint)]
        if fitted and evaluated != self.loaded_step:
            files = (callback.best_model_path if at_end else callback.file_at(evaluated) for callback in callbacks)
            path = next(files, None)  # None if it has been removed
        else:
            path = trainer.ckpt_path
        path = path or (module.policy.init_lora if at_end or not fitted else None)
        return {
            "command": trainer.state.fn.value if trainer.state.fn else None,
            **module.policy.identity,
            "adapter": module.evaluator.adapter(trainer),
            "checkpoint": str(Path(path).resolve()) if path else None,
            "optimizer_step": evaluated if fitted else self.loaded_step,
            **({"balancer": type(module.balancer).__name__, **module.balancer.cadence} if fitted else {}),
        }


def reasons_to_stop(trainer: Trainer) -> list[str]:
    """Why an EarlyStopping ended this run."""
    return [
        callback.stopping_reason_message
        for callback in trainer.early_stopping_callbacks
        if isinstance(callback, EarlyStopping)
        and callback.stopping_reason_message
        and callback.stopped_epoch == trainer.current_epoch - 1  # not in the run that this one resumes
    ]


def best_checkpoints(trainer: Trainer) -> dict[str, str]:
    """Path of the best checkpoint by monitored metric, for the checkpoint callbacks that a user has added."""
    return {
        callback.monitor: callback.best_model_path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and not isinstance(callback, RoundCheckpoint)
        if callback.monitor and callback.best_model_path
    }
