"""The recipe trains from scratch, writes folders that load, and resumes after an interruption."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from marble_lightning.tinyworld.train import main
from rewards import CLIPScore


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_recipe_makes_every_folder_and_resumes(tmp_path, monkeypatch):
    options = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--images", "300", "--pairs", "200"]
    options += ["--autoencoder-steps", "3", "--base-steps", "3", "--reward-steps", "4"]
    monkeypatch.setattr(sys, "argv", ["train", *options])
    main()
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "out/sd3", dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    output = pipeline("a red circle", num_inference_steps=2, height=64, width=64, max_sequence_length=1, output_type="pt")
    assert output.images.shape == (1, 3, 64, 64)
    for name in ("clipscore", "pickscore", "hpsv2"):
        CLIPScore(str(tmp_path / "out" / name)).setup()
    assert (tmp_path / "out/aesthetic/head.safetensors").exists()

    first = (tmp_path / "out/sd3/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    main()  # every stage loads its last checkpoint and has no steps left
    assert (tmp_path / "out/sd3/transformer/diffusion_pytorch_model.safetensors").read_bytes() == first
