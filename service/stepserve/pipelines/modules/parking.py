"""Which methods of a pipeline's modules park their caller: one row a case, no code per pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.call import NO_RULES, Enter
from stepserve.engine.calls.text_padding import FrameBias, JointMask, TextPadding, TokenMask
from stepserve.engine.tracks.track import Stage

PROMPTS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ParkingRule:
    """One method of the components of one kind.

    Args:
        components: patterns of component names, as pipelines call them.
        method: the method that parks.
        stage: what its time is counted as.
        shared: whether calls of several requests may share a forward. Text encoders and VAEs run
            one call at a time: they take a few percent of the time and gain little from sharing,
            while on many processors their kernels round differently for another row count, and the
            image would no longer be the one that diffusers makes by itself.
        cached: whether outputs are kept for calls with equal arguments. Most requests have the
            same negative prompt, and people try a prompt again and again.
    """

    components: tuple[str, ...]
    method: str
    stage: Stage
    shared: bool = False
    cached: bool = False

    def covers(self, path: str) -> bool:
        """Whether the component at that dotted path is meant."""
        name = path.rpartition(".")[2]
        return any(fnmatchcase(name, pattern) for pattern in self.components)


DENOISERS = ("unet", "transformer", "transformer_[0-9]", "prior", "decoder")
AUTOENCODERS = ("vae", "movq", "vqgan", "vqvae")
NETWORK_RULE = ParkingRule(("controlnet", "adapter"), "forward", Stage.CONTROL, shared=True)
PARKING_RULES = (
    ParkingRule(("text_encoder*",), "forward", Stage.ENCODE, cached=True),
    ParkingRule(("image_encoder", "siglip"), "forward", Stage.ENCODE),
    ParkingRule(DENOISERS, "forward", Stage.DENOISE, shared=True),
    NETWORK_RULE,
    ParkingRule(AUTOENCODERS, "encode", Stage.ENCODE),
    ParkingRule(AUTOENCODERS, "decode", Stage.DECODE),
)


def _names(*names: str) -> frozenset[str]:
    return frozenset(names)


# Modules in which rows of one forward influence one another, so that calls of several requests must
# not share one: its attention takes the rows of the batch for its sequence.
ROWS_MEET = _names("ControlNetUnionModel", "MultiControlNetUnionModel")

# Backends of attention, as diffusers calls them, that raise when they get a mask.
MASKLESS_ATTENTION = (
    "flash",
    "sage",
    "_flash_3",
    "_native_flash",
    "_native_xla",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
)

BLOCK_SAMPLES = _names("controlnet_block_samples")
FLUX_RULES = ArgumentRules(
    shared=_names("img_ids", "txt_ids"),
    residuals=_names("controlnet_block_samples", "controlnet_single_block_samples"),
    residual_settings=_names("controlnet_blocks_repeat"),
)

CONDITIONING_SCALE = "conditioning_scale"
MASKED_TEXT = (TextPadding(TokenMask("encoder_hidden_states_mask")),)

Z_IMAGE_TOKENS = 32
"""What a Z-Image transformer fills each image and each text of a row up to a multiple of."""


def _z_image_tokens(count: int) -> int:
    return -(-count // Z_IMAGE_TOKENS) * Z_IMAGE_TOKENS


# By the name of a list: latents of shape (channels, frames, height, width), of which four make a
# token; texts of shape (tokens, channels); what a vision encoder saw, (height, width, channels).
Z_IMAGE_ROW_TOKENS = {
    "x": lambda latents: _z_image_tokens(math.prod(latents.shape[1:]) // 4),
    "cap_feats": lambda text: _z_image_tokens(text.shape[0]),
    "siglip_feats": lambda seen: _z_image_tokens(math.prod(seen.shape[:2])),
}

# What the arguments themselves do not show, by class of the module.
ARGUMENT_RULES = {
    # `decode` takes one, and draws nothing.
    "AutoencoderKL": ArgumentRules(ignored=_names("generator")),
    # Position tables, the same for all rows.
    "BriaFiboTransformer2DModel": ArgumentRules(
        shared=_names("img_ids", "txt_ids"),
        text=(
            TextPadding(
                JointMask("joint_attention_kwargs", "attention_mask", "hidden_states"),
                text=("encoder_hidden_states", "text_encoder_layers"),
                places=("txt_ids",),
            ),
        ),
    ),
    "ChromaTransformer2DModel": FLUX_RULES,
    "CogVideoXTransformer3DModel": ArgumentRules(shared=_names("image_rotary_emb")),
    "CogView3PlusTransformer2DModel": ArgumentRules(shared=_names("image_rotary_emb")),
    "CogView4Transformer2DModel": ArgumentRules(shared=_names("image_rotary_emb")),
    "DreamLiteUNetModel": ArgumentRules(text=(TextPadding(TokenMask("encoder_attention_mask")),)),
    # Keys and values of reference images, from the first step on.
    "Flux2Transformer2DModel": ArgumentRules(caches=_names("kv_cache")),
    "ControlNetModel": ArgumentRules(output_scale=CONDITIONING_SCALE),
    "FluxControlNetModel": ArgumentRules(
        shared=_names("img_ids", "txt_ids"), output_scale=CONDITIONING_SCALE
    ),
    "FluxTransformer2DModel": FLUX_RULES,
    "HunyuanDiT2DControlNetModel": ArgumentRules(
        shared=_names("image_rotary_emb"), output_scale=CONDITIONING_SCALE
    ),
    "HunyuanDiT2DModel": ArgumentRules(shared=_names("image_rotary_emb"), residuals=BLOCK_SAMPLES),
    "Kandinsky5Transformer3DModel": ArgumentRules(
        shared=_names("visual_rope_pos", "text_rope_pos", "sparse_params")
    ),
    # One entry a frame of the mask.
    "LatteTransformer3DModel": ArgumentRules(
        repeated=_names("encoder_attention_mask"),
        text=(TextPadding(FrameBias("encoder_attention_mask", "hidden_states")),),
    ),
    "LongCatImageTransformer2DModel": ArgumentRules(shared=_names("img_ids", "txt_ids")),
    # The first row of the mask counts for all. Keys and values of what the prompt says.
    "QwenImage21Transformer2DModel": ArgumentRules(
        shared=_names("img_mask"), caches=_names("kv_cache")
    ),
    # One entry a layer.
    "WanVACETransformer3DModel": ArgumentRules(shared=_names("control_hidden_states_scale")),
    # States of many layers.
    "HiDreamImageTransformer2DModel": ArgumentRules(layered=_names("encoder_hidden_states_llama3")),
    "SanaControlNetModel": ArgumentRules(output_scale=CONDITIONING_SCALE),
    "SD3ControlNetModel": ArgumentRules(output_scale=CONDITIONING_SCALE),
    # What ControlNets and T2I-Adapters have added.
    "SanaTransformer2DModel": ArgumentRules(residuals=BLOCK_SAMPLES),
    "SD3Transformer2DModel": ArgumentRules(residuals=_names("block_controlnet_hidden_states")),
    "UNet2DConditionModel": ArgumentRules(
        residuals=_names(
            "down_block_additional_residuals",
            "mid_block_additional_residual",
            "down_intrablock_additional_residuals",
        )
    ),
    # One entry a frame.
    "UNetMotionModel": ArgumentRules(
        repeated=_names(
            "encoder_hidden_states",
            "down_block_additional_residuals",
            "mid_block_additional_residual",
        )
    ),
    # Python lists with one entry a row.
    "JoyImageEditPlusTransformer3DModel": ArgumentRules(
        row_lists=_names("shape_list"), text=MASKED_TEXT
    ),
    "ZImageTransformer2DModel": ArgumentRules(
        row_lists=_names("x", "cap_feats", "siglip_feats", "image_noise_mask"),
        row_tokens=Z_IMAGE_ROW_TOKENS,
    ),
    "QwenImageControlNetModel": ArgumentRules(
        row_lists=_names("img_shapes"),
        whole_lists_out=True,
        output_scale=CONDITIONING_SCALE,
        text=MASKED_TEXT,
    ),
    "QwenImageTransformer2DModel": ArgumentRules(
        row_lists=_names("img_shapes"), residuals=BLOCK_SAMPLES, text=MASKED_TEXT
    ),
}


def takes_lengths(pipeline: Any) -> bool:
    """Whether forwards that run at every step take rows of different lengths."""
    return any(
        rule.shared and rules_of(module).row_tokens
        for _, module, rule in parkable_methods(pipeline)
    )


def takes_caches(module: nn.Module) -> bool:
    """Whether its forwards read or fill objects that keep something from step to step."""
    rules = ARGUMENT_RULES.get(type(module).__name__)
    return rules is not None and bool(rules.caches)


@dataclass(frozen=True)
class ParkingOptions:
    """How a pipeline's modules are shared.

    Args:
        max_rows: most rows of one shared forward.
        bucket_rows: row counts that shared forwards are filled up to; empty: any.
        pads_prompts: whether texts are filled up, where a rule says how.
        prompt_cache_bytes: how much is kept of each text encoder's outputs; 0 keeps nothing.
        inline: components that do not park, because a call changes them while it runs: so nobody
            else gets to see them changed.
        enter: by component, what is told before a forward which variant each row wants.
        mixes_lengths: whether rows of different lengths share forwards, where a module takes them.
    """

    max_rows: int = 32
    bucket_rows: tuple[int, ...] = ()
    pads_prompts: bool = True
    prompt_cache_bytes: int = PROMPTS_BYTES
    inline: frozenset[str] = frozenset()
    enter: Mapping[str, Enter] = field(default_factory=dict)
    mixes_lengths: bool = True


def parkable_methods(pipeline: Any) -> Iterator[tuple[str, nn.Module, ParkingRule]]:
    """Path and module of every component that parks, with the rule for each of its methods."""
    for path, module in components_of(pipeline):
        for rule in PARKING_RULES:
            if rule.covers(path) and hasattr(module, rule.method):
                yield path, module, rule


def components_of(pipeline: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a pipeline and of the pipelines inside it, once, by its dotted path."""
    seen: set[int] = set()
    for path, module in _all_components(pipeline, ""):
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module


