"""Prompt files in the published formats: training prompts, and held-out captions for evaluation."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from marble_lightning.tinyworld.captions import GENEVAL, SHARES, Captioned, draw_captioned

TRAIN, TEST = 600, 42
"""Maximum number of prompts per source."""
DRAWS = 20_000
"""Number of captions drawn to find distinct ones; a tag gets fewer only if it has no more distinct captions."""
TEST_PER_TAG = 7
"""Maximum number of held-out GenEval prompts per tag."""


def write_prompt_files(folder: Path, seed: int) -> None:
    """Write `{source}/{train,test}` for every source, with distinct prompts and no overlap between train and test."""
    rng = random.Random(seed)
    for source in SHARES:
        (folder / source).mkdir(parents=True, exist_ok=True)
        for split, test in (("train", False), ("test", True)):
            prompts = _distinct(rng, source, test)
            if source == "geneval":
                lines = [json.dumps({**prompt.metadata, "prompt": prompt.caption}) for prompt in prompts]
                file = folder / source / f"{split}_metadata.jsonl"
            else:
                lines = [prompt.caption for prompt in prompts]
                file = folder / source / f"{split}.txt"
            file.write_text("\n".join(lines) + "\n")


def _distinct(rng: random.Random, source: str, test: bool) -> list[Captioned]:
    """Draw distinct captions, at most a fixed number per GenEval tag, or per source if it has no tags."""
    tagged = source == "geneval"
    limit = (TEST_PER_TAG if tagged else TEST) if test else (TRAIN // len(GENEVAL) if tagged else TRAIN)
    prompts: dict[str, Captioned] = {}
    tags: Counter[str] = Counter()
    for _ in range(DRAWS):
        prompt = draw_captioned(rng, source, test=test)
        tag = prompt.metadata.get("tag", source)
        if prompt.caption not in prompts and tags[tag] < limit:
            tags[tag] += 1
            prompts[prompt.caption] = prompt
    return list(prompts.values())
