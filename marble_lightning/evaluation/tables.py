"""Tables of held-out scores: base and trained, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from marble_lightning.evaluation.statistics import MEAN_OF_TAGS, Summary, summaries


def held_out_table(
    names: Sequence[str],
    scores: Float[Tensor, "prompt reward"],
    *,
    heading: str = "trained",
    base: Float[Tensor, "prompt reward"] | None = None,
    title: str = "Held-out prompts",
) -> Table:
    """The table shown after `fit`, `validate` and `test`.

    Args:
        names: Names of the rewards and metrics.
        scores: Their scores, NaN where they do not apply.
        heading: Heading of the column of scores.
        base: Scores of the base on the same prompts and noise; adds the columns `base` and `change`.
        title: Title of the table, such as the name of the prompt set.
    """
    columns = summaries(scores, base, heading)
    table = Table(title=f"{title}, mean ± standard error")
    table.add_column("reward", no_wrap=True)
    for column in ("n", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for index, name in enumerate(names):
        row = {column: by_reward[index] for column, by_reward in columns.items()}
        n, paired = row[heading].n, row.get("change", row[heading]).n
        cells = [_cell(summary, "+" if column == "change" else "") for column, summary in row.items()]
        table.add_row(name, str(n) if n == paired else f"{n} ({paired} with base)", *cells)
    return table


def _cell(summary: Summary, sign: str = "") -> str:
    mean = f"{summary.mean:{sign}.4f}"
    return f"{mean} ± {summary.error:.4f}" if summary.n > 1 else mean if summary.n else "-"


def tags_table(
    scores: Mapping[str, Float[Tensor, " prompt"]],
    *,
    heading: str = "trained",
    base: Mapping[str, Float[Tensor, " prompt"]] | None = None,
) -> Table:
    """Means by tag, with a column for each reward model that has tags.

    Args:
        scores: By reward model and tag, such as `geneval/counting`; NaN for prompts with another tag.
        heading: Name of the scored policy, for the title.
        base: Scores of the base on the same prompts and noise, shown before `scores`.
    """
    reward_models, tags = (list(dict.fromkeys(name.split("/", 1)[part] for name in scores)) for part in (0, 1))
    table = Table(title=f"By tag, {heading if base is None else f'base -> {heading}'}")
    table.add_column("tag", no_wrap=True)
    for reward_model in reward_models:
        table.add_column(reward_model, justify="right", no_wrap=True)
    for tag in sorted(tags, key=lambda tag: (tag == MEAN_OF_TAGS, tag)):
        table.add_row(tag, *(" -> ".join(_means(f"{reward_model}/{tag}", base, scores)) for reward_model in reward_models))
    return table


def _means(name: str, *columns: Mapping[str, Tensor] | None) -> list[str]:
    return [f"{column[name].nanmean():.4f}" for column in columns if column is not None and name in column]


def comparison_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """The composite and the means of each run.

    Args:
        runs: One row per run, from `compare_runs`.
    """
    table = Table(title="Means over all prompts; composite: mean z-score over these runs")
    table.add_column("run", overflow="fold")
    for title in ("composite", *runs[0]["means"]):
        table.add_column(title, justify="right")
    for run in runs:
        composite = "-" if run["composite"] is None else f"{run['composite']:+.3f}"
        table.add_row(run["run"], composite, *(f"{mean:.4f}" for mean in run["means"].values()))
    return table
