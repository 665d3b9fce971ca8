"""Checks whether a policy can train a checkpoint, from its configuration and before any weight loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from marble_lightning.policies.pipeline_kinds import PipelineKind
from rewards.files import resolve_path
from rewards.hub import hub_reason


def pipeline_index(kind: PipelineKind, path: str, revision: str | None = None) -> dict[str, Any]:
    """Read the pipeline's model_index.json from a folder or the hub, without loading weights.

    Args:
        kind: The kind of pipeline that it must be.
        path: Folder in diffusers format, or hub id; see `resolve_path`.
        revision: Revision of a hub id.

    Raises:
        ValueError: There is none, it is of another kind, or the model is distilled.
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
        index = dict(kind.pipeline_class.load_config(path, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`policy.path` must be a folder in diffusers format or a hub id (owner/name). Found {path!r}: no such "
            f"folder from {Path.cwd()}, where relative paths start"
            + f"; of the hub: {hub_reason(error, path)}" * hub_id
            + "."
        ) from error
    _check_kind(kind, index, path)
    return index


def _check_kind(kind: PipelineKind, index: dict[str, Any], path: str) -> None:
    if index.get("_class_name") != kind.pipeline:
        raise ValueError(
            f"`policy.path` must hold a {kind.pipeline}. Found {index.get('_class_name')} in {path!r}; choose a checkpoint "
            f"of that pipeline, such as {kind.choose}, or another class of `policy`."
        )
    for part, required in kind.parts.items():
        if (class_name := (index.get(part) or [None, None])[1]) != required:
            raise ValueError(
                f"`policy.path` must hold a pipeline whose {part} is a {required}. Found {class_name} in {path!r}: its "
                "velocities or its grid of flow times differ from those that training needs; choose the original checkpoint."
            )
    names = (Path(path).resolve().name if Path(path).exists() else path, index.get("_name_or_path") or "")
    if any(kind.distilled in name.lower() for name in names):
        raise ValueError(
            f"`policy.path` must hold a model that was not distilled to a few steps. Found {path!r}: a {kind.distilled} "
            f"model predicts jumps, not the velocity of the flow, which the loss needs; choose {kind.choose}."
        )


def part_config(kind: PipelineKind, part: str, path: str, revision: str | None) -> dict[str, Any]:
    """Read the configuration of a part of the pipeline, such as `transformer`, without loading weights.

    Raises:
        ValueError: There is no such pipeline, or it has no such file.
    """
    pipeline_index(kind, path, revision)
    folder = resolve_path(path)
    try:
        model: Any = getattr(diffusers, kind.parts[part])
        return dict(model.load_config(folder, revision=revision, subfolder=part))
    except (OSError, ValueError) as error:
        raise ValueError(
            "`policy.path` must hold a pipeline with config.json of its transformer and its vae. "
            f"Found {path!r}: {hub_reason(error, folder)}."
        ) from error
