"""What a policy was found to be worth, as files: results.json with everything, results.csv with a mean a line."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from marble_lightning.data.datamodule import ALL
from marble_lightning.evaluation.statistics import MEAN_OF_TAGS, Summary, by_tag, summaries, summarise
from marble_lightning.run_folder import RESULTS
from marble_lightning.utils.atomic_files import atomic_write
from rewards import Prompt, Reward
from rewards.base import with_public_names

CSV = "results.csv"


class HeldOutScores(NamedTuple):
    """Scores of held-out prompts, NaN where there is none, and those of the base on the same prompts and noise.

    `prompts` are those of the rows, by their place among all held-out prompts.
    """

    reward_models: Mapping[str, Reward]
    prompts: Mapping[int, Prompt]
    scores: Float[Tensor, "prompt reward"]
    base: Float[Tensor, "prompt reward"] | None = None

    def sets(self) -> dict[str, HeldOutScores]:
        """The same of each prompt set, which is a source of prompts; where there are several, of `all` too."""
        found = [prompt.source for prompt in self.prompts.values()]
        own = {source: self._rows([each == source for each in found]) for source in dict.fromkeys(found)}
        return own | ({ALL: self} if len(own) > 1 else {})

    def sampled(self) -> HeldOutScores:
        """The same without prompts of which nothing is known."""
        return self._rows((~self.scores.isnan().all(1)).tolist())

    def tags(self) -> dict[str, Tensor]:
        """Scores by judge and tag, as `geneval/counting`."""
        return by_tag(self.reward_models, list(self.prompts.values()), self.scores)

    def base_tags(self) -> dict[str, Tensor] | None:
        """The same of the base."""
        return None if self.base is None else by_tag(self.reward_models, list(self.prompts.values()), self.base)

    def _rows(self, chosen: Sequence[bool]) -> HeldOutScores:
        prompts = {index: prompt for (index, prompt), kept in zip(self.prompts.items(), chosen, strict=True) if kept}
        rows = [row for row, kept in enumerate(chosen) if kept]
        return HeldOutScores(self.reward_models, prompts, self.scores[rows], None if self.base is None else self.base[rows])


def document(measured: HeldOutScores, **facts: Any) -> dict[str, Any]:
    """All that results.json has: `facts`, then means by set and reward, by tag, and the scores of each prompt.

    Args:
        measured: The scores.
        facts: How they came about.
    """
    return {
        **facts,
        "rewards": list(measured.reward_models),
        "judges": {name: reward_model.identity for name, reward_model in measured.reward_models.items()},
        "sets": {name: _means(own) for name, own in measured.sets().items() if name != ALL},
        ALL: _means(measured),
        "tags": _tags(measured),
        "prompts": [
            {"index": index, "set": prompt.source, "prompt": prompt.text, **each}
            for (index, prompt), each in zip(measured.prompts.items(), _each(measured), strict=True)
        ],
    }


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write results.json, and results.csv: set, reward, mean, its standard error, number of prompts with a score.

    Args:
        folder: Where to; made where it is missing.
        found: What `document` gave.
    """
    with atomic_write(folder / RESULTS) as beside:
        beside.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    sets = {**found["sets"], **({ALL: found[ALL]} if len(found["sets"]) > 1 else {})}
    with atomic_write(folder / CSV) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["set", "reward", *Summary._fields])
        for name, means in sets.items():
            lines.writerows([name, reward, *(own[field] for field in Summary._fields)] for reward, own in means.items())


def read(path: str | Path, who: str = "`path`") -> dict[str, Any]:
    """Read results.json, given by its path or that of its folder.

    Args:
        path: Of the file or the folder.
        who: The setting that names it, for error messages.

    Raises:
        ValueError: There is none, or it is something else.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{who} must be a {RESULTS} or a run's folder with one. Found no file {file.resolve()}.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor text
        raise ValueError(f"{who} must be a {RESULTS}. Found {file.resolve()}: {error}.") from error
    if not isinstance(found, dict) or not {"settings", "rewards", ALL, "prompts"} <= found.keys():
        raise ValueError(f"{who} must be a {RESULTS} written by fit, validate or test. Found {file.resolve()}.")
    for reward_model in found.get("judges", {}).values():
        reward_model["class"] = with_public_names(reward_model["class"])  # earlier results name modules, which have moved
    return found


def _plain(summary: Summary) -> dict[str, float | int | None]:
    return {name: value if value == value else None for name, value in summary._asdict().items()}


def _means(measured: HeldOutScores) -> dict[str, dict[str, Any]]:
    columns = summaries(measured.scores, measured.base)
    own = columns.pop("trained")
    return {
        name: {**_plain(own[index]), **{title: _plain(column[index]) for title, column in columns.items()}}
        for index, name in enumerate(measured.reward_models)
    }


def _tags(measured: HeldOutScores) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, column in measured.tags().items():
        reward_model, tag = name.split("/", 1)
        own = _plain(summarise(column))
        found.setdefault(reward_model, {})[tag] = {"mean": own["mean"]} if tag == MEAN_OF_TAGS else own
    return found


def _each(measured: HeldOutScores) -> list[dict[str, dict[str, float]]]:
    columns = {"scores": measured.scores} | ({} if measured.base is None else {"base": measured.base})
    rows = {title: [_there(measured.reward_models, row) for row in column.tolist()] for title, column in columns.items()}
    return [{title: own[index] for title, own in rows.items()} for index in range(len(measured.prompts))]


def _there(reward_models: Mapping[str, Reward], row: Sequence[float]) -> dict[str, float]:
    return {name: score for name, score in zip(reward_models, row, strict=True) if score == score}
