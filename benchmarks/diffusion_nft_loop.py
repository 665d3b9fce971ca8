"""A round of DiffusionNFT's released loop, built from the same stock components, as the baseline for timings.

The base model is float32 (under autocast if training is in mixed precision). The prompt of every image is encoded. The sum
of all rewards is the only reward; it is computed in a thread pool during sampling. The old, trained and reference
velocities take one network call each.

Source: DiffusionNFT, arXiv 2509.16117, and its released training script.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.phases import Phases
from marble_lightning.module import DiffusionNFT
from marble_lightning.policies.samplers import flow_sigmas, scheduler_for
from marble_lightning.policies.sd3 import SD3Policy
from rewards import Prompt, Reward
from rewards.files import resolve_path


class DiffusionNFTLoop:
    """Rounds of DiffusionNFT with the settings of a module of this package.

    Args:
        module: The module with the settings.
        policy: Its policy.
        rewards: Rewards to sum.
        images_per_prompt: k, images sampled for each prompt.
        device: Device of the loop.
        half: Dtype of autocast; None trains in float32.
        phases: Measures the phases.
    """

    def __init__(
        self,
        module: DiffusionNFT,
        policy: SD3Policy,
        rewards: Mapping[str, Reward],
        images_per_prompt: int,
        device: torch.device,
        half: torch.dtype | None,
        phases: Phases,
    ) -> None:
        self.module, self.policy, self.rewards, self.k = module, policy, rewards, images_per_prompt
        self.device, self.half, self.phases = device, half, phases
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if getattr(policy.pipeline, name) is None}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(resolve_path(policy.path), dtype=torch.float32, **absent)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(device)
        self.flow = self.pipeline.scheduler
        self.transformer = self.pipeline.transformer.requires_grad_(False)
        lora = LoraConfig(
            r=policy.rank, lora_alpha=policy.alpha, init_lora_weights="gaussian", target_modules=list(policy.targets)
        )
        for name in ("default", "old"):
            self.transformer.add_adapter(lora, name)
        named = dict(self.transformer.named_parameters())
        self.trained, self.old = ([p for n, p in named.items() if f".{name}." in n] for name in ("default", "old"))
        self.mean = [parameter.detach().clone() for parameter in self.trained]
        self.transformer.set_adapter("default")
        self.optimizer = torch.optim.AdamW(self.trained, lr=3e-4, weight_decay=1e-4)
        self.pool = ThreadPoolExecutor(8)
        self.steps = 0

    def round(self, prompts: Sequence[Prompt]) -> None:
        """Sample, score and train on a round of distinct prompts."""
        repeated = [prompt for prompt in prompts for _ in range(self.k)]
        batch, samples, scores = self.module.sampling.batch_size, [], []
        for start in range(0, len(repeated), batch):
            chunk = repeated[start : start + batch]
            with self.phases("encode"):
                embeds, pooled = self._encode([prompt.text for prompt in chunk])
            latents, images = self._sample(embeds, pooled)
            scores.append(self.pool.submit(self._score, images, chunk))
            samples.append((embeds, pooled, latents))
        with self.phases("score"):
            summed = torch.cat([score.result() for score in scores]).to(self.device)
        grouped = summed.view(-1, self.k)
        advantages = ((grouped - grouped.mean(1, keepdim=True)) / (summed.std() + 1e-4)).flatten()
        with self.phases("train"):
            embeds, pooled, clean = (torch.cat(parts) for parts in zip(*samples, strict=True))
            self._train(embeds, pooled, clean, advantages)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts, None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.policy.text_length,
        )  # fmt: skip
        return embeds, pooled

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.half is None else torch.autocast(self.device.type, self.half)

    def _sample(self, embeds: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        side = self.policy.resolution
        self.transformer.set_adapter("old")
        self.pipeline.scheduler = scheduler_for(self.module.sampling.solver, self.flow)
        with torch.no_grad(), self._autocast():
            with self.phases("sample"):
                latents = self.pipeline(
                    prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=side, width=side, guidance_scale=1.0,
                    num_inference_steps=self.module.sampling.steps, output_type="latent",
                ).images  # fmt: skip
            with self.phases("decode"):
                vae = self.pipeline.vae
                pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
                images = self.pipeline.image_processor.postprocess(pixels.float(), output_type="pt")
        self.transformer.set_adapter("default")
        return latents, images

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.stack([reward(images=images, prompts=prompts).nan_to_num() for reward in self.rewards.values()]).sum(0)

    def _train(self, embeds: Tensor, pooled: Tensor, clean: Tensor, advantages: Tensor) -> None:
        settings, times = self.module.objective, self.module.sampling
        grid = flow_sigmas(self.flow, times.steps)[: times.usable_times].to(self.device)
        size, steps, inner_epochs = self.module.sizes
        for _ in range(inner_epochs):
            order = torch.randperm(len(clean), device=self.device)
            for step in order.chunk(steps):
                batches = step.split(size)
                for chosen in batches:
                    inputs = embeds[chosen], pooled[chosen], clean[chosen], advantages[chosen]
                    for t in self._times(grid, len(chosen), times.times):
                        (self._loss(*inputs, t, settings.beta, settings.max_advantage, settings.kl_weight)
                         / (len(batches) * times.times)).backward()  # fmt: skip
                clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.steps += 1
                for mean, parameter in zip(self.mean, self.trained, strict=True):
                    mean.lerp_(parameter.detach(), 0.1)
        keep = self.module.averaging.old_decay(self.steps)
        with torch.no_grad():
            for old, parameter in zip(self.old, self.trained, strict=True):
                old.copy_(old * keep + parameter * (1 - keep))

    def _times(self, grid: Tensor, n_images: int, count: int) -> Iterator[Tensor]:
        drawn = torch.stack([torch.randperm(len(grid), device=self.device)[:count] for _ in range(n_images)])
        yield from grid[drawn].T

    def _loss(
        self,
        embeds: Tensor,
        pooled: Tensor,
        x0: Tensor,
        advantages: Tensor,
        t: Tensor,
        beta: float,
        max_advantage: float,
        kl_weight: float,
    ) -> Tensor:
        t_ = t.view(-1, 1, 1, 1)
        xt = (1 - t_) * x0 + t_ * torch.randn_like(x0)

        def call() -> Tensor:
            velocity: Tensor = self.transformer(
                hidden_states=xt, timestep=1000 * t, encoder_hidden_states=embeds, pooled_projections=pooled,
                return_dict=False,
            )[0]  # fmt: skip
            return velocity

        with self._autocast():
            self.transformer.set_adapter("old")
            with torch.no_grad():
                old = call()
            self.transformer.set_adapter("default")
            new = call()
            with torch.no_grad():
                self.transformer.disable_adapters()
                reference = call()
                self.transformer.enable_adapters()
        r = (advantages.clamp(-max_advantage, max_advantage) / max_advantage / 2 + 0.5).clamp(0, 1)

        def loss(mixed: Tensor) -> Tensor:
            predicted = xt - t_ * mixed
            scale = (predicted.double() - x0.double()).abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5).detach()
            return ((predicted - x0) ** 2 / scale).mean((1, 2, 3))

        plus, minus = loss(beta * new + (1 - beta) * old), loss((1 + beta) * old - beta * new)
        policy = (r * plus / beta + (1 - r) * minus / beta).mul(max_advantage).mean()
        return policy + kl_weight * (new - reference).square().mean()
