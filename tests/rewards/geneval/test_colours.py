"""Colours by zero-shot CLIP, against a computation with transformers and PIL alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import CLIPScore, Detection
from rewards.geneval.colours import ColourClassifier, cut_out
from rewards.geneval.rules import COLOURS

SIZE = 32  # of the small checkpoint
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LABELS = ("cat", "dog", "bird", "tie", "stop sign", "vase")
POSITIONS = 48  # the small vocabulary spells words by letters, and a text cut short loses its colour


@pytest.fixture(scope="module")
def folder(write_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("colours"), positions=POSITIONS, seed=1)


@pytest.fixture(scope="module")
def classifier(folder: Path) -> ColourClassifier:
    classifier = ColourClassifier(str(folder))
    classifier.setup()
    return classifier


def eight_bit(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def prepared(picture: Image.Image) -> torch.Tensor:
    """Pixels as by torchvision's Resize, CenterCrop, ToTensor and Normalize."""
    short = min(picture.size)
    picture = picture.resize([int(SIZE * side / short) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = (round((side - SIZE) / 2.0) for side in picture.size)
    pixels = torch.from_numpy(np.array(picture.crop((left, top, left + SIZE, top + SIZE)))).permute(2, 0, 1).float() / 255
    return ((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]


@torch.no_grad()
def similarities(folder: Path, image: torch.Tensor, detections: list[Detection]) -> np.ndarray:
    """Cosines of objects with each of the ten colours, by the benchmark's steps."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)

    def unit(vectors: torch.Tensor | np.ndarray) -> np.ndarray:
        return np.asarray(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)

    rows = []
    for detection in detections:
        picture = eight_bit(image)
        if detection.mask is not None:
            grey = Image.new("RGB", picture.size, "#999")
            picture = Image.composite(picture, grey, Image.fromarray(detection.mask.numpy()))
        pixels = prepared(picture.crop(detection.box))
        feature = unit(model.get_image_features(pixel_values=pixels).pooler_output[0])
        rows.append([])
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} {detection.label}",
                f"a photo of a {colour}-colored {detection.label}",
                f"a photo of a {colour} object",
            ]
            tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="pt")
            mean = unit(model.get_text_features(**tokens).pooler_output).mean(axis=0)
            rows[-1].append(unit(mean) @ feature)
    return np.array(rows)


def objects(count: int) -> tuple[torch.Tensor, list[Detection]]:
    """Coloured discs in noise, each within a box of its own shape."""
    generator = torch.Generator().manual_seed(4)
    image = torch.randint(256, (3, 60, 90), generator=generator) / 255
    ys, xs = torch.meshgrid(torch.arange(60), torch.arange(90), indexing="ij")
    found = []
    for index in range(count):
        x, y, wide, high = (int(torch.randint(5, limit, (), generator=generator)) for limit in (50, 30, 40, 30))
        mask = ((xs - x - wide / 2) / wide * 2) ** 2 + ((ys - y - high / 2) / high * 2) ** 2 < 1
        found.append(Detection(LABELS[index % len(LABELS)], 0.9, (x, y, x + wide, y + high), mask))
        image = torch.where(mask, torch.randint(256, (3, 1, 1), generator=generator) / 255, image)
    return image, found


def test_colours_are_those_of_the_plain_computation(classifier: ColourClassifier, folder: Path) -> None:
    image, found = objects(24)
    found += [Detection(d.label, 0.9, d.box) for d in found[:6]]  # without masks
    expected = similarities(folder, image, found)
    # 8-bit steps of the library's resampling move cosines a little: where two colours are as near, either may be named.
    clear = np.diff(np.sort(expected))[:, -1] > 0.005
    names = np.array(classifier.classify(image, found))
    assert clear.sum() > 20
    assert names[clear].tolist() == np.array(COLOURS)[expected.argmax(axis=1)][clear].tolist()
    assert len(set(names[clear])) > 3


def test_what_is_outside_the_mask_does_not_matter(classifier: ColourClassifier) -> None:
    image, found = objects(1)
    changed = torch.where(found[0].mask, image, 1 - image)
    assert torch.equal(cut_out(changed, found[0]), cut_out(image, found[0]))
    crop, (x0, y0, x1, y1) = cut_out(image, found[0]), found[0].box
    assert crop.shape == (3, y1 - y0, x1 - x0)
    outside = ~found[0].mask[y0:y1, x0:x1]
    assert outside.any() and torch.equal(crop[:, outside], torch.full_like(crop[:, outside], 0.6))
    assert eight_bit(crop).getpixel((0, 0)) == (0x99, 0x99, 0x99)


def test_boxes_are_rounded_and_cut_at_the_border() -> None:
    image = torch.rand(3, 10, 12)
    assert torch.equal(cut_out(image, Detection("cat", 0.9, (-3.0, 1.6, 4.4, 30.0))), image[:, 2:, :4])
    assert torch.equal(cut_out(image, Detection("cat", 0.9, (0, 0, 12, 10), np.ones((10, 12), bool))), image)


@pytest.mark.parametrize(
    ("detection", "message"),
    [
        (
            Detection("cat", 0.9, (0, 0, 4, 4), torch.ones(4, 4)),
            r"the 10 x 12 pixels of its image. Found \(4, 4\) on a 'cat'",
        ),
        (Detection("cat", 0.9, (5, 5, 5, 9)), r"at least one of the 10 x 12 pixels.*Found \(5, 5, 5, 9\) on a 'cat'"),
        (Detection("cat", 0.9, (-9, -9, -1, -1)), "at least one of the 10 x 12 pixels"),
        (Detection("cat", 0.9, (12, 0, 20, 4)), "at least one of the 10 x 12 pixels"),
    ],
)
def test_what_cannot_be_cut_out_is_refused(detection: Detection, message: str) -> None:
    with pytest.raises(ValueError, match=f"ColourClassifier: .*{message}"):
        cut_out(torch.rand(3, 10, 12), detection)


def test_nothing_is_named_nothing(classifier: ColourClassifier) -> None:
    assert classifier.classify(torch.rand(3, 8, 8), []) == []


def test_tower_is_shared_frozen_and_loaded_in_setup(folder: Path, classifier: ColourClassifier) -> None:
    score = CLIPScore(str(folder))
    score.setup()
    assert score.tower is not None and classifier.tower is not None and score.tower.model is classifier.tower.model
    tower = classifier.tower
    classifier.setup()
    assert classifier.tower is tower and not any(parameter.requires_grad for parameter in classifier.parameters())
    fresh = ColourClassifier(str(folder))
    assert not list(fresh.parameters())
    with pytest.raises(RuntimeError, match=r"Call `setup\(\)`"):
        fresh.classify(torch.rand(3, 8, 8), [Detection("cat", 0.9, (0, 0, 8, 8))])
    with pytest.raises(ValueError, match="ColourClassifier: `dtype` must be float32"):
        ColourClassifier(dtype="int8")
    with pytest.raises(FileNotFoundError, match="ColourClassifier: `path` must be"):
        ColourClassifier("nowhere/at/all").setup()
