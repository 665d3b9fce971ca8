"""CLIP rewards, compared with transformers, PIL and torchmetrics."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rewards import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore, Prompt, Reward
from rewards.clip.loading import load_tower
from rewards.clip.tower import Preprocess
from rewards.geneval.colours import ColourClassifier

IMAGE_SIZE, POSITIONS = 32, 12  # of the fixture's checkpoint
TEXTS = ["a cat", "a dog", "a cat and " + "a dog and " * POSITIONS, "a cat"]
PROMPTS = [Prompt(text, "test") for text in TEXTS]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def exact_images() -> torch.Tensor:
    """Images of the model's input size with 8-bit values, so that PIL neither resizes nor rounds them."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (4, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator) / 255


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def reference_logits(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Compute exp(logit_scale) * cos(image, text) of the matching pairs by CLIPModel.forward and the PIL processor."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pixels = CLIPImageProcessorPil.from_pretrained(folder)([pil(image) for image in images], return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, truncation=True, max_length=POSITIONS, return_tensors="pt"
    )
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder)(pixel_values=pixels["pixel_values"], **tokens)
    return output.logits_per_image.diagonal()


def hpsv2(path: str, **options: str) -> HPSv2:
    """Build HPSv2 from a folder in transformers format."""
    return HPSv2(path, file=None, processor_path=None, **options)


def scores(reward, images: torch.Tensor) -> torch.Tensor:
    reward.setup()
    return reward(images=images, prompts=PROMPTS)


def test_rewards_are_scalings_of_the_logits(clip_folder: Path, exact_images: torch.Tensor) -> None:
    logits, path = reference_logits(clip_folder, exact_images), str(clip_folder)
    assert logits.std() > 0.1  # otherwise agreement would prove little
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(scores(PickScore(path, None), exact_images), logits / 26, **close)
    torch.testing.assert_close(scores(PickScore(path, None, divide_by=1), exact_images), logits, **close)
    torch.testing.assert_close(scores(CLIPScore(path), exact_images), logits / 100, **close)
    # At the model's input size there is nothing to crop or pad, so HPSv2 differs only by the logit scale, here exp(3).
    torch.testing.assert_close(scores(hpsv2(path), exact_images), logits / np.exp(3), **close)


def test_clipscore_is_the_cosine_torchmetrics_reports(clip_folder: Path, exact_images: torch.Tensor) -> None:
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    images_of, texts_of = (
        CLIPImageProcessorPil.from_pretrained(clip_folder),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    model = CLIPModel.from_pretrained(clip_folder)
    # torchmetrics expects tensors where transformers 5 returns outputs, and a processor that takes either modality.
    image_features, text_features = model.get_image_features, model.get_text_features
    model.get_image_features = lambda *args: image_features(*args).pooler_output
    model.get_text_features = lambda *args: text_features(*args).pooler_output

    def processor(*, images=None, text=None, return_tensors, padding):
        if images is not None:
            return images_of(images=[pil(image / 255) for image in images], return_tensors=return_tensors)
        return texts_of(text, padding=padding, truncation=True, max_length=POSITIONS, return_tensors=return_tensors)

    with torch.no_grad():
        expected, _ = _clip_score_update(list((exact_images * 255).round()), TEXTS, model, processor)
    # torchmetrics assumes a logit scale of 100, as in the published models; here it is exp(3).
    actual = scores(CLIPScore(str(clip_folder)), exact_images) * 100 / np.exp(3)
    torch.testing.assert_close(actual, expected / 100, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (90, 50), (50, 91), (20, 20), (33, 97)])
