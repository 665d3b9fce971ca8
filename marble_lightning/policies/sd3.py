"""Stable Diffusion 3 as a policy: a stock pipeline with frozen weights and three LoRA adapters of its transformer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor, nn

from marble_lightning.policies.base import Adapter, Conditions, FlowPolicy, concat_conditions
from marble_lightning.policies.embedding_cache import PromptCache, fingerprint
from marble_lightning.policies.lora_files import read_lora
from marble_lightning.policies.samplers import Solver, flow_sigmas, scheduler_for
from marble_lightning.policies.sd3_checks import check_resolution_fits, pipeline_index
from marble_lightning.policies.sd3_loading import compile_blocks, load_pipeline
from marble_lightning.utils.atomic_files import check_folder, local_path
from rewards.files import resolve_path
from rewards.texts import truncate

TARGETS = tuple(
    f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
"""Linear layers of a block's joint attention that get a LoRA, as in the published runs: 191 layers of SD3.5 Medium."""

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ENCODE_BATCH_SIZE = 32
"""Prompts that the text encoders encode at once."""


class SD3Policy(FlowPolicy):
    """Stable Diffusion 3 with a frozen base and the LoRA adapters `trained`, `old` and `ema`.

    Args:
        path: Folder in diffusers format, or hub id, of a StableDiffusion3Pipeline that was not distilled. `package:` stands
            for the folder of the installed marble_lightning, which contains `package:tinyworld/weights/sd3`.
        resolution: Side of the images in pixels.
        rank: LoRA rank, >= 1.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        targets: Linear layers that get a LoRA: those with a name that ends with one of these. The default is that of the
            published run, the joint attention `attn` (191 layers of SD3.5 Medium, 18.78 million parameters at rank 32).
            Without `attn.`, as in [to_q, to_k, to_v, to_out.0, add_q_proj, add_k_proj, add_v_proj, to_add_out], the layers
            of SD3.5 Medium's second attention, `attn2`, are included (243 layers, 23.89 million).
        text_length: Tokens of the third text encoder (zeros if it is absent).
        text_encoder_3: Null leaves T5 out, as if the checkpoint had none: 9 GiB less to load, but long prompts are
            followed less well.
        dtype: Precision of the frozen weights: `float32`, `bfloat16` or `float16`. Adapters are always float32.
        vae_dtype: Precision of the autoencoder if it differs: the published run decodes in `float32`. Null: `dtype`.
        revision: Revision of a hub id.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them: saves memory, takes
            more time.
        offload_text_encoders: Keep text encoders on the CPU and move them to the device only while they encode.
        prompt_cache: Folder for encoded prompts, separate for each set of text encoders; null stores none. A prompt takes
            1.6 MiB with SD3.5's encoders in bfloat16.
        vae_slicing: Decode images one by one: saves memory if many are sampled at once.
        vae_tiling: Decode images larger than the autoencoder's own size, 1024 pixels for SD3.5, in overlapping tiles:
            saves memory, may change the images slightly at the seams.
        compile: Compile the transformer's blocks (torch.compile): minutes at the start, faster afterwards.
        init_lora: File or folder with a LoRA that all adapters start from, e.g. from `marble-lightning export`; null starts
            at the base model. In evaluations on held-out prompts, the base is then this LoRA; the KL term uses the base
            model without it.
        adapter: Weights that are evaluated and generate images: the averaged adapter `ema`, the adapter `trained`, or
            `none`, the base model.

    Source: MARBLE, arXiv 2605.06507, settings of the SD3.5-Medium run.
    """

    transformer: SD3Transformer2DModel

    def __init__(
        self,
        path: str,
        resolution: int = 512,
        rank: int = 32,
        alpha: float = 64,
        targets: Sequence[str] = TARGETS,
        text_length: int = 128,
        text_encoder_3: Literal["checkpoint"] | None = "checkpoint",
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        revision: str | None = None,
        gradient_checkpointing: bool = False,
        offload_text_encoders: bool = True,
        prompt_cache: str | None = None,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        compile: bool = False,
        init_lora: str | None = None,
        adapter: Literal["ema", "trained", "none"] = "ema",
        vae_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        super().__init__(path, revision, rank, alpha, targets)
        if resolution < 16 or resolution % 16:
            raise ValueError(f"`policy.resolution` must be a positive multiple of 16. Found {resolution}.")
        if text_length < 1:
            raise ValueError(f"`policy.text_length` must be >= 1. Found {text_length}.")
        if adapter not in ("ema", "trained", "none"):
            raise ValueError(f"`policy.adapter` must be ema, trained or none. Found {adapter!r}.")
        if adapter == "none" and init_lora is not None:
            raise ValueError(f"`policy.init_lora` must be null where `policy.adapter` is none. Found {init_lora!r}.")
        self.adapter = None if adapter == "none" else adapter
        self.resolution, self.text_length = resolution, text_length
        self.text_encoder_3_from = text_encoder_3
        self.gradient_checkpointing, self.compiled = gradient_checkpointing, compile
        self.init_lora = None if init_lora is None else str(local_path("policy.init_lora", init_lora))
        self.offload_text_encoders, self.prompt_cache = offload_text_encoders, prompt_cache
        self.vae_slicing, self.vae_tiling = vae_slicing, vae_tiling
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.vae_dtype: torch.dtype | None = None if vae_dtype is None else getattr(torch, vae_dtype)

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Model, revision, settings of text encoders and precision, and whether images are decoded in tiles."""
        text = {"text_length": self.text_length, "text_encoder_3": self.text_encoder_3_from}
        vae_dtype = {"vae_dtype": str(self.vae_dtype)[6:]} if self.vae_dtype else {}
        return super().identity | text | {"dtype": str(self.dtype)[6:], "vae_tiling": self.vae_tiling} | vae_dtype

    def check_resolution(self, name: str, resolution: int) -> None:
        """Check that images consist of whole patches that the transformer has positions for; reads configurations only."""
        check_resolution_fits(self.path, self.revision, name, resolution)

    # Setup ----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that `prompt_cache` can be a folder, and that the adapters can start from `init_lora`."""
        if self.prompt_cache is not None:
            check_folder("policy.prompt_cache", Path(self.prompt_cache).expanduser())
        if self.init_lora is not None:
            read_lora(self.init_lora, rank=self.rank, alpha=self.alpha)

    def setup(self, seed: int) -> None:
        """Load the pipeline, freeze it and add the adapters; the same seed gives the same initial adapters."""
        if hasattr(self, "pipeline"):
            return
        self.check()
        index = pipeline_index(self.path, self.revision)
        start = read_lora(self.init_lora, rank=self.rank, alpha=self.alpha) if self.init_lora is not None else None
        without_t5 = self.text_encoder_3_from is None or index.get("text_encoder_3", [None])[0] is None
        absent = ("text_encoder_3", "tokenizer_3") if without_t5 else ()
        path, dtypes = resolve_path(self.path), {"vae": self.vae_dtype} if self.vae_dtype else {}
        pipeline = load_pipeline(path, index, self.dtype, self.revision, without=absent, dtypes=dtypes)
        self.pipeline, self.flow_scheduler = pipeline, pipeline.scheduler
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.text_encoders = {name: module for name in ENCODERS if (module := getattr(pipeline, name)) is not None}
        if not self.offload_text_encoders:  # as submodules they move with this module
            for name, module in self.text_encoders.items():
                setattr(self, name, module)
        # without text encoders, which may be on the CPU, the pipeline runs on the device of transformer and autoencoder
        self.sampler = StableDiffusion3Pipeline(**{**pipeline.components, **dict.fromkeys(ENCODERS)})
        self.sampler.set_progress_bar_config(disable=True)
        if self.prompt_cache is not None:
            encoders = fingerprint(self.text_encoders, self.text_length, pipeline.tokenizer_max_length)
            self.cache = PromptCache(self.prompt_cache, encoders)
        if self.vae_slicing:
            self.vae.enable_slicing()
        if self.vae_tiling:
            self.vae.enable_tiling()
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.add_adapters(seed, start)
        if self.compiled:
            compile_blocks(self.transformer)

    # Prompts --------------------------------------------------------------------------------------------------------

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of a prompt in the CLIP text encoders, including the start and end tokens."""
        return self.pipeline.tokenizer_max_length

    def truncated_prompts(self, texts: Iterable[str]) -> list[str]:
        """The texts that a CLIP text encoder truncates: those with more than `max_prompt_tokens` of either tokenizer."""
        texts = list(texts)
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        beginnings = [truncate(text, self.max_prompt_tokens) for text in texts]
        tokens = [tokenizer(beginnings, verbose=False).input_ids if texts else [] for tokenizer in tokenizers]
        return [text for text, *ids in zip(texts, *tokens, strict=True) if max(map(len, ids)) > self.max_prompt_tokens]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditions:
        """Encode prompts with the pipeline's text encoders, or read them from the cache."""
        if self.prompt_cache is None:
            with self._text_encoders_on_device():
                batches = range(0, len(texts), ENCODE_BATCH_SIZE)
                return concat_conditions([self._encode(texts[i : i + ENCODE_BATCH_SIZE]) for i in batches], self.device)
        distinct = dict.fromkeys(texts)
        encoded = {text: cached for text in distinct if (cached := self.cache.get(text)) is not None}
        if missing := [text for text in distinct if text not in encoded]:
            with self._text_encoders_on_device():
                for text in missing:  # one by one, since rounding depends on the other prompts of a batch
                    encoded[text] = self._encode([text])
                    self.cache.put(text, encoded[text])
        return concat_conditions([encoded[text] for text in texts], self.device)

    def _encode(self, texts: Sequence[str]) -> Conditions:
        max_tokens = max(self.max_prompt_tokens, self.text_length)
        with _without_truncation_warnings(type(self.pipeline).__module__):
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=[truncate(text, max_tokens) for text in texts],
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.text_length,
            )
        return Conditions(embeds, pooled)

    @contextmanager
    def _text_encoders_on_device(self) -> Iterator[None]:
        visiting = [encoder for encoder in self.text_encoders.values() if encoder.device != self.device]
        for encoder in visiting:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder in visiting if self.offload_text_encoders else []:
                encoder.to("cpu")

    # Images -------------------------------------------------------------------------------------------------------

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
        """Sample latents with the stock pipeline, one generator per image; see `FlowPolicy.sample`."""
        self.sampler.scheduler = scheduler_for(solver, self.flow_scheduler)
        negative = unconditional[torch.zeros(len(generators), dtype=torch.long)] if unconditional is not None else None
        with self.use_adapter(adapter):
            output = self.sampler(
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
        """Decode latents to images in [0, 1], float32."""
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        # autocast would override `vae_dtype`
        with torch.autocast(latents.device.type, enabled=False) if self.vae_dtype else nullcontext():
            pixels = self.vae.decode(latents).sample
        return self.sampler.image_processor.postprocess(pixels.float(), output_type="pt")

    def velocity(
        self, noisy: Tensor, t: Float[Tensor, " batch"], conditions: Conditions
    ) -> Float[Tensor, "batch channel height width"]:
        """Velocity at x_t with the adapter in use; t in (0, 1]. Float32."""
        prediction = self.transformer(
            hidden_states=noisy.to(self.dtype),
            timestep=1000 * t,
            encoder_hidden_states=conditions.embeds,
            pooled_projections=conditions.pooled,
            return_dict=False,
        )[0]
        return prediction.float()

    def sigmas(self, steps: int) -> Float[Tensor, " step"]:
        """Flow times of a rollout with `steps` steps, in descending order from 1, without the final 0."""
        return flow_sigmas(self.flow_scheduler, steps)[:-1]


@contextmanager
def _without_truncation_warnings(module: str) -> Iterator[None]:
    """Suppress a pipeline's warnings about truncated prompts, which quote them; see `truncated_prompts` instead."""

    def keep(record: logging.LogRecord) -> bool:
        return "truncated" not in record.msg

    logger = logging.getLogger(module)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
