"""ImageReward's published format, compared with a second implementation."""

from pathlib import Path

import pytest
import torch

from rewards import ImageReward, Prompt
from tests.helpers.blip_reference import SIZE, WORDS, write_image_reward

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tokens_of(text: str) -> list[int]:
    """Tokenize by hand: words of the vocabulary between [CLS] and [SEP]."""
    return [2, *(WORDS.index(word) if word in WORDS else 1 for word in text.split()), 3]


@torch.no_grad()
def test_scores_agree_with_the_second_implementation(tmp_path: Path) -> None:
    model = write_image_reward(tmp_path)
    texts = ["a cat", "the dog and the cat", "a unicorn", "a cat " * 30]
    images = torch.randint(256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)) / 255
    rows = [tokens_of(text) for text in texts]
    rows = [row if len(row) <= 35 else [*row[:34], 3] for row in rows]
    tokens = torch.tensor([[*row, *[0] * (35 - len(row))] for row in rows])
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    expected = model((images - mean) / std, tokens, tokens > 0)

    reward = ImageReward(str(tmp_path), tokenizer_path=str(tmp_path))
    reward.setup()
    actual = reward(images=images, prompts=[Prompt(text, "test") for text in texts])
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    swapped = reward(images=images, prompts=[Prompt(text, "test") for text in reversed(texts)])
    assert (swapped - actual).abs().max() > 0.01  # each image is scored against its own prompt


def test_bad_files_are_refused(tmp_path: Path) -> None:
    weights = write_image_reward(tmp_path).state_dict()

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        torch.save(changed, tmp_path / "ImageReward.pt")
        with pytest.raises(ValueError, match=f"ImageReward: .*{message}"):
            ImageReward(str(tmp_path), tokenizer_path=str(tmp_path)).setup()

    missing = "blip.text_encoder.encoder.layer.1.output.dense.weight"
    refused(
        {name: tensor for name, tensor in weights.items() if name != missing}, "Found 1 missing, such as encoder.layer.1"
    )
    refused(
        {name: tensor for name, tensor in weights.items() if not name.startswith("blip")},
        "must hold BLIP's `visual_encoder`",
    )
    refused(
        {name: tensor for name, tensor in weights.items() if not name.startswith("mlp")}, "must hold the five linear layers"
    )
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(20))]))
    with pytest.raises(ValueError, match="must have at most the model's 16 tokens. Found 34"):
        ImageReward(str(tmp_path), tokenizer_path=str(tmp_path)).setup()
