"""W&B, MLflow, several loggers and CSV alone: curves, images, tables, run folders and resuming, in local stores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.evaluation.results import read
from tests.helpers.command_line import options

pytestmark = [
    pytest.mark.integration,
    *(pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of the trackers' packages
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CURVES = {"held_out/jpeg", "train/jpeg", "alpha/jpeg", "time/training", "loss"}


def fit(checkpoints: Path, folder: Path, loggers: object, *more: str, rounds: int = 1) -> None:
    settings = {"trainer.max_epochs": rounds, "trainer.check_val_every_n_epoch": 1, "trainer.logger": json.dumps(loggers)}
    main(["fit", *options(checkpoints, folder, **settings), *more])


def wandb_logger(folder: Path, **more: str) -> dict[str, object]:
    return {"class_path": "WandbLogger", "init_args": {"project": "tiny", "offline": True, "save_dir": str(folder), **more}}


def mlflow_logger(folder: Path, **more: str) -> dict[str, object]:
    store = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_location": str(folder / "artifacts")}
    return {"class_path": "MLFlowLogger", "init_args": {"experiment_name": "tiny", **store, **more}}


def check_folders(folder: Path) -> None:
    """Two runs in a row have the first two run folders, with all files; the second continues the first."""
    for index in range(2):
        run = folder / f"version_{index}"
        assert read(run)["evaluated"]["optimizer_step"] == 2 * (index + 1)
        assert (run / "checkpoints/last.ckpt").exists() and (run / f"held_out_00000{2 * (index + 1)}.png").exists()


def test_wandb(checkpoints, tmp_path, monkeypatch):
    import wandb  # slow to import

    monkeypatch.setenv("WANDB_MODE", "offline")  # the logger sets it, and would leave it set
    monkeypatch.chdir(tmp_path)
    names: list[set[str]] = []
    for rounds, more in ((1, []), (2, ["--ckpt_path", "last"])):
        fit(checkpoints, tmp_path, wandb_logger(tmp_path, version="run1"), *more, rounds=rounds)
        names.append(set(dict(wandb.run.summary)))
        wandb.finish()
    assert all(names[index] >= CURVES | {"held_out", "cosines", "results"} for index in range(2))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*-run1"))
    assert len(runs) == 2
    for run in runs:
        assert {file.name.split("_")[0] for file in run.glob("files/media/images/*.png")} == {"held", "cosines"}
        (table,) = run.glob("files/media/table/results_*.json")
        content = json.loads(table.read_text())
        assert content["columns"] == ["set", "reward", "mean", "error", "n"] and ["all", "jpeg"] in [
            r[:2] for r in content["data"]
        ]
    check_folders(tmp_path)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([], marks=pytest.mark.slow, id="alone"),
        pytest.param([{"class_path": "CSVLogger", "init_args": {"name": "csv"}}], id="and_csv"),
    ],
)
def test_mlflow(checkpoints, tmp_path, monkeypatch, others):
    from mlflow.tracking import MlflowClient  # slow to import

    monkeypatch.chdir(tmp_path)
    for other in others:
        other["init_args"]["save_dir"] = str(tmp_path)
    fit(checkpoints, tmp_path, [mlflow_logger(tmp_path), *others])
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (first,) = client.search_runs([experiment])
    more = [mlflow_logger(tmp_path, run_id=first.info.run_id), *others]
    fit(checkpoints, tmp_path, more, "--ckpt_path", "last", rounds=2)
    (run,) = client.search_runs([experiment])  # the same run, continued
    assert set(run.data.metrics) >= CURVES and run.info.status == "FINISHED"
    assert next(point.step for point in client.get_metric_history(run.info.run_id, "held_out/jpeg")) == 0  # the base
    images = {file.path.split("/")[1].split("+")[0] for file in client.list_artifacts(run.info.run_id, "images")}
    assert images == {"held_out", "cosines"}
    table = (tmp_path / "artifacts" / run.info.run_id / "artifacts/results.csv").read_bytes()
    assert table == (tmp_path / "version_1/results.csv").read_bytes()
    check_folders(tmp_path)
    written = list(tmp_path.glob("csv/version_*/metrics.csv"))
    assert len(written) == 2 * len(others)
    assert all(set(file.read_text().splitlines()[0].split(",")) >= CURVES for file in written)


@pytest.mark.slow
def test_csv_alone(checkpoints, tmp_path):
    logger = {"class_path": "CSVLogger", "init_args": {"name": "csv", "save_dir": str(tmp_path)}}
    fit(checkpoints, tmp_path, logger)
    fit(checkpoints, tmp_path, logger, "--ckpt_path", "last", rounds=2)
    for index in range(2):
        assert set((tmp_path / f"csv/version_{index}/metrics.csv").read_text().splitlines()[0].split(",")) >= CURVES
    check_folders(tmp_path / "csv")
