"""Sweeps: plans, stops, failures and resuming."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from marble_lightning.cli import main
from marble_lightning.command_line import check_fit
from marble_lightning.lab.jobs import Job
from marble_lightning.lab.launchers import Local, Slurm, in_use
from marble_lightning.lab.sweep import Variant, merged, plan, sweep
from marble_lightning.lab.sweep_table import catching, follow


def job(folder: Path, name: str, script: str) -> Job:
    """A job whose command is a script of Python; it writes results.json to be finished."""

    class Script(Job):
        @property
        def command(self) -> list[str]:
            return [sys.executable, "-c", script]

    (folder / name / "version_0").mkdir(parents=True, exist_ok=True)
    return Script(name, 0, folder / name, [], "")


def results(command: str) -> str:
    """The content of a results.json."""
    return json.dumps({"settings": {}, "rewards": [], "all": {}, "prompts": [], "evaluated": {"command": command}})


def finish(folder: Path, name: str) -> str:
    """A script that finishes a job."""
    return f"import pathlib; pathlib.Path({str(folder / name / 'version_0/results.json')!r}).write_text({results('fit')!r})"


def test_variants_and_seeds_make_jobs(tmp_path):
    variants = {"a": Variant(), "b": Variant(["balancers/mgda"], {"trainer": {"max_epochs": 3}})}
    jobs = plan(tmp_path, ["tiny"], variants, [0, 7], {"trainer": {"max_epochs": 2, "devices": 1}})
    assert [(job.variant, job.seed) for job in jobs] == [("a", 0), ("b", 0), ("a", 7), ("b", 7)]
    settings = yaml.safe_load(jobs[3].settings)
    assert settings["seed_everything"] == 7
    assert settings["trainer"]["max_epochs"] == 3
    assert settings["trainer"]["devices"] == 1
    assert settings["trainer"]["logger"]["init_args"] == {"save_dir": str(tmp_path / "b"), "name": "seed_7"}
    assert jobs[3].arguments == ["-c", "tiny", "-c", "balancers/mgda", "-c", str(tmp_path / "b/seed_7/sweep.yaml")]


def test_a_failure_does_not_stop_the_others(tmp_path, capsys):
    """Two at a time; a run that exits without results has failed as well; finished ones are not repeated."""
    jobs = [job(tmp_path, name, finish(tmp_path, name)) for name in ("good", "done")]
    jobs += [job(tmp_path, "bad", "raise ValueError('no such reward')"), job(tmp_path, "empty", "")]
    (jobs[1].folder / "version_0/results.json").write_text(results("fit"))
    before = jobs[1].folder.stat().st_mtime_ns
    assert follow(jobs, Local(2, None)) == 1
    printed = capsys.readouterr().out
    assert "2 finished, 2 failed" in printed
    assert f"\nbad, seed 0 failed: ValueError: no such reward\n  All messages: {tmp_path / 'bad/output.txt'}\n" in printed
    assert not jobs[1].output.exists()
    assert jobs[1].folder.stat().st_mtime_ns == before
    assert follow(jobs[:2], Local(2, None)) == 0


def test_jobs_that_slurm_refuses_or_loses_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """sbatch's message is in the list at the end. Only the node creates the file of messages."""
    for name, script in {"srun": "", "sbatch": "echo 'sbatch: error: invalid partition' >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    slurm = Slurm(1, None, tmp_path / "slurm", {"slurm_partition": "none"})

    class Cluster(Local):
        def start(self, command, output):
            if output.parent.name == "refused":
                return slurm.start(command, output)
            return SimpleNamespace(poll=lambda: 1) if output.parent.name == "lost" else super().start(command, output)

    jobs = [job(tmp_path, name, finish(tmp_path, name)) for name in ("first", "refused", "lost", "last")]
    assert follow(jobs, Cluster(2, None)) == 1
    printed = capsys.readouterr().out
    assert "2 finished, 2 failed" in printed
    assert printed.endswith(
        "refused, seed 0 failed: FailedJobError: sbatch: error: invalid partition\nlost, seed 0 failed: no messages\n"
    )


def test_only_results_of_fit_finish_a_job(tmp_path):
    """`validate` and `test` have written theirs beside an interrupted run; a damaged file is none."""
    single = job(tmp_path, "a", "")
    for version, content in enumerate([results("validate"), results("test"), "{"], start=1):
        (single.folder / f"version_{version}").mkdir()
        (single.folder / f"version_{version}/results.json").write_text(content)
    assert not single.finished
    (single.folder / "version_0/results.json").write_text(results("fit"))
    assert single.finished


def test_a_signal_stops_the_runs_and_begins_no_more(tmp_path):
    """Each run gets the signal once, and may save its round."""
    script = "import signal, time; signal.signal(15, lambda *_: (print('saved'), exit(143))); print('up', flush=True)"
    script += "; time.sleep(60)"
    jobs = [job(tmp_path, name, script) for name in ("first", "second", "third")]

    def interrupt() -> None:
        while not all(file.exists() and "up" in file.read_text() for file in (jobs[0].output, jobs[1].output)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert follow(jobs, Local(2, None)) == 128 + signal.SIGTERM
    thread.join()
    assert [single.output.exists() for single in jobs] == [True, True, False]
    assert [single.output.read_text().split() for single in jobs[:2]] == [["up", "saved"]] * 2


def test_a_lost_terminal_stops_a_sweep_but_not_under_nohup():
    caught = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with catching(caught):
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == [signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with catching(caught):
            os.kill(os.getpid(), signal.SIGHUP)
        assert caught == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_outlives_its_sweep_is_noticed(tmp_path):
    process = Local(1, None).start([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "output.txt")
    assert in_use(tmp_path / "output.txt")
    process.terminate()
    process.wait()
    assert not in_use(tmp_path / "output.txt")


def test_other_settings_than_those_of_earlier_runs_are_refused(tmp_path):
    """They may be corrected until a run has begun. A refused sweep leaves nothing in the folders of its other runs."""
    first, second = (plan(tmp_path, ["tiny"], {"a": Variant(settings=more)}, [0], {})[0] for more in ({}, {"data": {}}))
    first.prepare()
    second.check_earlier_runs()
    (first.folder / "version_0").mkdir()
    first.check_earlier_runs()
    message = "settings of a, seed 0, and the .* must be those of its earlier runs.*another `folder`"
    with pytest.raises(ValueError, match=message):
        second.check_earlier_runs()
    with pytest.raises(ValueError, match=message):
        sweep(tmp_path, ["tiny"], {"new": Variant(), "a": Variant(settings={"data": {}})}, [0])
    assert (first.folder / "sweep.yaml").read_text() == first.content
    assert not (tmp_path / "new").exists()


def test_an_edited_configuration_is_refused(tmp_path):
    """A comment is no edit."""
    file = tmp_path / "mine.yaml"
    file.write_text("trainer: {max_epochs: 3}\n")
    (before,) = plan(tmp_path / "runs", ["tiny", str(file)], {"a": Variant()}, [0], {})
    before.prepare()
    (before.folder / "version_0").mkdir()
    file.write_text("# three rounds\ntrainer:\n  max_epochs: 3\n")
    (same,) = plan(tmp_path / "runs", ["tiny", str(file)], {"a": Variant()}, [0], {})
    same.check_earlier_runs()
    file.write_text("trainer: {max_epochs: 4}\n")
    (edited,) = plan(tmp_path / "runs", ["tiny", str(file)], {"a": Variant()}, [0], {})
    with pytest.raises(ValueError, match="a, seed 0, and the configurations before them, must be those of its earlier runs"):
        edited.check_earlier_runs()


def test_threads_of_a_job_on_a_cluster(tmp_path):
    """submitit's own executor for this machine runs the job as SLURM would."""
    slurm = Slurm(1, 3, tmp_path / "slurm", {"cluster": "local"})
    process = slurm.start([sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], tmp_path / "output.txt")
    while process.poll() is None:
        time.sleep(0.05)
    assert process.poll() == 0 and (tmp_path / "output.txt").read_text() == "3\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {"a/b": Variant()}}, "A variant's name must be letters.*'a/b'"),
        ({"variants": {"..": Variant()}}, "must not be that of another folder of a sweep. Found '..'"),
        ({"variants": {"slurm": Variant()}}, "must not be that of another folder of a sweep. Found 'slurm'"),
        ({"variants": {"seed_1": Variant()}}, "must not be that of another folder of a sweep. Found 'seed_1'"),
        ({"configs": ["no_such"]}, "`-c` must be a file, or the name of a configuration.*'no_such'"),
        ({"variants": {}}, "needs variants and seeds.*0 and 1"),
        ({"seeds": [1, 1]}, "`seeds` must be different numbers"),
        ({"jobs": 0}, "`jobs` must be >= 1"),
        (
            {"settings": {"trainer": {"logger": False}}},
            "settings of a must have no `trainer.logger`.*Found False; remove it",
        ),
        (
            {"variants": {"a": Variant(settings={"trainer": {"logger": [{"class_path": "WandbLogger"}]}})}},
            "settings of a must have no `trainer.logger`.*Found .*WandbLogger.*; remove it",
        ),
        (
            {"settings": {"balancer": {"init_args": {"no_such": 1}}}},
            "(?s)`fit` must accept the settings of a. Found Parser key.*no_such",
        ),
        (
            {"settings": {"balancer": {"init_args": {"gram": "split"}}}},
            "`fit` must accept the settings of a. Found `gram_shrinkage` needs `gram_decay` > 0",
        ),
        ({"slurm": {"cluster": "none"}}, "`slurm` must be options that submitit accepts.*'cluster': 'none'"),
        ({"slurm": {"cluster": "local", "gpus": 1}}, "`slurm` must be options that submitit accepts.*'gpus': 1"),
        (
            {"slurm": {"cluster": "local", "timeout_min": "9h"}},
            "`slurm` must be options that submitit accepts.*expected type",
        ),
    ],
)
def test_wrong_sweeps_are_refused_before_the_first_run(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("marble_lightning.lab.sweep.follow", lambda *_: pytest.fail("started"))
    options = {"folder": tmp_path, "configs": ["tiny"], "variants": {"a": Variant()}, "seeds": [0]} | change
    with pytest.raises(ValueError, match=message):
        sweep(**options)
    assert {place.name for place in tmp_path.iterdir()} <= {"slurm"}  # which submitit creates, and no run


def test_a_variant_is_checked_as_fit_checks_it(tmp_path, monkeypatch, capsys):
    """The same message, in this process, without weights; classes of the working folder are found, as by `python -m`."""
    monkeypatch.setattr("marble_lightning.policies.sd3.load_pipeline", lambda *_: pytest.fail("weights were loaded"))
    wrong = ["-c", "tiny", "--model.sampling.steps", "few"]
    with pytest.raises(SystemExit):
        main(["fit", *wrong])
    expected = capsys.readouterr().err.removeprefix("error: ").strip()
    with pytest.raises(ValueError) as refused:
        check_fit(wrong)
    assert str(refused.value) == expected and "sampling.steps" in expected
    (tmp_path / "own_balancer.py").write_text("from balancers import MARBLE\n\n\nclass Own(MARBLE):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    check_fit(["-c", "tiny", "--balancer", "own_balancer.Own"])
    check_fit(["-c", "sd35m"])  # this machine has no GPU
    assert sys.path == before and capsys.readouterr() == ("", "")


def test_the_command_reads_a_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "marble_lightning.lab.sweep.follow", lambda jobs, launcher: seen.extend([jobs, launcher.places]) or 0
    )
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"folder: {tmp_path}\nconfigs: [tiny]\nvariants: {{a: {{}}, b: {{configs: [balancers/mgda]}}}}\nseeds: [0, 1]\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["sweep", str(file), "--jobs", "2"])
    assert end.value.code == 0
    assert [(job.variant, job.seed) for job in seen[0]] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert seen[1] == 2
    assert all((job.folder / "sweep.yaml").read_text() == job.content for job in seen[0])


def test_classes_in_settings_stay_settings(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("marble_lightning.lab.sweep.follow", lambda jobs, launcher: seen.extend(jobs) or 0)
    reward = {"class_path": "rewards.CLIPScore", "init_args": {"path": "package:tinyworld/weights/clipscore"}}
    balancer = {"class_path": "balancers.MGDA", "init_args": {"refresh_every": 3}}
    content = {"configs": ["tiny"], "seeds": [0], "variants": {"a": {"settings": {"balancer": balancer}}}}
    content |= {"folder": str(tmp_path / "runs"), "settings": {"model": {"rewards": {"clipscore": reward}}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        main(["sweep", str(tmp_path / "sweep.yaml")])
    settings = yaml.safe_load(seen[0].settings)
    assert settings["balancer"] == balancer and settings["model"]["rewards"] == {"clipscore": reward}


def test_later_settings_decide():
    assert merged({"a": {"b": 1}, "c": 1}, {"a": None}) == {"a": None, "c": 1}
    assert merged({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}