def test_crop_agrees_with_pil(clip_folder: Path, shape: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    rows, columns = torch.linspace(0, 1, shape[0]).view(-1, 1), torch.linspace(0, 1, shape[1]).view(1, -1)
    image = torch.stack([rows.expand(shape), (rows * columns), (7 * (rows + columns)).sin() / 2 + 0.5])
    image = (image * 255).round() / 255
    expected = CLIPImageProcessorPil.from_pretrained(clip_folder)(pil(image), return_tensors="pt")["pixel_values"]
    actual = Preprocess(IMAGE_SIZE, IMAGE_SIZE, MEAN, STD)(image[None])
    # PIL rounds to 8 bits after each of its two passes; one step is 1 / 255 / 0.26 after normalising.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1.5 / 255 / 0.26)


@pytest.mark.parametrize("spare", range(12))
def test_start_of_a_crop(spare: int) -> None:
    """`int(round(spare / 2.0))` in torchvision, `spare // 2` in transformers; they differ for 3, 7 and 11."""
    columns = torch.arange(32.0 + spare).expand(1, 3, 32, 32 + spare)
    for centre, begin in (("even", round(spare / 2.0)), ("floor", spare // 2)):
        for image in (columns, columns.mT):
            assert Preprocess(32, 32, (0, 0, 0), (1, 1, 1), centre=centre)(image).min() == begin


def test_bilinear_resize_agrees_with_pil() -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(256, (3, 80, 64), generator=generator) / 255
    expected = np.asarray(pil(image).resize((32, 40), Image.Resampling.BILINEAR))[4:36]
    actual = Preprocess(32, 32, (0, 0, 0), (1, 1, 1), resize="bilinear")(image[None])[0]
    torch.testing.assert_close(actual.permute(1, 2, 0), torch.tensor(expected) / 255, rtol=0, atol=1.5 / 255)


def test_each_reward_preprocesses_images_as_its_published_scorer(clip_folder: Path, imagereward_folder: Path) -> None:
    """As torchvision for CLIPScore (bilinear), GenEval's colours and ImageReward; as transformers for the others."""
    path, blip = str(clip_folder), str(imagereward_folder)
    published = [
        (CLIPScore(path), "bilinear", "even"),
        (CLIPScore(path, resize="bicubic"), "bicubic", "even"),
        (ColourClassifier(path), "bicubic", "even"),
        (ImageReward(blip, tokenizer_path=blip), "bicubic", "even"),
        (PickScore(path, None), "bicubic", "floor"),
        (Aesthetic(path, path, "head.safetensors"), "bicubic", "floor"),
    ]
    for reward, resize, centre in published:
        reward.setup()
        assert (reward.tower.preprocess.resize, reward.tower.preprocess.centre) == (resize, centre), reward


def test_resize_option_of_clipscore(clip_folder: Path, exact_images: torch.Tensor) -> None:
    path = str(clip_folder)
    bilinear, bicubic = CLIPScore(path), CLIPScore(path, resize="bicubic")
    assert bilinear.identity != bicubic.identity
    assert torch.equal(scores(bilinear, exact_images), scores(bicubic, exact_images))  # of the model's input size
    large = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(scores(bilinear, large), scores(bicubic, large))
    with pytest.raises(ValueError, match="`resize` must be 'bilinear' or 'bicubic'. Found 'nearest'"):
        CLIPScore(path, resize="nearest")


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40)])
def test_pad_shows_everything_between_black_bars(height: int, width: int) -> None:
    actual = Preprocess(32, 32, MEAN, STD, "pad")(torch.ones(1, 3, height, width))
    black, white = -torch.tensor(MEAN) / torch.tensor(STD), (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    expected = black.view(1, 3, 1, 1).repeat(1, 1, 32, 32)
    expected[:, :, 8:24] = white.view(1, 3, 1, 1)
    torch.testing.assert_close(actual, expected if width > height else expected.mT, rtol=0, atol=1e-5)


def test_bicubic_overshoot_is_clipped() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    actual = Preprocess(32, 32, (0, 0, 0), (1, 1, 1))(edge)
    assert actual.min() == 0 and actual.max() == 1


def test_new_and_old_preprocessor_files_agree() -> None:
    numbers = {"image_mean": MEAN, "image_std": STD}
    old = Preprocess.from_config({**numbers, "size": 40, "crop_size": 32})
    new = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    assert Preprocess.from_config({**numbers, **new}) == old == Preprocess(40, 32, MEAN, STD)


@pytest.mark.parametrize(
    "change",
    [{"resample": 2}, {"crop_size": {"height": 32, "width": 30}}, {"crop_size": 50}, {"size": {"height": 32}}],
)
def test_other_preprocessing_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="must resize the shortest edge bicubically"):
        Preprocess.from_config({"image_mean": MEAN, "image_std": STD, "size": 40, "crop_size": 32, **change})


