"""Prompts of a round, and checks of prompts before a run starts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from balancers import WeightedSum
from marble_lightning.checks import check_prompts
from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.data.datamodule import PromptDataModule, draw_round, read_prompts
from marble_lightning.tinyworld import PROMPTS, ColourBlobs
from rewards import GenEval, Prompt
from rewards.texts import excerpt
from tests.helpers import ROOT
from tests.helpers.small_runs import run

SOURCES = ("pickscore", "ocr", "geneval")
PUBLISHED = ROOT.parent / "shared/prompts"
"""Folder of the published test files; without it, their test is skipped."""

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.txt").write_text("".join(f"{name} {split} {i}\n" for i in range(10)))
    return tmp_path


@pytest.mark.parametrize("source", SOURCES)
def test_held_out_prompts_are_not_trained_on(source):
    train, test = ({prompt.text for prompt in read_prompts(PROMPTS, source, split)} for split in ("train", "test"))
    assert len(test) >= 40
    assert not train & test


def test_a_round_has_balanced_distinct_prompts_split_over_ranks(folder):
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=8, images_per_prompt=2)
    data.setup("fit")
    ranks = [data.round(seed=1, index=3, rank=rank, ranks=2) for rank in range(2)]
    together = [prompt for part in ranks for prompt in part]
    assert len({prompt.text for prompt in together}) == 8
    assert Counter(prompt.source for prompt in together) == {"a": 4, "b": 4}
    assert all(Counter(prompt.source for prompt in part) == {"a": 2, "b": 2} for part in ranks)
    whole = data.round(seed=1, index=3, rank=0, ranks=1)
    assert {p.text for p in whole} == {p.text for p in together}


def test_rounds_depend_on_seed_and_index_only(folder):
    pools = {"a": read_prompts(folder, "a", "train")}
    first, again, later, other = (
        draw_round(pools, {"a": 1}, turns=4, seed=seed, index=index) for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first != later
    assert first != other


def test_sources_may_have_unequal_shares(folder):
    data = PromptDataModule(str(folder), {"a": 1, "b": 3}, prompts_per_round=8, images_per_prompt=2)
    data.setup("fit")
    ranks = [data.round(seed=0, index=0, rank=rank, ranks=2) for rank in range(2)]
    assert all([prompt.source for prompt in part] == ["a", "b", "b", "b"] for part in ranks)
    assert len({prompt.text for part in ranks for prompt in part}) == 8


def test_held_out_images_are_repeated_and_capped(folder):
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=2, held_out_per_source=3, held_out_images=2)
    data.setup("validate")
    assert [prompt.text for prompt in data.held_out[:3]] == ["a test 0", "a test 0", "a test 1"]
    assert len(data.held_out) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "at least one source"),
        ({"sources": ["a", "a"]}, "each once"),
        ({"sources": {"a": 1, "b": 0}}, "a share >= 1"),
        ({"prompts_per_round": 3}, "multiple of the sum of the shares of `sources`, 2. Found 3; try 4"),
        ({"images_per_prompt": 1}, "`images_per_prompt` must be >= 2"),
        ({"held_out_images": 0}, "`held_out_images` must be >= 1. Found 0"),
        ({"prompts_per_round": 0}, "`prompts_per_round` must be >= 1. Found 0"),
        ({"cap_per_source": 0}, "`cap_per_source` must be >= 1. Found 0"),
        ({"held_out_per_source": -1}, "`held_out_per_source` must be >= 1. Found -1"),
    ],
)
def test_invalid_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**{"folder": str(folder), "sources": ["a", "b"], "prompts_per_round": 4, **options})


def test_a_round_needs_enough_prompts(folder):
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=22)
    with pytest.raises(ValueError, match="takes 11 distinct prompts of 'a'. Found 10"):
        data.setup("fit")


def test_a_cap_takes_the_start_of_each_training_file(folder):
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=4, cap_per_source=3)
    data.setup("fit")
    assert {source: [prompt.text for prompt in pool] for source, pool in data.pools.items()} == {
        source: [f"{source} train {i}" for i in range(3)] for source in ("a", "b")
    }
    assert len(data.held_out) == 20
    with pytest.raises(ValueError, match="takes 4 distinct prompts of 'a'. Found 3; .*raise `cap_per_source`"):
        PromptDataModule(str(folder), ["a", "b"], prompts_per_round=8, cap_per_source=3).setup("fit")


def test_repeated_training_prompts_count_once_with_a_warning(folder, caplog):
    with (folder / "a" / "train.txt").open("a") as file:
        file.write("a train 2\na train 2\na train 7\nnew\n")
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=4, cap_per_source=11)
    data.setup("fit")
    assert [prompt.text for prompt in data.pools["a"]] == [f"a train {i}" for i in range(10)] + ["new"]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{folder / 'a' / 'train.txt'}: 3 prompts of 'a' were left out as duplicates."]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with the published test prompts, which also serve as training prompts."""
    if not PUBLISHED.is_dir():
        pytest.skip("the published prompt files are not there")
    for file in PUBLISHED.rglob("test*"):
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        for split in ("train", "test"):
            shutil.copy(file, tmp_path / file.parent.name / file.name.replace("test", split))
    return tmp_path


