"""validate, test and predict: adapters, settings, written files, and equal results on any number of ranks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.evaluation.results import read
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.scorer import Scorer
from rewards import PickScore
from tests.helpers import forks
from tests.helpers.command_line import small_options

SAMPLED = ("prompt", "index", "steps", "solver", "guidance", "resolution", "seed", "adapter")
FACTS = (*SAMPLED, "model", "revision", "text_length", "text_encoder_3", "dtype", "vae_tiling", "checkpoint")

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


@pytest.fixture(scope="module")
def fitted(checkpoints, tmp_path_factory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("fitted")
    main(["fit", *small_options(checkpoints, folder), "--model.optimizer.init_args.lr", "0.05"])
    return folder / "tiny/version_0"


@pytest.fixture
def trained(fitted) -> str:
    """A checkpoint with changed adapters."""
    return str(fitted / "checkpoints/last.ckpt")


def in_a_run(options: list[str], command: str, name: str, *more: str) -> None:
    """Run a command with the run folder `tiny/{name}`."""
    main([command, *options, "--trainer.logger.version", name, *more])


def in_runs_on_two_ranks(folder: Path, options: list[str], *runs: tuple[str, ...]) -> None:
    """Run commands on two ranks; each run is (command, name of the run folder, further options)."""
    options = [*options, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    commands = [[command, *options, "--trainer.logger.version", name, *more] for command, name, *more in runs]
    failed = forks.call(forks.on_two_ranks_each, commands, folder / "output")
    assert not failed, failed


def scores(results: dict[str, Any]) -> list[list[float]]:
    return [list(prompt["scores"].values()) for prompt in results["prompts"]]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()]


def facts_of(file: Path) -> dict[str, str]:
    with Image.open(file) as image:
        return dict(image.info)


@pytest.mark.integration
def test_images_and_results_do_not_depend_on_batch_size_and_ranks(small, trained, tmp_path):
    """Nine images: one rank has a batch more than the other."""
    small = [*small, "--data.held_out_per_source", "3", "--ckpt_path", trained]
    in_a_run(small, "validate", "one", "--data.held_out_batch_size", "4")
    in_runs_on_two_ranks(
        tmp_path, small,
        ("validate", "two", "--data.held_out_batch_size", "2"), ("predict", "p2", "--data.held_out_batch_size", "4"),
    )  # fmt: skip
    one, two = read(tmp_path / "tiny/one"), read(tmp_path / "tiny/two")
    assert [prompt["index"] for prompt in two["prompts"]] == list(range(9))
    for of_one, of_two in zip(scores(one), scores(two), strict=True):
        assert of_two == pytest.approx(of_one, abs=1e-5)
    for name, means in one["sets"].items():
        for reward, expected in means.items():
            assert two["sets"][name][reward]["n"] == expected["n"]
            for field in ("mean", "error"):
                assert two["sets"][name][reward][field] == pytest.approx(expected[field], abs=1e-5)
    assert np.abs(pixels(tmp_path / "tiny/one/held_out.png") - pixels(tmp_path / "tiny/two/held_out.png")).max() <= 1

    in_a_run(small, "predict", "p1", "--data.held_out_batch_size", "1")
    in_a_run(small, "predict", "p3", "--data.held_out_batch_size", "3")
    first, *others = (tmp_path / f"tiny/{name}/predictions" for name in ("p1", "p3", "p2"))
    files = sorted(file.name for file in first.glob("*.png"))
    assert files == [f"{index:05d}.png" for index in range(9)]
    for other in others:
        assert sorted(file.name for file in other.glob("*.png")) == files
        for file in files:
            assert np.abs(pixels(first / file) - pixels(other / file)).max() <= 1
            assert facts_of(first / file) == facts_of(other / file)
        lines = [records(predictions) for predictions in (first, other)]
        for expected, actual in zip(*lines, strict=True):
            assert actual | {"scores": None} == expected | {"scores": None}
            assert actual["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    predicted = [record["scores"] for record in records(first)]
    assert [list(by_name.values()) for by_name in predicted] == [pytest.approx(row, abs=1e-4) for row in scores(one)]


@pytest.mark.integration
def test_the_ema_adapter_the_trained_one_or_the_base(small, fitted, trained, tmp_path, monkeypatch):
    for name in ("ema", "trained"):
        in_a_run(small, "validate", name, "--ckpt_path", trained, "--model.policy.adapter", name)
    in_a_run(small, "test", "none", "--model.policy.adapter", "none")
    ema, trained_adapter, base = (read(tmp_path / f"tiny/{name}") for name in ("ema", "trained", "none"))
    of_fit = read(fitted)
    assert scores(ema) == scores(of_fit)
    assert scores(trained_adapter) != scores(ema)
    assert [prompt["base"] for prompt in of_fit["prompts"]] == [prompt["scores"] for prompt in base["prompts"]]
    assert base["all"]["pickscore"].keys() == {"mean", "error", "n"}
    assert trained_adapter["all"]["pickscore"]["base"] == {
        name: base["all"]["pickscore"][name] for name in ("mean", "error", "n")
    }

    checkpoint = str(Path(trained).resolve())
    facts = {"model": str(small[small.index("--model.policy.path") + 1]), "revision": None, "checkpoint": checkpoint}
    facts |= {"text_length": 1, "text_encoder_3": "checkpoint", "dtype": "float32", "vae_tiling": False}
    cadence = {"balancer": "MARBLE", "refresh_every": 5, "ema_decay": 0.7, "estimate_share": 1.0, "normalize": True}
    cadence |= {"refresh_alpha": "smoothed", "uniform_after_step": None, "gram": "own", "gram_decay": 0.0}
    assert of_fit["evaluated"] == {**facts, **cadence, "command": "fit", "adapter": "ema", "optimizer_step": 2}
    assert trained_adapter["evaluated"] == {**facts, "command": "validate", "adapter": "trained", "optimizer_step": 2}
    assert base["evaluated"] == {**facts, "command": "test", "adapter": "none", "checkpoint": None, "optimizer_step": None}
    assert of_fit["peak_memory"]["of"] == "process" and 0.1 < of_fit["peak_memory"]["gib"] < 100
    assert of_fit["settings"] == base["settings"] == {
        "steps": 2, "solver": "euler", "guidance": 1.0, "resolution": 16, "seed": 0, "images_per_prompt": 1
    }  # fmt: skip
    assert (fitted / "held_out_000000.png").exists()
    assert (fitted / "held_out_000002.png").exists()
    assert (tmp_path / "tiny/none/held_out.png").exists()

    folder = ["--predictions.folder", str(tmp_path / "out"), "--predictions.scores", "false"]
    main(["predict", *small, *folder, "--ckpt_path", trained])
    main(["predict", *small, *folder, "--ckpt_path", trained])
    facts = facts_of(tmp_path / "out/00000.png")
    assert (facts["adapter"], facts["checkpoint"]) == ("ema", checkpoint)
    monkeypatch.setattr(SD3Policy, "sample", lambda *_: pytest.fail("something was sampled"))
    with pytest.raises(ValueError, match=r"00000\.png with adapter 'ema' instead of 'trained'; choose another folder"):
        main(["predict", *small, *folder, "--ckpt_path", trained, "--model.policy.adapter", "trained"])
    with pytest.raises(ValueError, match=r"00000\.png with adapter 'ema' instead of 'none', checkpoint '.*' instead"):
        main(["predict", *small, *folder])
    with pytest.raises(ValueError, match="`ckpt_path` must be null where `policy.adapter` is none: .*choose the adapter"):
        main(["validate", *small, "--model.policy.adapter", "none", "--ckpt_path", trained])


@pytest.mark.integration
def test_comparison_of_runs_and_settings_that_prevent_it(small, tmp_path, capsys, monkeypatch):
    in_a_run(small, "validate", "plain")
    compare = ["--results.compare_with", f"[{tmp_path}/tiny/plain, {tmp_path}/tiny/plain/results.json]"]
    in_a_run(small, "validate", "compared", *compare, "--results.columns", "[pickscore, ocr]")
    comparison = read(tmp_path / "tiny/compared")["comparison"]
    assert [run["run"] for run in comparison] == [
        "this run",
        f"{tmp_path}/tiny/plain",
        f"{tmp_path}/tiny/plain/results.json",
    ]
    assert "composite: mean z-score over these runs" in capsys.readouterr().out

    monkeypatch.setattr("marble_lightning.policies.sd3.load_pipeline", lambda *_, **__: pytest.fail("weights were loaded"))
    changed = {"seed": "5", "guidance": "2.0", "resolution": "32", "solver": "dpm2", "steps": "3"}
    options = [part for name, value in changed.items() for part in (f"--model.evaluation.{name}", value)]
    with pytest.raises(
        ValueError, match=r"Found .*/plain with steps 2 instead of 3, solver euler instead of dpm2, guidance"
    ):
        in_a_run(small, "validate", "other", *compare, *options)
    with pytest.raises(ValueError, match="with 6 prompts instead of 3;"):
        in_a_run(small, "test", "fewer", *compare, "--data.held_out_per_source", "1")


@pytest.mark.integration
def test_predict_samples_a_prompt_file_and_records_the_settings(small, tmp_path):
    (tmp_path / "mine.txt").write_text("a red circle\n\nein Kreis, größer als 5 €\n")
    folder = ["--predictions.folder", str(tmp_path / "out"), "--data.predict_file", str(tmp_path / "mine.txt")]
    options = [*small, *folder, "--data.predict_images", "2", "--model.evaluation.resolution", "32"]
    main(["predict", *options, "--model.evaluation.guidance", "3", "--model.evaluation.seed", "7"])
    lines = records(tmp_path / "out")
    assert [line["prompt"] for line in lines] == ["a red circle"] * 2 + ["ein Kreis, größer als 5 €"] * 2
    assert all(line["scores"].keys() == {"pickscore", "hpsv2", "clipscore"} and line["source"] == "mine" for line in lines)
    assert all(pixels(tmp_path / "out" / line["file"]).shape == (32, 32, 3) for line in lines)
    assert (pixels(tmp_path / "out/00000.png") != pixels(tmp_path / "out/00001.png")).any()
    path = str(small[small.index("--model.policy.path") + 1])
    sampled = ("ein Kreis, größer als 5 €", "3", "2", "euler", "3.0", "32", "7", "none")
    facts = (*sampled, path, "None", "1", "checkpoint", "float32", "False", "none")
    assert facts_of(tmp_path / "out/00003.png") == dict(zip(FACTS, facts, strict=True))


@pytest.mark.integration
@pytest.mark.parametrize("command", [pytest.param("validate", marks=pytest.mark.slow), "fit"])
def test_text_encoders_and_rewards_take_turns(small, monkeypatch, command):
    """Held-out prompts are encoded at once with any batch size, while rewards are off the device."""
    calls = []

    def record(owner, name, label):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *given, **named: (calls.append(label), real(self, *given, **named))[1])

    record(SD3Policy, "encode", "encode")
    record(Scorer, "release", "release")
    record(Scorer, "_score", "score")
    offload = ["--model.scoring.offload", "true", "--data.held_out_batch_size", "1", "--model.evaluation.guidance", "2"]
    main([command, *small, *offload])
    before_encode = [before for before, now in pairwise(calls) if now == "encode"]
    assert before_encode == ["release"] * (1 if command == "validate" else 3)  # `fit` also encodes in each of two rounds
    assert calls.count("score") > 30


@pytest.mark.integration
def test_a_base_with_another_text_length_is_not_compared(small, trained, tmp_path, capsys):
    """The text length is part of the policy's identity, since it changes the images."""
    in_a_run(small, "validate", "longer", "--ckpt_path", trained, "--model.policy.text_length", "8")
    assert "base" not in read(tmp_path / "tiny/longer")["prompts"][0]
    assert "evaluate it with the same settings and `--model.policy.adapter none`" in " ".join(
        capsys.readouterr().out.split()
    )
    assert read(tmp_path / "tiny/longer")["evaluated"]["text_length"] == 8


