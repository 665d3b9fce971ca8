"""A second implementation of ImageReward in plain torch with the published names, and small random files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TEXT_WIDTH, PATCH, SIZE, POSITIONS = 64, 128, 8, 32, 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", "and", "##s", "sign", "says", '"']
VOCABULARY = len(WORDS) + 2  # BLIP adds [DEC] and [ENC]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention with heads of width 64; (B, tokens, width)."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.mT / 8
    scores = scores if mask is None else scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class ImageAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, -1)))


class ImageBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn = ImageAttention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ImageTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (SIZE // PATCH) ** 2, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.ModuleList(ImageBlock() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextAttention(nn.Module):
    def __init__(self, source: int) -> None:
        super().__init__()
        widths = {"query": TEXT_WIDTH, "key": source, "value": source}
        self.self = nn.ModuleDict({name: nn.Linear(width, TEXT_WIDTH) for name, width in widths.items()})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(TEXT_WIDTH, TEXT_WIDTH), "LayerNorm": nn.LayerNorm(TEXT_WIDTH, 1e-12)}
        )

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        layers = self.self
        attended = attend(layers["query"](x), layers["key"](source), layers["value"](source), mask)
        return self.output["LayerNorm"](x + self.output["dense"](attended))


class TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.crossattention = TextAttention(TEXT_WIDTH), TextAttention(WIDTH)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(TEXT_WIDTH, 4 * TEXT_WIDTH)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(4 * TEXT_WIDTH, TEXT_WIDTH), "LayerNorm": nn.LayerNorm(TEXT_WIDTH, 1e-12)}
        )

    def forward(self, x: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), patches)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class TextTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(VOCABULARY, TEXT_WIDTH),
                "position_embeddings": nn.Embedding(POSITIONS, TEXT_WIDTH),
                "LayerNorm": nn.LayerNorm(TEXT_WIDTH, 1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(TextLayer() for _ in range(3))})

    def forward(self, tokens: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        positions = self.embeddings["position_embeddings"](torch.arange(tokens.shape[1]))
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](tokens) + positions)
        for layer in self.encoder["layer"]:
            x = layer(x, mask, patches)
        return x


class ImageRewardReference(nn.Module):
    """The reward, with weights under the published names: `blip.visual_encoder`, `blip.text_encoder`, `mlp.layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.blip = nn.ModuleDict({"visual_encoder": ImageTower(), "text_encoder": TextTower()})
        sizes = (TEXT_WIDTH, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)]
        for index in (1, 3, 5):
            linear.insert(index, nn.Dropout(0.1))
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*linear)})

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        features = self.blip["text_encoder"](tokens, mask, self.blip["visual_encoder"](pixels))[:, 0]
        return (self.mlp["layers"](features)[:, 0] - 0.16717362830052426) / 1.0333394966054072


def write_image_reward(folder: Path) -> ImageRewardReference:
    """Save a small random model in the published format, and a vocabulary in BERT's format."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ImageRewardReference().eval()
    for parameter in model.parameters():  # with the initial weights all images would have nearly the same score
        if parameter.ndim > 1:
            parameter.data *= 2
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return model
