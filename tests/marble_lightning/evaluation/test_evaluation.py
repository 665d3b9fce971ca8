"""validate, test and predict: which adapter, how, what is written, and the same on any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from marble_lightning.cli import QUIET, main
from marble_lightning.evaluation.results import read
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.scorer import Scorer
from rewards import PickScore
from tests.helpers import ROOT, forks

FACTS = (
    "prompt", "index", "steps", "solver", "guidance", "resolution", "seed", "adapter",
    "model", "revision", "text_length", "text_encoder_3", "dtype", "vae_tiling", "checkpoint",
)  # fmt: skip

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


@pytest.fixture
def trained(small, tmp_path) -> str:
    """A checkpoint whose adapters have moved."""
    main(["fit", *small, "--model.optimizer.init_args.lr", "0.05"])
    return str(tmp_path / "tiny/version_0/checkpoints/last.ckpt")


def in_a_run(options: list[str], command: str, name: str, *more: str) -> None:
    """A command whose run folder is `tiny/{name}`."""
    main([command, *options, "--trainer.logger.version", name, *more])


def in_runs_on_two_ranks(folder: Path, options: list[str], *runs: tuple[str, ...]) -> None:
    """Commands, each with the name of its run folder and more options."""
    options = [*options, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    commands = [[command, *options, "--trainer.logger.version", name, *more] for command, name, *more in runs]
    ended = subprocess.run(
        [sys.executable, forks.__file__, str(folder / "said"), json.dumps(commands)], cwd=ROOT,
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


def scores(found: dict[str, Any]) -> list[list[float]]:
    return [list(each["scores"].values()) for each in found["prompts"]]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()]


def told_by(file: Path) -> dict[str, str]:
    with Image.open(file) as picture:
        return dict(picture.info)


def test_pictures_and_results_are_the_same_at_any_batch_size_and_number_of_ranks(small, trained, tmp_path):
    """Nine images: one rank has a batch more than the other."""
    small = [*small, "--data.held_out_per_source", "3", "--ckpt_path", trained]
    in_a_run(small, "validate", "one", "--data.held_out_batch_size", "4")
    in_runs_on_two_ranks(
        tmp_path, small,
        ("validate", "two", "--data.held_out_batch_size", "2"), ("predict", "p2", "--data.held_out_batch_size", "4"),
    )  # fmt: skip
    one, two = read(tmp_path / "tiny/one"), read(tmp_path / "tiny/two")
    assert [each["index"] for each in two["prompts"]] == list(range(9))
    for ours, theirs in zip(scores(one), scores(two), strict=True):
        assert theirs == pytest.approx(ours, abs=1e-5)
    for name, means in one["sets"].items():
        for reward, own in means.items():
            assert two["sets"][name][reward]["n"] == own["n"]
            for field in ("mean", "error"):
                assert two["sets"][name][reward][field] == pytest.approx(own[field], abs=1e-5)
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
            assert told_by(first / file) == told_by(other / file)
        lines = [records(each) for each in (first, other)]
        for ours, theirs in zip(*lines, strict=True):
            assert theirs | {"scores": None} == ours | {"scores": None}
            assert theirs["scores"] == pytest.approx(ours["scores"], abs=1e-4)
    told = [record["scores"] for record in records(first)]
    assert [list(each.values()) for each in told] == [pytest.approx(each, abs=1e-4) for each in scores(one)]


def test_the_averaged_adapter_the_live_one_or_the_base(small, trained, tmp_path, monkeypatch):
    for name in ("ema", "trained"):
        in_a_run(small, "validate", name, "--ckpt_path", trained, "--model.policy.adapter", name)
    in_a_run(small, "test", "none", "--model.policy.adapter", "none")
    ema, live, base = (read(tmp_path / f"tiny/{name}") for name in ("ema", "trained", "none"))
    fitted = read(tmp_path / "tiny/version_0")
    assert scores(ema) == scores(fitted)
    assert scores(live) != scores(ema)
    assert [each["base"] for each in fitted["prompts"]] == [each["scores"] for each in base["prompts"]]
    assert base["all"]["pickscore"].keys() == {"mean", "error", "n"}
    assert live["all"]["pickscore"]["base"] == {name: base["all"]["pickscore"][name] for name in ("mean", "error", "n")}

    end = str(Path(trained).resolve())
    told = {"model": str(small[small.index("--model.policy.path") + 1]), "revision": None, "checkpoint": end}
    told |= {"text_length": 4, "text_encoder_3": "checkpoint", "dtype": "float32", "vae_tiling": False}
    ran = {"balancer": "MARBLE", "refresh_every": 5, "ema_decay": 0.7, "estimate_share": 1.0, "normalize": True}
    ran |= {"refresh_alpha": "smoothed", "amortize": "raw", "uniform_after_step": None}
    assert fitted["judged"] == {**told, **ran, "command": "fit", "adapter": "ema", "optimizer_step": 2}
    assert live["judged"] == {**told, "command": "validate", "adapter": "trained", "optimizer_step": 2}
    assert base["judged"] == {**told, "command": "test", "adapter": "none", "checkpoint": None, "optimizer_step": None}
    assert fitted["settings"] == base["settings"] == {
        "steps": 2, "solver": "euler", "guidance": 1.0, "resolution": 16, "seed": 0, "images_per_prompt": 1
    }  # fmt: skip
    assert (tmp_path / "tiny/version_0/held_out_000000.png").exists()
    assert (tmp_path / "tiny/version_0/held_out_000002.png").exists()
    assert (tmp_path / "tiny/none/held_out.png").exists()

    folder = ["--predictions.folder", str(tmp_path / "out"), "--predictions.scores", "false"]
    main(["predict", *small, *folder, "--ckpt_path", trained])
    main(["predict", *small, *folder, "--ckpt_path", trained])
    assert (told_by(tmp_path / "out/00000.png")["adapter"], told_by(tmp_path / "out/00000.png")["checkpoint"]) == (
        "ema",
        end,
    )
    monkeypatch.setattr(SD3Policy, "sample", lambda *_: pytest.fail("something was sampled"))
    with pytest.raises(ValueError, match=r"00000\.png with adapter 'ema' instead of 'trained'; choose another folder"):
        main(["predict", *small, *folder, "--ckpt_path", trained, "--model.policy.adapter", "trained"])
    with pytest.raises(
        ValueError, match=r"00000\.png with adapter 'ema' instead of 'none', checkpoint '.*' instead of 'none'"
    ):
        main(["predict", *small, *folder])
    with pytest.raises(ValueError, match="`ckpt_path` must be null where `policy.adapter` is none: .*choose the adapter"):
        main(["validate", *small, "--model.policy.adapter", "none", "--ckpt_path", trained])


def test_runs_beside_others_and_settings_that_forbid_it(small, tmp_path, capsys, monkeypatch):
    in_a_run(small, "validate", "plain")
    beside = ["--results.compare_with", f"[{tmp_path}/tiny/plain, {tmp_path}/tiny/plain/results.json]"]
    in_a_run(small, "validate", "beside", *beside, "--results.columns", "[pickscore, ocr]")
    found = read(tmp_path / "tiny/beside")["comparison"]
    assert [run["run"] for run in found] == ["this run", f"{tmp_path}/tiny/plain", f"{tmp_path}/tiny/plain/results.json"]
    assert "composite: mean z-score over these runs" in capsys.readouterr().out

    monkeypatch.setattr("marble_lightning.policies.sd3.load_pipeline", lambda *_, **__: pytest.fail("weights were loaded"))
    changed = {"seed": "5", "guidance": "2.0", "resolution": "32", "solver": "dpm2", "steps": "3"}
    options = [part for name, value in changed.items() for part in (f"--model.evaluation.{name}", value)]
    with pytest.raises(
        ValueError, match=r"Found .*/plain with steps 2 instead of 3, solver euler instead of dpm2, guidance"
    ):
        in_a_run(small, "validate", "other", *beside, *options)
    with pytest.raises(ValueError, match="with 6 prompts instead of 3;"):
        in_a_run(small, "test", "fewer", *beside, "--data.held_out_per_source", "1")


def test_predict_draws_the_users_prompts_and_says_how(small, tmp_path):
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
    told = (*sampled, path, "None", "4", "checkpoint", "float32", "False", "none")
    assert told_by(tmp_path / "out/00003.png") == dict(zip(FACTS, told, strict=True))


@pytest.mark.parametrize("command", ["validate", "fit"])
def test_text_encoders_and_rewards_take_turns(small, monkeypatch, command):
    """Held-out prompts are encoded in one visit, however small the batches, while rewards are off the device."""
    seen = []

    def told(owner, name, what):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *given, **named: (seen.append(what), real(self, *given, **named))[1])

    told(SD3Policy, "encode", "encode")
    told(Scorer, "release", "release")
    told(Scorer, "_score", "score")
    offload = ["--model.scoring.offload", "true", "--data.held_out_batch_size", "1", "--model.evaluation.guidance", "2"]
    main([command, *small, *offload])
    visits = [before for before, now in pairwise(seen) if now == "encode"]
    assert visits == ["release"] * (1 if command == "validate" else 3)  # and each of two rounds
    assert seen.count("score") > 30


def test_a_base_that_reads_prompts_otherwise_is_not_compared(small, trained, tmp_path, capsys):
    """Also a policy is: images of more or of fewer text tokens are other images."""
    in_a_run(small, "validate", "longer", "--ckpt_path", trained, "--model.policy.text_length", "8")
    assert "base" not in read(tmp_path / "tiny/longer")["prompts"][0]
    assert "evaluate it with the same settings and `--model.policy.adapter none`" in " ".join(
        capsys.readouterr().out.split()
    )
    assert read(tmp_path / "tiny/longer")["judged"]["text_length"] == 8


def test_without_scores_no_judge_is_loaded(small, tmp_path, monkeypatch):
    record = {"prompt": "a circle", "include": [{"class": "circle", "count": 1}]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"source": "x"}) + "\n")
    monkeypatch.setattr(PickScore, "setup", lambda self: pytest.fail("a judge was loaded"))
    options = [*small, "--predictions.folder", str(tmp_path / "out"), "--predictions.scores", "false"]
    main(["predict", *options, "--data.predict_file", str(tmp_path / "mine.jsonl")])
    lines = records(tmp_path / "out")
    assert [line["source"] for line in lines] == ["mine", "x"]
    assert [line["scores"] for line in lines] == [{}, {}]


def test_pictures_are_only_replaced_by_themselves(small, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("a red circle\na blue square\n")
    options = [*small, "--predictions.folder", str(tmp_path / "out"), "--predictions.scores", "false"]
    options += ["--data.predict_file", str(tmp_path / "mine.txt")]
    main(["predict", *options])
    before = pixels(tmp_path / "out/00001.png")
    whole = (tmp_path / "out/00001.png").read_bytes()
    (tmp_path / "out/00000.png").write_bytes(b"")  # as a full disk leaves them
    (tmp_path / "out/00001.png").write_bytes(whole[:-20])
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


def test_more_processes_than_pictures(small, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("a red circle\n")
    monkeypatch.setattr("marble_lightning.checks.Trainer.world_size", 2)
    with pytest.raises(ValueError, match="an image for each of the 2 processes to sample. Found 1; use fewer"):
        main(["predict", *small, "--data.predict_file", str(tmp_path / "mine.txt")])