@pytest.mark.integration
def test_without_scores_no_reward_model_is_loaded(small, tmp_path, monkeypatch):
    line = {"prompt": "a circle", "include": [{"class": "circle", "count": 1}]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"source": "x"}) + "\n")
    monkeypatch.setattr(PickScore, "setup", lambda self: pytest.fail("a reward model was loaded"))
    options = [*small, "--predictions.folder", str(tmp_path / "out"), "--predictions.scores", "false"]
    main(["predict", *options, "--data.predict_file", str(tmp_path / "mine.jsonl")])
    lines = records(tmp_path / "out")
    assert [line["source"] for line in lines] == ["mine", "x"]
    assert [line["scores"] for line in lines] == [{}, {}]


@pytest.mark.integration
def test_images_are_only_replaced_by_images_with_the_same_facts(small, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("a red circle\na blue square\n")
    options = [*small, "--predictions.folder", str(tmp_path / "out"), "--predictions.scores", "false"]
    options += ["--data.predict_file", str(tmp_path / "mine.txt")]
    main(["predict", *options])
    before = pixels(tmp_path / "out/00001.png")
    content = (tmp_path / "out/00001.png").read_bytes()
    (tmp_path / "out/00000.png").write_bytes(b"")  # as after a full disk
    (tmp_path / "out/00001.png").write_bytes(content[:-20])
    main(["predict", *options])
    assert (pixels(tmp_path / "out/00001.png") == before).all()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png", "images.jsonl"]

    monkeypatch.setattr("marble_lightning.policies.sd3.load_pipeline", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(
        ValueError, match=r"`predictions\.folder` must not .*00000\.png with seed '0' instead of '1'; choose"
    ):
        main(["predict", *options, "--model.evaluation.seed", "1"])
    (tmp_path / "mine.txt").write_text("a red circle\na blue cross\n")
    with pytest.raises(ValueError, match=r"00001\.png with prompt 'a blue square' instead of 'a blue cross'"):
        main(["predict", *options])
    (tmp_path / "mine.txt").write_text("a red circle\n")
    with pytest.raises(ValueError, match=r"00001\.png of the prompt 'a blue square', beyond the requested prompts"):
        main(["predict", *options])
    with pytest.raises(ValueError, match=r"`predictions\.folder` must be a folder\. Found a file, .*mine\.txt"):
        main(["predict", *options, "--predictions.folder", str(tmp_path / "mine.txt/out")])
    Image.new("RGB", (4, 4)).save(tmp_path / "out/00000.png")
    with pytest.raises(ValueError, match=r"00000\.png with prompt 'unknown' instead of"):
        main(["predict", *options])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"`data\.predict_file` must be a \.txt .* Found no file .*none\.txt"),
        ("mine.json", "{}", r"`data\.predict_file` must be a \.txt with .* Found .*mine\.json"),
        ("empty.txt", "\n \n", "must have at least one prompt. Found none in .*empty.txt"),
        ("mine.jsonl", '{"text": "a"}', r"mine\.jsonl:1 must be a JSON object with a text under `prompt`"),
    ],
)
def test_prompt_files_that_cannot_be_read(small, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        main(["predict", *small, "--data.predict_file", str(tmp_path / name)])


def test_more_processes_than_images(small, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("a red circle\n")
    monkeypatch.setattr("marble_lightning.checks.Trainer.world_size", 2)
    with pytest.raises(ValueError, match="an image for each of the 2 processes to sample. Found 1; use fewer"):
        main(["predict", *small, "--data.predict_file", str(tmp_path / "mine.txt")])
