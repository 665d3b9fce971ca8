"""Result files: results.json with all held-out scores, results.csv with one mean per line."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from marble_lightning.evaluation.statistics import MEAN_OF_TAGS, Summary, by_tag, summaries, summarise
from marble_lightning.utils.atomic_files import atomic_write
from marble_lightning.utils.run_files import ALL, RESULTS
from rewards import Prompt, Reward

CSV = "results.csv"
COLUMNS = ("set", "reward", *Summary._fields)
"""Headings of results.csv."""


class HeldOutScores(NamedTuple):
    """Scores of held-out prompts, NaN where there is none, and scores of the base for the same prompts and noise.

    `prompts` holds the prompt of each row, by its index among all held-out prompts.
    """

    reward_models: Mapping[str, Reward]
    prompts: Mapping[int, Prompt]
    scores: Float[Tensor, "prompt reward"]
    base: Float[Tensor, "prompt reward"] | None = None

    def sets(self) -> dict[str, HeldOutScores]:
        """The prompts with a score, split by prompt set, that is by source; also `all` if there are several sets."""
        scored = (~self.scores.isnan().all(1)).tolist()
        sources = [prompt.source if kept else None for prompt, kept in zip(self.prompts.values(), scored, strict=True)]
        names = dict.fromkeys(source for source in sources if source is not None)
        by_source = {name: self._rows([source == name for source in sources]) for name in names}
        return by_source | ({ALL: self._rows(scored)} if len(by_source) > 1 else {})

    def tags(self) -> dict[str, Tensor]:
        """Scores by reward model and tag, such as `geneval/counting`."""
        return by_tag(self.reward_models, list(self.prompts.values()), self.scores)

    def base_tags(self) -> dict[str, Tensor] | None:
        """Scores of the base by reward model and tag."""
        return None if self.base is None else by_tag(self.reward_models, list(self.prompts.values()), self.base)

    def _rows(self, chosen: Sequence[bool]) -> HeldOutScores:
        prompts = {index: prompt for (index, prompt), kept in zip(self.prompts.items(), chosen, strict=True) if kept}
        rows = [row for row, kept in enumerate(chosen) if kept]
        return HeldOutScores(self.reward_models, prompts, self.scores[rows], None if self.base is None else self.base[rows])


def document(held_out: HeldOutScores, **facts: Any) -> dict[str, Any]:
    """The content of results.json: `facts`, then means by set and reward, by tag, and the scores of each prompt.

    Sets without any score have no means. Every prompt is there, also one without a score, so that runs with other rewards
    are seen to have the same prompts.

    Args:
        held_out: The scores.
        facts: Facts of the evaluation, such as the model and the settings.
    """
    return {
        **facts,
        "rewards": list(held_out.reward_models),
        "reward_models": {name: reward_model.identity for name, reward_model in held_out.reward_models.items()},
        "sets": {name: _means(of_set) for name, of_set in held_out.sets().items() if name != ALL},
        ALL: _means(held_out),
        "tags": _tags(held_out),
        "prompts": [
            {"index": index, "set": prompt.source, "prompt": prompt.text, **scores}
            for (index, prompt), scores in zip(held_out.prompts.items(), _by_prompt(held_out), strict=True)
        ],
    }


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, and results.csv: set, reward, mean, its standard error, number of prompts with a score.

    Args:
        folder: Folder of the files; created if it is missing.
        results: The content, from `document`.
    """
    with atomic_write(folder / RESULTS) as scratch:
        scratch.write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    with atomic_write(folder / CSV) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *mean_rows(results)])


def mean_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """The means of all sets and rewards, a row each, in the order of `COLUMNS`; None where there is no value."""
    sets = {**results["sets"], **({ALL: results[ALL]} if len(results["sets"]) > 1 else {})}
    return [
        [name, reward, *(row[field] for field in Summary._fields)]
        for name, means in sets.items()
        for reward, row in means.items()
    ]


def read(path: str | Path, setting: str = "`path`") -> dict[str, Any]:
    """Read results.json.

    Args:
        path: Path of the file or of its folder.
        setting: The setting that names the path, for error messages.

    Raises:
        ValueError: There is no such file, or it is not a results.json.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{setting} must be a {RESULTS} or a run's folder with one. Found no file {file.resolve()}.")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor text
        raise ValueError(f"{setting} must be a {RESULTS}. Found {file.resolve()}: {error}.") from error
    if not isinstance(results, dict) or not {"settings", "rewards", ALL, "prompts"} <= results.keys():
        raise ValueError(f"{setting} must be a {RESULTS} written by fit, validate or test. Found {file.resolve()}.")
    return results


def _plain(summary: Summary) -> dict[str, float | int | None]:
    return {name: value if value == value else None for name, value in summary._asdict().items()}


def _means(held_out: HeldOutScores) -> dict[str, dict[str, Any]]:
    columns = summaries(held_out.scores, held_out.base)
    trained = columns.pop("trained")
    return {
        name: {**_plain(trained[index]), **{title: _plain(column[index]) for title, column in columns.items()}}
        for index, name in enumerate(held_out.reward_models)
    }


def _tags(held_out: HeldOutScores) -> dict[str, dict[str, Any]]:
    tags: dict[str, dict[str, Any]] = {}
    for name, column in held_out.tags().items():
        reward_model, tag = name.split("/", 1)
        summary = _plain(summarise(column))
        tags.setdefault(reward_model, {})[tag] = {"mean": summary["mean"]} if tag == MEAN_OF_TAGS else summary
    return tags


def _by_prompt(held_out: HeldOutScores) -> list[dict[str, dict[str, float]]]:
    columns = {"scores": held_out.scores} | ({} if held_out.base is None else {"base": held_out.base})
    rows = {title: [_not_nan(held_out.reward_models, row) for row in column.tolist()] for title, column in columns.items()}
    return [{title: by_row[index] for title, by_row in rows.items()} for index in range(len(held_out.prompts))]


def _not_nan(reward_models: Mapping[str, Reward], row: Sequence[float]) -> dict[str, float]:
    return {name: score for name, score in zip(reward_models, row, strict=True) if score == score}
