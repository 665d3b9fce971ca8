"""The aesthetic head and JPEG sizes, compared with direct computations."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rewards import Aesthetic, CLIPScore, JPEGCompressibility, Prompt


@pytest.mark.parametrize("name", ["head.safetensors", "head.pth"])
def test_aesthetic_is_the_published_formula(clip_folder: Path, name: str) -> None:
    """Features of `CLIPModel` on the PIL processor's pixels, divided by their norm, passed through five linear layers."""
    from transformers import CLIPImageProcessorPil, CLIPModel

    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (4, 3, 32, 32), generator=generator) / 255
    pil_images = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(pil_images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip_folder).get_image_features(pixel_values=pixels).pooler_output
    expected = expected / expected.norm(dim=1, keepdim=True)
    weights = load_file(clip_folder / "head.safetensors")
    for number in (0, 2, 4, 6, 7):
        expected = expected @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    assert expected.std() > 0.01

    reward = Aesthetic(str(clip_folder), str(clip_folder), name)
    reward.setup()
    actual = reward(images=images, prompts=[Prompt("", "test")] * 4)
    torch.testing.assert_close(actual, expected[:, 0], rtol=0, atol=1e-5)


def test_two_rewards_share_one_clip_model(clip_folder: Path) -> None:
    aesthetic, clipscore = Aesthetic(str(clip_folder), str(clip_folder), "head.pth"), CLIPScore(str(clip_folder))
    half = CLIPScore(str(clip_folder), dtype="bfloat16")
    for reward in (aesthetic, clipscore, half):
        reward.setup()
    assert aesthetic.tower.model is clipscore.tower.model
    assert half.tower.model is not clipscore.tower.model


def test_a_linear_head_is_applied_to_the_same_embedding(clip_folder: Path, tmp_path: Path, images: torch.Tensor) -> None:
    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight, "bias": torch.tensor([5.0])}, tmp_path / "linear.safetensors")
    reward = Aesthetic(str(clip_folder), str(tmp_path), "linear.safetensors")
    reward.setup()
    expected = reward.tower.embed_images(images) @ weight[0] + 5
    actual = reward(images=images, prompts=[Prompt("", "test")] * len(images))
    torch.testing.assert_close(actual, expected)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, "must hold one linear layer from 16 features to one score"),
        ({"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}, "must hold one linear layer from 16 features to one score"),
        ({"weight": torch.zeros(1, 16)}, "`weight` and `bias` of one linear layer. Found weight. Use LAION's files"),
        ({"weight": torch.full((1, 16), torch.nan), "bias": torch.zeros(1)}, "finite"),
        ({}, "of one linear layer. Found nothing"),
    ],
)
def test_other_linear_heads_are_refused(clip_folder: Path, tmp_path: Path, weights: dict, message: str) -> None:
    torch.save(weights, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=message):
        Aesthetic(str(clip_folder), str(tmp_path), "head.pth").setup()


def test_bad_heads_are_refused(clip_folder: Path, write_clip: Callable[..., Path], tmp_path: Path) -> None:
    path = str(clip_folder)
    with pytest.raises(FileNotFoundError, match=r"Aesthetic: no\.pth must be a file .* exists, the file does not"):
        Aesthetic(path, path, "no.pth").setup()
    torch.save({"layers.0.weight": torch.zeros(1024, 3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="Aesthetic: .*other.pth must hold the five linear layers .* 16 features"):
        Aesthetic(path, str(tmp_path), "other.pth").setup()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold named tensors"):
        Aesthetic(path, str(tmp_path), "list.pth").setup()
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name} must be a file of named tensors.*Download it again"):
            Aesthetic(path, str(tmp_path), name).setup()


@pytest.mark.parametrize("quality", [10, 95])
def test_jpeg_score_is_the_file_size(images: torch.Tensor, quality: int) -> None:
    scores = JPEGCompressibility(quality)(images=images, prompts=[Prompt("", "test")] * len(images))
    for image, score in zip(images, scores, strict=True):
        file = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, format="jpeg", quality=quality)
        assert score.item() == pytest.approx(-len(file.getvalue()) / 500_000)
    with pytest.raises(ValueError, match=r"`quality` must be in \[1, 100\]. Found 0"):
        JPEGCompressibility(quality=0)
