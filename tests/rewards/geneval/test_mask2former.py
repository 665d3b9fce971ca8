"""Mask2Former as GenEval's detector, on a small checkpoint in the published format, compared with direct computations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards import GenEval, Mask2Former, Prompt
from rewards.geneval.coco import COCO_CLASSES
from rewards.geneval.mask2former import _load
from tests.helpers.mask2former_reference import PUBLISHED_NAMES, QUERIES, assert_same, by_hand, write_mask2former


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture(scope="session")
def detector(folder: Path, clip_folder: Path) -> Mask2Former:
    detector = Mask2Former(str(folder), colour_path=str(clip_folder), short_side=64, long_side=112)
    detector.setup()
    return detector


@pytest.fixture(scope="session")
def smooth_images() -> torch.Tensor:
    """Three smooth images of 48 x 72 pixels."""
    coarse = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(coarse, size=(48, 72), mode="bicubic").clamp(0, 1)


@torch.no_grad()
def outputs(detector: Mask2Former, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw class and mask logits of the network for one image."""
    output = detector.model(pixel_values=detector.preprocess(image[None]))
    return output.class_queries_logits[0].double().numpy(), output.masks_queries_logits[0].double().numpy()


@pytest.mark.parametrize("floor", [0.3, 0.02, 0.0])
def test_detections_agree_with_the_reference(
    detector: Mask2Former, smooth_images: torch.Tensor, floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "min_score", floor)
    detections_per_image = detector.detect(smooth_images)  # all in one batch
    assert len(detections_per_image) == 3
    for image, detections in zip(smooth_images, detections_per_image, strict=True):
        expected = by_hand(*outputs(detector, image), floor)
        assert len(expected) > (1 if floor else 80)
        assert_same(detections, expected)


def test_every_pair_is_a_candidate(
    detector: Mask2Former, smooth_images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "min_score", 0.0)
    detections = detector.detect(smooth_images[:1])[0]
    with torch.no_grad():
        masks = detector.model(pixel_values=detector.preprocess(smooth_images[:1])).masks_queries_logits[0]
    non_empty = int((masks > 0.1).any(dim=(1, 2)).sum())
    assert non_empty > 5 and len(detections) == non_empty * 80
    for label in COCO_CLASSES:
        assert sum(d.label == label for d in detections) == non_empty


def test_the_no_object_class_is_not_detected(detector: Mask2Former, smooth_images: torch.Tensor) -> None:
    bias = detector.model.class_predictor.bias.data
    original = bias.clone()
    try:
        bias[-1] += 100  # all queries predict "no object"
        assert detector.detect(smooth_images) == [[], [], []]
    finally:
        bias.copy_(original)


