"""Speed of the old and reference velocities in one network call or two: `python -m benchmarks.policies_in_one_pass`.

Training makes two network calls of B images. The alternative is one call of 2 B images, in which peft uses the old adapter
for the first half and none for the second. Both alternate within one run, on the bundled tiny model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marble_lightning.policies.base import Conditions
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.tinyworld import WEIGHTS
from marble_lightning.utils.seeds import generator

BASE = "__base__"
"""peft's name for no adapter, in a batch with several adapters."""


@contextmanager
def mixed(policy: SD3Policy, names: list[str]) -> Iterator[None]:
    """Use the adapter `names[i]` for image i of a batch."""

    def add(layer: Any, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**options, "adapter_names": names}

    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in policy._lora_layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    """Time both alternatives and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[9, 72], help="images of a micro-batch")
    parser.add_argument("--cycles", type=int, default=10)
    options = parser.parse_args()
    policy = SD3Policy(str(WEIGHTS / "sd3"), resolution=64, rank=16, alpha=32, text_length=1, dtype="float32")
    policy.setup(seed=0)
    with torch.no_grad():
        for index, parameter in enumerate(policy.parameters_of("old")):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(index)))
    print("| images | one pass is faster by | spread | largest difference |\n|---|---|---|---|")
    for size in options.sizes:
        conditions = policy.encode(["a red circle"] * size)
        noisy, t = torch.randn(size, 16, 8, 8), torch.rand(size) * 0.9 + 0.05
        twice = conditions[torch.arange(size).repeat(2)]

        def one(noisy: Tensor = noisy, t: Tensor = t, twice: Conditions = twice, size: int = size) -> Tensor:
            with mixed(policy, ["old"] * size + [BASE] * size):
                return policy.velocity(noisy.repeat(2, 1, 1, 1), t.repeat(2), twice)

        def two(noisy: Tensor = noisy, t: Tensor = t, conditions: Conditions = conditions) -> Tensor:
            velocities = []
            for adapter in ("old", None):
                with policy.use_adapter(adapter):  # type: ignore[arg-type]
                    velocities.append(policy.velocity(noisy, t, conditions))
            return torch.cat(velocities)

        ratios = []
        with torch.no_grad():
            difference = float((one() - two()).abs().max())
            for _ in tqdm(range(options.cycles), f"{size} images", leave=False):
                seconds = []
                for call in (two, one):
                    start = time.perf_counter()
                    call()
                    seconds.append(time.perf_counter() - start)
                ratios.append(seconds[0] / seconds[1])
        print(f"| {size} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {difference:.0e} |")


if __name__ == "__main__":
    main()
