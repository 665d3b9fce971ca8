"""Fingerprints change with what the figures depend on, and with nothing else."""

from __future__ import annotations

from benchmarks.fingerprint import fingerprint, hash_of_files, resolve

TINY = ["-c", "tiny"]


def test_the_configuration_counts_however_it_is_given():
    tiny = fingerprint(TINY)
    assert tiny == fingerprint([*TINY, "-c", "stages/published", "--seed_everything", "3"])
    assert tiny == fingerprint([*TINY, "--balancer.refresh_every", "5"])
    other = fingerprint([*TINY, "--balancer.refresh_every", "10"])
    assert other["configuration"] != tiny["configuration"]
    assert other["weights"] == tiny["weights"]


def test_a_setting_newer_than_the_figures_counts_only_where_it_changes_something():
    """The fingerprint of `tiny` in benchmarks/results, recorded before `kl_every` was there."""
    arguments = (*TINY, "--model.objective.kl_every")
    recorded = "f537d08c9fb696c8f430e91a9fdec2432e2cf3329eb404eff03318a7447085e5"
    assert [fingerprint([*arguments, every])["configuration"] == recorded for every in ("1", "2")] == [True, False]
    assert resolve(*arguments, "1")["model"]["objective"]["kl_every"] == 1


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