def test_processor_from_another_folder(clip_folder: Path, tmp_path: Path, exact_images: torch.Tensor) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, weights)
    actual = scores(PickScore(str(weights), str(clip_folder)), exact_images)
    assert torch.equal(actual, scores(PickScore(str(clip_folder), None), exact_images))
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json\. Found .*weights"):
        PickScore(str(weights), None).setup()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["vocab.json", "merges.txt"], ValueError, "must have the 194 tokens .* Found 2"),
        (["merges.txt"], FileNotFoundError, "must hold tokenizer files"),
        (["preprocessor_config.json"], FileNotFoundError, "must hold tokenizer files and preprocessor_config.json"),
        (["model.safetensors"], FileNotFoundError, "no file named model.safetensors"),
    ],
)
def test_incomplete_folders_are_refused(
    clip_folder: Path, tmp_path: Path, names: list[str], error: type[Exception], message: str
) -> None:
    shutil.copytree(clip_folder, tmp_path / "clip")
    for name in names:
        (tmp_path / "clip" / name).unlink()
    with pytest.raises(error, match=f"^CLIPScore: .*{message}"):
        load_tower("CLIPScore", path=str(tmp_path / "clip"))


@pytest.mark.parametrize("reward", [PickScore, hpsv2, CLIPScore])
def test_a_missing_folder_is_refused_with_a_remedy(reward: Callable[..., Reward], tmp_path: Path) -> None:
    (tmp_path / "HPS_v2.1_compressed.pt").touch()  # weights in another format, without config.json
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"(PickScore|HPSv2|CLIPScore): .*transformers-format CLIPModel.*Check"):
            reward(path=str(path)).setup()


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"must hold a CLIPModel .* Found 'bert'"):
        CLIPScore(str(tmp_path)).setup()


def test_missing_weights_are_refused(tmp_path: Path, write_clip: Callable[..., Path]) -> None:
    folder = write_clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"Found 1 missing, such as visual_projection.weight"):
        CLIPScore(str(folder)).setup()


def test_sizes_must_fit_together(tmp_path: Path, write_clip: Callable[..., Path]) -> None:
    folder, other = write_clip(tmp_path / "a"), write_clip(tmp_path / "b", image_size=40)
    with pytest.raises(ValueError, match="must crop to the 32 pixels .* Found 40"):
        PickScore(str(folder), str(other)).setup()


def test_dtype(clip_folder: Path, exact_images: torch.Tensor) -> None:
    half = hpsv2(str(clip_folder), dtype="bfloat16")
    actual = scores(half, exact_images)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, scores(hpsv2(str(clip_folder)), exact_images), rtol=0, atol=0.05)
    scales = []
    for dtype in ("float32", "bfloat16", "float16"):
        reward = hpsv2(str(clip_folder), dtype=dtype)
        reward.setup()
        scales.append(reward.tower.scale)
    assert {scale.dtype for scale in scales} == {torch.float32}
    assert scales[0] == scales[1] == scales[2]  # in half precision the published 100 would be rounded to 98.9
    with pytest.raises(ValueError, match="`dtype` must be float32, bfloat16 or float16. Found 'int8'"):
        HPSv2(str(clip_folder), dtype="int8")


def test_divide_by_is_checked() -> None:
    with pytest.raises(ValueError, match="`divide_by` must be > 0. Found 0"):
        PickScore(divide_by=0)
