"""Prompt files in the published formats: what the policy learns on, and held-out captions it is judged on."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from marble_lightning.tinyworld.captions import SHARES, Captioned, captioned

TRAIN, TEST = 600, 96
"""Prompts of each text source."""
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
    found: dict[str, Captioned] = {}
    tags: Counter[str] = Counter()
    for _ in range(20_000):
        each = captioned(rng, source, test=test)
        if each.caption in found:
            continue
        tag = each.metadata.get("tag", source)
        if tags[tag] >= (TRAIN if not test else TEST_PER_TAG if source == "geneval" else TEST):
            continue
        if not test and source == "geneval" and tags[tag] >= TRAIN // 6:
            continue
        tags[tag] += 1
        found[each.caption] = each
    return list(found.values())
