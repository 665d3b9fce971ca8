"""Fingerprints change with what the figures depend on, and with nothing else."""

from __future__ import annotations

import json

from benchmarks.fingerprint import fingerprint, hash_of_files, resolve
from benchmarks.methods import run_of
from benchmarks.stages import read_stages
from tests.helpers import ROOT

TINY = ["-c", "tiny"]


def test_the_configuration_counts_however_it_is_given():
    tiny = fingerprint(TINY)
    assert tiny == fingerprint([*TINY, "-c", "stages/published", "--seed_everything", "3"])
    assert tiny == fingerprint([*TINY, "--balancer.refresh_every", "5"])
    other = fingerprint([*TINY, "--balancer.refresh_every", "10"])
    assert other["configuration"] != tiny["configuration"]
    assert other["weights"] == tiny["weights"]


def test_a_setting_newer_than_the_figures_counts_only_where_it_changes_something():
    """A result that was recorded before `kl_every` was there still has the fingerprint of its run."""
    file = ROOT / "benchmarks/results/methods/published_marble_24_seed_0.json"
    fit = run_of(read_stages(), "published", "marble", 0, 24, ())
    assert fit.identity["fingerprint"] == json.loads(file.read_text())["fingerprint"]
    assert resolve(*fit.arguments)["model"]["objective"]["kl_every"] == 1
    other = fingerprint([*fit.arguments, "--model.objective.kl_every", "2"])
    assert other["configuration"] != fit.identity["fingerprint"]["configuration"]


def test_files_count_by_name_and_content(tmp_path):
    def hashed():
        hash_of_files.cache_clear()
        return hash_of_files(tmp_path)

    hashes = [hashed()]
    for name, text in (("a", "1"), ("a", "2"), ("b", "2")):
        (tmp_path / name).write_text(text)
        hashes.append(hashed())
    assert len(set(hashes)) == 4
    (tmp_path / "c.pyc").touch()
    assert hashed() == hashes[-1]
    hash_of_files.cache_clear()