def test_top_pairs_agree_with_transformers(folder: Path, clip_folder: Path) -> None:
    """At 384 pixels both use the same steps; transformers keeps as many pairs as there are queries."""
    from transformers import Mask2FormerImageProcessorPil

    detector = Mask2Former(str(folder), colour_path=str(clip_folder), short_side=384, long_side=384, min_score=0.0)
    detector.setup()
    image = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(3))
    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        output = detector.model(pixel_values=detector.preprocess(image))
    result = processor.post_process_instance_segmentation(
        output, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    segments = result["segments_info"]
    assert len(segments) == QUERIES
    detections = detector.detect(image)[0]
    for segment, mask in zip(segments, result["segmentation"], strict=True):
        label = COCO_CLASSES[segment["label_id"]]
        matches = [d for d in detections if d.label == label and torch.equal(d.mask, mask.bool())]
        assert any(d.score == pytest.approx(segment["score"], abs=2e-6) for d in matches)


def test_published_prompts_name_known_classes(published_metadata: list[dict]) -> None:
    clauses = [clause for line in published_metadata for part in ("include", "exclude") for clause in line.get(part, [])]
    assert Mask2Former.classes == {clause["class"] for clause in clauses}  # all 80 of them


def test_classes_are_known_before_weights_load() -> None:
    detector = Mask2Former("nowhere")
    assert detector.classes is not None and len(detector.classes) == 80
    assert {"computer mouse", "tv remote", "computer keyboard", "couch"} <= detector.classes
    assert not list(detector.parameters())
    with pytest.raises(RuntimeError, match=r"Mask2Former: weights must be loaded.*Call `setup\(\)`"):
        detector.detect(torch.zeros(1, 3, 8, 8))


def test_cocos_class_names_are_accepted(tmp_path: Path, clip_folder: Path) -> None:
    coco = [name.removeprefix("computer ").removeprefix("tv ") for name in COCO_CLASSES]
    assert {"mouse", "remote", "keyboard", "couch"} <= set(coco)
    detector = Mask2Former(str(write_mask2former(tmp_path, coco)), colour_path=str(clip_folder))
    detector.setup()
    assert detector.names == list(COCO_CLASSES)


def test_weights_have_their_published_names(folder: Path) -> None:
    encoder = "model.pixel_level_module.encoder"
    assert {
        f"{encoder}.embeddings.patch_embeddings.projection.weight",
        f"{encoder}.encoder.layers.0.blocks.0.attention.self.query.weight",
        f"{encoder}.hidden_states_norms.stage4.weight",
    } <= load_file(folder / "model.safetensors").keys()


def test_setup_is_idempotent_frozen_and_shared(detector: Mask2Former, folder: Path, clip_folder: Path) -> None:
    before = list(detector.modules())
    detector.setup()
    assert [id(module) for module in detector.modules()] == [id(module) for module in before]
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    assert not any(module.training for module in (detector.model, detector.classifier.tower.model))
    other = Mask2Former(str(folder), colour_path=str(clip_folder), min_score=0.1)
    other.setup()
    assert other.model is detector.model and other.classifier.tower.model is detector.classifier.tower.model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights(
    detector: Mask2Former, folder: Path, clip_folder: Path, smooth_images: torch.Tensor, dtype: str
) -> None:
    half = Mask2Former(str(folder), colour_path=str(clip_folder), short_side=64, long_side=112, dtype=dtype, min_score=0.0)
    half.setup()
    assert {parameter.dtype for parameter in half.parameters()} == {getattr(torch, dtype)}
    best = max(detector.detect(smooth_images)[0], key=lambda d: d.score)
    assert any(d.label == best.label and abs(d.score - best.score) < 0.2 for d in half.detect(smooth_images)[0])


def test_inside_geneval(detector: Mask2Former, smooth_images: torch.Tensor) -> None:
    groups = {}
    for detection in by_hand(*outputs(detector, smooth_images[0]), 0.3):
        groups.setdefault(detection.label, []).append(detection)
    label, objects = max(groups.items(), key=lambda group: len(group[1]))
    count = len(objects)
    names = detector.colours(smooth_images[0], objects)
    absent = min(set(COCO_CLASSES) - set(groups))

    def prompt(**clause: object) -> Prompt:
        return Prompt("", "geneval", {"tag": "colors", "include": [{"class": label, "count": count, **clause}]})

    prompts = [
        prompt(),
        prompt(count=count + 1),
        prompt(**{"class": absent}),
        prompt(color=names[0]),
        Prompt("a cat", "plain"),
    ]
    reward = GenEval(detector)
    reward.setup()
    scores = reward(images=smooth_images[[0] * len(prompts)], prompts=prompts)
    right_colours = (1 + names.count(names[0]) / count) / 2
    assert scores[:4].tolist() == pytest.approx([1, 1 - 1 / (count + 1), 1 - count / count, right_colours])
    assert scores[4].isnan()
    with pytest.raises(ValueError, match="must know every class that prompts name. Found unicorn"):
        reward(images=smooth_images[:1], prompts=[prompt(**{"class": "unicorn"})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_score": 1.0}, r"`min_score` must be in \[0, 1\). Found 1.0"),
        ({"min_score": -0.1}, r"`min_score` must be in \[0, 1\). Found -0.1"),
        ({"short_side": 0}, "`short_side` must be >= 1 and at most `long_side`. Found 0 and 1333"),
        ({"short_side": 900, "long_side": 800}, "Found 900 and 800"),
        ({"dtype": "int8"}, "`dtype` must be float32, bfloat16 or float16. Found 'int8'"),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"Mask2Former: .*{message}"):
        Mask2Former(**arguments)


def test_bad_folders_are_refused(tmp_path: Path, clip_folder: Path) -> None:
    def refused(path: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"Mask2Former: .*{message}"):
            Mask2Former(str(path), colour_path=str(clip_folder)).setup()

    def rewritten(name: str, **changes: object) -> None:
        file = tmp_path / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    refused(tmp_path / "nowhere", FileNotFoundError, "`path` must be a folder or hub id.*Check the spelling")
    refused(clip_folder, ValueError, "model_type 'mask2former'.*Found 'clip'.*Point it to")
    refused(tmp_path, FileNotFoundError, "there is no config.json")

    write_mask2former(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = "class_predictor.weight"
    save_file({k: v for k, v in weights.items() if k != missing}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, ValueError, f"every weight of its model. Found 1 missing, such as {missing}. Download it again")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("criterion")}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert _load(str(tmp_path), None, torch.float32).num_parameters()  # detection does not need the loss

    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, FileNotFoundError, "config.json, weights and preprocessor_config.json.*Found")
    rewritten("config.json", id2label={str(index): f"LABEL_{index}" for index in range(80)})
    refused(tmp_path, ValueError, "80 classes of COCO instances. Found 80 classes, one of them 'LABEL_0'. Use a model")
    rewritten("config.json", id2label={str(index): name for index, name in enumerate([*PUBLISHED_NAMES, "sky"])})
    refused(tmp_path, ValueError, "Found 81 classes, one of them 'sky'")
    rewritten("config.json", id2label={str(index): name for index, name in enumerate(["cat", *PUBLISHED_NAMES[1:]])})
    refused(tmp_path, ValueError, "Found 80 classes. Use a model trained on COCO")

    rewritten("config.json", id2label={str(index): name for index, name in enumerate(PUBLISHED_NAMES)})
    rewritten("preprocessor_config.json", resample=3)
    with pytest.raises(
        ValueError, match=r"must resize bilinearly \(`resample` 2\).*'resample': 3.*Use the file of a Mask2Former"
    ):
        Mask2Former(str(tmp_path), colour_path=str(clip_folder)).setup()
    (tmp_path / "preprocessor_config.json").unlink()
    refused(tmp_path, FileNotFoundError, "must be a folder .*preprocessor_config.json.*Found .*: ")
