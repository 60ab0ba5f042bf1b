"""Keeps forwards of a Qwen-Image that get a mask from copying a number to the device.

diffusers counts the tokens of each row there, and no caller uses the counts. One number of the
sum comes from the host: its copy waits for all that the device has to do, and a CUDA graph cannot
record it. Nothing of this changes an output.
"""

from __future__ import annotations

from diffusers.models.controlnets import controlnet_qwenimage
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

COUNT = "compute_text_seq_len_from_mask"
CALLERS = (transformer_qwenimage, controlnet_qwenimage)


def leave_counts_out() -> None:
    """Replace what counts, for the process."""
    for caller in CALLERS:
        setattr(caller, COUNT, text_length_and_mask)


def text_length_and_mask(
    encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor | None
) -> tuple[int, None, Tensor | None]:
    """The length of texts of shape (rows, tokens, ...), no counts, and the mask in boolean form."""
    mask = encoder_hidden_states_mask
    return encoder_hidden_states.shape[1], None, None if mask is None else mask.bool()
