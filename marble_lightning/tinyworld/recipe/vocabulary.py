"""The vocabulary: a byte-pair encoding learned from the captions, saved as a CLIPTokenizer."""

from __future__ import annotations

import random
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from marble_lightning.tinyworld.captions import draw_captioned

TOKENS = 18
"""Tokens of the longest caption, including the start and end tokens."""


def train_tokenizer(folder: Path, seed: int) -> CLIPTokenizer:
    """Learn the merges of a byte-pair encoding in CLIP's format on 20,000 captions, and save the tokenizer to `folder`."""
    rng = random.Random(seed)
    captions = [draw_captioned(rng).caption for _ in range(20_000)]
    letters = sorted(set(string.printable.strip().lower()))
    captions += [" ".join(letters)] * 2  # so that every letter can also end a word
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # the trainer would number the letters that end a word in the random order of a hash map
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters)],
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
