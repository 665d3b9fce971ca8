"""Folders for the model hub: model card, dry run, upload, and errors that say what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, errors
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from marble_lightning.cli import main
from marble_lightning.evaluation.results import read, write
from marble_lightning.hub import export
from marble_lightning.hub import upload as upload_module
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers.exported_runs import finished_run
from tests.helpers.stock_pipeline import (
    differ,
    generate_by_pipeline,
    make_three_adapters,
    sample_by_policy,
    stock,
)

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


@pytest.fixture(scope="module")
def policy(checkpoints) -> SD3Policy:
    """A policy that tests only read."""
    return make_three_adapters(checkpoints)


@pytest.fixture
def checkpoint(policy, tmp_path) -> Path:
    return finished_run(policy, tmp_path / "run", MEDIUM)


def push(checkpoint: Path, folder: Path, *more: str) -> None:
    main(["export", "--ckpt_path", str(checkpoint), "--to", str(folder), "--push-to-hub", "me/mine", *more])


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """A replacement of the hub's client, which records calls, or raises `error`."""
    calls = SimpleNamespace(created=[], uploaded=[], error=None)

    class FakeApi:
        def create_repo(self, repository: str, exist_ok: bool) -> str:
            if calls.error is not None:
                raise calls.error
            calls.created.append((repository, exist_ok))
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
            assert all((Path(folder_path) / name).is_file() for name in allow_patterns)
            calls.uploaded.append((repo_id, sorted(allow_patterns)))

    monkeypatch.setattr(upload_module, "HfApi", FakeApi)
    monkeypatch.setattr(upload_module, "get_token", lambda: "hf_token")
    monkeypatch.setattr(upload_module.constants, "HF_HUB_OFFLINE", False)
    return calls


def test_a_dry_run_writes_a_folder_that_a_stock_pipeline_loads(checkpoints, policy, checkpoint, tmp_path, hub, capsys):
    push(checkpoint, tmp_path / "lora", "--dry-run")
    assert "nothing was uploaded" in capsys.readouterr().out
    assert hub.created == hub.uploaded == []
    pipeline = stock(checkpoints, tmp_path / "lora")
    assert differ(generate_by_pipeline(pipeline, "latent"), sample_by_policy(policy, "ema")) < 1e-5
    with pytest.raises(ValueError, match=r"`dry_run` must be given with `push_to_hub`"):
        export(checkpoint, tmp_path / "other", dry_run=True)
    assert not (tmp_path / "other").exists()


def test_the_card(checkpoint, tmp_path):
    push(checkpoint, tmp_path / "lora", "--dry-run")
    card = ModelCard.load(tmp_path / "lora/README.md")
    data = card.data.to_dict()
    assert data["base_model"] == MEDIUM and data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "text-to-image" and data["library_name"] == "diffusers"
    assert data["license"] == "other" and data["license_name"] == "stabilityai-ai-community"
    assert {"lora", "text-to-image", "reinforcement-learning"} <= set(data["tags"])
    assert data["widget"] == [{"text": f"prompt {index}"} for index in (0, 4, 8)]
    means = read(checkpoint.parents[1])["all"]["ocr"]
    evaluated = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert evaluated["ocr"] == f"{means['mean']:.4f} ± {means['error']:.4f}" and evaluated.keys() == {"ocr", "geneval"}
    change, base = means["change"], means["base"]
    row = (
        f"| ocr | {base['mean']:.4f} ± {base['error']:.4f} | {evaluated['ocr']} | "
        f"{change['mean']:+.4f} ± {change['error']:.4f} | 12 |"
    )
    assert row in card.text
    assert "| pickscore | rewards.PickScore | yuvalkirstain/PickScore_v1 (MIT) | training |" in card.text
    assert "| ocr | rewards.OCR | PP-OCR models in RapidOCR's wheel (Apache-2.0) | training |" in card.text
    assert "| mine | mine.Reward | other weights (licence not known here) | evaluation only |" in card.text
    assert "merged by `balancers.MARBLE`, with `refresh_every` 5." in card.text and "| seed | 3 |" in card.text
    assert "secret" not in card.text and str(tmp_path) not in card.text
    assert "![Held-out prompts, with the scores of each image](images/held_out.png)" in card.text
    assert "<Gallery />" not in card.text  # there are no images of single prompts
    assert (tmp_path / "lora/images/held_out.png").is_file()


def test_the_code_of_the_card_runs(checkpoints, checkpoint, tmp_path, monkeypatch):
    """With the repository and the base as folders, as if they had been downloaded."""
    push(checkpoint, tmp_path / "me/mine", "--dry-run")
    code = (tmp_path / "me/mine/README.md").read_text().partition("```python\n")[2].partition("```")[0]
    shutil.copytree(checkpoints / "sd3_t5", tmp_path / MEDIUM)
    monkeypatch.chdir(tmp_path)
    assert max(map(len, code.splitlines())) <= 80
    names: dict = {}
    exec(code, names)
    assert names["image"].size == (16, 16)
    assert names["pipeline"].get_active_adapters() == ["default_0"]


