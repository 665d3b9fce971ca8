"""The model card of an exported adapter, from its checkpoint and the results of its run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from marble_lightning.hub.finished_run import Sample
from marble_lightning.hub.settings import balancer_of, code_of, rewards_of, settings_of
from marble_lightning.policies.lora import Lora
from marble_lightning.policies.pipeline_kinds import kind_of
from marble_lightning.utils.run_files import RESULTS
from rewards.files import BUNDLED

TEMPLATE = Path(__file__).with_name("model_card.jinja")
TAGS = ("text-to-image", "diffusers", "stable-diffusion-3", "reinforcement-learning", "marble-lightning")
LORA_TAGS = ("lora", "template:sd-lora")
WIDGET_PROMPTS = 3


@dataclass(frozen=True)
class Facts:
    """What a card is about.

    Args:
        repository: OWNER/NAME.
        base: Folder or hub id of the base model.
        fused: Whether the adapter is merged into a transformer.
        lora: The exported LoRA.
        checkpoint: Content of its checkpoint.
        results: Results of the exported weights; None if they were not evaluated.
        samples: Their images.
        averaged: Number of averaged checkpoints, >= 1.
    """

    repository: str
    base: str
    fused: bool
    lora: Lora
    checkpoint: Mapping[str, Any]
    results: Mapping[str, Any] | None
    samples: Sequence[Sample]
    averaged: int = 1

    @property
    def hub_id(self) -> str | None:
        """The base as a hub id; None if it is a folder."""
        is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.base) and not Path(self.base).exists()
        return self.base if is_id else None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run; empty if it was started in Python."""
        return yaml.safe_load(self.checkpoint["config"] or "{}")


def model_card(facts: Facts) -> ModelCard:
    """Write the card as Markdown with YAML metadata for the hub.

    Args:
        facts: What it is about.
    """
    rewards = rewards_of(facts.config, facts.results, facts.checkpoint["rewards"])
    data = card_data(facts)
    base = f"[{facts.hub_id}](https://huggingface.co/{facts.hub_id})" if facts.hub_id else _base_name(facts)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=facts.repository.partition("/")[2],
        fused=facts.fused,
        base_link=base,
        version=version("marble-lightning"),
        gallery=any(sample.is_prompt for sample in facts.samples),  # the hub puts the images of the metadata there
        images=[{"text": sample.text, "path": sample.name} for sample in facts.samples if not sample.is_prompt],
        code=code_of(facts.repository, facts.base, facts.fused, facts.checkpoint["base_model"], evaluation_of(facts)),
        rewards=[reward for reward in rewards if reward["use"] == "training"],
        metrics=[reward for reward in rewards if reward["use"] != "training"],
        balancer=balancer_of(facts.config, facts.results),
        averaged=facts.averaged if facts.averaged > 1 else None,
        settings=settings_of(facts.config, facts.checkpoint, facts.lora),
        held_out=held_out_rows(facts.results),
        no_results=f"These weights were not evaluated: the run has no {RESULTS} of them.",
        evaluation=", ".join(f"{name} {value}" for name, value in evaluation_of(facts).items()),
        licence=_licence(facts),
    )


def card_data(facts: Facts) -> ModelCardData:
    """The metadata of a card."""
    held_out = [row for row in held_out_rows(facts.results) if row["trained"] != "-"]
    evaluations = [
        EvalResult(
            task_type="text-to-image", dataset_type="held-out-prompts", dataset_name="Held-out prompts",
            metric_type=row["name"], metric_name=row["name"], metric_value=row["trained"],
        )
        for row in held_out
    ]  # fmt: skip
    community = (facts.hub_id or "").startswith("stabilityai/stable-diffusion-3")
    licence: dict[str, Any] = {
        "license": "other", "license_name": "stabilityai-ai-community",
        "license_link": f"https://huggingface.co/{facts.hub_id}/blob/main/LICENSE.md",
    } if community else {"license": "apache-2.0"} if facts.base.startswith(BUNDLED) else {}  # fmt: skip
    relation: dict[str, Any] = {"base_model_relation": "finetune" if facts.fused else "adapter"} if facts.hub_id else {}
    widget: dict[str, Any] = {"widget": prompts} if (prompts := widget_of(facts)) else {}
    return ModelCardData(
        base_model=facts.hub_id, library_name="diffusers", pipeline_tag="text-to-image",
        tags=[*TAGS, *(() if facts.fused else LORA_TAGS)], eval_results=evaluations or None,
        model_name=facts.repository.partition("/")[2], **licence, **relation, **widget,
    )  # fmt: skip


def widget_of(facts: Facts) -> list[dict[str, Any]]:
    """Examples for the hub's widget: sample images with their prompts, or some held-out prompts."""
    images = [{"text": each.text, "output": {"url": each.name}} for each in facts.samples if each.is_prompt]
    prompts = [row["prompt"] for row in (facts.results or {}).get("prompts", [])]
    return images or [{"text": text} for text in prompts[:: max(len(prompts) // WIDGET_PROMPTS, 1)][:WIDGET_PROMPTS]]


def evaluation_of(facts: Facts) -> dict[str, Any]:
    """How held-out images were sampled; empty if the weights were not evaluated."""
    settings = (facts.results or {}).get("settings", {})
    return {name: settings[name] for name in ("steps", "solver", "guidance", "resolution", "seed") if name in settings}


def held_out_rows(results: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of the table of held-out scores, over all prompt sets; empty without results."""
    return [
        {
            "name": name,
            "base": _cell(means.get("base")),
            "trained": _cell(means),
            "change": _cell(means.get("change"), "+"),
            "n": means["n"],
        }
        for name, means in (results or {}).get("all", {}).items()
    ]


def _cell(summary: Mapping[str, Any] | None, sign: str = "") -> str:
    if summary is None or summary["mean"] is None:
        return "-"
    error = "" if summary["error"] is None else f" ± {summary['error']:.4f}"
    return f"{summary['mean']:{sign}.4f}{error}"


def _base_name(facts: Facts) -> str:
    """A base that is no hub id; the path of a local folder may be private."""
    if facts.base.startswith(BUNDLED):
        return "the tiny Stable Diffusion 3 of MARBLE Lightning"
    return f"a {kind_of(facts.checkpoint['base_model']).name} checkpoint"


def _licence(facts: Facts) -> str:
    if facts.base.startswith(BUNDLED):
        return "Base and update: Apache-2.0."
    return (
        f"The licence of the base holds{f', see [its page](https://huggingface.co/{facts.hub_id})' if facts.hub_id else ''}."
    )
