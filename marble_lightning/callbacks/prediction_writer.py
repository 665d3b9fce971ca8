"""The callback that writes the images of `predict` as PNG files with their settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.evaluator import HeldOut
from marble_lightning.module import DiffusionNFT
from marble_lightning.run_folder import run_folder
from marble_lightning.utils.atomic_files import atomic_write, check_folder, remove_unfinished
from marble_lightning.utils.distributed import gather_items
from marble_lightning.utils.images import to_image


class PredictionWriter(Callback):
    """Writes the images of `predict` as PNG files, and their prompts and scores as `images.jsonl` in the same folder.

    A file's text chunks hold prompt, index, seed, steps, solver, guidance, resolution, adapter, checkpoint, and the model:
    its name, its revision, and how it reads prompts and weights.

    Args:
        folder: Folder of the files; null for `predictions` in the run's folder. A folder with images made with other
            settings is refused.
        scores: Whether rewards and metrics score the images; if false, their weights are not loaded.
    """

    def __init__(self, folder: str | None = None, scores: bool = True) -> None:
        self.folder, self.scores = folder, scores
        self.records: list[dict[str, Any]] = []
        self.output = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder with other images, before weights are loaded if possible, otherwise before sampling."""
        if stage != "predict" or not isinstance(pl_module, DiffusionNFT):
            return
        self.records = []
        pl_module.evaluator.scores_predictions = self.scores
        if self.folder is not None:
            self.output = Path(self.folder)
            check_folder("predictions.folder", self.output)
            self._check_files(trainer, pl_module, {"adapter", "checkpoint"})  # known only after a checkpoint is loaded

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is None:
            self.output = run_folder(trainer) / "predictions"
        if trainer.is_global_zero:
            remove_unfinished([self.output])
        if isinstance(pl_module, DiffusionNFT):
            self._check_files(trainer, pl_module, set())

    def _check_files(self, trainer: Trainer, module: DiffusionNFT, unknown: set[str]) -> None:
        for file in sorted(self.output.glob("*.png")):
            if file.stem.isdecimal():
                _check_file(file, self._facts(trainer, module, int(file.stem)), unknown)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Tensor], batch: HeldOut, *arguments: Any
    ) -> None:
        if not isinstance(pl_module, DiffusionNFT):
            return
        for (index, prompt), image, scores in zip(batch, outputs["images"], outputs["scores"], strict=True):
            if not image.isfinite().all():  # `predict` ends with an error about it
                continue
            text = PngInfo()
            for name, value in (self._facts(trainer, pl_module, index) or {}).items():
                text.add_text(name, value)
            file = self.output / f"{index:05d}.png"
            with atomic_write(file) as scratch:
                to_image(image).save(scratch, pnginfo=text)
            names = pl_module.evaluator.selected
            by_name = {name: score for name, score in zip(names, scores.tolist(), strict=True) if score == score}
            self.records.append(
                {"file": file.name, "index": index, "prompt": prompt.text, "source": prompt.source, "scores": by_name}
            )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the records of all ranks' images, in the order of their prompts."""
        records = sorted(gather_items(self.records), key=lambda record: record["index"])
        if trainer.is_global_zero and records:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            with atomic_write(self.output / "images.jsonl") as scratch:
                scratch.write_text("".join(lines), encoding="utf-8")
            print(f"\nImages: {self.output}")

    @staticmethod
    def _facts(trainer: Trainer, module: DiffusionNFT, index: int) -> dict[str, str] | None:
        """Prompt, settings and model of the image with an index; None if there is no prompt with that index."""
        prompts, policy = get_datamodule(trainer).held_out, module.policy
        if index >= len(prompts):
            return None
        start = trainer.ckpt_path or policy.init_lora
        facts = {
            "prompt": prompts[index].text,
            "index": index,
            **module.evaluator.settings,
            "adapter": module.evaluator.adapter(trainer),
            **policy.identity,
            "checkpoint": Path(start).resolve() if start else "none",
        }
        return {name: str(value) for name, value in facts.items()}


def _check_file(file: Path, facts: Mapping[str, str] | None, unknown: set[str]) -> None:
    """Check that an existing image has the facts of the new one that will replace it.

    A file that cannot be read, for example after a full disk, is ignored.

    Args:
        file: The existing image.
        facts: Facts of the new image; None if there is none.
        unknown: Names of facts that are not known yet and are not compared.

    Raises:
        ValueError: The images differ; the message names the differences.
    """
    try:
        with Image.open(file) as image:
            existing = image.info
            image.verify()
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for a chunk that does not match its checksum
        return
    if facts is None:
        difference = f"of the prompt {existing.get('prompt', 'unknown')!r}, beyond the requested prompts"
    else:
        differences = [
            f"{name} {existing.get(name, 'unknown')!r} instead of {value!r}"
            for name, value in facts.items()
            if existing.get(name) != value and name not in unknown
        ]
        difference = f"with {', '.join(differences)}" if differences else ""
    if difference:
        raise ValueError(
            f"`predictions.folder` must not have images other than the requested ones. Found {file} {difference}; choose "
            "another folder, or remove the images there."
        )
