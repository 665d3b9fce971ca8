"""Estimate the GPU memory and the work of `configs/sd35m.yaml`, without a GPU and without the weights.

`python -m benchmarks.memory` builds Stable Diffusion 3.5 Medium with its three text encoders and the rewards and metrics of
the published run at full size on torch's `meta` device, which allocates no memory, and prints the table of
`marble-lightning memory`, which needs the weights. `--large` replaces the transformer by that of Stable Diffusion 3.5 Large.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from diffusers import SD3Transformer2DModel
from lightning.pytorch.plugins import MixedPrecision

import rewards
from balancers import MARBLE
from benchmarks.random_rewards import build_rewards
from benchmarks.random_sd35m import WHOLE, random_sd35m
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.memory import estimate_memory
from marble_lightning.memory.report import print_estimate
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Objective
from marble_lightning.nft.rollout import Plan
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.pipeline_kinds import SD3
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.settings import Scoring
from marble_lightning.tinyworld.recipe.vocabulary import train_tokenizer

LARGE = {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}  # fmt: skip
"""What the transformer of Stable Diffusion 3.5 Large has other than Medium's: 8.06 billion parameters."""


def write_prompts(folder: Path) -> None:
    """Write prompts that the rewards support; their content does not affect the estimate."""
    for source in ("pickscore", "ocr", "geneval"):
        (folder / source).mkdir()
    for split in ("train", "test"):
        (folder / "pickscore" / f"{split}.txt").write_text("".join(f"a street at night, {n}\n" for n in range(99)))
        (folder / "ocr" / f"{split}.txt").write_text("".join(f'a sign that says "{n}"\n' for n in range(99)))
        objects = ({"prompt": f"{n} cats", "include": [{"class": "cat", "count": n}]} for n in range(1, 99))
        (folder / "geneval" / f"{split}_metadata.jsonl").write_text("\n".join(map(json.dumps, objects)))


def module_on_a_gpu(folder: Path, options: argparse.Namespace) -> DiffusionNFT:
    """Build the module as `fit` sets it up, without weights."""
    t5, ranks = not options.no_t5, options.ranks
    tokenizer = train_tokenizer(folder / "tokenizer", seed=0)
    tokenizer.model_max_length = 77
    third = ["transformers", "T5EncoderModel"] if t5 else [None, None]
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": third}
    index |= {part: ["diffusers", name] for part, name in SD3.parts.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    policy = SD3Policy(
        str(folder), resolution=512, rank=32, alpha=64, text_length=128, dtype="bfloat16", vae_slicing=options.frugal,
        gradient_checkpointing=options.checkpointing,
    )  # fmt: skip
    with torch.device("meta"):
        pipeline = random_sd35m(tokenizer, **WHOLE | ({} if t5 else {"t5_layers": 0}))
        if options.large:
            config = {**pipeline.transformer.config, **LARGE}
            pipeline.transformer = SD3Transformer2DModel.from_config(config).to(torch.bfloat16)
    loaded = patch("marble_lightning.policies.sd3.load_pipeline", return_value=pipeline)
    with loaded, torch.device("meta"):
        policy.setup(seed=0)
    reward_models, metrics = build_rewards(tokenizer, options.reward_dtype, "meta")
    reward_models["ocr"] = rewards.OCR()
    devices = dict.fromkeys(reward_models | metrics, "cpu") if options.rewards_on_cpu else {}
    scoring = Scoring(devices=devices, offload=options.frugal, overlap=not options.no_overlap)
    sampling = Sampling(options.steps, batch_size=options.sampling, times_per_image=options.times)
    evaluation = Evaluation(resolution=options.held_out_resolution, guidance=options.guidance)
    objective = Objective(kl_every=options.kl_every)
    module = DiffusionNFT(policy, reward_models, metrics, sampling, scoring, objective, evaluation=evaluation)
    module.requires_grad_(False)
    module.trainable = policy.parameters_of("trained")
    for parameter in module.trainable:
        parameter.requires_grad_(True)
    write_prompts(folder)
    data = PromptDataModule(str(folder), ["pickscore", "ocr", "geneval"], options.prompts, options.images)
    data.held_out_batch_size = options.held_out
    data.setup("fit")
    module.balancer = MARBLE(refresh_every=10, estimate_share=0.05)
    module.balancer.bind(list(module.rewards))
    module.plan = Plan(options.prompts // ranks * options.images, module.sampling.times, options.micro, 1)
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0), reduce=lambda tensor: tensor),
        precision_plugin=MixedPrecision("bf16-mixed", "cuda"),
        world_size=ranks,
        datamodule=data,
        limit_val_batches=1.0,
        check_val_every_n_epoch=30,
    )
    return module


def arguments() -> argparse.ArgumentParser:
    """The options, those of `configs/sd35m.yaml` on one GPU by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48, help="prompts of a round")
    parser.add_argument("--images", type=int, default=24, help="images of a prompt")
    parser.add_argument("--steps", type=int, default=25, help="steps to sample an image")
    parser.add_argument("--times", type=int, default=24, help="times at which an image is trained on")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs")
    parser.add_argument("--large", action="store_true", help="Stable Diffusion 3.5 Large")
    parser.add_argument("--shards", type=int, default=1, help="GPUs that share the transformer, see ShardedBaseStrategy")
    parser.add_argument("--no-t5", action="store_true", help="without the third text encoder")
    parser.add_argument("--reward-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rewards-on-cpu", action="store_true", help="run all rewards on the CPU")
    parser.add_argument("--frugal", action="store_true", help="offload rewards, decode images one by one")
    parser.add_argument("--no-overlap", action="store_true", help="score after sampling, not during it")
    parser.add_argument("--held-out", type=int, default=16, help="batch of held-out prompts")
    parser.add_argument("--held-out-resolution", type=int, help="side of held-out images in pixels; default 512")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance of held-out prompts; 1 is none")
    parser.add_argument("--sampling", type=int, default=9, help="batch of sampling")
    parser.add_argument("--micro", type=int, default=9, help="images of a micro-batch")
    parser.add_argument("--kl-every", type=int, default=1, help="micro-batches of which one has a KL term")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    return parser


def main() -> None:
    """Estimate the memory and print the table."""
    options = arguments().parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        module = module_on_a_gpu(Path(folder), options)
        start = time.perf_counter()
        print_estimate(estimate_memory(module, options.ranks, shards=options.shards), options.ranks)
        print(f"counted in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