@pytest.mark.parametrize("change", [{"optimizer_step": 7}, {"adapter": "trained"}])
def test_scores_of_other_weights_are_left_out(checkpoint, tmp_path, change):
    results = read(checkpoint.parents[1])
    write(checkpoint.parents[1], results | {"evaluated": results["evaluated"] | change})
    push(checkpoint, tmp_path / "lora", "--dry-run")
    card = ModelCard.load(tmp_path / "lora/README.md")
    assert card.data.eval_results is None and "widget" not in card.data
    assert "These weights were not evaluated" in card.text and "held_out.png" not in card.text
    assert not (tmp_path / "lora/images").exists()


def test_predictions_in_the_run_are_examples_of_the_widget(checkpoint, tmp_path):
    folder = checkpoint.parents[1] / "predictions"
    folder.mkdir()
    for index, source in enumerate([str(checkpoint.resolve()), "another.ckpt"]):
        text = PngInfo()
        for name, value in {"prompt": f"a cat {index}", "checkpoint": source, "adapter": "ema"}.items():
            text.add_text(name, value)
        Image.new("RGB", (8, 8)).save(folder / f"{index:05d}.png", pnginfo=text)
    push(checkpoint, tmp_path / "lora", "--dry-run")
    card = ModelCard.load(tmp_path / "lora/README.md")
    assert card.data["widget"] == [{"text": "a cat 0", "output": {"url": "images/00000.png"}}]
    assert "\n\n<Gallery />\n\n" in card.text
    assert (tmp_path / "lora/images/00000.png").is_file()


def test_only_the_files_of_the_export_are_uploaded(checkpoint, tmp_path, hub):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/private.txt").write_text("private")
    push(checkpoint, tmp_path / "lora")
    files = ["README.md", "images/held_out.png", "pytorch_lora_weights.safetensors"]
    assert hub.created == [("me/mine", True)] and hub.uploaded == [("me/mine", files)]


def refused(status: int) -> Exception:
    return errors.HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refused(401), r"does not accept the token\. Log in again"),
        (refused(403), "may not write there"),
        (refused(404), "no such owner"),
        (refused(503), r"failed \(status 503\)\. Try again later"),
        (ConnectionError("refused"), r"cannot be reached\. Check the network"),
    ],
)
def test_a_failed_upload_says_what_to_do(checkpoint, tmp_path, hub, error, message):
    hub.error = error
    with pytest.raises(SystemExit, match=rf"`push_to_hub` must .*Found me/mine: .*{message}.*`hf upload me/mine"):
        push(checkpoint, tmp_path / "lora")
    assert (tmp_path / "lora/README.md").is_file() and hub.uploaded == []


def test_access_is_checked_before_anything_is_written(checkpoint, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(upload_module, "get_token", lambda: None)
    with pytest.raises(SystemExit, match=r"must have a token that may write\. Found none; log in \(`hf auth login`\)"):
        push(checkpoint, tmp_path / "lora")
    monkeypatch.setattr(upload_module.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="Found HF_HUB_OFFLINE set; unset it, or add --dry-run"):
        push(checkpoint, tmp_path / "lora")
    for name in ("mine", "a b/c", "a/b/c"):
        with pytest.raises(ValueError, match=f"`push_to_hub` must be OWNER/NAME. Found '{name}'"):
            export(checkpoint, tmp_path / "lora", push_to_hub=name, dry_run=True)
    assert not (tmp_path / "lora").exists()


def test_an_existing_card_stays_without_overwrite(checkpoint, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/README.md").write_text("mine")
    with pytest.raises(SystemExit, match=r"without README\.md\. Found one in"):
        push(checkpoint, tmp_path / "lora", "--dry-run")
    assert (tmp_path / "lora/README.md").read_text() == "mine"
    push(checkpoint, tmp_path / "lora", "--dry-run", "--overwrite")
    assert "# mine" in (tmp_path / "lora/README.md").read_text()


def test_an_option_names_another_base(checkpoint, tmp_path):
    push(checkpoint, tmp_path / "large", "--dry-run", "--base", "me/other-base")
    assert ModelCard.load(tmp_path / "large/README.md").data.base_model == "me/other-base"


def test_a_fused_transformer_and_its_card(checkpoints, policy, tmp_path, capsys):
    checkpoint = finished_run(policy, tmp_path / "run", str(checkpoints / "sd3"))
    push(checkpoint, tmp_path / "fused", "--fuse", "--dry-run")
    assert "Merged in float32: 0.0% of the update's norm is lost" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "fused/README.md")
    assert card.data.base_model is None and "lora" not in card.data.tags
    assert "SD3Transformer2DModel.from_pretrained(" in card.text and str(checkpoints) not in card.text
    assert not any("lora" in file.name for file in (tmp_path / "fused").iterdir())
    pipeline = stock(checkpoints, None)
    pipeline.transformer = type(pipeline.transformer).from_pretrained(tmp_path / "fused", dtype=torch.float32)
    assert differ(generate_by_pipeline(pipeline, "latent"), sample_by_policy(policy, "ema")) < 1e-5
