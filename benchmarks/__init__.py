"""Benchmarks, each a module to run with `python -m benchmarks.NAME`. The README names the benchmark behind each number."""
