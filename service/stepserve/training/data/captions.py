"""Captions for the emoji artwork, and the tokenizer that reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from stepserve.training.data.images import BACKGROUNDS
from stepserve.training.loop.files import fresh_sibling, replace_folder

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
OPENINGS = ("{name}", "{name}", "{name}", "{article} {name}", "{name} emoji", "an image of {name}")
STYLES = ("", "", ", {style}", ", {style} style")
BACKGROUND_PHRASES = (" on a {colour} background", ", {colour} background")


@dataclass(frozen=True)
class Caption:
    """What an image shows: its name, its artwork style and the colour painted behind it."""

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
    frame = ["a an the emoji image of on background style noto fluent", *BACKGROUNDS]
    # Repeated, so that the words of every caption become single tokens.
    return frame * 100 + list(names)


def letters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in a fixed order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def word_ends(tokenizer: Tokenizer, phrases: Iterable[str]) -> list[str]:
    """The last letters of all words, marked as such, in a fixed order."""
    lasts: set[str] = set()
    for phrase in phrases:
        text = tokenizer.normalizer.normalize_str(phrase)
        lasts.update(word[-1] for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return [letter + WORD_END for letter in sorted(lasts)]


def train_tokenizer(names: Iterable[str], vocabulary: int, max_tokens: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format, trained on the words of the captions.

    Any text can be encoded: words that were never seen fall apart into smaller pieces. The same
    names give the same tokens in every process.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    phrases = all_phrases(names)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        # Given here in a fixed order, because the trainer would number the word-ending letters, and
        # so break ties between merges, in the order of a hash map, new in every process.
        special_tokens=[START, END, *letters(), *word_ends(tokenizer, phrases)],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(phrases, trainer)
    return _as_clip_tokenizer(tokenizer, max_tokens)


def _as_clip_tokenizer(tokenizer: Tokenizer, max_tokens: int) -> CLIPTokenizer:
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = dict(model["vocab"])
    for letter in letters():
        vocabulary.setdefault(letter + WORD_END, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)


def keep_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save a tokenizer atomically: weights mean nothing without their tokens."""
    partial = fresh_sibling(folder)
    tokenizer.save_pretrained(partial)
    replace_folder(partial, folder)


def find_tokenizer(*folders: Path) -> CLIPTokenizer | None:
    """The tokenizer in the first of the folders that exists."""
    for folder in folders:
        if folder.is_dir():
            return CLIPTokenizer.from_pretrained(folder)
    return None
