"""Images of prompts as PNG files that say how they were made."""

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
from marble_lightning.utils.distributed import gathered
from marble_lightning.utils.images import to_image


class PredictionWriter(Callback):
    """Writes the images of `predict` as PNG files, and their prompts and scores as `images.jsonl` beside them.

    A file's text chunks tell prompt, index, seed, steps, solver, guidance, resolution, adapter, checkpoint, and the model:
    its name, revision, and how it reads prompts and weights.

    Args:
        folder: Where to; null is `predictions` in the run's folder. One that has images made otherwise is refused.
        scores: Whether rewards and metrics score the images; without, none of their weights are loaded.
    """

    def __init__(self, folder: str | None = None, scores: bool = True) -> None:
        self.folder, self.scores = folder, scores
        self.records: list[dict[str, Any]] = []
        self.place = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that has other images before anything is loaded, or at the latest before anything is sampled."""
        if stage != "predict" or not isinstance(pl_module, DiffusionNFT):
            return
        self.records = []
        pl_module.evaluator.scores_predictions = self.scores
        if self.folder is not None:
            self.place = Path(self.folder)
            check_folder("predictions.folder", self.place)
            self._keep_others(trainer, pl_module, {"adapter", "checkpoint"})  # which are known once it is loaded

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.folder is None:
            self.place = run_folder(trainer) / "predictions"
        if trainer.is_global_zero:
            remove_unfinished([self.place])
        if isinstance(pl_module, DiffusionNFT):
            self._keep_others(trainer, pl_module, set())

    def _keep_others(self, trainer: Trainer, module: DiffusionNFT, unknown: set[str]) -> None:
        for file in sorted(self.place.glob("*.png")):
            if file.stem.isdecimal():
                _must_be_the_same(file, self._facts(trainer, module, int(file.stem)), unknown)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Tensor], batch: HeldOut, *arguments: Any
    ) -> None:
        if not isinstance(pl_module, DiffusionNFT):
            return
        for (index, prompt), image, scores in zip(batch, outputs["images"], outputs["scores"], strict=True):
            if not image.isfinite().all():  # `predict` ends with an error that says so
                continue
            text = PngInfo()
            for name, value in (self._facts(trainer, pl_module, index) or {}).items():
                text.add_text(name, value)
            file = self.place / f"{index:05d}.png"
            with atomic_write(file) as beside:
                to_image(image).save(beside, pnginfo=text)
            there = {
                name: score for name, score in zip(pl_module.evaluator.selected, scores.tolist(), strict=True) if score == score
            }
            self.records.append(
                {"file": file.name, "index": index, "prompt": prompt.text, "source": prompt.source, "scores": there}
            )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known of the images of all ranks, in the order of their prompts."""
        records = sorted(gathered(self.records), key=lambda record: record["index"])
        if trainer.is_global_zero and records:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            with atomic_write(self.place / "images.jsonl") as beside:
                beside.write_text("".join(lines), encoding="utf-8")
            print(f"\nPictures: {self.place}")

    @staticmethod
    def _facts(trainer: Trainer, module: DiffusionNFT, index: int) -> dict[str, str] | None:
        """How the image of an index is made; None where there is no such image."""
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


def _must_be_the_same(file: Path, facts: Mapping[str, str] | None, unknown: set[str]) -> None:
    """An image that is there was made as the one that would take its place, as far as its facts are not `unknown`.

    One that cannot be read, which a full disk may have left, is not there.

    Raises:
        ValueError: With what differs.
    """
    try:
        with Image.open(file) as image:
            found = image.info
            image.verify()
    except (OSError, SyntaxError):  # as Pillow calls a chunk that does not match its checksum
        return
    if facts is None:
        difference = f"of the prompt {found.get('prompt', 'unknown')!r}, beyond the prompts asked for"
    else:
        differences = [
            f"{name} {found.get(name, 'unknown')!r} instead of {value!r}"
            for name, value in facts.items()
            if found.get(name) != value and name not in unknown
        ]
        difference = f"with {', '.join(differences)}" if differences else ""
    if difference:
        raise ValueError(
            f"`predictions.folder` must not have other images than those asked for. Found {file} {difference}; choose "
            "another folder, or remove the images there."
        )
