"""What a model card says about a run's settings: rewards, balancer, training, and the code that loads the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from balancers import CADENCE
from marble_lightning.policies.lora import Lora
from marble_lightning.policies.pipeline_kinds import kind_of
from rewards.files import BUNDLED
from rewards.licences import weights_of

SETTINGS = {
    "seed": "seed_everything",
    "resolution": "model.policy.init_args.resolution",
    "precision of the base": "model.policy.init_args.dtype",
    "prompts a round": "data.prompts_per_round",
    "images of a prompt": "data.images_per_prompt",
    "sampling steps": "model.sampling.steps",
    "sampling solver": "model.sampling.solver",
    "guidance": "model.sampling.guidance",
    "flow times of an image": "model.sampling.times_per_image",
    "beta": "model.objective.beta",
    "KL weight": "model.objective.kl_weight",
    "optimizer": "model.optimizer.class_path",
    "learning rate": "model.optimizer.init_args.lr",
    "optimizer steps a round": "model.optimizer_steps_per_round",
    "decay of the averaged adapter": "model.averaging.ema_decay",
}
"""The settings in a card, by name, with their place in the configuration."""


CODE_WIDTH = 60
"""Characters of the longest call on one line."""


def look_up(config: Mapping[str, Any], name: str) -> Any:
    """A setting by its dotted name; None if the configuration does not have it.

    >>> look_up({"model": {"sampling": {"steps": 8}}}, "model.sampling.steps")
    8
    """
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def settings_of(config: Mapping[str, Any], checkpoint: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """The main settings of a run, by name; those that it does not have are left out.

    Args:
        config: Its configuration; empty if it was started in Python.
        checkpoint: Content of the checkpoint.
        lora: The exported LoRA.
    """
    known = {
        "optimizer steps": checkpoint["global_step"],
        "LoRA rank": lora.rank,
        "LoRA alpha": f"{lora.alpha:g}",
        "LoRA targets": ", ".join(checkpoint["lora"]["targets"]),
    }
    found = {name: look_up(config, place) for name, place in SETTINGS.items()}
    return known | {name: value for name, value in found.items() if value is not None}


def rewards_of(config: Mapping[str, Any], results: Mapping[str, Any] | None, names: Sequence[str]) -> list[dict[str, str]]:
    """The rewards and metrics of a run: name, class, weights with licences, and use.

    Args:
        config: Its configuration; empty if it was started in Python.
        results: Its results, which name the classes too.
        names: Names of the rewards that it was trained on.
    """
    identities = (results or {}).get("reward_models", {})
    known = {name: {"class_path": facts["class"], "init_args": facts} for name, facts in identities.items()}
    for part in ("metrics", "rewards"):
        known |= {name: settings for name, settings in (look_up(config, f"model.{part}") or {}).items() if settings}
    metrics = [name for name in known if name not in names]
    return [
        {
            "name": name,
            "kind": known.get(name, {}).get("class_path", "not recorded"),
            "weights": ", ".join(weights_of(known.get(name, {}))) or "none",
            "use": "training" if name in names else "evaluation only",
        }
        for name in (*names, *metrics)
    ]


def balancer_of(config: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    """A sentence about the balancer and its settings.

    Args:
        config: The run's configuration; empty if it was started in Python.
        results: Its results, which name the balancer and its cadence.
    """
    balancer, evaluated = config.get("balancer") or {}, (results or {}).get("evaluated", {})
    name = balancer.get("class_path", evaluated.get("balancer"))
    settings = balancer.get("init_args") or {key: evaluated.get(key) for key in CADENCE}
    if name is None:
        return "The checkpoint does not name the balancer."
    listed = ", ".join(f"`{key}` {value}" for key, value in settings.items() if value is not None)
    return f"Rewards are merged by `{name}`" + (f", with {listed}." if listed else ".")


def code_of(repository: str, base: str, fused: bool, identity: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Python code that loads the weights in diffusers and generates an image.

    Args:
        repository: OWNER/NAME.
        base: Folder or hub id of the base.
        fused: Whether it is a transformer.
        identity: Facts of the base.
        evaluation: How held-out images were sampled.
    """
    bundled = base.startswith(BUNDLED)
    location = (
        f'resolve_path("{base}")' if bundled else f'"{base}"' if "/" in base and base[0] not in "/.~" else '"PATH/TO/BASE"'
    )
    dtype = f"dtype=torch.{identity.get('dtype', 'float32')}"
    options = [location, *(["transformer=transformer"] if fused else []), dtype]
    if bundled or identity.get("text_encoder_3", "checkpoint") is None:  # the bundled model has no third encoder
        options += ["text_encoder_3=None", "tokenizer_3=None"]
    kind = kind_of(identity)
    if "guidance" in evaluation:
        evaluation = {**evaluation, "guidance": evaluation["guidance"] - kind.guidance_offset}
    size = {"height": "resolution", "width": "resolution", "num_inference_steps": "steps", "guidance_scale": "guidance"}
    call = ['"a prompt"', *(f"{name}={evaluation[key]}" for name, key in size.items() if key in evaluation)]
    if "text_length" in identity:
        call.append(f"max_sequence_length={identity['text_length']}")
    transformer = f'transformer = {kind.transformer}.from_pretrained("{repository}", {dtype})'
    lines = [
        "import torch",
        f"from diffusers import {f'{kind.pipeline}, {kind.transformer}' if fused else kind.pipeline}",
        *(["from rewards.files import resolve_path  # pip install marble-lightning"] if bundled else []),
        "",
        *([transformer] if fused else []),
        f"pipeline = {_call(f'{kind.pipeline}.from_pretrained', options)}",
        *([] if fused else [f'pipeline.load_lora_weights("{repository}")']),
        f"image = {_call('pipeline', call)}.images[0]",
    ]
    return "\n".join(lines)


def _call(function: str, arguments: Sequence[str]) -> str:
    """Code of a call. A long one has an argument a line, since the hub's page cuts long lines."""
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= CODE_WIDTH:
        return line
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"{function}(\n{lines})"