def sampled_by_two_ranks(prompts, sources, checkpoints, tmp_path, monkeypatch):
    """Check the prompts that each of two ranks samples and scores in three rounds, with equal shares of all sources."""
    k, turns = 3, 2 * len(sources)
    data = PromptDataModule(str(prompts), sources, prompts_per_round=turns, images_per_prompt=k)
    module, _ = run(checkpoints, tmp_path, WeightedSum(), rounds=1, data=data)
    submitted: list[Prompt] = []
    submit = module.scorer.submit

    def recording_submit(images, prompts, names):
        submitted.extend(prompts)
        submit(images, prompts, names)

    monkeypatch.setattr(module.scorer, "submit", recording_submit)
    monkeypatch.setattr(Trainer, "world_size", 2)
    for round_ in range(3):
        monkeypatch.setattr(Trainer, "current_epoch", round_)
        texts_of_ranks: list[set[str]] = []
        for rank in range(2):
            monkeypatch.setattr(Trainer, "global_rank", rank)
            submitted.clear()
            rollout, images, *_ = module.sample_round(seed=5)
            counts = Counter((prompt.source, prompt.text) for prompt in submitted)
            assert len(submitted) == len(images) == len(rollout.latents) == len(sources) * k
            assert set(counts.values()) == {k}
            assert Counter(source for source, _ in counts) == dict.fromkeys(sources, 1)
            assert [rollout.groups[i] for i in range(0, len(images), k)] == list(range(len(sources)))
            texts_of_ranks.append({text for _, text in counts})
        first, second = texts_of_ranks
        assert not first & second
        assert len(first | second) == turns
    return data


def test_two_ranks_sample_k_images_of_each_prompt(checkpoints, tmp_path, monkeypatch):
    sampled_by_two_ranks(PROMPTS, list(SOURCES), checkpoints, tmp_path, monkeypatch)


def test_two_ranks_sample_k_images_of_each_published_prompt(published, checkpoints, tmp_path, monkeypatch):
    sources = ["pickscore", "ocr", "drawbench", "geneval"]
    data = sampled_by_two_ranks(published, sources, checkpoints, tmp_path, monkeypatch)
    assert all(len(pool) > 100 for pool in data.pools.values())


def test_truncated_prompts_are_counted(checkpoints, tmp_path, folder, caplog):
    long = "a red circle " * 20
    with (folder / "a" / "train.txt").open("a") as file:
        file.write(long + "\n")
    with (folder / "b" / "test.txt").open("a") as file:
        file.write("a blue square " * 20 + "\n")
    data = PromptDataModule(str(folder), ["a", "b"], prompts_per_round=4, images_per_prompt=3, held_out_images=2)
    run(checkpoints, tmp_path, WeightedSum(), data=data, rewards=("bright", "contrast"))
    (message,) = [record.getMessage() for record in caplog.records if record.name == "marble_lightning.checks"]
    assert "the end of 2 of 42 prompts" in message
    assert excerpt(long.strip()) in message and len(message) < 500


@pytest.mark.parametrize("split", ["train", "test"])
def test_malformed_metadata_fails_before_any_weight_loads(small, tmp_path, split, monkeypatch):
    folder = tmp_path / "prompts"
    shutil.copytree(PROMPTS, folder)
    bad = {"prompt": "two green circles", "include": [{"class": "circle", "count": "2"}]}
    file = folder / "geneval" / f"{split}_metadata.jsonl"
    file.write_text(json.dumps(bad) + "\n" + file.read_text())

    def loading(*arguments: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("marble_lightning.policies.sd3.load_pipeline", loading)
    with pytest.raises(ValueError, match=r"`geneval` must .*'two green circles' of source 'geneval'.*`count` >= 1"):
        main(["fit", *small, "--data.folder", str(folder)])


def test_classes_that_the_detector_does_not_know_are_refused():
    reward_models = {"geneval": GenEval(ColourBlobs())}
    fine = Prompt("a circle", "x", {"include": [{"class": "circle", "count": 1}]})
    check_prompts(reward_models, [fine, Prompt("without metadata", "x")])
    zebra = Prompt("a zebra", "x", {"include": [{"class": "zebra", "count": 1}]})
    with pytest.raises(ValueError, match="`geneval` must be able .*'a zebra'.*must know every class.*Found zebra"):
        check_prompts(reward_models, [fine, zebra])
