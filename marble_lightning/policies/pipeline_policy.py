"""A flow model in a stock pipeline of diffusers, with frozen weights and three LoRA adapters of its transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from marble_lightning.policies.base import Conditions, FlowPolicy, concat_conditions
from marble_lightning.policies.embedding_cache import PromptCache, fingerprint
from marble_lightning.policies.lora_files import read_lora
from marble_lightning.policies.pipeline_checks import part_config
from marble_lightning.policies.pipeline_kinds import PipelineKind
from marble_lightning.policies.samplers import flow_sigmas
from marble_lightning.utils.atomic_files import check_folder, local_path
from marble_lightning.utils.cpu_weights import CPUWeights


class PipelinePolicy(FlowPolicy):
    """A flow model in a pipeline of diffusers, with an AutoencoderKL and a flow-matching Euler scheduler.

    Args:
        path: Folder in diffusers format, or hub id, of a pipeline that was not distilled.
        resolution: Side of the images in pixels.
        rank: LoRA rank, >= 1.
        alpha: LoRA alpha; the update is scaled by alpha / rank.
        targets: Linear layers that get a LoRA: those with a name that ends with one of these.
        text_length: Tokens of a text encoder.
        dtype: Precision of the frozen weights: `float32`, `bfloat16` or `float16`. Adapters are always float32.
        revision: Revision of a hub id.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them: saves memory, takes
            more time.
        offload_text_encoders: Keep text encoders on the CPU and move them to the device only while they encode.
        prompt_cache: Folder for encoded prompts, separate for each set of text encoders; null stores none.
        vae_slicing: Decode images one by one: saves memory if many are sampled at once.
        vae_tiling: Decode images larger than the autoencoder's own size in overlapping tiles: saves memory, may change the
            images slightly at the seams.
        compile: Compile the transformer's blocks (torch.compile): minutes at the start, faster afterwards.
        init_lora: File or folder with a LoRA that all adapters start from, e.g. from `marble-lightning export`; null starts
            at the base model. In evaluations on held-out prompts, the base is then this LoRA; the KL term uses the base
            model without it.
        adapter: Weights that are evaluated and generate images: the averaged adapter `ema`, the adapter `trained`, or
            `none`, the base model.
        vae_dtype: Precision of the autoencoder if it differs. Null: `dtype`.
    """

    kind: ClassVar[PipelineKind]
    """The pipeline that `path` must hold."""
    encode_batch_size: ClassVar[int] = 32
    """Prompts that the text encoders encode at once."""

    def __init__(
        self,
        path: str,
        resolution: int,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        text_length: int,
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
        self.gradient_checkpointing, self.compiled = gradient_checkpointing, compile
        self.init_lora = None if init_lora is None else str(local_path("policy.init_lora", init_lora))
        self.offload_text_encoders, self.prompt_cache = offload_text_encoders, prompt_cache
        self.vae_slicing, self.vae_tiling = vae_slicing, vae_tiling
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.vae_dtype: torch.dtype | None = None if vae_dtype is None else getattr(torch, vae_dtype)

    # Methods that a subclass implements, beside those of FlowPolicy -------------------------------------------------

    @abstractmethod
    def load(self) -> Any:
        """Load the pipeline on the CPU."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Conditions:
        """Encode prompts with the text encoders, which are on the device."""

    @property
    @abstractmethod
    def encoding_settings(self) -> tuple[object, ...]:
        """What an encoding depends on beside the text encoders."""

    @abstractmethod
    def patches(self, transformer: dict[str, Any]) -> tuple[int, int, str]:
        """Side of a patch in latents, and the maximum number of patches a side, with the name of its field.

        Args:
            transformer: Configuration of the transformer.
        """

    # Checks and setup -----------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Model, revision, settings of text encoders and precision, and whether images are decoded in tiles."""
        vae_dtype = {"vae_dtype": str(self.vae_dtype)[6:]} if self.vae_dtype else {}
        return (
            super().identity | self.text_identity | {"dtype": str(self.dtype)[6:], "vae_tiling": self.vae_tiling} | vae_dtype
        )

    @property
    def text_identity(self) -> dict[str, str | int | None]:
        """Settings of the text encoders that change images, by name."""
        return {"text_length": self.text_length}

    def check_resolution(self, name: str, resolution: int) -> None:
        """Check that images consist of whole patches that the transformer has positions for; reads configurations only."""
        transformer, vae = (part_config(self.kind, part, self.path, self.revision) for part in ("transformer", "vae"))
        side, maximum, field = self.patches(transformer)
        patch = side * 2 ** (len(vae["block_out_channels"]) - 1)
        if resolution % patch or not 0 < resolution <= maximum * patch:
            raise ValueError(
                f"`{name}` must be a multiple of {patch}, at most {maximum * patch}: the transformer of {self.path} has "
                f"positions for {maximum} patches of {patch} pixels a side (`{field}`). Found {resolution}."
            )

    def check(self) -> None:
        """Check that `prompt_cache` can be a folder, and that the adapters can start from `init_lora`."""
        if self.prompt_cache is not None:
            check_folder("policy.prompt_cache", Path(self.prompt_cache).expanduser())
        if self.init_lora is not None:
            read_lora(self.init_lora, rank=self.rank, alpha=self.alpha, kind=self.kind)

    def setup(self, seed: int) -> None:
        """Load the pipeline, freeze it and add the adapters; the same seed gives the same initial adapters."""
        if hasattr(self, "pipeline"):
            return
        self.check()
        pipeline = self.load()
        self.pipeline, self.flow_scheduler = pipeline, pipeline.scheduler
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.text_encoders = {name: part for name in self.kind.encoders if (part := getattr(pipeline, name)) is not None}
        if not self.offload_text_encoders:  # as submodules they move with this module
            for name, module in self.text_encoders.items():
                setattr(self, name, module)
        # without text encoders, which may be on the CPU, the pipeline runs on the device of transformer and autoencoder
        self.sampler = type(pipeline)(**{**pipeline.components, **dict.fromkeys(self.kind.encoders)})
        self.sampler.set_progress_bar_config(disable=True)
        if self.prompt_cache is not None:
            self.cache = PromptCache(self.prompt_cache, fingerprint(self.text_encoders, *self.encoding_settings))
        if self.vae_slicing:
            self.vae.enable_slicing()
        if self.vae_tiling:
            self.vae.enable_tiling()
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        start = (
            None if self.init_lora is None else read_lora(self.init_lora, rank=self.rank, alpha=self.alpha, kind=self.kind)
        )
        self.add_adapters(seed, start)
        if self.compiled:
            self._compile_blocks()

    def _compile_blocks(self) -> None:
        """Compile the transformer's blocks: those of a kind share compiled code, and all take most of the run time."""
        # each kind of block has a variant for each adapter, with and without a graph; the default limit is 8
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # type: ignore[attr-defined]
        # else DistributedDataParallel has each block cut where a bucket of gradients is full, and each part compiled alone
        torch._dynamo.config.optimize_ddp = False  # type: ignore[attr-defined]
        kinds = self.transformer._repeated_blocks or self.transformer._no_split_modules  # SD3's model names only the latter
        for module in self.transformer.modules():
            if type(module).__name__ in kinds:
                module.compile()

    # Prompts and images ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditions:
        """Encode prompts with the pipeline's text encoders, or read them from the cache."""
        if self.prompt_cache is None:
            with self._text_encoders_on_device():
                batches = range(0, len(texts), self.encode_batch_size)
                rows = [self.encode_batch(texts[start : start + self.encode_batch_size]) for start in batches]
                return concat_conditions(rows, self.device)
        distinct = dict.fromkeys(texts)
        encoded = {text: cached for text in distinct if (cached := self.cache.get(text)) is not None}
        if missing := [text for text in distinct if text not in encoded]:
            with self._text_encoders_on_device():
                for text in missing:  # one by one, since rounding depends on the other prompts of a batch
                    encoded[text] = self.encode_batch([text])
                    self.cache.put(text, encoded[text])
        return concat_conditions([encoded[text] for text in texts], self.device)

    @contextmanager
    def _text_encoders_on_device(self) -> Iterator[None]:
        visiting = [encoder for encoder in self.text_encoders.values() if encoder.device != self.device]
        on_cpu = CPUWeights(visiting if self.offload_text_encoders else ())
        for encoder in visiting:
            encoder.to(self.device)
        try:
            yield
        finally:
            on_cpu.restore()
            for encoder in visiting if self.offload_text_encoders else []:
                encoder.to("cpu")

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch 3 pixel pixel"]:
        """Decode latents to images in [0, 1], float32."""
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        pixels = self.vae.decode(latents).sample
        return self.sampler.image_processor.postprocess(pixels.float(), output_type="pt")

    def sigmas(self, steps: int) -> Float[Tensor, " step"]:
        """Flow times of a rollout with `steps` steps, in descending order from 1, without the final 0."""
        return flow_sigmas(self.flow_scheduler, steps)[:-1]
