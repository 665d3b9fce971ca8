"""Training on one reward after another."""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import check_known

log = logging.getLogger(__name__)


class Sequential(Balancer):
    r"""Train on a single reward for some rounds, then on the next one, in the same run.

    In round $t = 0, 1, \dots$ with turns of $T$ rounds, the only reward is $R_{i, o(t)}$ with
    $o(t) = \text{order}[\lfloor t / T \rfloor \bmod \text{length}]$. Samples that it does not apply to are not trained on. A
    run of $T$ times the length of `order` rounds has each turn once; a longer run starts again with the first, and a
    shorter one does not reach the last. In a round where the reward applies to no image, only the KL term has a gradient.

    Args:
        rounds: Rounds of a turn, >= 1. Null: equal shares of the run's rounds (`trainer.max_epochs`, which then sets their
            number), up to one round.
        order: Reward of each turn, by name; a reward may have several turns. Null: each once, in the order of the rewards.

    Raises:
        ValueError: `rounds` is below 1, or null in a run without an end; `order` is empty, or it has an unknown name.

    Source: the sequential baseline of MARBLE, arXiv 2605.06507.
    """

    merged_name = "turn"

    def __init__(self, rounds: int | None = None, order: list[str] | None = None) -> None:
        super().__init__()
        if rounds is not None and rounds < 1:
            raise ValueError(f"`rounds` must be null or >= 1. Found {rounds}.")
        if order == []:
            raise ValueError("`order` must name the reward of at least one turn. Found none; use null for all rewards.")
        self.rounds, self.order = rounds, order
        self.run_rounds = 1
        """Rounds of the whole run, known from `setup` on."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.rounds is None and trainer.max_epochs in (None, -1):
            raise ValueError(
                "`rounds` must be set in a run without an end, since null is equal shares of the run's rounds. Found null "
                f"and `trainer.max_epochs` {trainer.max_epochs}; set `rounds`."
            )
        self.run_rounds = max(trainer.max_epochs or 1, 1)
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.max_epochs not in (None, -1) and (skipped := self.without_turn()):
            rank_zero_only(log.warning)(
                "%d rounds are too few for all turns: %s will not be trained on. Set `trainer.max_epochs` or `rounds`.",
                self.run_rounds, ", ".join(skipped),
            )  # fmt: skip

    def bind(self, reward_names: Sequence[str]) -> None:
        check_known(self.order or [], reward_names, "order")
        super().bind(reward_names)

    @property
    def current(self) -> str:
        """Name of the reward of this round."""
        return self.reward_of(max(self.memory.get("begun", 0) - 1, 0))

    def reward_of(self, finished: int) -> str:
        """Name of the reward of the round after so many finished ones."""
        order = self.order or self.reward_names
        turn = finished // self.rounds if self.rounds else finished * len(order) // self.run_rounds
        return order[turn % len(order)]

    def without_turn(self) -> list[str]:
        """Names of the rewards of `order` that no round of the run trains on."""
        trained = {self.reward_of(finished) for finished in range(self.run_rounds)}
        return [name for name in dict.fromkeys(self.order or self.reward_names) if name not in trained]

    @property
    def column(self) -> int:
        """Index of the reward of this round."""
        return self.reward_names.index(self.current)

    def begin_round(self, scores: Float[Tensor, "sample reward"], prompts: Int[Tensor, " sample"]) -> dict[str, float]:
        """Count the round. Returns 1 for its reward and 0 for the others."""
        self.memory["begun"] = self.memory.get("begun", 0) + 1
        if scores[:, self.column].isnan().all():
            rank_zero_only(log.warning)(
                "`%s`, the reward of this turn, applies to no image of this round: no reward is trained on.", self.current
            )
        return {f"turn/{name}": float(name == self.current) for name in self.reward_names}

    def merge_rewards(
        self, rewards: Float[Tensor, "sample reward"], applies: Bool[Tensor, "sample reward"]
    ) -> Float[Tensor, "sample 1"]:
        """The column of the round's reward; NaN where it does not apply.

        Shape:
            rewards (N, K), applies (N, K) -> (N, 1).
        """
        return torch.where(applies, rewards, torch.nan)[:, [self.column]]

    def covered(self, applies: Bool[Tensor, "sample reward"]) -> Bool[Tensor, "sample 1"]:
        return applies[:, [self.column]]
