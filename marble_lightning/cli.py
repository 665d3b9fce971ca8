"""The command line: `marble-lightning fit|validate|test|predict`, wired by LightningCLI; `export` and `configs`."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace, auto_cli, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from balancers import Balancer
from marble_lightning.callback_checks import check_trainer
from marble_lightning.callbacks.gradient_alignment import Harmony
from marble_lightning.callbacks.held_out_images import HeldOutImages
from marble_lightning.callbacks.image_drift import ImageDriftMonitor
from marble_lightning.callbacks.prediction_writer import PredictionWriter
from marble_lightning.callbacks.progress_bar import ProgressBar
from marble_lightning.callbacks.results_writer import Results
from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.content import LAST, TO_EVALUATE, TO_FIT, load_checked
from marble_lightning.checkpoints.files import WholeCheckpointIO, last_of, warn
from marble_lightning.checkpoints.signals import Stops, checkpoint_of_job, status
from marble_lightning.config_files import configs
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.memory import Memory
from marble_lightning.module import DiffusionNFT
from marble_lightning.parsers import Parser, TrainingParser
from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.lora_export import export, redacted_yaml
from marble_lightning.run_folder import RunFolder, folder_of_runs
from marble_lightning.utils.atomic_files import local_path

ABOUT = "Fine-tune Stable Diffusion 3 by reinforcement learning on several rewards at once."
OTHERS = (
    "export: Write a checkpoint's adapter as a LoRA for diffusers and ComfyUI; see `marble-lightning export --help`. "
    "configs: List the configurations that `-c` knows by name, or copy one; see `marble-lightning configs --help`."
)

CKPT_PATH = (
    "Checkpoint to go on from, or to judge: a file in a run's folder `checkpoints`, or `last`, the newest of the last run "
    "of the logger's name, or in `default_root_dir` for loggers without version folders."
)

QUIET = (
    "Found .* in eval mode at the start of training",
    "The '.*_dataloader' does not have many workers",
    "The dirpath has changed",
)
"""Lightning's warnings about what is meant here: a frozen base, prompts that need no loading, a folder per run."""


def a_seed(found: Any) -> int:
    """The seed of everything; LightningCLI also takes true, for one drawn by chance, and false."""
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ValueError(f"`seed_everything` must be a number >= 0, of which all randomness is made. Found {found}.")
    return found


