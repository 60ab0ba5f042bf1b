"""Stand-ins for tokenizers that would have to be downloaded: a word is a token."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

WORDS = """
a the of bad image red big wet new blue cold heart apple stone house bird lake describe
user assistant system text in on and with : . , < >
"""
VOCABULARY = 100
"""Above every token id."""


def clip_tokenizer(max_tokens: int = 77) -> CLIPTokenizer:
    """A real CLIP tokenizer that knows letters only, 514 tokens: 0 starts, 1 ends and pads."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{a}</w>" for a in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_tokens)


def word_tokenizer(
    max_tokens: int = 32, end: bool = True, chat_template: str | None = None, **special: Any
) -> PreTrainedTokenizerFast:
    """In place of T5, Llama, Qwen and others: padding is 0, end 1, start 2, unknown 3, words above.

    Words get a number from a fixed list of common ones, and all others are unknown: enough for
    prompts of the parity suite to differ.
    """
    marks = ["<pad>", "</s>", "<s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*marks, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=max_tokens,
        **special,
    )
    wrapped.chat_template = chat_template
    return wrapped
