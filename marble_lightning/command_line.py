"""The commands that need a trainer, `fit|validate|test|predict`, wired by LightningCLI."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cached_property
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from balancers import Balancer
from marble_lightning.callback_checks import check_trainer
from marble_lightning.callbacks.gradient_alignment import GradientAlignment
from marble_lightning.callbacks.held_out_images import HeldOutImages
from marble_lightning.callbacks.image_drift import ImageDriftMonitor
from marble_lightning.callbacks.prediction_writer import PredictionWriter
from marble_lightning.callbacks.progress_bar import ProgressBar
from marble_lightning.callbacks.results_writer import Results
from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.content import LAST, TO_EVALUATE, TO_FIT, load_checked
from marble_lightning.checkpoints.files import WholeCheckpointIO, last_of, warn
from marble_lightning.checkpoints.signals import Stops, checkpoint_of_job
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.memory import Memory
from marble_lightning.module import DiffusionNFT
from marble_lightning.parsers import import_classes
from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.lora_export import redact_yaml
from marble_lightning.rehearsal import Rehearsal, begin_rehearsal
from marble_lightning.run_folder import RunFolder, folder_of_runs
from marble_lightning.training_parser import TrainingParser
from marble_lightning.utils.atomic_files import local_path

ABOUT = "Fine-tune Stable Diffusion 3 by reinforcement learning on several rewards at once."
OTHERS = (
    "export: Write a checkpoint's adapter as a LoRA for diffusers and ComfyUI; see `marble-lightning export --help`. "
    "configs: List the configurations that `-c` knows by name, or copy one; see `marble-lightning configs --help`. "
    "sweep: Fit several variants with several seeds; see `marble-lightning sweep --help`. "
    "report: Compare finished runs on one page; see `marble-lightning report --help`. "
    "memory: Print the GPU memory that `fit` needs, without a GPU; it has the options of `fit`."
)

CKPT_PATH = (
    "Checkpoint to resume from or to evaluate: a file in a run's folder `checkpoints`, or `last` for the newest checkpoint "
    "of the last run with the logger's name, or in `default_root_dir` for loggers without version folders."
)

QUIET = (
    "Found .* in eval mode at the start of training",
    "The '.*_dataloader' does not have many workers",
    "The dirpath has changed",
    "LightningCLI's args parameter is intended",
)
"""Lightning's warnings about intended settings: a frozen base, a data loader without workers, a folder per run, arguments
without the name of the command."""


def check_seed(seed: Any) -> int:
    """Check the seed of the run; LightningCLI would also take true, for a random seed, and false.

    Raises:
        ValueError: The seed is not a number >= 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed_everything` must be a number >= 0; it seeds all random generators. Found {seed}.")
    return seed


def expand_home(value: Any) -> Any:
    """Replace a leading `~` by the home folder, in a setting and in all settings nested in it."""
    if isinstance(value, Namespace | dict):
        for name, item in list(value.items()):
            value[name] = expand_home(item)
        return value
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and re.match(r"~(/|$)", value) else value


class MarbleCLI(LightningCLI):
    """LightningCLI with a section for the balancer and one seed for everything."""

    def __init__(self, model: Any, data: Any, *, args: Sequence[str] | None = None, **options: Any) -> None:
        words = sys.argv[1:] if args is None else args
        commands = LightningCLI.subcommands()
        # a parser takes a tenth of a second to build, and only one of four is used
        self._commands = {words[0]: commands[words[0]]} if words and words[0] in commands else commands
        self._rehearsal: Rehearsal | None = None
        with ExitStack() as self._until_end:  # Lightning runs the command here
            # nothing here saves hyper-parameters, for which Lightning would write and read the whole configuration once more
            options = {"load_from_checkpoint_support": False, **options}
            super().__init__(model, data, args=None if args is None else list(args), **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The requested command, or all of them where the command line does not begin with one."""
        return self._commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        import_classes()
        parser.add_lightning_class_args(Balancer, "balancer", subclass_mode=True, required=True)
        parser.add_lightning_class_args(GradientAlignment, "gradient_alignment")
        parser.add_lightning_class_args(ImageDriftMonitor, "image_drift")
        parser.add_lightning_class_args(Memory, "memory")
        parser.add_lightning_class_args(RoundCheckpoint, "checkpoints")
        parser.add_lightning_class_args(HeldOutImages, "held_out_images")
        parser.add_lightning_class_args(Results, "results")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=check_seed)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> LightningArgumentParser:
        # Lightning's help names keywords that are not supported here
        parser = super()._prepare_subcommand_parser(klass, subcommand, **options)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = CKPT_PATH
        return parser

    def _parse_ckpt_path(self) -> None:
        """Do nothing; Lightning would load the unchecked file for hyper-parameters, which these checkpoints do not have."""

    def before_instantiate_classes(self) -> None:
        """Expand `~`, begin a rehearsal, and switch off Lightning's table of metrics and its list of predictions.

        The callback `Results` prints tables instead, and `PredictionWriter` writes images to files.
        """
        options = self.config[self.subcommand] if self.subcommand else self.config
        expand_home(options)
        if self.subcommand == "fit":
            self._rehearsal = begin_rehearsal(options, self._until_end)
        if "verbose" in options:
            options.verbose = False
        if options.get("return_predictions", True) is None:
            options.return_predictions = False

    def instantiate_classes(self) -> None:
        """Create everything. A class that refuses its settings is heard, and not the parser, which lists types."""
        try:
            self._create()
        except ValueError as error:
            refused = error.__cause__
            if refused is None or not str(error).startswith("Does not validate against any of the Union subtypes"):
                raise
            raise refused from None

    def _create(self) -> None:
        super().instantiate_classes()

    @cached_property
    def _config_yaml(self) -> str:
        """The settings of the run, as config.yaml has them."""
        config = self.config.get(str(self.subcommand), self.config)
        return self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)  # parsing has validated it

    def after_instantiate_classes(self) -> None:
        """Keep the configuration for checkpoints, as in config.yaml but without secrets, since checkpoints are shared."""
        self.model.run_config = redact_yaml(self._config_yaml)

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """Add the callbacks that have no section of settings."""
        parser, settings = self._parser(self.subcommand), self._get(self.config_init, "trainer")
        added = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks]
        sections = {name: self._get(self.config_init, name) for name in parser.callback_keys}
        check_trainer(settings.enable_checkpointing, added, sections)
        self._run_folder = RunFolder(self._config_yaml)
        defaults: list[Callback] = [self._run_folder, Stops()]
        if self._rehearsal:
            defaults.append(self._rehearsal)
        if settings.enable_progress_bar is not False and not any(isinstance(item, BaseProgressBar) for item in added):
            defaults.append(ProgressBar())
        self.trainer_defaults["callbacks"] += defaults
        self.save_config_callback = None  # RunFolder writes the configuration
        return super().instantiate_trainer(**options)

    def before_fit(self) -> None:
        """Check the settings before a logger writes anything, then find the checkpoint to resume from.

        A job that SLURM has queued again resumes from its own checkpoint. `--ckpt_path last` means the newest checkpoint of
        the last run with the logger's name; Lightning would search the new run's empty folder.
        """
        self._check_settings(str(self.subcommand))
        if self._rehearsal:
            self._rehearsal.prepare(self.trainer, self.model)
        options, folder = self.config_init[self.subcommand], folder_of_runs(self.trainer)
        if (options.ckpt_path or "").partition(":")[0] in ("best", "hpc", "registry"):  # keywords of Lightning
            raise ValueError(f"`ckpt_path` must be a file, or last. Found {options.ckpt_path}.")
        if options.ckpt_path is None and self.subcommand == "fit" and (checkpoint := checkpoint_of_job(folder)):
            warn(f"SLURM has queued this job again; it resumes from {checkpoint}.")
            options.ckpt_path = self.config[self.subcommand].ckpt_path = str(checkpoint)
            del self._config_yaml  # config.yaml names the checkpoint: a report finds the earlier part of the run by it
            self._run_folder.config = self._config_yaml
        if options.ckpt_path == "last":
            checkpoint = last_of(self.trainer)
            if checkpoint is None and self.subcommand != "fit":
                raise ValueError(f"`ckpt_path` must be a checkpoint. Found `last`, and no run in {folder} has a {LAST}.")
            if checkpoint is None:
                warn(f"`--ckpt_path last`: no run in {folder} has a {LAST} yet, so this one begins with the first round.")
            options.ckpt_path = None if checkpoint is None else str(checkpoint)
        if options.ckpt_path:
            options.ckpt_path = str(local_path("ckpt_path", options.ckpt_path))
            if isinstance(self.trainer.strategy.checkpoint_io, WholeCheckpointIO):
                content = TO_FIT if self.subcommand == "fit" else TO_EVALUATE
                load_checked(options.ckpt_path, content, map_location="cpu", weights_only=True)

    def _check_settings(self, stage: str) -> None:
        """Run the checks that data, model and callbacks repeat in `setup`; warnings are suppressed until then."""
        trainer = self.trainer
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        self.datamodule.trainer = self.model.trainer = trainer
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            self.datamodule.setup(stage)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Results | PredictionWriter):
                    callback.setup(trainer, self.model, stage)
            self.model.check(stage)
        finally:
            logging.disable(level)

    before_validate = before_test = before_predict = before_fit


def command_line(args: Sequence[str] | None = None, run: bool = True, kind: type[MarbleCLI] = MarbleCLI) -> MarbleCLI:
    """Parse the command line, and run its subcommand.

    Args:
        args: Replaces `sys.argv` if given.
        run: Whether to run the subcommand. If false, `args` has no subcommand, and all objects are only created.
        kind: Class of the command line.
    """
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    set_parsing_settings(subclasses_enabled=[Averaging])  # allows custom schedules; other settings have no subclasses
    return kind(
        DiffusionNFT,
        PromptDataModule,
        args=args,
        run=run,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_class=TrainingParser,
        parser_kwargs={"prog": "marble-lightning", "description": ABOUT, "epilog": OTHERS},
        trainer_defaults={"callbacks": []},
    )


class _Check(MarbleCLI):
    """Creates what the command would use, but for the trainer: this machine may lack its accelerator. Nothing runs."""

    def _create(self) -> None:
        config = self.config.clone()
        del config[str(self.subcommand)].trainer
        self.config_init = self.parser.instantiate_classes(config)

    def after_instantiate_classes(self) -> None:
        """Do nothing; there is no trainer and no run."""

    def _set_seed(self) -> None:
        """Do nothing: the seed is for the run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


def check_fit(arguments: Sequence[str]) -> None:
    """Parse arguments of `fit` in this process and create what they name, without loading weights.

    Modules of the working folder can be imported, as in `python -m marble_lightning fit`.

    Args:
        arguments: What follows `fit`.

    Raises:
        ValueError: `fit` would refuse them; with its message.
    """
    errors, path = io.StringIO(), list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(errors):
            command_line(["fit", *arguments], kind=_Check)
    except SystemExit as end:
        if end.code:
            raise ValueError((errors.getvalue().partition("error: ")[2] or errors.getvalue()).strip()) from end
    finally:
        sys.path[:] = path
