"""A small random HPSv3 in the published format, and a second, plain way to compute its scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

PROMPT = (Path(__file__).parents[2] / "rewards/hpsv3/prompt.txt").read_text()
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
WIDTH = 32
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_tokenizer(folder: Path) -> Tokenizer:
    """Train a byte-level BPE with Qwen2's special tokens on the prompt, and save it as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [PROMPT], trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def config_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a small config.json with the published file's flat structure; its vocabulary is larger than the tokenizer's."""
    vision = {"depth": 2, "embed_dim": 16, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": WIDTH}
    ids = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **{f"{name}_token_id": tokenizer.token_to_id(token) for name, token in ids.items()},
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": vision | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        "vocab_size": 1024,
    }


class HPSv3Reference:
    """The published computation, one image at a time: chat template, PIL resizing, patches by loops, head at the token.

    The language model gets embeddings only, so it numbers positions itself.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        self.tokenizer = write_tokenizer(folder)
        content = config_of(self.tokenizer)
        (folder / "config.json").write_text(json.dumps(content))
        self.tokenizer.add_special_tokens(["<|Reward|>"])
        config = Qwen2VLConfig.from_dict(content | {"vocab_size": self.tokenizer.get_vocab_size()})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.qwen = Qwen2VLForConditionalGeneration(config).float().eval()
            self.head = nn.Sequential(
                *(nn.Linear(WIDTH, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
            ).eval()
        for part in (self.qwen, self.head):  # with the initial weights all images would have nearly the same score
            for parameter in (parameter for parameter in part.parameters() if parameter.ndim > 1):
                parameter.data *= 6 if part is self.qwen else 4

    def weights(self, *, old_names: bool = True) -> dict[str, Tensor]:
        """Return the weights as transformers named them up to version 4.51, as in the published file, or later."""
        weights = {f"rm_head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for name, tensor in self.qwen.state_dict().items():
            old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            weights[old if old_names else name] = tensor
        return weights

    @torch.no_grad()
    def output(self, image: Image.Image, text: str, size: tuple[int, int]) -> Tensor:
        """Return mean and log standard deviation for one image, resized to (width, height)."""
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
        pixels = (torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD)
        patches = patches_of(pixels.permute(2, 0, 1))
        grid = torch.tensor([[1, size[1] // 14, size[0] // 14]])
        chat = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * (len(patches) // 4)
            + "<|vision_end|>" + PROMPT.format(text_prompt=text) + "<|im_end|>\n<|im_start|>assistant\n"
        )  # fmt: skip
        ids = torch.tensor([self.tokenizer.encode(chat).ids])
        embeddings = self.qwen.get_input_embeddings()(ids)
        parts = self.qwen.model.visual(patches, grid_thw=grid).pooler_output
        embeddings[ids == self.tokenizer.token_to_id("<|image_pad|>")] = parts
        hidden = self.qwen.model.language_model(inputs_embeds=embeddings).last_hidden_state
        return self.head(hidden[ids == self.tokenizer.token_to_id("<|Reward|>")])[0]


def patches_of(pixels: Tensor) -> Tensor:
    """Cut an image (3, H, W) into patches of 14 x 14 pixels, blocks of 2 x 2 patches together, each patch twice in time."""
    height, width = pixels.shape[1] // 14, pixels.shape[2] // 14
    rows = []
    for top in range(0, height, 2):
        for left in range(0, width, 2):
            for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                patch = pixels[:, y * 14 : y * 14 + 14, x * 14 : x * 14 + 14]
                rows.append(torch.stack([patch, patch], dim=1).flatten())
    return torch.stack(rows)


def write_hpsv3(folder: Path, *, old_names: bool = True) -> HPSv3Reference:
    """Save a small random model in the published format: HPSv3.safetensors, config.json and tokenizer.json."""
    reference = HPSv3Reference(folder)
    save_file(reference.weights(old_names=old_names), folder / "HPSv3.safetensors")
    return reference
