"""Captions for the emoji artwork, and the tokenizer that reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from service.training.pictures import BACKGROUNDS

START, END = "<|startoftext|>", "<|endoftext|>"
OPENINGS = ("{name}", "{name}", "{name}", "{article} {name}", "{name} emoji", "a picture of {name}")
STYLES = ("", "", ", {style}", ", {style} style")
BACKGROUND_PHRASES = (" on a {colour} background", ", {colour} background")


@dataclass(frozen=True)
class Caption:
    """What a picture shows: its name, its artwork style and the colour painted behind it."""

    name: str
    style: str
    background: str


def write_caption(caption: Caption, chance: random.Random) -> str:
    """One of the many ways to say it. A white background mostly goes unmentioned."""
    article = "an" if caption.name[0] in "aeiou" else "a"
    text = chance.choice(OPENINGS).format(name=caption.name, article=article)
    text += chance.choice(STYLES).format(style=caption.style)
    if caption.background != "white" or chance.random() < 0.15:
        text += chance.choice(BACKGROUND_PHRASES).format(colour=caption.background)
    return text


def all_phrases(names: Iterable[str]) -> list[str]:
    """Text that contains every word the captions use."""
    frame = ["a an the emoji picture of on background style noto fluent", *BACKGROUNDS]
    # Repeated, so that the words of every caption become single tokens.
    return frame * 100 + list(names)


def train_tokenizer(names: Iterable[str], vocabulary: int, max_tokens: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format, trained on the words of the captions.

    Any text can be encoded: words that were never seen fall apart into smaller pieces.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, END],
        initial_alphabet=[*alphabet, *(letter + "</w>" for letter in alphabet)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_phrases(names), trainer)
    return _as_clip_tokenizer(tokenizer, max_tokens)


def _as_clip_tokenizer(tokenizer: Tokenizer, max_tokens: int) -> CLIPTokenizer:
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = dict(model["vocab"])
    for symbol in [a + "</w>" for a in pre_tokenizers.ByteLevel.alphabet()]:
        vocabulary.setdefault(symbol, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)
