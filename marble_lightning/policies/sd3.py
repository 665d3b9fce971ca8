"""Stable Diffusion 3 as a policy: a stock pipeline with frozen weights and three LoRA adapters of its transformer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor

from marble_lightning.policies.base import Adapter, Conditions
from marble_lightning.policies.pipeline_checks import pipeline_index
from marble_lightning.policies.pipeline_kinds import SD3
from marble_lightning.policies.pipeline_loading import load_pipeline
from marble_lightning.policies.pipeline_policy import PipelinePolicy
from marble_lightning.policies.quantised import check_bitsandbytes, quantise
from marble_lightning.policies.samplers import Solver, scheduler_for
from rewards.files import resolve_path
from rewards.texts import truncate

TARGETS = tuple(
    f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
"""Linear layers of a block's joint attention that get a LoRA, as in the published runs: 191 layers of SD3.5 Medium."""


class SD3Policy(PipelinePolicy):
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
        quantised: `nf4` keeps the transformer's linear layers in four bits, by the package bitsandbytes: a quarter of their
            memory in bfloat16, but another base, whose velocities differ. Null: `dtype`.

    Source: MARBLE, arXiv 2605.06507, settings of the SD3.5-Medium run.
    """

    kind = SD3
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
        quantised: Literal["nf4"] | None = None,
    ) -> None:
        super().__init__(
            path, resolution, rank, alpha, targets, text_length, dtype, revision, gradient_checkpointing,
            offload_text_encoders, prompt_cache, vae_slicing, vae_tiling, compile, init_lora, adapter, vae_dtype,
        )  # fmt: skip
        if quantised not in (None, "nf4"):
            raise ValueError(f"`policy.quantised` must be nf4 or null. Found {quantised!r}.")
        if quantised and compile:
            raise ValueError("`policy.compile` must be false where `policy.quantised` is nf4. Found true.")
        self.text_encoder_3_from, self.quantised = text_encoder_3, quantised

    @property
    def identity(self) -> dict[str, str | int | None]:
        """As `PipelinePolicy.identity`, with the quantisation if there is one."""
        return super().identity | ({"quantised": self.quantised} if self.quantised else {})

    @property
    def text_identity(self) -> dict[str, str | int | None]:
        """Length of T5's part, and whether there is one."""
        return super().text_identity | {"text_encoder_3": self.text_encoder_3_from}

    @property
    def encoding_settings(self) -> tuple[object, ...]:
        """Tokens of T5 and of the other text encoders."""
        return self.text_length, self.pipeline.tokenizer_max_length

    def patches(self, transformer: dict[str, Any]) -> tuple[int, int, str]:
        """Side of a patch in latents, and the maximum number of patches a side, with the name of its field."""
        return transformer["patch_size"], transformer["pos_embed_max_size"], "pos_embed_max_size"

    def check(self) -> None:
        """As `PipelinePolicy.check`, and that bitsandbytes is installed where it is needed."""
        super().check()
        if self.quantised:
            check_bitsandbytes()

    def load(self) -> StableDiffusion3Pipeline:
        """Load the pipeline on the CPU, without T5 if it is absent or left out, with a quantised transformer if set."""
        index = pipeline_index(self.kind, self.path, self.revision)
        without_t5 = self.text_encoder_3_from is None or index.get("text_encoder_3", [None])[0] is None
        absent = ("text_encoder_3", "tokenizer_3") if without_t5 else ()
        path, dtypes = resolve_path(self.path), {"vae": self.vae_dtype} if self.vae_dtype else {}
        pipeline = load_pipeline(path, index, self.dtype, self.revision, without=absent, dtypes=dtypes)
        if self.quantised:
            quantise(pipeline.transformer, self.dtype)
        return pipeline  # type: ignore[no-any-return]

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

    def encode_batch(self, texts: Sequence[str]) -> Conditions:
        """Encode prompts with the pipeline's text encoders, which are on the device."""
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
