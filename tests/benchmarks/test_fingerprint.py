"""Fingerprints change with what the figures depend on, and with nothing else."""

from __future__ import annotations

from benchmarks.fingerprint import fingerprint, hash_of_files

TINY = ["-c", "tiny"]


def test_the_configuration_counts_however_it_is_given():
    tiny = fingerprint(TINY)
    assert tiny == fingerprint([*TINY, "-c", "stages/published", "--seed_everything", "3"])
    assert tiny == fingerprint([*TINY, "--balancer.refresh_every", "5"])
    other = fingerprint([*TINY, "--balancer.refresh_every", "10"])
    assert other["configuration"] != tiny["configuration"]
    assert other["weights"] == tiny["weights"]


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
