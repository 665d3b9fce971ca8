"""What prevents a comparison of runs, and what a reader must know before one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from marble_lightning.evaluation.comparison import evaluation_differences
from marble_lightning.lab.runs import Run
from marble_lightning.utils.validation import require

SEEDS = {"seed_everything", "seed"}
"""Names of settings that the runs of a method may differ in, in every section."""
OUTPUT = {
    "ckpt_path", "weights_only", "trainer.logger", "trainer.default_root_dir", "checkpoints", "memory", "held_out_images",
    "results", "predictions", "model.policy.init_args.prompt_cache",
}  # fmt: skip
"""Settings that change where a run begins and what it writes, but not what it trains."""
OF_METHODS = ("balancer", "model.rewards", "model.metrics", "gradient_alignment", "trainer.check_val_every_n_epoch")
"""Settings that methods may differ in, and what follows from them: a report says these elsewhere."""
BASE = ("model", "revision", "text_length", "text_encoder_3", "quantised")
"""Facts of results.json that make another base."""
MISSING = object()
"""In place of the value of a setting that a configuration does not have."""


def check_same(runs: Sequence[Run]) -> None:
    """Check that the runs of a method differ only in their seed.

    Raises:
        ValueError: Rewards, balancer, cadence, number of optimizer steps or another setting differ.
    """
    facts = [
        {"rewards": ", ".join(run.rewards), "balancer": run.balancer, "optimizer steps": run.evaluated.get("optimizer_step")}
        for run in runs
    ]
    for run, of_run in zip(runs, facts, strict=True):
        differences = (
            different(facts[0], of_run)
            or [
                f"`{name}` {value} instead of {expected}"
                for name, expected, value in differing(runs[0].config, run.config)
                if MISSING not in (expected, value)
            ][:1]
        )
        require(
            not differences,
            "Runs of one method must differ only in their seed",
            f"{run.folder} beside {runs[0].folder}, with {'; '.join(differences)}; put methods into folders of their own",
        )


def differing(first: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ, by their dotted names, with the values of both; `MISSING` for one that has none.

    Seeds, and settings of the output, are left out.

    >>> list(differing({"seed": 0, "data": {"folder": "a"}}, {"seed": 1, "data": {"folder": "b"}}))
    [('data.folder', 'a', 'b')]
    """
    for key in dict.fromkeys([*first, *other]):
        name, one, two = f"{prefix}{key}", first.get(key, MISSING), other.get(key, MISSING)
        if name in OUTPUT or key in SEEDS:
            continue
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from differing(one, two, f"{name}.")
        elif one != two:
            yield name, one, two


def different(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Differences of facts that both have, in words."""
    both = [name for name in other if name in first]
    return [f"{name} {other[name]} instead of {first[name]}" for name in both if other[name] != first[name]]


def check_base(first: Run, run: Run) -> None:
    """Check that two runs began with the same base.

    Raises:
        ValueError: The base is another model, or is used in another way.
    """
    differences = different(base_of(first), base_of(run))
    require(
        not differences,
        "The runs of a report must have the same base",
        f"{run.folder} beside {first.folder}, with {', '.join(differences)}; write a report of each",
    )


def base_of(run: Run) -> dict[str, Any]:
    """What makes a run's base, as far as its files tell."""
    facts = {name: run.evaluated[name] for name in BASE if name in run.evaluated}
    return {"quantised": None, "init_lora": setting(run, "model.policy.init_args.init_lora"), **facts}


def check_evaluation(first: Run, run: Run) -> None:
    """Check that two runs were evaluated on the same prompts, with the same settings and classes of reward models.

    Raises:
        ValueError: They were not.
    """
    common = [name for name in first.reward_models if name in run.reward_models]
    differences = evaluation_differences(without_seed(first.results), without_seed(run.results), common)
    require(
        not differences,
        "The runs of a report must be evaluated alike",
        f"{run.folder} beside {first.folder}, with {', '.join(differences)}; evaluate both with the same `evaluation` "
        "settings, held-out prompts and rewards, or write a report of each",
    )


def without_seed(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results without the seed of the held-out noise, which is the run's seed."""
    return {**results, "settings": {name: value for name, value in results["settings"].items() if name != "seed"}}


def notes_on_settings(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Settings that only some runs of a method have, as in configurations of earlier versions: they are not compared."""
    notes = []
    for method, (first, *others) in groups.items():
        found = (difference for run in others for difference in differing(first.config, run.config))
        if names := dict.fromkeys(name for name, *values in found if MISSING in values):
            notes.append(f"Not all runs of {method} have these settings, which were not compared: {', '.join(names)}.")
    return notes


def notes_on_training(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Methods that were trained for other steps, or with other settings besides their rule, than the first one.

    Those with the same differences share a note.
    """
    (first, (reference, *_)), *others = groups.items()
    alike = dict[str, list[str]]()
    for method, (run, *_) in others:
        steps = ({"optimizer steps": each.evaluated.get("optimizer_step")} for each in (reference, run))
        settings = [
            f"{name} {value} instead of {expected}"
            for name, expected, value in differing(reference.config, run.config)
            if MISSING not in (expected, value) and not any(f"{name}.".startswith(f"{part}.") for part in OF_METHODS)
        ]
        if differences := [*different(*steps), *settings]:
            alike.setdefault(", ".join(differences), []).append(method)
    return [
        f"{', '.join(methods)} {'were' if len(methods) > 1 else 'was'} trained otherwise than {first}: {differences}."
        for differences, methods in alike.items()
    ]


def setting(run: Run, name: str) -> Any:
    """A setting of a run's configuration by its dotted name; None if there is none."""
    value: Any = run.config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
