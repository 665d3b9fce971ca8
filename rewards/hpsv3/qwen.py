"""Qwen2-VL with a head that reads the reward token, in the format of HPSv3's published checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from rewards.checkpoints import check_finite

REWARD_TOKEN = "<|Reward|>"
START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
END_OF_IMAGE = "<|vision_end|>"
IMAGE_TOKEN = "<|image_pad|>"
QUESTION = Path(__file__).with_name("prompt.txt").read_text(encoding="utf-8").partition(REWARD_TOKEN)[0]
"""The question that the model was trained with, up to the reward token: later tokens cannot change its output."""


class ChatTokenizer:
    """Token ids of a chat with one image and one question, which end with the reward token.

    Captions are plain text: the name of a special token in a caption is not that token.

    Args:
        owner: Name of the reward, for error messages.
        file: The base model's tokenizer.json.
        image_token: Id of the token that stands for a part of the image, by the model's configuration.
        vocabulary: Number of tokens of the model. The last one is the reward token.

    Raises:
        ValueError: if the tokenizer and the model have different tokens.
    """

    def __init__(self, owner: str, file: Path, image_token: int, vocabulary: int) -> None:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.add_special_tokens([AddedToken(REWARD_TOKEN, normalized=False)])
        reward_token, size = tokenizer.token_to_id(REWARD_TOKEN), tokenizer.get_vocab_size()
        if (tokenizer.token_to_id(IMAGE_TOKEN), reward_token, size) != (image_token, vocabulary - 1, vocabulary):
            raise ValueError(
                f"{owner}: the tokenizer in {file} must have {vocabulary - 1} tokens, with {IMAGE_TOKEN} at {image_token}. "
                f"Found {size - 1}, with {IMAGE_TOKEN} at {tokenizer.token_to_id(IMAGE_TOKEN)}. Use the tokenizer of the "
                "model that the checkpoint was trained from."
            )
        self.start, self.end_of_image = (tokenizer.encode(text).ids for text in (START, END_OF_IMAGE))
        self.image_token, self.reward_token = image_token, reward_token
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], image_tokens: int) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Return token ids, padded on the right, and the mask of real tokens."""
        before = [*self.start, *[self.image_token] * image_tokens, *self.end_of_image]
        questions = [QUESTION.replace("{text_prompt}", text) for text in texts]
        rows = [[*before, *self.tokenizer.encode(question).ids, self.reward_token] for question in questions]
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return ids, mask


class QwenScorer(nn.Module):
    """A frozen Qwen2-VL model and a head on the hidden state of the reward token.

    Args:
        model: The transformers `Qwen2VLModel`.
        head: Maps a hidden state to mean and log standard deviation of the score.
        tokenizer: Builds the chat.
        pixels: Area in pixels to which images are resized.
    """

    def __init__(self, model: Any, head: nn.Module, tokenizer: ChatTokenizer, pixels: int) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        super().__init__()
        self.model, self.head = model.requires_grad_(False).eval(), head
        self.tokenizer = tokenizer
        vision = model.config.vision_config
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": pixels, "longest_edge": pixels},
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )

    def forward(self, images: UInt8[Tensor, "b 3 h w"], texts: Sequence[str]) -> Float[Tensor, "b 2"]:
        """Return the head's output for each (image, text) pair, float32."""
        device = self.model.device
        patches = self.processor(list(images.cpu()), return_tensors="pt", input_data_format="channels_first")
        grid = patches["image_grid_thw"]
        ids, mask = self.tokenizer(texts, int(grid[0].prod()) // self.processor.merge_size**2)
        # Plain positions, also for image tokens: the published code gives Qwen2-VL no grid, in training and in scoring.
        positions = torch.arange(ids.shape[1], device=device).expand(len(ids), -1)
        hidden = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions,
            pixel_values=patches["pixel_values"].to(device, self.model.dtype),
            image_grid_thw=grid.to(device),
            use_cache=False,
        ).last_hidden_state
        last = mask.sum(dim=1).to(device) - 1
        return self.head(hidden[torch.arange(len(ids), device=device), last].float())


def build_model(
    owner: str, weights: Mapping[str, Tensor], config_file: Path, dtype: torch.dtype, source: object
) -> tuple[Any, int]:
    """Build the `Qwen2VLModel` of a checkpoint.

    Args:
        owner: Name of the reward, for error messages.
        weights: Weights by the names of transformers, of before or after version 4.52. Heads are ignored.
        config_file: The base model's config.json.
        dtype: Number format of the weights.
        source: Origin of the weights, for error messages.

    Returns:
        The model, and the number of its tokens.

    Raises:
        ValueError: if the configuration is of another model, or weights are missing, of other shapes or too many.
    """
    from transformers import Qwen2VLModel

    config = _read_config(owner, config_file)
    state = {new_name(name): tensor for name, tensor in weights.items() if not name.startswith(("lm_head.", "rm_head."))}
    try:
        # Training added the reward token, and cut the table to the tokens in use.
        config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
        model, report = Qwen2VLModel.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{owner}: {source} must hold the weights of the Qwen2-VL model in {config_file}. Found others: "
            f"{str(error).splitlines()[0]}. Use the published file, with the model that it was trained from."
        ) from error
    for kind in ("missing", "unexpected"):
        if names := sorted(report[f"{kind}_keys"]):
            raise ValueError(
                f"{owner}: {source} must hold exactly the weights of the Qwen2-VL model in {config_file}. Found "
                f"{len(names)} {kind}, such as {names[0]}. Use the published file, with the model that it was trained from."
            )
    check_finite(owner, model, source)
    return model, config.text_config.vocab_size


def _read_config(owner: str, file: Path) -> Any:
    """Return the `Qwen2VLConfig` in a config.json."""
    from transformers import Qwen2VLConfig

    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("model_type") != "qwen2_vl":
        raise ValueError(
            f"{owner}: {file} must describe a Qwen2-VL model (model_type 'qwen2_vl'). Found "
            f"{content.get('model_type')!r}. Use the folder of the model that the checkpoint was trained from."
        )
    return Qwen2VLConfig.from_dict(content)


def new_name(name: str) -> str:
    """Return the name of a weight in `Qwen2VLModel`.

    >>> new_name("visual.merger.ln_q.weight"), new_name("model.norm.weight"), new_name("model.language_model.norm.weight")
    ('visual.merger.ln_q.weight', 'language_model.norm.weight', 'language_model.norm.weight')
    """
    name = name.removeprefix("model.")
    return name if name.startswith(("visual.", "language_model.")) else f"language_model.{name}"
