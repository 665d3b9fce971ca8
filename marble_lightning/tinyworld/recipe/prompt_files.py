"""Prompt files in the published formats: what the policy learns on, and held-out captions it is judged on."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from marble_lightning.tinyworld.captions import GENEVAL, SHARES, Captioned, captioned

TRAIN, TEST = 600, 96
"""Prompts of each source, at most."""
DRAWS = 20_000
"""Captions drawn to find distinct ones; enough that a tag runs out only where it has no more."""
TEST_PER_TAG = 24
"""Held-out GenEval prompts of each tag, as far as there are distinct ones."""


def write_prompt_files(folder: Path, seed: int) -> None:
    """Write `{source}/{train,test}` for every source: distinct prompts, none in both."""
    rng = random.Random(seed)
    for source in SHARES:
        (folder / source).mkdir(parents=True, exist_ok=True)
        for split, test in (("train", False), ("test", True)):
            prompts = _distinct(rng, source, test)
            if source == "geneval":
                lines = [json.dumps({**each.metadata, "prompt": each.caption}) for each in prompts]
                file = folder / source / f"{split}_metadata.jsonl"
            else:
                lines = [each.caption for each in prompts]
                file = folder / source / f"{split}.txt"
            file.write_text("\n".join(lines) + "\n")


def _distinct(rng: random.Random, source: str, test: bool) -> list[Captioned]:
    """Distinct captions, at most a fixed number of each GenEval tag, or of the source where it has no tags."""
    tagged = source == "geneval"
    most = (TEST_PER_TAG if tagged else TEST) if test else (TRAIN // len(GENEVAL) if tagged else TRAIN)
    found: dict[str, Captioned] = {}
    tags: Counter[str] = Counter()
    for _ in range(DRAWS):
        each = captioned(rng, source, test=test)
        tag = each.metadata.get("tag", source)
        if each.caption not in found and tags[tag] < most:
            tags[tag] += 1
            found[each.caption] = each
    return list(found.values())
