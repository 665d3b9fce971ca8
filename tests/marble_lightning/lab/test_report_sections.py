"""What single sections of a report show of hand-written runs."""

from __future__ import annotations

import json

import pytest
from matplotlib import pyplot
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from marble_lightning.lab.report import plots, sections, tables
from marble_lightning.lab.report.collect import collect
from marble_lightning.lab.report.harmony import cosines
from marble_lightning.lab.runs import Run
from tests.helpers.finished_runs import REWARDS, begin, finish


def test_images_of_a_resumed_run_are_those_of_its_parts(tmp_path):
    """The base is that of step 0 and no other; methods without its images or without their own are named."""
    begin(tmp_path / "a" / "version_0", 0)
    (tmp_path / "a" / "version_0" / "checkpoints").mkdir()
    finish(tmp_path / "a" / "version_1", 0, ckpt_path="last", steps=8)
    finish(tmp_path / "b", 0, ckpt_path=str(tmp_path / "gone" / "checkpoints" / "last.ckpt"))
    finish(tmp_path / "c", 0)
    (tmp_path / "c" / "held_out_000008.png").unlink()
    for part, step, colour in (("version_0", 0, "red"), ("version_1", 4, "green"), ("version_1", 8, "blue")):
        Image.new("RGB", (4, 2), colour).save(tmp_path / "a" / part / f"held_out_{step:06d}.png")
    found = collect([tmp_path])
    sheets = plots.sheets(found)
    assert list(sheets) == ["base", "a", "b"]
    assert [sheets[name].getpixel((0, 0)) for name in ("base", "a")] == [(255, 0, 0), (0, 0, 255)]
    text = sections.images(found, "a").text
    assert text.endswith("the same prompts and noise. No images of the base: b. No images after training: c.")


def test_images_of_results_that_name_no_step(tmp_path):
    """Those of earlier versions: the last images are the trained ones."""
    finish(tmp_path / "a", 0, steps=8)
    file = tmp_path / "a" / "results.json"
    results = json.loads(file.read_text())
    del results["evaluated"]["optimizer_step"]
    file.write_text(json.dumps(results))
    run = Run(tmp_path / "a")
    assert (run.sheet(0), run.trained_sheet) == (
        tmp_path / "a" / "held_out_000000.png",
        tmp_path / "a" / "held_out_000008.png",
    )
    (tmp_path / "a" / "held_out_000008.png").unlink()
    assert run.trained_sheet is None


def test_a_statistic_may_begin_at_zero(tmp_path):
    for name, values in (("never", (0.0, 0.0)), ("later", (0.0, 0.5)), ("halved", (0.5, 0.25))):
        finish(tmp_path / name, 0, steps=0)
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step, value in enumerate(values):
                writer.add_scalar("images/clipping", value, step)
    clipping = tables.images(collect([tmp_path]))["clipping"].to_dict()
    assert clipping == {"halved": "x 0.50 (0.50 to 0.50)", "later": "x inf (inf to inf)", "never": "x 1.00 (1.00 to 1.00)"}


@pytest.mark.parametrize(("refresh_every", "kind"), [(1, "update"), (5, "reused")])
def test_cosines_are_of_the_weights_that_most_steps_use(tmp_path, refresh_every, kind):
    """Every refresh logs both; where every step is one, the reused weights never make an update.

    Products of halves need weights that were found on other images.
    """
    finish(tmp_path / "a", 0, refresh_every=refresh_every)
    with SummaryWriter(str(tmp_path / "a")) as writer:
        for name in REWARDS:
            for place in ("own", "split"):
                writer.add_scalar(f"cosine/reused/{place}/{name}", -0.5, 3)
    own, split = cosines(REWARDS, [Run(tmp_path / "a")])
    assert (own["weights"], split["weights"]) == (kind, "reused")
    assert own["ocr"].startswith("-0.500" if kind == "reused" else "+0.200")


