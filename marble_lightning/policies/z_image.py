"""Z-Image as a policy: a stock pipeline with frozen weights and three LoRA adapters of its transformer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from jaxtyping import Float
from torch import Tensor

from marble_lightning.policies.base import Adapter, Conditions
from marble_lightning.policies.pipeline_checks import part_config, pipeline_index
from marble_lightning.policies.pipeline_kinds import Z_IMAGE
from marble_lightning.policies.pipeline_loading import load_pipeline
from marble_lightning.policies.pipeline_policy import PipelinePolicy
from marble_lightning.policies.samplers import Solver, flow_sigmas, scheduler_for
from rewards.files import resolve_path
from rewards.texts import truncate

TARGETS = tuple(f"attention.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0"))
"""Linear layers of a block's attention that get a LoRA: 136 layers of Z-Image."""

TEXT_MULTIPLE = 32
"""The transformer fills prompts up to a multiple of this number of tokens."""


class ZImagePolicy(PipelinePolicy):
    """Z-Image with a frozen base and the LoRA adapters `trained`, `old` and `ema`.

    The transformer gets the time 1 - t and predicts x_0 - eps. Prompts have different numbers of tokens; those after a
    prompt's end take no part.

    Args:
        path: Folder in diffusers format, or hub id, of a ZImagePipeline that was not distilled.
        resolution: Side of the images in pixels.
        rank: LoRA rank, >= 1.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        targets: Linear layers that get a LoRA: those with a name that ends with one of these. The default is the attention
            of all blocks, also of those that refine noise and prompts (136 layers of Z-Image, 33.42 million parameters at
            rank 32).
        text_length: Maximum number of tokens of a prompt, with those of the chat template.
        options: Further arguments of `PipelinePolicy`.

    Source: Z-Image, arXiv 2511.22699, and its pipeline in diffusers.
    """

    kind = Z_IMAGE
    encode_batch_size = 8  # the hidden states of all layers of the text encoder are kept
    transformer: ZImageTransformer2DModel

    def __init__(
        self,
        path: str,
        resolution: int = 1024,
        rank: int = 32,
        alpha: float = 64,
        targets: Sequence[str] = TARGETS,
        text_length: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(path, resolution, rank, alpha, targets, text_length, **options)

    @property
    def identity(self) -> dict[str, str | int | None]:
        """As `PipelinePolicy.identity`, with the class of the pipeline."""
        return super().identity | {"pipeline": self.kind.pipeline}

    @property
    def encoding_settings(self) -> tuple[object, ...]:
        """Maximum number of tokens of a prompt."""
        return (self.text_length,)

    def patches(self, transformer: dict[str, Any]) -> tuple[int, int, str]:
        """Side of a patch in latents, and the maximum number of patches a side, with the name of its field."""
        return transformer["all_patch_size"][0], min(transformer["axes_lens"][1:]), "axes_lens"

    def check(self) -> None:
        """Check the settings as `PipelinePolicy.check`, and that the transformer has positions for the longest prompt."""
        super().check()
        positions = part_config(self.kind, "transformer", self.path, self.revision)["axes_lens"][0]
        maximum = (positions - 2) // TEXT_MULTIPLE * TEXT_MULTIPLE  # the positions before and after it are used too
        if self.text_length > maximum:
            raise ValueError(
                f"`policy.text_length` must be at most {maximum}: the transformer of {self.path} has {positions} positions "
                f"for prompts (`axes_lens`). Found {self.text_length}."
            )

    def load(self) -> ZImagePipeline:
        """Load the pipeline on the CPU.

        Raises:
            ValueError: A part is missing or damaged, the tokenizer has no chat template, or the grid of flow times depends
                on the size of the images.
        """
        index = pipeline_index(self.kind, self.path, self.revision)
        dtypes = {"vae": self.vae_dtype} if self.vae_dtype else {}
        pipeline = load_pipeline(resolve_path(self.path), index, self.dtype, self.revision, dtypes=dtypes)
        if not pipeline.tokenizer.chat_template:
            raise ValueError(
                f"`policy.path` must hold a tokenizer with a chat template. Found none in {self.path!r}; put that model's "
                "tokenizer files into tokenizer."
            )
        if pipeline.scheduler.config.use_dynamic_shifting:
            raise ValueError(
                "`policy.path` must hold a scheduler whose flow times do not depend on the size of the images. Found "
                f"`use_dynamic_shifting` in {self.path!r}; choose {self.kind.choose}."
            )
        return pipeline

    # Prompts --------------------------------------------------------------------------------------------------------

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum number of tokens of a prompt, with those of the chat template."""
        return self.text_length

    def truncated_prompts(self, texts: Iterable[str]) -> list[str]:
        """The texts that have more than `max_prompt_tokens` tokens in the chat template."""
        return [text for text in texts if self._tokens(text) > self.max_prompt_tokens]

    def _tokens(self, text: str) -> int:
        # the pipeline does the same before it truncates
        message = {"role": "user", "content": truncate(text, self.max_prompt_tokens)}
        tokenizer: Any = self.pipeline.tokenizer
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return len(tokenizer(prompt, verbose=False).input_ids)

    def encode_batch(self, texts: Sequence[str]) -> Conditions:
        """Encode prompts with the pipeline's text encoder, which is on the device."""
        beginnings = [truncate(text, self.max_prompt_tokens) for text in texts]
        embeds, _ = self.pipeline.encode_prompt(
            beginnings, self.device, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        lengths = torch.tensor([len(prompt) for prompt in embeds], device=self.device)
        return Conditions(torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True), lengths=lengths)

    @torch.no_grad()
    def encode_longest(self, prompts: int) -> Conditions:
        """Encode so many prompts of `text_length` tokens, without reading numbers from tensors."""
        encoder, tokens = self.text_encoders["text_encoder"], torch.zeros(prompts, self.text_length, dtype=torch.long)
        with self._text_encoders_on_device():
            batches = [
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                for ids in tokens.to(self.device).split(self.encode_batch_size)
            ]
            return Conditions(
                torch.cat([encoder(**batch, output_hidden_states=True).hidden_states[-2] for batch in batches])
            )

    # Images ---------------------------------------------------------------------------------------------------------

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
        """Sample latents with the stock pipeline, one generator per image; see `FlowPolicy.sample`.

        The pipeline's own `guidance_scale` is `guidance` - 1.
        """
        self.sampler.scheduler = scheduler_for(solver, self.flow_scheduler)
        negative = prompts_of(unconditional) * len(generators) if unconditional is not None else None
        with self.use_adapter(adapter):
            output = self.sampler(
                prompt_embeds=prompts_of(conditions),
                negative_prompt_embeds=negative,
                height=resolution or self.resolution,
                width=resolution or self.resolution,
                num_inference_steps=steps,
                guidance_scale=guidance - self.kind.guidance_offset,
                generator=list(generators),
                output_type="latent",
            )
        return output.images

    def velocity(
        self, noisy: Tensor, t: Float[Tensor, " batch"], conditions: Conditions
    ) -> Float[Tensor, "batch channel height width"]:
        """Velocity at x_t with the adapter in use; t in (0, 1]. Float32."""
        images = list(noisy.to(self.dtype).unsqueeze(2))  # videos of one frame
        prediction = self.transformer(images, 1 - t, prompts_of(conditions), return_dict=False)[0]
        return -torch.stack(prediction).squeeze(2).float()

    def sigmas(self, steps: int) -> Float[Tensor, " step"]:
        """Flow times of a rollout with `steps` steps, in descending order from 1, without the final 0."""
        return flow_sigmas(self.flow_scheduler, None, get_default_z_image_sigmas(steps))[:-1]


def prompts_of(conditions: Conditions) -> list[Float[Tensor, "token width"]]:
    """The tokens of each prompt, without the zeros after its end."""
    if conditions.lengths is None:
        return list(conditions.embeds)
    return [embeds[:length] for embeds, length in zip(conditions.embeds, conditions.lengths.tolist(), strict=True)]
