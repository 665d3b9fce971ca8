"""The policy: a stock SD3 pipeline, its frozen base, and three LoRA adapters on the transformer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float, Int
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from marble_lightning.seeds import derived_seed
from marble_lightning.solvers import Solver, flow_sigmas, scheduler_for

Adapter = Literal["trained", "old", "ema"]
ADAPTERS: tuple[Adapter, ...] = ("trained", "old", "ema")
"""`trained` learns, `old` samples the rollouts, `ema` is the average that is evaluated and exported."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Linear layers of a joint attention block that get a LoRA, as in the published runs."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


@dataclass(frozen=True)
class Conditions:
    """Encoded prompts: `embeds` (B, tokens, width) and `pooled` (B, pooled width)."""

    embeds: Float[Tensor, "batch token width"]
    pooled: Float[Tensor, "batch pooled"]

    def __getitem__(self, index: Int[Tensor, " chosen"]) -> Conditions:
        return Conditions(self.embeds[index], self.pooled[index])


class SD3Policy(nn.Module):
    """Stable Diffusion 3 with a frozen base and the LoRA adapters `trained`, `old` and `ema`.

    Args:
        path: Folder in diffusers format, or hub id, of a StableDiffusion3Pipeline.
        resolution: Side of the pictures in pixels.
        rank: LoRA rank, >= 1.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        targets: Names of the attention's linear layers that get a LoRA.
        text_length: Tokens of the third text encoder (zeros where it is absent).
        dtype: Precision of the frozen weights: `float32`, `bfloat16` or `float16`. Adapters are always float32.
        revision: Revision of a hub id.
        gradient_checkpointing: Keep less for the way back and compute it anew: saves memory, costs time.
        adapter: What is judged and makes pictures: the averaged adapter `ema`, the live one `trained`, or `none`, the base.

    Source: MARBLE, arXiv 2605.06507, settings of the SD3.5-Medium run.
    """

    def __init__(
        self,
        path: str,
        resolution: int = 512,
        rank: int = 32,
        alpha: float = 64,
        targets: Sequence[str] = TARGETS,
        text_length: int = 128,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        revision: str | None = None,
        gradient_checkpointing: bool = False,
        adapter: Literal["ema", "trained", "none"] = "ema",
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"`rank` must be >= 1. Found {rank}.")
        if resolution < 16 or resolution % 16:
            raise ValueError(f"`resolution` must be a positive multiple of 16. Found {resolution}.")
        if not targets:
            raise ValueError("`targets` must name at least one linear layer. Found none.")
        if adapter not in ("ema", "trained", "none"):
            raise ValueError(f"`policy.adapter` must be ema, trained or none. Found {adapter!r}.")
        self.adapter: Adapter | None = None if adapter == "none" else adapter
        self.path, self.resolution, self.rank, self.alpha = path, resolution, rank, alpha
        self.targets, self.text_length, self.revision = tuple(targets), text_length, revision
        self.gradient_checkpointing = gradient_checkpointing
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.transformer: SD3Transformer2DModel

    def index(self) -> dict[str, Any]:
        """The pipeline's model_index.json, from the folder or the hub; no weight is loaded.

        Raises:
            ValueError: Where there is none, or it is not a StableDiffusion3Pipeline's.
        """
        folder = Path(self.path).expanduser()
        if folder.exists() and not (folder / "model_index.json").exists():
            raise ValueError(
                f"`policy.path` must hold a diffusers pipeline with a model_index.json. Found none in {folder}; "
                "save one with `pipeline.save_pretrained(folder)`."
            )
        hub_id = self.path.count("/") == 1 and not self.path.startswith((".", "/", "~"))
        try:
            if not (folder.exists() or hub_id):
                raise OSError("there is no such folder")
            index = dict(StableDiffusion3Pipeline.load_config(self.path, revision=self.revision))
        except OSError as error:
            raise ValueError(
                f"`policy.path` must be a folder in diffusers format or a hub id (owner/name). Found {self.path!r}: no such "
                f"folder from {Path.cwd()}, where relative paths start" + ", and no such model on the hub." * hub_id
            ) from error
        if index.get("_class_name") != "StableDiffusion3Pipeline":
            raise ValueError(
                f"`policy.path` must hold a StableDiffusion3Pipeline. Found {index.get('_class_name')} in {self.path!r}; "
                "choose a Stable Diffusion 3 or 3.5 checkpoint."
            )
        return index

    def setup(self, seed: int) -> None:
        """Load the pipeline, freeze it and add the adapters; the same seed gives the same initial adapters."""
        if hasattr(self, "pipeline"):
            return
        index = self.index()
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(self.path, dtype=self.dtype, revision=self.revision, **absent)
        pipeline.set_progress_bar_config(disable=True)
        self.flow_scheduler = pipeline.scheduler
        for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer"):
            module = getattr(pipeline, name, None)
            if module is not None:
                setattr(self, name, module.requires_grad_(False).eval())
        self.pipeline = pipeline
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # three adapters are the point
            torch.manual_seed(derived_seed(seed, "lora"))
            for name in ADAPTERS if self.adapter else ():
                self.transformer.add_adapter(self._lora(), name)
        self._lora_layers = [module for module in self.transformer.modules() if isinstance(module, LoraLayer)]
        for name in ADAPTERS:
            for parameter in self.parameters_of(name):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(name == "trained")
        for name in ADAPTERS:
            self.move(name, towards="trained", by=1.0)
        self._activate("trained")

    def _lora(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha, init_lora_weights="gaussian", target_modules=list(self.targets)
        )

    @property
    def lora(self) -> dict[str, object]:
        """What a checkpoint's adapters must have been trained with to fit."""
        return {"rank": self.rank, "alpha": float(self.alpha), "targets": list(self.targets)}

    # Adapters -------------------------------------------------------------------------------------------------------

    def parameters_of(self, adapter: Adapter) -> list[nn.Parameter]:
        """The parameters of one adapter, in a fixed order."""
        return [parameter for name, parameter in self.transformer.named_parameters() if f".{adapter}." in name]

    @torch.no_grad()
    def move(self, adapter: Adapter, *, towards: Adapter, by: float) -> None:
        """Move one adapter a share `by` in [0, 1] of the way to another."""
        for own, goal in zip(self.parameters_of(adapter), self.parameters_of(towards), strict=True):
            own.lerp_(goal, by)

    @contextmanager
    def using(self, adapter: Adapter | None) -> Iterator[None]:
        """Run the transformer with one adapter, or with none (the reference policy)."""
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate("trained")

    def _activate(self, adapter: Adapter | None) -> None:
        # peft's own switches also flip requires_grad, which would cut DistributedDataParallel's gradient hooks
        for layer in self._lora_layers:
            layer._disable_adapters = adapter is None
            layer._active_adapter = [adapter or "trained"]

    # Calls ----------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @property
    def most_tokens(self) -> int:
        """Tokens that the CLIP text encoders read of a prompt, with those that mark its beginning and end."""
        return self.pipeline.tokenizer_max_length

    def too_long(self, texts: Iterable[str]) -> list[str]:
        """Those texts whose end the CLIP text encoders do not read: more than `most_tokens` of either tokenizer."""
        texts = list(texts)
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        tokens = [tokenizer(texts, verbose=False).input_ids if texts else [] for tokenizer in tokenizers]
        return [text for text, *each in zip(texts, *tokens, strict=True) if max(map(len, each)) > self.most_tokens]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditions:
        """Encode prompts with the pipeline's text encoders."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return Conditions(embeds, pooled)

    @torch.no_grad()
    def sample(
        self,
        conditions: Conditions,
        generators: Sequence[torch.Generator],
        adapter: Adapter | None,
        *,
        steps: int,
        solver: Solver,
        guidance: float = 1.0,
        unconditional: Conditions | None = None,
        resolution: int | None = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """Sample latents through the stock pipeline, one generator per picture.

        Args:
            conditions: Encoded prompts, one per picture.
            generators: CPU generators of the initial noise.
            adapter: Adapter to sample with; None samples the base.
            steps: Steps of the solver.
            solver: `dpm2` or `euler`.
            guidance: Classifier-free guidance scale; 1 is none.
            unconditional: The encoded empty prompt (batch of one), needed where guidance > 1.
            resolution: Side of the pictures in pixels; None for the policy's.
        """
        self.pipeline.scheduler = scheduler_for(solver, self.flow_scheduler)
        negative = unconditional[torch.zeros(len(generators), dtype=torch.long)] if unconditional is not None else None
        with self.using(adapter):
            output = self.pipeline(
                prompt_embeds=conditions.embeds,
                pooled_prompt_embeds=conditions.pooled,
                negative_prompt_embeds=negative.embeds if negative else None,
                negative_pooled_prompt_embeds=negative.pooled if negative else None,
                height=resolution or self.resolution,
                width=resolution or self.resolution,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=list(generators),
                output_type="latent",
            )
        return output.images

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch 3 pixel pixel"]:
        """Pictures in [0, 1], float32, of latents."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(latents).sample
        return self.pipeline.image_processor.postprocess(pixels.float(), output_type="pt")

    def velocity(
        self, noisy: Tensor, t: Float[Tensor, " batch"], conditions: Conditions
    ) -> Float[Tensor, "batch channel height width"]:
        """Velocity at x_t of the adapter in use; t in (0, 1]. Float32."""
        prediction = self.transformer(
            hidden_states=noisy.to(self.dtype),
            timestep=1000 * t,
            encoder_hidden_states=conditions.embeds,
            pooled_projections=conditions.pooled,
            return_dict=False,
        )[0]
        return prediction.float()

    def sigmas(self, steps: int) -> Float[Tensor, " step"]:
        """Noise levels a rollout of that many steps visits, from 1 down, without the final 0."""
        return flow_sigmas(self.flow_scheduler, steps)[:-1]
