"""Properties of all rewards, tested on each reward with a small checkpoint in the published format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewards import (
    OCR,
    Aesthetic,
    CLIPScore,
    Detector,
    GenEval,
    GenEval2,
    HPSv2,
    HPSv3,
    ImageReward,
    JPEGCompressibility,
    PickScore,
    Prompt,
    RemoteReward,
    Reward,
    UnifiedReward,
    UnifiedReward2,
    VisionLanguageReward,
)
from tests.helpers.scripted_server import MODEL

Build = Callable[..., Reward]
RANGES = {
    "OCR": (0, 1),
    "GenEval": (-15, 1),
    "GenEval2": (0, 1),
    "HPSv2": (-1, 1),
    "JPEGCompressibility": (-1, 0),
    "ImageReward": (-9, 9),
    "HPSv3": (-9, 9),
}


NAMES = ["pickscore", "hpsv2", "clipscore", "aesthetic", "imagereward", "jpeg", "ocr", "geneval"]
NAMES += ["geneval2", "hpsv3", "remote", "unified", "unified2", "vlm"]
QUESTION = "How well does it show the caption? Text caption: {prompt}"


@pytest.fixture(params=NAMES, scope="module")
def build(
    request: pytest.FixtureRequest,
    clip_folder: Path,
    imagereward_folder: Path,
    hpsv3_folder: Path,
    BrightBlobs: type[Detector],
    remote_url: str,
    chat_url: str,
) -> Build:
    path, blip, qwen = str(clip_folder), str(imagereward_folder), str(hpsv3_folder)
    return {
        "pickscore": lambda **kwargs: PickScore(path, processor_path=None, **kwargs),
        "hpsv2": lambda **kwargs: HPSv2(path, file=None, processor_path=None, **kwargs),
        "clipscore": lambda **kwargs: CLIPScore(path, **kwargs),
        "aesthetic": lambda **kwargs: Aesthetic(path, path, "head.safetensors", **kwargs),
        "imagereward": lambda **kwargs: ImageReward(blip, tokenizer_path=blip, **kwargs),
        "hpsv3": lambda **kwargs: HPSv3(qwen, base_path=qwen, dtype="float32", pixels=3136, **kwargs),
        "jpeg": lambda **kwargs: JPEGCompressibility(**kwargs),
        "ocr": lambda **kwargs: OCR(upscale_to=96, detect=False, **kwargs),
        "geneval": lambda **kwargs: GenEval(BrightBlobs(), **kwargs),
        "geneval2": lambda **kwargs: GenEval2(chat_url, MODEL, **kwargs),
        "remote": lambda **kwargs: RemoteReward(remote_url, **kwargs),
        "unified": lambda **kwargs: UnifiedReward(chat_url, size=64, **kwargs),
        "unified2": lambda **kwargs: UnifiedReward2(chat_url, **kwargs),
        "vlm": lambda **kwargs: VisionLanguageReward(QUESTION, r"Score: ([\d.]+)", 1, 5, MODEL, chat_url, **kwargs),
    }[request.param]


@pytest.fixture(scope="module")
def reward(build: Build) -> Reward:
    reward = build()
    reward.setup()
    return reward


def test_scores_have_shape_type_and_range(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    scores = reward(images=images, prompts=prompts)
    assert scores.shape == (6,)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    applicable = torch.tensor([reward.supports(prompt) for prompt in prompts])
    assert applicable.any()
    assert torch.equal(scores.isnan(), ~applicable)
    assert len(scores[applicable].unique()) > 1  # a constant score would pass most other tests
    lowest, highest = RANGES.get(type(reward).__name__, (-2, 2))
    assert lowest <= scores[applicable].min() and scores[applicable].max() <= highest


def test_only_applicable_samples_reach_score(
    reward: Reward, images: torch.Tensor, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_prompts: list[Prompt] = []
    score = reward.score

    def spy(*, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        scored_prompts.extend(prompts)
        return score(images=images, prompts=prompts)

    monkeypatch.setattr(reward, "score", spy)
    reward(images=images, prompts=prompts)
    assert scored_prompts == [prompt for prompt in prompts if reward.supports(prompt)]


def test_which_prompts_a_reward_supports(reward: Reward, prompts: list[Prompt]) -> None:
    some = {"OCR": [0, 1, 0, 0, 1, 0], "GenEval": [0, 0, 1, 0, 0, 1], "GenEval2": [0, 0, 1, 0, 0, 1]}
    expected = some.get(type(reward).__name__, [1] * 6)
    assert [int(reward.supports(prompt)) for prompt in prompts] == expected


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_do_not_matter(build: Build, images: torch.Tensor, prompts: list[Prompt], batch_size: int) -> None:
    whole, split = build(batch_size=32), build(batch_size=batch_size)
    whole.setup()
    split.setup()
    torch.testing.assert_close(
        split(images=images, prompts=prompts),
        whole(images=images, prompts=prompts),
        equal_nan=True,
        rtol=0,
        atol=1e-5,
    )


def test_order_does_not_matter(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    order = [3, 1, 5, 0, 4, 2]
    shuffled = reward(images=images[order], prompts=[prompts[index] for index in order])
    expected = reward(images=images, prompts=prompts)[order]
    torch.testing.assert_close(shuffled, expected, equal_nan=True, rtol=0, atol=1e-5)


def test_arguments_are_keyword_only(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    with pytest.raises(TypeError, match="positional"):
        reward(images, prompts)
    with pytest.raises(TypeError, match="positional"):
        reward.score(images, prompts)


def test_setup_is_idempotent_and_frozen(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    before = list(reward.modules())
    reward.setup()
    assert [id(module) for module in reward.modules()] == [id(module) for module in before]
    reward(images=images, prompts=prompts)
    assert not any(module.training for module in reward.modules())
    reward.train()  # a trainer calls this on its children
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_no_gradient_flows(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    assert not reward(images=images.requires_grad_(), prompts=prompts).requires_grad


def test_autocast_does_not_change_scores(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    expected = reward(images=images, prompts=prompts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = reward(images=images, prompts=prompts)
    assert torch.equal(actual.nan_to_num(-9), expected.nan_to_num(-9))


def test_half_precision_images_are_accepted(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    scores = reward(images=images.bfloat16(), prompts=prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(images=images, prompts=prompts), equal_nan=True, rtol=0, atol=0.1)


@pytest.mark.gpu
def test_scores_are_the_same_on_a_gpu(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    expected = reward(images=images, prompts=prompts)
    actual = reward.to("cuda")(images=images.cuda(), prompts=prompts)
    assert actual.device.type == "cuda"
    torch.testing.assert_close(actual.cpu(), expected, equal_nan=True, rtol=0, atol=1e-3)


def test_empty_batch(reward: Reward) -> None:
    assert reward(images=torch.zeros(0, 3, 8, 8), prompts=[]).shape == (0,)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_checked(build: Build, batch_size: int) -> None:
    with pytest.raises(ValueError, match=r"`batch_size` must be >= 1\. Found"):
        build(batch_size=batch_size)


def test_weights_load_in_setup_only(build: Build, images: torch.Tensor, prompts: list[Prompt]) -> None:
    reward = build()
    assert not list(reward.parameters())
    if isinstance(reward, GenEval | JPEGCompressibility):  # rewards without weights
        return
    with pytest.raises(RuntimeError, match=r"Call `setup\(\)`"):
        reward(images=images, prompts=prompts)


BAD_IMAGES = {
    "not a tensor": (lambda x: x.numpy(), TypeError, "floating point tensor. Found a ndarray"),
    "8 bit": (lambda x: (x * 255).byte(), TypeError, "Divide 8-bit pixels by 255"),
    "one image": (lambda x: x[0], ValueError, r"shape \(B, 3, H, W\). Found \(3, 48, 48\)"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), ValueError, r"Found \(6, 48, 48, 3\)"),
    "in [-1, 1]": (lambda x: 2 * x - 1, ValueError, r"in \[0, 1\]. Found values from -"),
    "in [0, 255]": (lambda x: 255 * x, ValueError, "Found values from 0.* to 255"),
    "a NaN": (lambda x: torch.where(x == x.max(), torch.nan, x), ValueError, "Found values from nan to nan"),
    "an infinity": (lambda x: torch.where(x == x.max(), torch.inf, x), ValueError, "to inf"),
    "one too few": (lambda x: x[1:], ValueError, "Found 6 prompts for 5 images"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_rejected(reward: Reward, images: torch.Tensor, prompts: list[Prompt], kind: str) -> None:
    change, error, message = BAD_IMAGES[kind]
    with pytest.raises(error, match=rf"^{type(reward).__name__}: .*{message}"):
        reward(images=change(images), prompts=prompts)


def test_rounding_outside_the_range_is_tolerated(reward: Reward, images: torch.Tensor, prompts: list[Prompt]) -> None:
    slightly_off = torch.where(images == 1, 1.0009, torch.where(images < 0.001, -0.0009, images))
    expected = reward(images=slightly_off.clamp(0, 1), prompts=prompts)
    actual = reward(images=slightly_off, prompts=prompts)
    assert torch.equal(actual.nan_to_num(-9), expected.nan_to_num(-9))


def test_texts_must_be_prompts(reward: Reward, images: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="Wrap texts"):
        reward(images=images, prompts=["a cat"] * 6)
