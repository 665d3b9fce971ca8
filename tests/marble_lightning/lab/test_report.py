"""Reports on finished runs: which they find, and what they contain."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout

import pandas
import pytest
from torch.utils.tensorboard import SummaryWriter

from marble_lightning.cli import main
from marble_lightning.evaluation.gains import normalised_gains
from marble_lightning.evaluation.statistics import crossed_interval
from marble_lightning.lab.report.collect import collect
from marble_lightning.lab.report.harmony import cosines, signal_to_noise
from marble_lightning.lab.report.page import write_report
from marble_lightning.lab.runs import Run, resumed
from tests.helpers.finished_runs import PROMPTS, REWARDS, begin, finish


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory):
    """The folder of a report on them, with what the command has printed in `shown.txt`."""
    folder = tmp_path_factory.mktemp("written")
    with (folder / "shown.txt").open("w") as shown, redirect_stdout(shown):
        main(["report", str(finished), "--to", str(folder), "--reference", "greedy"])
    return folder


def test_runs_are_found_by_method_and_seed(folder):
    found = collect([folder])
    assert {name: list(seeds) for name, seeds in found.methods.items()} == {"fair": [0, 1, 2], "greedy": [0, 1, 2]}
    assert {name: list(seeds) for name, seeds in found.specialists.items()} == {"geneval": [0, 1], "ocr": [0, 1]}
    assert found.rewards == ["ocr", "geneval"]
    assert found.changes("greedy").mean((0, 1)).tolist() == pytest.approx([0.4, 0.0], abs=0.05)


def test_the_page_and_its_files(finished, report):
    page, text, shown = ((report / name).read_text() for name in ("report.html", "report.md", "shown.txt"))
    assert shown.strip() == str(report / "report.html")
    for title in ("Normalised gains", "Beside greedy", "Learning curves", "Weights over time", "Image statistics"):
        assert title in page and f"## {title}" in text
    assert "All were trained on ocr, geneval." in text and "| rewards " not in text
    assert "Compare conflicts with <code>by chance</code>" in page and "<li>Differences have 99 % intervals.</li>" in page
    assert page.count("data:image/png;base64,") == len(list(report.glob("*.png"))) == 8
    assert "http" not in page  # nothing is loaded from elsewhere
    found = collect([finished])
    changes = pandas.read_csv(report / "changes.csv", index_col=0)
    interval = crossed_interval(found.changes("fair")[:, :, 0])
    assert changes.loc["fair", "ocr"] == f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    gains = pandas.read_csv(report / "gains.csv", index_col=0)
    expected = normalised_gains(found.changes("greedy"), found.changes_of_specialists())
    assert gains.loc["greedy", "least"] == pytest.approx(float(expected.min()), abs=0.006)
    assert gains.loc["greedy", "least"] < gains.loc["fair", "least"]
    verdicts = pandas.read_csv(report / "verdicts.csv")
    assert dict(zip(verdicts.reward, verdicts.verdict, strict=True)) == dict.fromkeys(REWARDS, "too few seeds")
    assert len(pandas.read_csv(report / "scores.csv")) == 10 * PROMPTS * 2
    costs = pandas.read_csv(report / "methods.csv", index_col=0)
    facts = costs.loc["fair", ["seconds a round", "hours a run", "peak memory"]]
    assert facts.tolist() == [2.0, 0.00444, "1.75 GiB (process)"]
    statistics = pandas.read_csv(report / "image_statistics.csv", index_col=0)
    assert statistics.loc["fair", "brightness"].startswith("x 0.65")


def test_honest_cosines_stand_beside_those_of_own_images(report):
    """Of each method and of each run, with what chance gives and the signal-to-noise ratio."""
    page = (report / "report.html").read_text()
    assert re.search(r"<span>\[[-+\d., ]*\]</span>", page), "an interval may not break"
    assert "<th>0</th>" not in page, "rows without names have no numbers"
    assert page.count("<figcaption>") == 3, "the base and two methods"
    assert "by chance" in page and "Signal and noise" in page and "No cosines were logged" not in page
    harmony = pandas.read_csv(report / "harmony.csv")
    assert harmony["method"].tolist() == ["fair", "fair", "greedy", "greedy"]
    assert harmony["products"].tolist() == ["own", "split"] * 2
    assert harmony["weights"].tolist() == ["update"] * 4  # steps between refreshes have logged none
    assert harmony["steps"].tolist() == [24] * 4  # eight of each of three seeds
    assert harmony["conflicts"].tolist() == ["25%", "75%"] * 2
    assert harmony["by chance"].tolist() == ["70%"] * 4
    assert harmony["ocr"][0].startswith("+0.200 ± ")
    assert pandas.read_csv(report / "noise.csv", index_col=0).loc["fair"].tolist() == [0.1, 0.1]
    runs = pandas.read_csv(report / "harmony_runs.csv")
    assert len(runs) == 2 * 3 * 3
    third = runs[(runs["method"] == "fair") & (runs["seed"] == 2)].set_index("products")
    assert third["steps"].tolist()[:2] == [8, 8] and third.loc["signal / noise", "geneval"] == "0.20"


def test_cosines_of_probes_have_the_chance_of_probes(tmp_path):
    """Methods without refreshes log cosines at probes; those without probes are named."""
    for name in ("plain", "probed"):
        finish(tmp_path / name, 0, steps=0)
    with SummaryWriter(str(tmp_path / "probed")) as writer:
        for name in REWARDS:
            writer.add_scalar(f"cosine/update/split/{name}", 0.2, 3)
        writer.add_scalar("probe/reused/split/chance", 0.9, 3)
    plain, probed = (Run(tmp_path / name) for name in ("plain", "probed"))
    assert cosines(REWARDS, [plain]) == [] and signal_to_noise(REWARDS, [plain]) == {}
    (row,) = cosines(REWARDS, [probed])
    assert (row["products"], row["conflicts"], row["by chance"]) == ("split", "0%", "90%")


def test_methods_without_cosines_are_named(folder):
    for file in folder.glob("greedy/*/*/events*"):
        file.unlink()
    write_report([folder], folder / "report", None)
    text = (folder / "report/report.md").read_text()
    assert "No cosines were logged by greedy; `gradient_alignment.probe_every` logs them." in text


def test_a_bar_on_a_terminal_shows_the_runs(folder, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    write_report([folder / "fair"], folder / "report", None)
    for title, total in ((f"Reading {folder / 'fair'}", "0/3 "), ("Reading curves", "0/3 "), ("Drawing", "0/11 ")):
        assert f"{title}:   0%|          | {total}" in terminal.getvalue()


def test_one_seed_and_no_specialists(tmp_path):
    finish(tmp_path / "version_3", 0)
    write_report([tmp_path / "version_3"], tmp_path / "report", None)
    text = (tmp_path / "report/report.md").read_text()
    assert "There is none on ocr, geneval." in text and "±" in text
    assert tmp_path.name in text  # the method's name is that of the folder


def test_killed_runs_are_named(folder):
    begin(folder / "fair" / "seed_9" / "version_0", 9)
    write_report([folder], folder / "report", None)
    assert f"no results: {folder / 'fair/seed_9/version_0'}." in (folder / "report/report.md").read_text()


def test_a_run_of_a_sweep_that_never_began_is_named(folder):
    """It failed before it had a folder of its own."""
    (folder / "fair" / "seed_9").mkdir()
    (folder / "fair" / "seed_9" / "sweep.yaml").touch()
    (folder / "fair" / "seed_0" / "sweep.yaml").touch()
    assert collect([folder]).unfinished == [folder / "fair" / "seed_9"]


def test_killed_runs_that_were_resumed_are_not_missing(folder):
    """A run that left no checkpoint is repeated by the next one; an independent run replaces none."""
    versions = [folder / "fair" / "seed_9" / f"version_{number}" for number in range(4)]
    for version, checkpoints in zip(versions, (True, True, False), strict=False):
        begin(version, 9)
        if checkpoints:
            (version / "checkpoints").mkdir()
    finish(versions[3], 9, ckpt_path="last")
    found = collect([folder])
    assert found.unfinished == [versions[0]]
    assert 9 in found.methods["fair"]


def test_other_commands_are_no_killed_runs(folder):
    begin(folder / "fair" / "seed_0" / "version_1", 0, settings={"return_predictions": False})
    assert collect([folder]).unfinished == []


def test_evaluations_beside_a_run_are_named(folder):
    """`validate` writes results too; those of earlier versions name no command and count as runs."""
    place = folder / "fair" / "seed_0"
    finish(place / "version_1", 0, command="validate")
    finish(folder / "third" / "seed_0", 0, command="fit")
    found = collect([folder])
    assert found.methods["fair"][0].folder == place / "version_0"
    assert found.notes == [f"Left out, since `validate` wrote it: {place / 'version_1'}."]
    with pytest.raises(ValueError, match="needs finished runs.*none in .*version_1, and 0 that have not finished"):
        collect([place / "version_1"])


def test_a_resumed_run_has_the_curve_of_all_its_parts(tmp_path):
    """Steps that were done again count once, as they were done last."""
    for number, steps, ckpt_path in ((0, range(5), None), (1, range(3, 6), "last"), (2, range(5, 8), "last")):
        version = tmp_path / f"version_{number}"
        begin(version, 0, ckpt_path=ckpt_path)
        (version / "checkpoints").mkdir()
        with SummaryWriter(str(version)) as writer:
            for step in steps:
                writer.add_scalar("loss", 10 * number + step, step)
    assert resumed(tmp_path / "version_2") == tmp_path / "version_1"
    (tmp_path / "version_2/results.json").write_text("{}")
    assert Run(tmp_path / "version_2").curve("loss") == ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 13, 14, 25, 26, 27])
