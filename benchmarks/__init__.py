"""Benchmarks, each a module to run with `python -m benchmarks.NAME`. The documentation names that of each number."""
