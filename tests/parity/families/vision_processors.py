"""Stand-ins for processors of vision-language models, which cannot be made without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .tokenizers import word_tokenizer

IMAGE_MARK = "<|image_pad|>"
MARKS = ["<|vision_start|>", "<|vision_end|>", IMAGE_MARK, "<|video_pad|>"]
PATCH = 4
"""Side of a patch, in pixels; two by two patches make one token."""
IMAGE_SIDE = 4 * PATCH
"""Of what the encoder sees of an image: four tokens."""


def marked_tokenizer() -> PreTrainedTokenizerFast:
    """Words, and the marks that stand around an image."""
    tokenizer = word_tokenizer(4096, end=False)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer


def vision_tokens() -> dict[str, int]:
    """The ids that a model's configuration has to know."""
    ids = marked_tokenizer().convert_tokens_to_ids(MARKS)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, ids, strict=True))


class VisionProcessor:
    """Does what `Qwen2VLProcessor` does: a mark for an image becomes one for each of its tokens."""

    def __init__(self) -> None:
        area = IMAGE_SIDE * IMAGE_SIDE
        self.tokenizer = marked_tokenizer()
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=PATCH, size={"shortest_edge": area, "longest_edge": area}
        )

    def __call__(
        self,
        text: Sequence[str],
        images: Any = None,
        padding: bool = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Token ids and a mask of each text, and the patches of all images."""
        seen = {} if images is None else self._see(images)
        counts = iter(int(grid.prod()) // 4 for grid in seen.get("image_grid_thw", ()))
        texts = [self._with_tokens(one, counts) for one in text]
        tokens = self.tokenizer(texts, padding=padding, return_tensors=return_tensors)
        image_token = self.tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        types = (tokens["input_ids"] == image_token).long()
        ids = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature({**ids, **seen, "mm_token_type_ids": types})

    def _see(self, images: Any) -> dict[str, Any]:
        many = images if isinstance(images, list) else [images]
        assert all(isinstance(image, Image.Image) for image in many)
        return dict(self.image_processor(images=many, return_tensors="pt"))

    def _with_tokens(self, text: str, counts: Any) -> str:
        first, *others = text.split(IMAGE_MARK)
        return first + "".join(IMAGE_MARK * next(counts) + other for other in others)
