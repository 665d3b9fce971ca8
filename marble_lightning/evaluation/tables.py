"""Held-out scores as a table: base -> trained, with standard errors."""

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
    """A table shown after `fit`, `validate` and `test`.

    Args:
        names: Names of the judges.
        scores: What they say, NaN where they do not apply.
        heading: Whose scores these are.
        base: Scores of the base on the same prompts and noise; adds its column and the change.
        title: What prompts these are.
    """
    columns = summaries(scores, base, heading)
    table = Table(title=f"{title}, mean ± standard error")
    table.add_column("reward", no_wrap=True)
    for column in ("n", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for index, name in enumerate(names):
        own = {column: found[index] for column, found in columns.items()}
        n, paired = own[heading].n, own.get("change", own[heading]).n
        cells = [_cell(each, "+" if column == "change" else "") for column, each in own.items()]
        table.add_row(name, str(n) if n == paired else f"{n} ({paired} with base)", *cells)
    return table


def _cell(found: Summary, sign: str = "") -> str:
    return f"{found.mean:{sign}.4f} ± {found.error:.4f}" if found.n > 1 else f"{found.mean:{sign}.4f}" if found.n else "-"


def tags_table(
    scores: Mapping[str, Float[Tensor, " prompt"]],
    *,
    heading: str = "trained",
    base: Mapping[str, Float[Tensor, " prompt"]] | None = None,
) -> Table:
    """Means tag by tag, a column for each judge that tells tags apart.

    Args:
        scores: By judge and tag, as `geneval/counting`, NaN for prompts with another tag.
        heading: Whose scores these are.
        base: Scores of the base on the same prompts and noise, put before the others.
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
    return [f"{each[name].nanmean():.4f}" for each in columns if each is not None and name in each]


def comparison_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """The composite and the means of each run.

    Args:
        found: What `compared` gave.
    """
    table = Table(title="Means over all prompts; composite: mean z-score over these runs")
    table.add_column("run", overflow="fold")
    for title in ("composite", *found[0]["means"]):
        table.add_column(title, justify="right")
    for run in found:
        composite = "-" if run["composite"] is None else f"{run['composite']:+.3f}"
        table.add_row(run["run"], composite, *(f"{mean:.4f}" for mean in run["means"].values()))
    return table
