"""Long measurements, each a module to run: `python -m benchmarks.NAME`. The README says which made a figure."""