def _all_components(pipeline: Any, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    # Inner ones first: there a module has the name that says what it does.
    for name, inner in vars(pipeline).items():
        if isinstance(inner, DiffusionPipeline):
            yield from _all_components(inner, f"{prefix}{name}.")
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            yield prefix + name, component


def rules_of(module: nn.Module, is_compiled: bool = False) -> ArgumentRules:
    """How the arguments of a module's methods are read.

    Args:
        module: whose they are.
        is_compiled: whether compiled code runs for it. There is none for calls with residuals or
            for rows of several lengths, and eager code rounds otherwise: other calls must not share
            a forward with them.
    """
    rules = ARGUMENT_RULES.get(type(module).__name__, NO_RULES)
    if getattr(getattr(module, "config", None), "global_pool_conditions", False):
        # A mean comes after the scale.
        rules = replace(rules, output_scale="")
    if _refuses_masks(module):
        rules = replace(rules, text=(), row_tokens={})
    # Of several lengths it would be a graph for each combination.
    return replace(rules, residuals=frozenset(), row_tokens={}) if is_compiled else rules


def fills_text(pipeline: Any) -> bool:
    """Whether texts are filled up, so that the last bits are others than without an engine."""
    return any(rules_of(module).text for _, module, _ in parkable_methods(pipeline))


def _refuses_masks(module: nn.Module) -> bool:
    usual, _ = _AttentionBackendRegistry.get_active_backend()
    processors: Iterator[Any] = (getattr(part, "processor", None) for part in module.modules())
    backends = (one._attention_backend for one in processors if hasattr(one, "_attention_backend"))
    return any((backend or usual) in MASKLESS_ATTENTION for backend in backends)
