"""Small checkpoints in published formats, and images with text. Helpers are fixtures, so no test imports this file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from rewards import Detection, Detector, Prompt
from tests.helpers import ROOT
from tests.helpers.blip_reference import write_image_reward
from tests.helpers.qwen_reference import write_hpsv3
from tests.helpers.scripted_server import ScriptedServer, chat, remote_reward

IMAGE_SIZE = 32
POSITIONS = 12


def write_vocabulary(folder: Path) -> list[str]:
    """Write vocab.json, merges.txt and tokenizer_config.json of a CLIP tokenizer, and return its tokens."""
    letters = [chr(code) for code in range(33, 127)]
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return vocabulary


def write_clip(folder: Path, *, seed: int = 0, image_size: int = IMAGE_SIZE, positions: int = POSITIONS) -> Path:
    """Write a CLIPModel folder as published: config, safetensors, vocab.json, merges.txt, preprocessor_config.json."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    last = len(write_vocabulary(folder)) - 1
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": image_size,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "image_processor_type": "CLIPImageProcessor",
                "resample": 3,
                "size": image_size,
            }
        )
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": last + 1,
            "max_position_embeddings": positions,
            "bos_token_id": last - 1,
            "eos_token_id": last,
            "pad_token_id": last,
        },
        vision_config={**small, "image_size": image_size, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=3.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        # Initial weights are so small that all embeddings are similar; larger ones make scores differ.
        for parameter in (parameter for parameter in model.parameters() if parameter.ndim > 1):
            parameter.data.mul_(6)
    model.save_pretrained(folder)
    write_head(folder, width=16, seed=seed)
    return folder


def write_head(folder: Path, *, width: int, seed: int) -> None:
    """Write an aesthetic head in the published format, with indices that count dropout layers."""
    generator, sizes = torch.Generator().manual_seed(seed), (width, 1024, 128, 64, 16, 1)
    head = {}
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        head[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        head[f"layers.{number}.bias"] = torch.randn(outputs, generator=generator)
    save_file(head, folder / "head.safetensors")
    torch.save(head, folder / "head.pth")


@pytest.fixture(scope="session", name="write_clip")
def _write_clip() -> Callable[..., Path]:
    return write_clip


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def imagereward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    write_image_reward(folder)
    return folder


@pytest.fixture(scope="session")
def hpsv3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv3")
    write_hpsv3(folder)
    return folder


@pytest.fixture(scope="session")
def remote_url() -> Iterator[str]:
    with ScriptedServer(remote_reward) as server:
        yield server.url


@pytest.fixture(scope="session")
def chat_url() -> Iterator[str]:
    with ScriptedServer(chat) as server:
        yield server.url + "/v1"


@pytest.fixture(scope="session")
def published_metadata() -> list[dict]:
    """GenEval's prompts of the published runs, which are not part of this project."""
    file = ROOT.parent / "shared/prompts/geneval/test_metadata.jsonl"
    if not file.exists():
        pytest.skip(f"{file} does not exist")
    return [json.loads(line) for line in file.read_text().splitlines()]


def render(text: str, size: int = 256, font_size: int = 60) -> torch.Tensor:
    """Render a white square with black text in its centre, (3, size, size) in [0, 1]."""
    image = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(font_size)
    ImageDraw.Draw(image).text((size / 2, size / 2), text, fill="black", font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="session", name="render")
def _render() -> Callable[..., torch.Tensor]:
    return render


class BrightBlobs(Detector):
    """A simple detector: one cat per half of the image, scored by brightness and coloured by the brightest channel."""

    def detect(self, images: torch.Tensor) -> list[list[Detection]]:
        width = images.shape[-1]
        detections: list[list[Detection]] = []
        for image in images:
            halves = {0: image[..., : width // 2], width // 2: image[..., width // 2 :]}
            detections.append(
                [
                    Detection(
                        "cat",
                        half.mean().item(),
                        (x, 0, x + width // 2, width // 2),
                        colour=("red", "green", "blue")[int(half.mean(dim=(1, 2)).argmax())],
                    )
                    for x, half in halves.items()
                ]
            )
        return detections


@pytest.fixture(scope="session", name="BrightBlobs")
def _bright_blobs() -> type[Detector]:
    return BrightBlobs


@pytest.fixture
def prompts() -> list[Prompt]:
    """Prompts of three sources; every reward applies to some of them."""
    red, two = ["Is the cat red?", "Yes"], ["How many cats are in the image?", "two"]
    one_cat = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "vqa_list": [red]}
    two_cats = {"tag": "two_object", "include": [{"class": "cat", "count": 2}], "vqa_list": [two]}
    return [
        Prompt("a cat", "plain"),
        Prompt('a sign that says "CAT"', "text"),
        Prompt("a red cat", "geneval", one_cat),
        Prompt("a dog and a very long story that does not fit into the positions of the model", "plain"),
        Prompt('the word "dog"', "text"),
        Prompt("two cats", "geneval", two_cats),
    ]


@pytest.fixture
def images() -> torch.Tensor:
    """Six different images, 48 pixels square, some with text."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(4, 3, 48, 48, generator=generator)
    return torch.stack([noise[0], render("CAT", 48, 18), noise[1], noise[2], render("dig", 48, 18), noise[3]])