def with_home(value: Any) -> Any:
    """A setting with the home folder in place of a leading `~`, in all that it holds."""
    if isinstance(value, Namespace | dict):
        for name, each in list(value.items()):
            value[name] = with_home(each)
        return value
    if isinstance(value, list):
        return [with_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and re.match(r"~(/|$)", value) else value


class MarbleCLI(LightningCLI):
    """LightningCLI with the balancer as a part of its own and one seed for everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Balancer, "balancer", subclass_mode=True, required=True)
        parser.add_lightning_class_args(Harmony, "harmony")
        parser.add_lightning_class_args(ImageDriftMonitor, "alarms")
        parser.add_lightning_class_args(Memory, "memory")
        parser.add_lightning_class_args(RoundCheckpoint, "checkpoints")
        parser.add_lightning_class_args(HeldOutImages, "pictures")
        parser.add_lightning_class_args(Results, "results")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=a_seed)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> LightningArgumentParser:
        # Lightning's help is of words that find nothing here
        parser = super()._prepare_subcommand_parser(klass, subcommand, **options)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = CKPT_PATH
        return parser

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning reads the file here, unchecked, for hyper-parameters that no checkpoint of ours holds."""

    def before_instantiate_classes(self) -> None:
        """Expand `~`, and do without what Lightning shows or keeps.

        Results take the place of Lightning's table, and files that of images kept in memory.
        """
        options = self.config[self.subcommand] if self.subcommand else self.config
        with_home(options)
        if "verbose" in options:
            options.verbose = False
        if options.get("return_predictions", True) is None:
            options.return_predictions = False

    def after_instantiate_classes(self) -> None:
        """Let checkpoints hold the configuration as config.yaml in the run's folder does, but for secrets: they travel."""
        config = self.config.get(str(self.subcommand), self.config)
        self.model.run_config = redacted_yaml(self._parser(self.subcommand).dump(config, skip_none=False))

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """Add the callbacks that no section sets."""
        config, parser = self.config.get(str(self.subcommand), self.config), self._parser(self.subcommand)
        settings = self._get(self.config_init, "trainer")
        asked = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks]
        sections = {name: self._get(self.config_init, name) for name in parser.callback_keys}
        check_trainer(settings.enable_checkpointing, asked, sections)
        own: list[Callback] = [RunFolder(parser.dump(config, skip_none=False)), Stops()]
        if settings.enable_progress_bar is not False and not any(isinstance(each, BaseProgressBar) for each in asked):
            own.append(ProgressBar())
        self.trainer_defaults["callbacks"] += own
        self.save_config_callback = None  # RunFolder's work
        return super().instantiate_trainer(**options)

    def before_fit(self) -> None:
        """Check the settings before a logger writes anything, then find the checkpoint to resume from.

        It is that of a job which SLURM has queued again, or what `--ckpt_path last` means. That is the last run of the
        logger's name; Lightning looks in the new run's empty folder.
        """
        self._check_settings()
        options, folder = self.config_init[self.subcommand], folder_of_runs(self.trainer)
        if (options.ckpt_path or "").partition(":")[0] in ("best", "hpc", "registry"):  # words of Lightning's
            raise ValueError(f"`ckpt_path` must be a file, or last. Found {options.ckpt_path}.")
        if options.ckpt_path is None and self.subcommand == "fit" and (found := checkpoint_of_job(folder)):
            warn(f"SLURM has queued this job again; it resumes from {found}.")
            options.ckpt_path = str(found)
        if options.ckpt_path == "last":
            found = last_of(self.trainer)
            if found is None and self.subcommand != "fit":
                raise ValueError(f"`ckpt_path` must be a checkpoint. Found `last`, and no run in {folder} has a {LAST}.")
            if found is None:
                warn(f"`--ckpt_path last`: no run in {folder} has a {LAST} yet, so this one begins with the first round.")
            options.ckpt_path = None if found is None else str(found)
        if options.ckpt_path:
            options.ckpt_path = str(local_path("ckpt_path", options.ckpt_path))
            if isinstance(self.trainer.strategy.checkpoint_io, WholeCheckpointIO):
                content = TO_FIT if self.subcommand == "fit" else TO_EVALUATE
                load_checked(options.ckpt_path, content, map_location="cpu", weights_only=True)

    def _check_settings(self) -> None:
        """Let data, model and callbacks refuse settings as their `setup` will, which says again what is only a warning."""
        stage, trainer = str(self.subcommand), self.trainer
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        self.datamodule.trainer = self.model.trainer = trainer
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            self.datamodule.setup(stage)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Results | PredictionWriter):
                    callback.setup(trainer, self.model, stage)
            self.model.check(stage)
        finally:
            logging.disable(before)

    before_validate = before_test = before_predict = before_fit


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` replaces `sys.argv` where given."""
    given = list(sys.argv[1:] if args is None else args)
    for command in (export, configs):  # LightningCLI's subcommands are the trainer's methods; these need no trainer
        if given[:1] == [name := command.__name__]:
            auto_cli(command, args=given[1:], as_positional=False, prog=f"marble-lightning {name}", parser_class=Parser)
            return
    try:
        command_line(args)
    except SIGTERMException as end:
        sys.exit(status(end))
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # where `Stops` does not look, Lightning makes a 1 of it
            end.code = 128 + signal.SIGINT
        raise


def command_line(args: Sequence[str] | None = None, run: bool = True) -> MarbleCLI:
    """The parsed command line; with `run`, after its subcommand ran, otherwise without a subcommand and with all it made."""
    for known in QUIET:
        warnings.filterwarnings("ignore", known)
    set_parsing_settings(subclasses_enabled=[Averaging])  # a schedule of one's own; other settings are what they are
    return MarbleCLI(
        DiffusionNFT,
        PromptDataModule,
        args=list(args) if args is not None else None,
        run=run,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_class=TrainingParser,
        parser_kwargs={"prog": "marble-lightning", "description": ABOUT, "epilog": OTHERS},
        trainer_defaults={"callbacks": []},
    )
