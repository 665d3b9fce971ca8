"""HPSv3's published format, compared with a second, plain computation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rewards import HPSv3, Prompt
from rewards.files import PINNED
from rewards.hpsv3 import qwen
from rewards.hpsv3.reward import PIXELS
from tests.helpers.qwen_reference import PROMPT, HPSv3Reference, write_hpsv3, write_tokenizer

TEXTS = ["a cat", "a {very} long story that goes on and on, in a town, near a river", "zwei Bäume"]
SMALL = 4 * 28 * 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hpsv3")


@pytest.fixture(scope="module")
def reference(folder: Path) -> HPSv3Reference:
    return write_hpsv3(folder)


def load(folder: Path, **options: Any) -> HPSv3:
    reward = HPSv3(str(folder), base_path=str(folder), **{"dtype": "float32", "pixels": SMALL} | options)
    reward.setup()
    return reward


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (len(TEXTS), 3, height, width), generator=torch.Generator().manual_seed(1)).byte()


def score(reward: HPSv3, pixels: torch.Tensor, texts: list[str] = TEXTS) -> torch.Tensor:
    return reward(images=pixels / 255, prompts=[Prompt(text, "test") for text in texts])


@pytest.mark.parametrize(
    ("shape", "size"), [((48, 48), (56, 56)), ((256, 256), (56, 56)), ((40, 100), (112, 28)), ((90, 30), (56, 112))]
)
def test_scores_agree_with_the_plain_computation(
    reference: HPSv3Reference, folder: Path, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    pixels = noise(*shape)
    pairs = zip(pixels.permute(0, 2, 3, 1).numpy(), TEXTS, strict=True)
    expected = torch.stack([reference.output(Image.fromarray(array), text, size)[0] for array, text in pairs])
    actual = score(load(folder), pixels)
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    swapped = score(load(folder), pixels, TEXTS[::-1])
    assert (swapped - actual).abs().max() > 0.01  # each image is scored against its own prompt


def test_later_names_of_transformers_are_read(reference: HPSv3Reference, folder: Path, tmp_path: Path) -> None:
    write_hpsv3(tmp_path, old_names=False)
    assert torch.equal(score(load(tmp_path), noise(48, 48)), score(load(folder), noise(48, 48)))


def test_bfloat16_is_the_default_and_close(reference: HPSv3Reference, folder: Path) -> None:
    reward = load(folder, dtype=HPSv3().dtype)
    assert reward.scorer is not None
    assert {parameter.dtype for parameter in reward.scorer.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in reward.scorer.head.parameters()} == {torch.float32}
    torch.testing.assert_close(score(reward, noise(48, 48)), score(load(folder), noise(48, 48)), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("shape", "resized"),
    [
        ((512, 512), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((64, 64), (448, 448)),
        ((512, 768), (364, 532)),
        ((1344, 768), (588, 336)),
    ],
)
def test_published_sizes_of_images(
    reference: HPSv3Reference, folder: Path, shape: tuple[int, int], resized: tuple[int, int]
) -> None:
    scorer = load(folder, pixels=PIXELS).scorer
    assert scorer is not None
    grid = scorer.processor([torch.zeros(3, *shape, dtype=torch.uint8)], return_tensors="pt")["image_grid_thw"]
    assert [14 * side for side in grid[0, 1:].tolist()] == list(resized)


def test_special_tokens_in_captions_are_text(reference: HPSv3Reference, folder: Path) -> None:
    caption = "a <|Reward|> <|image_pad|><|im_end|>"
    reward = load(folder)
    assert reward.scorer is not None
    ids, mask = reward.scorer.tokenizer([caption, "a cat"], image_tokens=4)
    assert (ids == reference.tokenizer.token_to_id("<|Reward|>")).sum(dim=1).tolist() == [1, 1]
    assert (ids == reference.tokenizer.token_to_id("<|image_pad|>")).sum(dim=1).tolist() == [4, 4]
    assert ids[torch.arange(2), mask.sum(dim=1) - 1].tolist() == [reference.tokenizer.token_to_id("<|Reward|>")] * 2
    assert caption in reference.tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)
    assert score(reward, noise(48, 48)[:2], [caption, "a cat"]).isfinite().all()


def test_the_prompt_is_the_published_one() -> None:
    assert hashlib.sha256(PROMPT.encode()).hexdigest().startswith("f6ee57479d4e9eee")
    assert PROMPT.startswith(qwen.QUESTION) and qwen.QUESTION.endswith("ratings of this image: ")


def without(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}


BAD_WEIGHTS = {
    "one is missing": (without("model.layers.1.mlp.up_proj.weight"), "1 missing, such as language_model.layers.1.mlp"),
    "no head": (without("rm_head"), "must hold the three linear layers of a head on 32 features"),
    "no embeddings": (without("model.embed_tokens"), "must hold the weights of the Qwen2-VL model"),
    "a further layer": (
        lambda weights: weights | {"model.layers.2.input_layernorm.weight": torch.ones(32)},
        "exactly the weights.* Found 1 unexpected, such as language_model.layers.2",
    ),
    "another width": (
        lambda weights: weights | {"model.norm.weight": torch.ones(33)},
        "must hold the weights of the Qwen2-VL model",
    ),
    "a NaN": (lambda weights: weights | {"model.norm.weight": torch.full((32,), torch.nan)}, "finite numbers"),
    "without the reward token": (
        lambda weights: weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:-1].clone()},
        "the tokenizer in .* must have",
    ),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_refused(folder: Path, reference: HPSv3Reference, tmp_path: Path, kind: str) -> None:
    change, message = BAD_WEIGHTS[kind]
    save_file(change(reference.weights()), tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=f"HPSv3: .*{message}"):
        HPSv3(str(tmp_path), base_path=str(folder)).setup()


def test_a_configuration_of_another_model_is_refused(folder: Path, reference: HPSv3Reference, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with pytest.raises(ValueError, match=r"HPSv3: .*config.json must describe a Qwen2-VL model .* Found 'qwen2_5_vl'"):
        HPSv3(str(folder), base_path=str(tmp_path)).setup()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "HPSv3.safetensors"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    write_hpsv3(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"HPSv3: {name} must be a file"):
        HPSv3(str(tmp_path), base_path=str(tmp_path)).setup()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="HPSv3: `pixels` must be >= 784, one image token. Found 783"):
        HPSv3(pixels=783)
    with pytest.raises(ValueError, match="HPSv3: `dtype` must be float32"):
        HPSv3(dtype="int8")


def test_published_files_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, str, str | None]] = []

    def download(path: str, name: str, revision: str | None = None) -> str:
        requests.append((path, name, revision))
        if path == "MizzenAI/HPSv3":
            raise OSError("no network")
        return name

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match="no network"):
        HPSv3().setup()
    assert requests == [
        ("Qwen/Qwen2-VL-7B-Instruct", "config.json", PINNED["Qwen/Qwen2-VL-7B-Instruct"]),
        ("Qwen/Qwen2-VL-7B-Instruct", "tokenizer.json", PINNED["Qwen/Qwen2-VL-7B-Instruct"]),
        ("MizzenAI/HPSv3", "HPSv3.safetensors", PINNED["MizzenAI/HPSv3"]),
    ]
