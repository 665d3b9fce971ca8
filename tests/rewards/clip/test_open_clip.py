"""HPSv2's published format: open_clip weights, compared with a second implementation of the tower."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards import HPSv2, PickScore, Prompt
from rewards.clip.open_clip import VIT_H_14, clean_text
from rewards.geneval.colours import ColourClassifier

EMBED, WIDTH, TEXT_WIDTH, PATCH, SIZE, LENGTH, VOCABULARY = 16, 24, 32, 8, 32, 12, 194
DESCRIPTION = {
    "embed_dim": EMBED,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": WIDTH, "head_width": 8, "patch_size": PATCH},
    "text_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": TEXT_WIDTH, "heads": 4, "layers": 3},
}


class Block(nn.Module):
    """A residual block with open_clip's parameter names and torch's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(1 + (SIZE // PATCH) ** 2, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Transformer(WIDTH, 2, WIDTH // 8)
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBED))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Tower(nn.Module):
    """CLIP as in its paper, with open_clip's names: causal text, embedding at the position of the highest token id."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(VOCABULARY, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, TEXT_WIDTH))
        self.transformer = Transformer(TEXT_WIDTH, 3, 4)
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.randn(TEXT_WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def text(self, tokens: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


@pytest.fixture
def tower() -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = Tower().eval()
    for parameter in tower.parameters():  # initial weights are so small that all embeddings are similar
        if parameter.ndim > 1:
            parameter.data *= 3
    return tower


@pytest.fixture
def folder(tower: Tower, tmp_path: Path) -> Path:
    """A folder as published: a training checkpoint with `state_dict`, and the model configuration."""
    torch.save({"epoch": 3, "state_dict": tower.state_dict()}, tmp_path / "hps.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": DESCRIPTION}))
    return tmp_path


@torch.no_grad()
def test_scores_agree_with_the_second_implementation(tower: Tower, folder: Path, clip_folder: Path) -> None:
    from transformers import CLIPTokenizer

    prompts = [Prompt(text, "test") for text in ("a cat", "a dog", "the cat and the dog", "a cat")]
    images = torch.randint(256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)) / 255
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        [prompt.text for prompt in prompts], padding="max_length", max_length=LENGTH, truncation=True
    ).input_ids
    # open_clip pads with zeros: tokens after the end token must not matter
    tokens = [[*row[: row.index(VOCABULARY - 1) + 1], *[0] * LENGTH][:LENGTH] for row in tokens]
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ))  # fmt: skip
    expected = F.cosine_similarity(tower.visual((images - mean) / std), tower.text(torch.tensor(tokens)))

    reward = HPSv2(str(folder), "hps.pt", str(clip_folder))
    reward.setup()
    assert expected.std() > 0.05
    torch.testing.assert_close(reward(images=images, prompts=prompts), expected, rtol=0, atol=1e-5)


def test_a_missing_weight_and_another_architecture_are_refused(
    tower: Tower, folder: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tower.state_dict()
    del weights["visual.proj"]
    torch.save(weights, folder / "incomplete.pt")
    with pytest.raises(ValueError, match="HPSv2: .* Found 1 missing, such as visual_projection.weight"):
        HPSv2(str(folder), "incomplete.pt", str(clip_folder)).setup()
    shallow = {part: {**VIT_H_14[part], "layers": 1} for part in ("vision_cfg", "text_cfg")}  # faster to build
    monkeypatch.setattr("rewards.clip.loading.VIT_H_14", VIT_H_14 | shallow)
    shutil.copy(folder / "hps.pt", folder / "plain.pt")
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="HPSv2: .*plain.pt must hold the weights of the model that"):
        HPSv2(str(folder), "plain.pt", str(clip_folder)).setup()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat, on a mat", "a cat, on a mat"),
        ("A  Cat\n on\u00a0a mat ", "a cat on a mat"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("&quot;HI&quot;", '"hi"'),
        ("it’s “so”", 'it\'s "so"'),
        ("cafÃ©", "café"),
        ("ﬁne ＡＢ", "fine ab"),
    ],
)
def test_texts_are_cleaned_as_in_open_clip(text: str, expected: str) -> None:
    assert clean_text(text) == expected


def test_which_scorers_clean_texts(clip_folder: Path) -> None:
    """Scorers published with open_clip clean texts; scorers published with transformers do not."""
    path, image = str(clip_folder), torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    same = {}
    for reward in (HPSv2(path, file=None, processor_path=None), PickScore(path, None)):
        reward.setup()
        dirty, clean = (reward(images=image, prompts=[Prompt(text, "a")]) for text in ("it’s &amp;", "it's &"))
        same[type(reward)] = torch.equal(dirty, clean)
    assert same == {HPSv2: True, PickScore: False}
    classifier = ColourClassifier(path)
    classifier.setup()
    assert torch.equal(classifier.tower.embed_texts(["it’s &amp;"]), classifier.tower.embed_texts(["it's &"]))


def test_a_long_text_is_cut_before_tokenization(clip_folder: Path) -> None:
    reward = HPSv2(str(clip_folder), file=None, processor_path=None)
    reward.setup()
    cleaned_texts = []
    reward.tower.clean = lambda text: (cleaned_texts.append(text), text)[1]
    long, short = "cat dog " * 10**5, "cat dog " * 100
    assert torch.equal(reward.tower.embed_texts([long]), reward.tower.embed_texts([short]))
    assert max(map(len, cleaned_texts)) <= 100 * LENGTH
