"""The pipelines of diffusers that policies train: names of classes, and how they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers


@dataclass(frozen=True)
class PipelineKind:
    """A kind of pipeline; classes are named as in its model_index.json, so that only those in use are imported.

    Args:
        name: Name of the model.
        pipeline: Class of the pipeline.
        transformer: Class of its transformer.
        encoders: Names of its text encoders.
        distilled: Part of the names of checkpoints that were distilled to a few steps, in lower case.
        choose: Checkpoints to choose, for error messages.
        guidance_offset: What its `guidance_scale` has to be raised by to be the scale of classifier-free guidance, whose
            value 1 disables it.
    """

    name: str
    pipeline: str
    transformer: str
    encoders: tuple[str, ...]
    distilled: str
    choose: str
    guidance_offset: float = 0.0

    @property
    def pipeline_class(self) -> Any:
        """The class of the pipeline."""
        return getattr(diffusers, self.pipeline)

    @property
    def transformer_class(self) -> Any:
        """The class of the transformer."""
        return getattr(diffusers, self.transformer)

    @property
    def parts(self) -> dict[str, str]:
        """Required classes of parts: training depends on their predictions, their grid of flow times and their latents."""
        return {"transformer": self.transformer, "scheduler": "FlowMatchEulerDiscreteScheduler", "vae": "AutoencoderKL"}


SD3 = PipelineKind(
    "Stable Diffusion 3",
    "StableDiffusion3Pipeline",
    "SD3Transformer2DModel",
    ("text_encoder", "text_encoder_2", "text_encoder_3"),
    distilled="turbo",
    choose="stable-diffusion-3.5-medium or -large",
)
Z_IMAGE = PipelineKind(
    "Z-Image",
    "ZImagePipeline",
    "ZImageTransformer2DModel",
    ("text_encoder",),
    distilled="turbo",
    choose="Tongyi-MAI/Z-Image",
    guidance_offset=1.0,
)
KINDS = {kind.pipeline: kind for kind in (SD3, Z_IMAGE)}


def kind_of(identity: Mapping[str, Any]) -> PipelineKind:
    """The kind of pipeline of a policy's `identity`, which names none for Stable Diffusion 3.

    >>> kind_of({"model": "some/folder"}).pipeline
    'StableDiffusion3Pipeline'

    Raises:
        ValueError: The pipeline is not one of `KINDS`.
    """
    name = identity.get("pipeline", SD3.pipeline)
    if name not in KINDS:
        raise ValueError(f"The base must be a {' or a '.join(KINDS)}. Found {name}; export it with its own class.")
    return KINDS[name]