def test_harmony_over_time(tmp_path):
    """Least cosines are means over seeds; conflicts are counted up to each step, beside those by chance."""
    for seed, values in enumerate(((0.1, -0.2, -0.3), (0.3, 0.2, -0.1))):
        finish(tmp_path / "a" / f"seed_{seed}", seed, steps=0)
        with SummaryWriter(str(tmp_path / "a" / f"seed_{seed}")) as writer:
            for step, value in enumerate(values):
                writer.add_scalar("cosine/update/own/ocr", value, step)
                writer.add_scalar("cosine/update/own/geneval", 0.9, step)
                writer.add_scalar("cosine/update/split/ocr", -value, step)
                writer.add_scalar("harmony/split/chance", 0.8 - 0.1 * step, step)
    figure = plots.harmony(collect([tmp_path]))
    least, conflicts, _, split = figure.axes
    assert least.lines[0].get_ydata().tolist() == pytest.approx([0.2, 0.0, -0.2])
    assert conflicts.lines[0].get_ydata().tolist() == pytest.approx([0, 1 / 4, 3 / 6])
    assert [line.get_ydata().tolist() for line in split.lines] == [
        pytest.approx([1, 3 / 4, 3 / 6]),
        pytest.approx([0.8, 0.75, 0.7]),
    ]
    pyplot.close(figure)
    for file in tmp_path.glob("a/*/events*"):
        file.unlink()
    assert plots.harmony(collect([tmp_path])) is None


def test_weights_may_leave_zero_to_one(tmp_path):
    finish(tmp_path / "a", 0, steps=0)
    with SummaryWriter(str(tmp_path / "a")) as writer:
        for step, value in enumerate((1.5, 2.5)):
            writer.add_scalar("alpha_smoothed/ocr", value, step)
    figure = plots.weights(collect([tmp_path]))
    low, high = figure.axes[0].get_ylim()
    assert low == 0 and high > 2.5
    pyplot.close(figure)


def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(tmp_path):
    """A round that was done again counts once, as it was done last."""
    begin(tmp_path / "version_0", 0)
    (tmp_path / "version_0" / "checkpoints").mkdir()
    finish(tmp_path / "version_1", 0, ckpt_path="last", steps=0)
    for part, steps in ((0, range(3)), (1, range(2, 4))):
        with SummaryWriter(str(tmp_path / f"version_{part}")) as writer:
            for step in steps:
                writer.add_scalar("time/training", 900.0, step)
                writer.add_scalar("time/sampling", 900.0 * (1 + part), step)
    assert tables.methods(collect([tmp_path]))["hours a run"].tolist() == [1 + (2 + 4) / 4]


@pytest.mark.parametrize(("seeds", "verdicts"), [(4, ["too few seeds"] * 2), (5, ["worse", "better"])])
def test_a_verdict_needs_five_seeds(tmp_path, seeds, verdicts):
    for seed in range(seeds):
        finish(tmp_path / "fair" / f"seed_{seed}", seed, (0.2, 0.1), steps=1)
        finish(tmp_path / "greedy" / f"seed_{seed}", seed, (0.4, 0.0), steps=1)
    found = collect([tmp_path])
    table = tables.verdicts(found, "greedy")
    assert table["verdict"].tolist() == verdicts
    assert table["difference"][0].startswith("-0.2000 [") and (table["p"] < 0.05).all()
    assert "3 seeds" in sections.verdicts(found, "greedy").text


def test_gains_are_compared_with_the_reference(tmp_path):
    """As in the results of the documentation: least and mean gain with intervals, p-values by Holm, the share of runs."""
    methods = {"fair": (0.2, 0.1), "greedy": (0.3, 0.0), "same": (0.2, 0.1)}
    for seed in range(3):
        for name, of_method in methods.items():
            finish(tmp_path / name / f"seed_{seed}", seed + 10 * (name == "same"), of_method, steps=1)
        for name in REWARDS:
            finish(tmp_path / f"{name}_alone" / f"seed_{seed}", seed, (0.4, 0.2), rewards=(name,), steps=1)
    found = collect([tmp_path])
    table = tables.gains(found, "fair")
    assert table["least - fair's"]["greedy"].startswith("-0.") and table["mean - fair's"]["greedy"].startswith("-0.1")
    assert table["p (Holm)"]["greedy"] == "< 0.001" and table["better"]["greedy"] == "0%"
    assert table.loc["fair"][["least - fair's", "p (Holm)", "mean - fair's", "better"]].tolist() == [""] * 4
    assert table.loc["same"]["p (Holm)"] == ""  # no common seeds


def test_specialists_that_are_left_out_are_named(tmp_path):
    finish(tmp_path / "fair", 0, steps=1)
    for reward, seeds in (("ocr", 3), ("geneval", 1)):
        for seed in range(seeds):
            finish(tmp_path / "only" / f"{reward}_{seed}", seed, (0.4, 0.2), (reward,), steps=1)
    (note,) = sections.gains(collect([tmp_path]), "fair").notes
    assert note.endswith("1 are used, as many as the reward with the fewest has; left out: ocr seed 1, 2.")


