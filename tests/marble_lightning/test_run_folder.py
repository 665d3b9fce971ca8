"""Every run has its own folder, with any logger."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from marble_lightning.checkpoints.files import last_of
from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.evaluation.results import read
from marble_lightning.module import DiffusionNFT
from marble_lightning.run_folder import RunFolder, folder_of_runs, run_folder
from tests.helpers.command_line import options

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]

ONE = {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1}


class Online(Logger):
    """A logger without version folders, like those of W&B and MLflow."""

    instances: ClassVar[list[Online]] = []

    def __init__(self, save_dir: str | None = ".") -> None:
        super().__init__()
        Online.instances.append(self)
        self.folder = save_dir
        self.metrics: dict[str, float] = {}
        self.images: dict[str, Any] = {}

    save_dir = property(lambda self: self.folder)
    name = property(lambda self: "project")
    version = property(lambda self: "a1b2c3")

    def log_metrics(self, metrics, step=None):
        self.metrics.update(metrics)

    def log_hyperparams(self, params, *arguments, **options):
        pass

    def log_image(self, key, images, step):
        self.images[key] = images


def run(folder: Path, logger: Any) -> tuple[Path, list[str]]:
    """The folder of a new run, and the folders of its ModelCheckpoints."""
    callback, best = RunFolder("a: 1\n"), ModelCheckpoint(folder / "best")
    default = ModelCheckpoint(monitor="loss")
    trainer = Trainer(
        logger=logger, callbacks=[callback, best, default], default_root_dir=folder, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    callback.setup(trainer, DiffusionNFT.__new__(DiffusionNFT), "fit")
    assert run_folder(trainer) == callback.folder
    return callback.folder, [str(best.dirpath), str(default.dirpath)]


@pytest.mark.parametrize(
    ("logger", "names"),
    [
        (lambda folder: False, ["version_0", "version_1", "version_2"]),
        (lambda folder: Online(str(folder)), ["version_0", "version_1", "version_2"]),
        (lambda folder: Online(None), ["version_0", "version_1", "version_2"]),
        (lambda folder: CSVLogger(folder, "tiny"), ["tiny/version_0", "tiny/version_1", "tiny/version_2"]),
        (lambda folder: TensorBoardLogger(folder, "tiny", "mine"), ["tiny/mine", "tiny/mine_1", "tiny/mine_2"]),
        (lambda folder: TensorBoardLogger(folder, "", "mine", sub_dir="x"), ["mine", "mine_1", "mine_2"]),
    ],
)
def test_every_run_gets_a_new_folder(tmp_path, logger, names):
    for name in names:
        folder, checkpoints = run(tmp_path, logger(tmp_path))
        assert folder == tmp_path / name
        assert checkpoints == [str(tmp_path / "best"), str(folder / "checkpoints")]
        assert (folder / "config.yaml").read_text() == "a: 1\n"
        assert stat.S_IMODE((folder / "config.yaml").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["results.json", "checkpoints"])
def test_folders_of_runs_without_a_configuration_are_not_used(tmp_path, content):
    (tmp_path / "mine" / content).mkdir(parents=True)
    assert run(tmp_path, TensorBoardLogger(tmp_path, "", "mine"))[0] == tmp_path / "mine_1"


def test_last_is_found_in_folders_of_earlier_runs_without_a_logger(tmp_path):
    trainer = Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    assert folder_of_runs(trainer) == tmp_path and last_of(trainer) == tmp_path / "checkpoints/last.ckpt"


SEVERAL = [
    {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"name": "csv"}},
    {"class_path": f"{__name__}.Online"},
    {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"name": "board", "version": "mine"}},
]


@pytest.mark.integration
@pytest.mark.parametrize(
    "loggers", [pytest.param(False, marks=pytest.mark.slow, id="none"), pytest.param(SEVERAL, id="several")]
)
def test_a_run_is_resumed_and_evaluated_with_any_logger(checkpoints, tmp_path, monkeypatch, capsys, loggers):
    monkeypatch.chdir(tmp_path)
    for logger in loggers or []:
        logger.setdefault("init_args", {})["save_dir"] = str(tmp_path)
    Online.instances.clear()
    run_options = options(checkpoints, tmp_path, **ONE | {"trainer.logger": json.dumps(loggers)})
    main(["fit", *run_options])
    first = capsys.readouterr().out
    main(["fit", *run_options, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    main(["validate", *run_options, "--ckpt_path", "last"])
    names = [f"csv/version_{index}" if loggers == SEVERAL else f"version_{index}" for index in range(3)]
    evaluated = [read(tmp_path / name)["evaluated"] for name in names]
    assert [(facts["command"], facts["optimizer_step"]) for facts in evaluated] == [("fit", 2), ("fit", 4), ("validate", 4)]
    assert evaluated[2]["checkpoint"] == str((tmp_path / names[1] / "checkpoints/last.ckpt").resolve())
    assert all(list((tmp_path / name).glob("held_out*.png")) for name in names)
    assert f"-c {tmp_path / names[0]}/config.yaml --ckpt_path {tmp_path / names[0]}/checkpoints/last.ckpt" in first

    for online in Online.instances[:2]:
        assert {"held_out", "cosines"} == set(online.images) and "held_out/jpeg" in online.metrics
    assert ("tensorboard --logdir" in first) == (loggers == SEVERAL)
    if loggers == SEVERAL:
        assert f"tensorboard --logdir {tmp_path}/board\n" in first
        events = EventAccumulator(str(tmp_path / "board/mine"), size_guidance={"images": 0}).Reload()
        assert set(events.Tags()["images"]) == {"held_out", "cosines"}
        assert len(events.Scalars("held_out/jpeg")) >= 2  # the base and the first round
