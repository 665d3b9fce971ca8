"""Checks whether SD3Policy can train a checkpoint, from its configuration and before any weight loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

from rewards.files import resolve_path
from rewards.hub import hub_reason

PARTS = {"transformer": "SD3Transformer2DModel", "scheduler": "FlowMatchEulerDiscreteScheduler", "vae": "AutoencoderKL"}
"""Required classes of parts of the pipeline: training depends on their predictions and their grid of flow times."""


def pipeline_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """Read the pipeline's model_index.json from a folder or the hub, without loading weights.

    Args:
        path: Folder in diffusers format, or hub id; see `resolve_path`.
        revision: Revision of a hub id.

    Raises:
        ValueError: There is none, it is not of a StableDiffusion3Pipeline, or the model is distilled.
    """
    path = resolve_path(path)
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").exists():
        raise ValueError(
            f"`policy.path` must hold a diffusers pipeline with a model_index.json. Found none in {folder}; "
            "save one with `pipeline.save_pretrained(folder)`."
        )
    hub_id = path.count("/") == 1 and not path.startswith((".", "/"))
    try:
        if not (folder.exists() or hub_id):
            raise OSError("there is no such folder")
        index = dict(StableDiffusion3Pipeline.load_config(path, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`policy.path` must be a folder in diffusers format or a hub id (owner/name). Found {path!r}: no such "
            f"folder from {Path.cwd()}, where relative paths start"
            + f"; of the hub: {hub_reason(error, path)}" * hub_id
            + "."
        ) from error
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise ValueError(
            f"`policy.path` must hold a StableDiffusion3Pipeline. Found {index.get('_class_name')} in {path!r}; "
            "choose a Stable Diffusion 3 or 3.5 checkpoint."
        )
    for part, required in PARTS.items():
        if (class_name := (index.get(part) or [None, None])[1]) != required:
            raise ValueError(
                f"`policy.path` must hold a pipeline whose {part} is a {required}. Found {class_name} in {path!r}: its "
                "velocities or its grid of flow times differ from those that training needs; choose the original checkpoint."
            )
    names = (folder.resolve().name if folder.exists() else path, index.get("_name_or_path") or "")
    if any("turbo" in name.lower() for name in names):
        raise ValueError(
            f"`policy.path` must hold a model that was not distilled to a few steps. Found {path!r}: a turbo model predicts "
            "jumps, not the velocity of the flow, which the loss needs; choose stable-diffusion-3.5-medium or -large."
        )
    return index


def check_resolution_fits(path: str, revision: str | None, name: str, resolution: int) -> None:
    """Check that images of a size consist of whole patches that the transformer has positions for.

    Args:
        path: Folder in diffusers format, or hub id.
        revision: Revision of a hub id.
        name: Name of the setting, for the error message.
        resolution: Side of the images in pixels.

    Raises:
        ValueError: The size does not fit, or there is no such pipeline.
    """
    pipeline_index(path, revision)
    folder = resolve_path(path)
    try:
        transformer = SD3Transformer2DModel.load_config(folder, revision=revision, subfolder="transformer")
        autoencoder = AutoencoderKL.load_config(folder, revision=revision, subfolder="vae")
    except (OSError, ValueError) as error:
        raise ValueError(
            "`policy.path` must hold a pipeline with config.json of its transformer and its vae. "
            f"Found {path!r}: {hub_reason(error, folder)}."
        ) from error
    patch = transformer["patch_size"] * 2 ** (len(autoencoder["block_out_channels"]) - 1)
    max_patches = transformer["pos_embed_max_size"]
    if resolution % patch or resolution > max_patches * patch:
        raise ValueError(
            f"`{name}` must be a multiple of {patch}, at most {max_patches * patch}: the transformer of {path} has "
            f"positions for {max_patches} patches of {patch} pixels a side (`pos_embed_max_size`). Found {resolution}."
        )
