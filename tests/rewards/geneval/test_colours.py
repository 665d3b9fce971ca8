"""Colours by zero-shot CLIP, compared with a computation by transformers and PIL only."""

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
POSITIONS = 48  # the small vocabulary spells words by letters, and a truncated text would lose its colour


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


def preprocess(image: Image.Image) -> torch.Tensor:
    """Preprocess as torchvision's Resize, CenterCrop, ToTensor and Normalize."""
    short = min(image.size)
    image = image.resize([int(SIZE * side / short) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - SIZE) / 2.0) for side in image.size)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIZE, top + SIZE)))).permute(2, 0, 1).float() / 255
    return ((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]


@torch.no_grad()
def similarities(folder: Path, image: torch.Tensor, detections: list[Detection]) -> np.ndarray:
    """Compute cosines of objects with each of the ten colours, as in the benchmark."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)

    def unit(vectors: torch.Tensor | np.ndarray) -> np.ndarray:
        return np.asarray(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)

    rows = []
    for detection in detections:
        pil_image = eight_bit(image)
        if detection.mask is not None:
            grey = Image.new("RGB", pil_image.size, "#999")
            pil_image = Image.composite(pil_image, grey, Image.fromarray(detection.mask.numpy()))
        pixels = preprocess(pil_image.crop(detection.box))
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
    """Draw coloured ellipses on noise, and return the image with their detections."""
    generator = torch.Generator().manual_seed(4)
    image = torch.randint(256, (3, 60, 90), generator=generator) / 255
    ys, xs = torch.meshgrid(torch.arange(60), torch.arange(90), indexing="ij")
    detections = []
    for index in range(count):
        x, y, wide, high = (int(torch.randint(5, limit, (), generator=generator)) for limit in (50, 30, 40, 30))
        mask = ((xs - x - wide / 2) / wide * 2) ** 2 + ((ys - y - high / 2) / high * 2) ** 2 < 1
        detections.append(Detection(LABELS[index % len(LABELS)], 0.9, (x, y, x + wide, y + high), mask))
        image = torch.where(mask, torch.randint(256, (3, 1, 1), generator=generator) / 255, image)
    return image, detections


def test_colours_agree_with_the_reference(classifier: ColourClassifier, folder: Path) -> None:
    image, detections = objects(24)
    detections += [Detection(d.label, 0.9, d.box) for d in detections[:6]]  # without masks
    expected = similarities(folder, image, detections)
    # 8-bit rounding in PIL's resampling changes cosines slightly, so colours with nearly equal cosines may be swapped.
    clear = np.diff(np.sort(expected))[:, -1] > 0.005
    names = np.array(classifier.classify(image, detections))
    assert clear.sum() > 20
    assert names[clear].tolist() == np.array(COLOURS)[expected.argmax(axis=1)][clear].tolist()
    assert len(set(names[clear])) > 3


def test_pixels_outside_the_mask_do_not_matter(classifier: ColourClassifier) -> None:
    image, detections = objects(1)
    changed = torch.where(detections[0].mask, image, 1 - image)
    assert torch.equal(cut_out(changed, detections[0]), cut_out(image, detections[0]))
    crop, (x0, y0, x1, y1) = cut_out(image, detections[0]), detections[0].box
    assert crop.shape == (3, y1 - y0, x1 - x0)
    outside = ~detections[0].mask[y0:y1, x0:x1]
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
def test_bad_masks_and_boxes_are_refused(detection: Detection, message: str) -> None:
    with pytest.raises(ValueError, match=f"ColourClassifier: .*{message}"):
        cut_out(torch.rand(3, 10, 12), detection)


def test_no_detections_give_no_colours(classifier: ColourClassifier) -> None:
    assert classifier.classify(torch.rand(3, 8, 8), []) == []


def test_the_tower_is_shared_frozen_and_loaded_in_setup(folder: Path, classifier: ColourClassifier) -> None:
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
