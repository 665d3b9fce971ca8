"""The command `export`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from marble_lightning.hub.finished_run import results_of, samples_of
from marble_lightning.hub.fused import FILES as FUSED_FILES
from marble_lightning.hub.fused import write_fused
from marble_lightning.hub.model_card import Facts, model_card
from marble_lightning.hub.upload import check_access, check_repository, upload
from marble_lightning.policies.lora import Lora
from marble_lightning.policies.lora_export import Adapter, Loaded, load_adapter
from marble_lightning.policies.lora_files import FILE, write_lora
from marble_lightning.policies.pipeline_kinds import SD3, PipelineKind, kind_of
from marble_lightning.utils.atomic_files import atomic_write, check_folder, local_path, remove_unfinished
from marble_lightning.utils.validation import require

CARD = "README.md"


def export(
    ckpt_path: str | Path,
    to: str | Path,
    adapter: Adapter = "ema",
    overwrite: bool = False,
    average_with: list[str] | None = None,
    rank: int | None = None,
    fuse: bool = False,
    base: str | None = None,
    push_to_hub: str | None = None,
    dry_run: bool = False,
) -> Path:
    """Write a checkpoint's adapter as a LoRA that diffusers and ComfyUI load; neither base model nor GPU is needed.

    The header of the file also names the base model, the rewards, the run's config and the round.

    Args:
        ckpt_path: Checkpoint that `fit` wrote, e.g. checkpoints/last.ckpt in a run's folder.
        to: Folder for pytorch_lora_weights.safetensors; created if it does not exist.
        adapter: `ema`, the averaged adapter, which is evaluated on held-out prompts, or `trained`, its source.
        overwrite: Whether existing files of the same names in `to` are replaced.
        average_with: Further checkpoints; the LoRA is the exact mean of the updates of all, with the sum of their ranks.
        rank: Rank of the LoRA, if it is to be lower: the nearest update of this rank. Null keeps it.
        fuse: Write a whole transformer with the adapter merged into its weights instead of a LoRA; this loads the base.
        base: Hub id or folder of the base model, for `fuse` and the model card; null for the run's.
        push_to_hub: OWNER/NAME of a repository on the model hub, to which the files and a model card are uploaded; it is
            created, public, if it does not exist. Null uploads nothing.
        dry_run: With `push_to_hub`: write the folder with its model card, and upload nothing.

    Raises:
        ValueError: A checkpoint is damaged, not from `fit` or of another model, the rank is out of range, a file exists
            already, the base cannot be loaded, or the hub cannot be reached or refuses.
    """
    file, folder = local_path("ckpt_path", ckpt_path), Path(to).expanduser()
    _check(folder, overwrite, fuse, push_to_hub, dry_run)
    loaded = load_adapter(file, adapter, average_with or [], rank)
    identity = loaded.checkpoint["base_model"]
    base = base or str(identity["model"])
    if fuse:
        files = write_fused(loaded.lora, base, identity, folder)
        print(f"{folder}\ndiffusers:  {kind_of(identity).transformer}.from_pretrained({str(folder)!r})")
    else:
        targets = loaded.checkpoint["lora"]["targets"]
        kind = kind_of(identity)
        files = [write_lora(loaded.lora, folder, targets, loaded.entries, kind)]
        _print_use(files[0], folder, loaded.lora, kind)
    if push_to_hub:
        evaluated = not average_with and rank is None
        files += _write_card(folder, file, adapter, loaded, base, push_to_hub, fuse, evaluated, len(average_with or []) + 1)
        _publish(folder, files, push_to_hub, dry_run)
    return files[0]


def _check(folder: Path, overwrite: bool, fuse: bool, push_to_hub: str | None, dry_run: bool) -> None:
    """Check the settings before anything is written."""
    require(not dry_run or push_to_hub is not None, "`dry_run` must be given with `push_to_hub`", "it alone")
    if push_to_hub is not None:
        check_repository(push_to_hub)
        if not dry_run:
            check_access()
    check_folder("to", folder)
    remove_unfinished([folder])
    patterns = [*(FUSED_FILES if fuse else [FILE]), *([CARD, "images"] if push_to_hub else [])]
    existing = [path.name for pattern in patterns for path in folder.glob(pattern)]
    if existing and not overwrite:
        raise ValueError(
            f"`to` must be a folder without {existing[0]}. Found one in {folder}; choose another, or add --overwrite true."
        )


def _print_use(written: Path, folder: Path, lora: Lora, kind: PipelineKind) -> None:
    comfyui = "ComfyUI:    copy it to models/loras under a unique name, for the node LoraLoaderModelOnly\n"
    print(
        f"{written}\n"
        f"diffusers:  pipeline.load_lora_weights({str(folder)!r})\n"
        f"{comfyui if kind is SD3 else ''}"  # it has not been checked with files of another model
        f"start here: marble-lightning fit ... --model.policy.init_lora {folder} "
        f"--model.policy.rank {lora.rank} --model.policy.alpha {lora.alpha:g}"
    )


def _write_card(
    folder: Path,
    file: Path,
    adapter: str,
    loaded: Loaded,
    base: str,
    repository: str,
    fused: bool,
    evaluated: bool,
    averaged: int,
) -> list[Path]:
    """Write the model card and its images; scores and images are those of the exported weights, or there are none."""
    results = results_of(loaded.checkpoint, file, adapter) if evaluated else None
    samples = samples_of(file, adapter, loaded.checkpoint["global_step"]) if evaluated and results else []
    facts = Facts(repository, base, fused, loaded.lora, loaded.checkpoint, results, samples, averaged)
    if facts.hub_id is None:
        print(f"The card does not link its base model, since {base} is no hub id; --base OWNER/NAME names one.")
    written = []
    for sample in samples:
        with atomic_write(folder / sample.name) as scratch:
            shutil.copyfile(sample.file, scratch)
        written.append(folder / sample.name)
    with atomic_write(folder / CARD) as scratch:
        model_card(facts).save(scratch)
    return [*written, folder / CARD]


def _publish(folder: Path, files: Sequence[Path], repository: str, dry_run: bool) -> None:
    if dry_run:
        names = ", ".join(file.relative_to(folder).as_posix() for file in files)
        print(f"Dry run:    nothing was uploaded. Without it, {repository} gets {names}")
    else:
        print(f"Hub:        {upload(folder, files, repository)}")
