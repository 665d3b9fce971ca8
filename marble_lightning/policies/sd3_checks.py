"""Which checkpoints SD3Policy can train, told from their configuration before any weight loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

from rewards.files import resolve_path
from rewards.hub import hub_reason

PARTS = {"transformer": "SD3Transformer2DModel", "scheduler": "FlowMatchEulerDiscreteScheduler", "vae": "AutoencoderKL"}
"""Parts of the pipeline that must be of these classes, since training relies on what they predict and on which grid."""


def pipeline_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's model_index.json, from a folder or the hub; no weight is loaded.

    Args:
        path: Folder in diffusers format, or hub id; see `resolve_path`.
        revision: Revision of a hub id.

    Raises:
        ValueError: There is none, it is no StableDiffusion3Pipeline's, or it is a distilled model's.
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
    for part, wanted in PARTS.items():
        if (found := (index.get(part) or [None, None])[1]) != wanted:
            raise ValueError(
                f"`policy.path` must hold a pipeline whose {part} is a {wanted}. Found {found} in {path!r}: its velocities "
                "or its grid of flow times are not those that are trained on; choose the original checkpoint."
            )
    names = (folder.resolve().name if folder.exists() else path, index.get("_name_or_path") or "")
    if any("turbo" in name.lower() for name in names):
        raise ValueError(
            f"`policy.path` must hold a model that was not distilled to a few steps. Found {path!r}: a turbo model predicts "
            "jumps, not the velocity of the flow that the loss moves; choose stable-diffusion-3.5-medium or -large."
        )
    return index


def the_resolution_fits(path: str, revision: str | None, name: str, resolution: int) -> None:
    """Images of that size are whole patches, no more than the transformer has positions for.

    Args:
        path: Folder in diffusers format, or hub id.
        revision: Revision of a hub id.
        name: Of the setting.
        resolution: Side of the images in pixels.

    Raises:
        ValueError: They are not, or there is no such pipeline.
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
    most = transformer["pos_embed_max_size"]
    if resolution % patch or resolution > most * patch:
        raise ValueError(
            f"`{name}` must be a multiple of {patch}, at most {most * patch}: the transformer of {path} has "
            f"positions for {most} patches of {patch} pixels a side (`pos_embed_max_size`). Found {resolution}."
        )