def test_gains_and_differences_that_are_missing_are_explained(tmp_path):
    """A specialist that learned nothing, and too few runs for intervals."""
    for name in ("fair", "greedy"):
        finish(tmp_path / name, 0, steps=1)
    for name, change in (("ocr", (0.4, 0.2)), ("geneval", (0.0, 0.0))):
        finish(tmp_path / f"{name}_alone", 0, change, (name,), steps=1)
    section = sections.gains(collect([tmp_path]), "fair")
    few, unknown = section.notes
    assert few.startswith("Differences need two seeds") and few.endswith("used: 1.")
    assert unknown.startswith("No gain of geneval") and "less than 3 standard errors" in unknown
    assert section.table["geneval"].tolist() == ["-", "-"] and f"- {few}\n- {unknown}" in section.prose


def test_prompts_that_are_left_out_are_counted(tmp_path):
    """A reward that does not apply to a prompt is no loss; a score that a single seed lacks is one."""
    for method, seed in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
        folder = tmp_path / method / f"seed_{seed}"
        finish(folder, seed, steps=1)
        results = json.loads((folder / "results.json").read_text())
        lost = [0] if (method, seed) != ("b", 1) else [0, 1, 2]
        for index in lost:
            del results["prompts"][index]["scores"]["ocr"]
        (folder / "results.json").write_text(json.dumps(results))
    found = collect([tmp_path])
    section = sections.changes(found, "a")
    assert section.text.endswith("since not every seed has a score: 2 of 11 prompts of ocr by b.")
    assert section.table.loc["prompts"].tolist() == ["11", "12"]
    assert tables.verdicts(found, "a")["prompts"].tolist() == [9, 12]


def test_rounding_is_no_conflict(tmp_path):
    """An update on the border of a reward's half-space has a cosine of 0, but for rounding."""
    finish(tmp_path / "a" / "seed_0", 0, steps=0)
    with SummaryWriter(str(tmp_path / "a" / "seed_0")) as writer:
        for step, value in enumerate((-1e-8, 0.0, -0.1)):
            writer.add_scalar("cosine/update/own/ocr", value, step)
            writer.add_scalar("cosine/update/own/geneval", 0.9, step)
    found = collect([tmp_path])
    (own,) = cosines(REWARDS, found.runs)
    assert own["conflicts"] == "33%"
    figure = plots.harmony(found)
    assert figure.axes[1].lines[0].get_ydata().tolist() == pytest.approx([0, 0, 1 / 3])
    pyplot.close(figure)


def test_a_reward_with_a_score_on_one_prompt_or_none(tmp_path):
    """It has no interval and no verdict, and the report is written all the same."""
    for name in ("a", "b"):
        for seed in range(2):
            finish(tmp_path / name / f"seed_{seed}", seed)
    for file in tmp_path.glob("*/*/results.json"):
        results = json.loads(file.read_text())
        for prompt in results["prompts"][1 if "a" in file.parts else 0 :]:
            del prompt["scores"]["ocr"], prompt["base"]["ocr"]
        file.write_text(json.dumps(results))
    found = collect([tmp_path])
    changes = tables.changes(found)["ocr"]
    assert "[" not in changes["a"] and float(changes["a"]) and changes["b"] == "-"
    assert set(tables.verdicts(found, "a")["reward"]) == {"geneval"}


def test_gains_without_a_specialist_that_gains_enough_are_empty(tmp_path):
    finish(tmp_path / "a" / "seed_0", 0)
    for name in REWARDS:
        finish(tmp_path / f"only_{name}" / "seed_0", 0, gains=(0, 0), rewards=(name,))
    gains = tables.gains(collect([tmp_path]), "a").loc["a"]
    assert gains["least"] == gains["mean"] == "" and gains["ocr"] == "-"


def test_images_are_those_of_a_common_seed(tmp_path):
    """Where there is none, the noise differs, and the page says so."""
    for name, seeds in (("a", (0, 1)), ("b", (1, 2))):
        for seed in seeds:
            finish(tmp_path / name / f"seed_{seed}", seed)
    found = collect([tmp_path])
    assert {name: run.seed for name, run in found.examples.items()} == {"a": 1, "b": 1}
    assert "with seed 1; the same prompts and noise." in sections.images(found, "a").text
    finish(tmp_path / "c" / "seed_3", 3)
    found = collect([tmp_path])
    assert {name: run.seed for name, run in found.examples.items()} == {"a": 0, "b": 1, "c": 3}
    assert "with its lowest seed; the same prompts, but the noise of each seed." in sections.images(found, "a").text
