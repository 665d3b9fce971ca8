"""What a run's gradients said of each reward, and what became of it: the table and the warnings at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from scipy.stats import ttest_ind
from torch import Tensor

from marble_lightning.evaluation.statistics import Summary, summarise

SIGNIFICANCE = 0.01
"""One-sided probability below which a training mean has fallen."""


class AlignmentSummary:
    """Keeps cosines with each reward at every refresh, and each reward's training mean in every round.

    The cosines are of the update, or of the reused weights where most steps reuse them.
    """

    def __init__(self) -> None:
        self.cosines: dict[str, list[list[float]]] = {"own": [], "split": []}
        """Cosines with each reward at every refresh, NaN without one."""
        self.rounds: dict[int, list[float]] = {}
        """Training mean of each reward by round, NaN without one. A resumed run may train a round again."""

    def note_cosines(self, own: Float[Tensor, " reward"], split: Float[Tensor, " reward"] | None) -> None:
        """Add a refresh."""
        self.cosines["own"].append(own.tolist())
        self.cosines["split"].append((torch.full_like(own, torch.nan) if split is None else split).tolist())

    def note_round(self, index: int, means: Sequence[float]) -> None:
        """Add a round."""
        self.rounds[index] = list(means)

    def mean_cosine(self, place: str, reward: int) -> Summary:
        """Mean cosine of the update with a reward over the refreshes; `place` is own or split."""
        return summarise(torch.tensor([row[reward] for row in self.cosines[place]]))

    def quarters(self, reward: int) -> tuple[Tensor, Tensor]:
        """A reward's training means in the first and in the last quarter of the rounds."""
        means = torch.tensor([row[reward] for row in self.rounds.values()])
        quarter = max(len(means) // 4, 1)
        first, last = means[:quarter], means[-quarter:]
        return first[first.isfinite()], last[last.isfinite()]

    def has_fallen(self, reward: int) -> bool:
        """Whether the training mean of the last quarter is below that of the first by more than chance (Welch's t-test)."""
        first, last = self.quarters(reward)
        if min(len(first), len(last)) < 2:
            return False
        return bool(ttest_ind(last, first, equal_var=False, alternative="less").pvalue < SIGNIFICANCE)

    def warnings(self, names: Sequence[str]) -> list[str]:
        """A message for each reward whose training mean has fallen although the own-image cosines were positive."""
        messages = []
        for index, name in enumerate(names):
            own, split = (self.mean_cosine(place, index) for place in ("own", "split"))
            if own.n and own.mean > 0 and self.has_fallen(index):
                first, last = (float(quarter.mean()) for quarter in self.quarters(index))
                messages.append(
                    f"The training mean of {name} has fallen from {first:.4g} to {last:.4g} (first and last quarter of "
                    f"the rounds), although the update's mean cosine with its gradient was {own.mean:+.2f}. That cosine "
                    f"contains the noise that both share; on halves of the prompts it was {cell(split)}."
                )
        return messages

    def table(self, names: Sequence[str], ratio: Float[Tensor, " reward"]) -> Table:
        """The table at the end of a run.

        Args:
            names: Names of the rewards.
            ratio: Signal-to-noise ratio of each reward's gradient.
        """
        table = Table(title="The weights of most steps and each reward's gradient, mean ± standard error over refreshes")
        headings = (
            "reward",
            "cosine, own images",
            "cosine, halves",
            "signal / noise",
            "training mean, first and last quarter",
        )
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "reward" else "right")
        for index, name in enumerate(names):
            own, split = (cell(self.mean_cosine(place, index)) for place in ("own", "split"))
            first, last = (f"{float(quarter.mean()):.4f}" for quarter in self.quarters(index)) if self.rounds else ("-", "-")
            table.add_row(name, own, split, f"{ratio[index]:.2f}" if ratio[index].isfinite() else "-", f"{first} -> {last}")
        return table

    def state_dict(self) -> dict[str, Any]:
        """Copies of the state, as tensors."""
        cosines = {place: as_tensor(rows) for place, rows in self.cosines.items()}
        return {"rounds": {index: as_tensor(means) for index, means in self.rounds.items()}, **cosines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`."""
        self.cosines = {place: state[place].tolist() for place in self.cosines}
        self.rounds = {index: means.tolist() for index, means in state["rounds"].items()}


def as_tensor(rows: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """Numbers in float64."""
    return torch.tensor(rows, dtype=torch.float64)


def cell(summary: Summary) -> str:
    """A mean with its standard error; a dash without values."""
    return f"{summary.mean:+.3f} ± {summary.error:.3f}" if summary.n else "-"
