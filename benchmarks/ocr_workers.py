"""Speed-up of OCR with several workers: `python -m benchmarks.ocr_workers`.

One engine, threads and processes alternate in reading rendered words. The table has medians and ratios of one run.
"""

from __future__ import annotations

import argparse
import statistics
import time

from tqdm import tqdm

from benchmarks.random_rewards import rendered
from rewards import OCR


def main() -> None:
    """Time the readers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--cycles", type=int, default=5, help="measured turns of each reader, after a warm-up")
    parser.add_argument("--line", action="store_true", help="recognition only, without detection")
    options = parser.parse_args()

    readers = {
        "one engine": OCR(detect=not options.line),
        "threads": OCR(detect=not options.line, workers=options.workers, worker_kind="thread"),
        "processes": OCR(detect=not options.line, workers=options.workers, worker_kind="process"),
    }
    for reader in readers.values():
        reader.setup()
    images = rendered(options.images, options.size)
    times: dict[str, list[float]] = {name: [] for name in readers}
    for cycle in tqdm(range(options.cycles + 1), desc="Turns, the first a warm-up"):
        for name, reader in readers.items():
            start = time.perf_counter()
            reader.read(images)
            if cycle:
                times[name].append(time.perf_counter() - start)
    print(f"\n{options.workers} workers, {options.images} images of {options.size} px\n")
    print("| | images a second | times one engine | spread |\n|---|---|---|---|")
    for name, seconds in times.items():
        ratios = [one / other for one, other in zip(times["one engine"], seconds, strict=True)]
        print(
            f"| {name} | {options.images / statistics.median(seconds):.1f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
