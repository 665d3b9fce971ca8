"""The mean of specialists: which of them are trained, and whose base the scores stand beside."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from benchmarks import averaged_specialists
from benchmarks.averaged_specialists import LAST, averages, beside_base, evaluate, trained
from benchmarks.fits import ComparisonError, Fit, Folders
from benchmarks.stages import Stages
from marble_lightning.lab.runs import Run
from tests.helpers.finished_runs import finish

POLICY = {"model": {"rewards": {"ocr": {}}, "policy": {"init_args": {"rank": 4, "alpha": 8}}}}


def edit(folder, change):
    file = folder / "results.json"
    results = json.loads(file.read_text())
    for prompt in results["prompts"]:
        change(prompt)
    file.write_text(json.dumps(results))


def test_specialists_with_a_checkpoint_are_not_trained_again(tmp_path, monkeypatch):
    """Figures of one whose checkpoint is gone do not keep it from being trained."""
    fits = [Fit(f"specialist_{name}", (), (), 0) for name in "ab"]
    folders = Folders(tmp_path, tmp_path / "figures")
    (folders.run(fits[0]) / LAST).parent.mkdir(parents=True)
    (folders.run(fits[0]) / LAST).touch()
    folders.results.mkdir()
    folders.result(fits[1]).write_text("{}")
    begun = []
    monkeypatch.setattr(averaged_specialists, "fit_at_once", lambda fits, folders, jobs: begun.extend(fits))
    assert trained(fits, tmp_path, 1) == [folders.run(fit) for fit in fits]
    assert begun == [fits[1]]


def test_scores_stand_beside_those_of_a_specialists_base(tmp_path):
    finish(tmp_path / "mean", 0, rewards=("geneval", "ocr"))
    finish(tmp_path / "alone", 0, rewards=("ocr",))
    edit(tmp_path / "mean", lambda prompt: prompt.update(scores={"geneval": 0.25, "ocr": 0.5}))
    edit(tmp_path / "alone", lambda prompt: prompt.update(base={"geneval": 0.125, "ocr": 0.75}))
    figures = beside_base(Run(tmp_path / "mean"), Run(tmp_path / "alone"))
    columns = figures["rewards"].index("ocr"), figures["rewards"].index("geneval")
    assert [[row[column] for column in columns] for row in (figures["base"][0], figures["trained"][0])] == [
        [0.75, 0.125],
        [0.5, 0.25],
    ]
    edit(tmp_path / "mean", lambda prompt: prompt.update(prompt="another"))
    with pytest.raises(ComparisonError, match="same held-out prompts. Found others in .*mean"):
        beside_base(Run(tmp_path / "mean"), Run(tmp_path / "alone"))


@pytest.mark.parametrize(("name", "rank"), [("exact", 8), ("one rank", 4)])
def test_the_commands_of_an_average(tmp_path, monkeypatch, name, rank):
    """The exact mean has the sum of the ranks; alpha stays in proportion."""
    alone = [tmp_path / reward for reward in ("ocr", "geneval")]
    for folder in alone:
        finish(folder, 0, rewards=("ocr",), settings=POLICY)
    commands = []

    def call(arguments, output, title):
        commands.append(arguments)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("Rank 4: 1.0% of the update's norm is lost.\nfile\n")
        if arguments[0] == "validate":
            finish(output.parent / "validate" / "version_0", 0)

    monkeypatch.setattr(averaged_specialists, "call_marble", call)
    monkeypatch.setattr(Fit, "identity", {})
    result = evaluate(
        name, Fit("conflict_mean_8", ("-c", "tiny"), (), 3), alone, Folders(tmp_path / "runs", tmp_path / "results")
    )
    export, validate = commands
    assert export[:3] == ["export", "--ckpt_path", str(alone[0] / LAST)]
    assert json.loads(export[4]) == [str(alone[1] / LAST)]
    assert ("--rank" in export) == (name == "one rank")
    options = dict(zip(validate[1::2], validate[2::2], strict=True))
    assert (options["--model.policy.rank"], options["--model.policy.alpha"]) == (str(rank), str(2 * rank))
    assert options["--seed_everything"] == "3"
    assert result["balancer"].startswith(f"mean of 2 LoRAs, rank {rank}.")
    assert ("1.0% of the update's norm is lost" in result["balancer"]) == (name == "one rank")


def test_recorded_averages_are_not_computed_again(tmp_path, monkeypatch):
    stages = Stages({"conflict": ["ocr"]}, {"ocr": {}}, {}, 8)
    monkeypatch.setattr(Fit, "identity", {})
    monkeypatch.setattr(averaged_specialists, "read", lambda file, identity: {"file": file.name})
    options = Namespace(rounds=None, stage="conflict", folder=tmp_path, results=tmp_path, seeds=[1, 2], jobs=1)
    found = averages(stages, options, [])
    assert found["one rank"] == {seed: {"file": f"conflict_one_rank_8_seed_{seed}.json"} for seed in (1, 2)}
    assert list(found) == ["exact", "one rank"]
