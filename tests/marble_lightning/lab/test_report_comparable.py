"""Which runs a report compares, what it says of them before, and which it refuses."""

from __future__ import annotations

import json

import pytest

from marble_lightning.cli import main
from marble_lightning.lab.report.collect import collect
from marble_lightning.lab.report.page import write_report
from tests.helpers.command_line import options
from tests.helpers.finished_runs import finish
from tests.helpers.small_rewards import Redness


def test_what_cannot_be_compared_is_refused(folder):
    with pytest.raises(ValueError, match="needs folders of runs.*no folder"):
        collect([folder / "nothing"])
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="needs finished runs.*none in .*empty, and 0 that have not finished"):
        collect([folder / "empty"])
    with pytest.raises(ValueError, match="a run on several rewards"):
        collect([folder / "only"])
    with pytest.raises(ValueError, match="`reference` must be one of fair, greedy.*none"):
        write_report([folder], folder / "report", "none")
    finish(folder / "fair" / "again" / "seed_0" / "version_0", 0)
    collect([folder])  # another method
    finish(folder / "fair" / "seed_0" / "version_1", 0)
    with pytest.raises(ValueError, match="(?s)one run of each method and seed. Found two of fair, seed 0"):
        collect([folder])


def test_runs_with_other_evaluations_are_refused(folder):
    finish(folder / "other" / "seed_0", 0, prompts=5)
    prompts = "must be evaluated alike. Found .*other/seed_0 beside .*5 prompts instead of 12; ev"
    with pytest.raises(ValueError, match=prompts):
        collect([folder / "greedy", folder / "other"])
    finish(folder / "class" / "seed_0", 0, scorer=Redness)
    with pytest.raises(ValueError, match="ocr by tests.helpers.small_rewards.Redness instead of .*Brightness"):
        collect([folder / "greedy", folder / "class"])


def test_seeds_of_a_method_differ_in_nothing_else(folder):
    finish(folder / "fair" / "seed_5" / "version_0", 5, steps=9)
    with pytest.raises(ValueError, match="differ only in their seed. Found .*seed_5.*optimizer steps 9 instead of 8; put"):
        collect([folder])


def test_seeds_of_a_method_have_the_same_settings(tmp_path):
    """The first difference is named. Settings that earlier versions did not have are named without being compared."""
    objective = {"beta": 0.1, "kl_weight": 0.03, "kl_every": 1}
    model = {"rewards": {"ocr": {}, "geneval": {}}, "lr_scheduler": None, "objective": objective, "evaluation": {"seed": 1}}
    others = {"trainer": {"logger": {"name": "a"}, "default_root_dir": "a"}}
    finish(tmp_path / "a" / "seed_0", 0, settings={"model": model, **others}, steps=1)
    older = model | {"objective": {"beta": 0.1, "kl_weight": 0.03}, "evaluation": {"seed": 2}}
    finish(tmp_path / "a" / "seed_1", 1, settings={"model": older, "trainer": {"logger": None}}, steps=1)
    assert collect([tmp_path]).notes == [
        "Not all runs of a have these settings, which were not compared: model.objective.kl_every."
    ]
    changed = model | {"objective": objective | {"kl_weight": 0.1, "beta": 1}}
    finish(tmp_path / "a" / "seed_2", 2, settings={"model": changed}, steps=1)
    with pytest.raises(ValueError, match="seed_2 beside .*seed_0, with `model.objective.beta` 1 instead of 0.1; put"):
        collect([tmp_path])


def test_another_base_is_refused(folder):
    finish(folder / "third" / "seed_0", 0, model="a")
    finish(folder / "fourth" / "seed_0", 0, model="b")
    base = "must have the same base. Found .*third/seed_0 beside .*fourth/seed_0, with model a"
    with pytest.raises(ValueError, match=base):
        collect([folder / "fourth", folder / "third"])


def test_other_settings_of_methods_are_said(folder):
    rewards = {"ocr": {}, "geneval": {}}
    usual, fast = (8, 0.1, 12), (8, 0.2, 24)
    for name, (rounds, rate, images) in {"long": (9, 0.1, 12), "fast": fast, "so": fast, "usual": usual}.items():
        model = {"rewards": rewards, "optimizer": {"init_args": {"lr": rate}}}
        settings = {"trainer": {"max_epochs": rounds}, "model": model, "data": {"images_per_prompt": images}}
        settings["balancer"] = {"class_path": name}  # not told: it is the method
        finish(folder / name / "seed_0", 0, steps=rounds, settings=settings)
    assert collect([folder / "usual", folder / "long", folder / "fast", folder / "so"]).notes == [
        "long was trained otherwise than usual: optimizer steps 9 instead of 8, trainer.max_epochs 9 instead of 8.",
        "fast, so were trained otherwise than usual: model.optimizer.init_args.lr 0.2 instead of 0.1, "
        "data.images_per_prompt 24 instead of 12.",
    ]


def test_other_rewards_are_said(folder):
    """A reward of one method only is compared if all runs have scores of it, otherwise it is named."""
    finish(folder / "third" / "seed_0", 0, rewards=("geneval", "ocr", "beauty"))
    found = collect([folder])
    assert found.rewards == ["ocr", "geneval"]
    assert found.notes == [
        "third was trained on other rewards than fair: geneval, ocr, beauty.",
        "Not compared, since not all runs have scores of it: beauty.",
    ]
    write_report([folder], folder / "report", None)
    text = (folder / "report/report.md").read_text()
    assert all(f"\n- {note}\n" in text for note in found.notes)
    assert "| rewards " in text and "All were trained on" not in text
    for seed in range(2):
        finish(folder / "apart" / f"seed_{seed}", seed, rewards=("beauty", "grace"))
    with pytest.raises(ValueError, match="must have a reward in common. Found none"):
        collect([folder / "apart"])


def test_other_settings_of_a_scorer_are_said(folder):
    finish(folder / "third" / "seed_0", 0)
    file = folder / "third" / "seed_0" / "results.json"
    results = json.loads(file.read_text())
    results["reward_models"]["ocr"]["path"] = "elsewhere"
    file.write_text(json.dumps(results))
    assert collect([folder]).notes == [f"Scored with other settings, in {file.parent}: ocr.path elsewhere instead of None."]


@pytest.mark.integration
def test_runs_on_a_reward_for_some_prompts_are_specialists(checkpoints, tmp_path):
    """A run on GenEval alone has scores of its prompts only, but the held-out prompts of every other run."""
    detector = "{class_path: marble_lightning.tinyworld.ColourBlobs}"
    rewards = {
        "jpeg": "JPEGCompressibility",
        "geneval": f"{{class_path: rewards.GenEval, init_args: {{detector: {detector}}}}}",
    }
    for name, kept in {"both": rewards, **{f"only_{reward}": {reward: value} for reward, value in rewards.items()}}.items():
        yaml = ", ".join(f"{reward}: {value}" for reward, value in kept.items())
        short = {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1, "balancer": "WeightedSum"}
        main(["fit", *options(checkpoints, tmp_path / name, **short, **{"model.rewards": f"{{{yaml}}}"})])
    found = collect([tmp_path])
    assert list(found.methods) == ["both/tiny"] and sorted(found.specialists) == ["geneval", "jpeg"]
    changes = found.changes_of_specialists()
    assert changes.isfinite().sum((0, 1)).tolist() == [6, 2]  # two prompts of each source
