"""IP-Adapters with random weights for tiny models, and image encoders to go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterPlusImageProjection,
    IPAdapterTimeImageProjection,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

Weights = dict[str, dict[str, Tensor]]

IMAGE_PX = 32
ENCODER_WIDTH = 24
PROJECTED_WIDTH = 16
TOKENS = 4
HEAD_WIDTH = 64
# Far from the ones that torch begins with, so that a reference cannot go unseen.
LOUD = 3.0


def tiny_image_encoder(projection_dim: int = PROJECTED_WIDTH) -> CLIPVisionModelWithProjection:
    """For the adapters of Stable Diffusion, Stable Diffusion XL and FLUX."""
    config = CLIPVisionConfig(**_vision(), projection_dim=projection_dim)
    return CLIPVisionModelWithProjection(config).eval()


def tiny_siglip() -> SiglipVisionModel:
    """For the adapter of Stable Diffusion 3."""
    return SiglipVisionModel(SiglipVisionConfig(**_vision())).eval()


def unet_weights(unet: Any) -> Weights:
    """An adapter that reads one embedding of an image."""
    projection = ImageProjection(PROJECTED_WIDTH, unet.config.cross_attention_dim, TOKENS)
    weights = {
        name.replace("image_embeds", "proj"): LOUD * weight
        for name, weight in projection.state_dict().items()
    }
    return {"image_proj": weights, "ip_adapter": _unet_layers(unet)}


def unet_plus_weights(unet: Any) -> Weights:
    """An adapter that reads one embedding of each part of an image."""
    projection = IPAdapterPlusImageProjection(
        embed_dims=ENCODER_WIDTH,
        output_dims=unet.config.cross_attention_dim,
        hidden_dims=HEAD_WIDTH,
        heads=1,
        num_queries=TOKENS,
    )
    # The rest may be called as diffusers does.
    weights = {
        name.replace("to_out.0", "to_out"): weight
        for name, weight in projection.state_dict().items()
    }
    return {"image_proj": weights, "ip_adapter": _unet_layers(unet)}


def flux_weights(transformer: Any) -> Weights:
    """An adapter for the blocks that have a stream for text and one for the image."""
    width = transformer.config.joint_attention_dim
    layers: dict[str, Tensor] = {}
    for index in range(len(transformer.transformer_blocks)):
        for kind in ("to_k_ip", "to_v_ip"):
            layer = nn.Linear(width, transformer.inner_dim)
            layers |= {f"{index}.{kind}.{n}": w for n, w in layer.state_dict().items()}
    projection = ImageProjection(PROJECTED_WIDTH, width, TOKENS).state_dict()
    weights = {name.replace("image_embeds", "proj"): LOUD * w for name, w in projection.items()}
    return {"image_proj": weights, "ip_adapter": layers}


def sd3_weights(transformer: Any) -> Weights:
    """An adapter that reads one embedding of each part of an image, and the timestep."""
    heads, head_width = (
        transformer.config.num_attention_heads,
        transformer.config.attention_head_dim,
    )
    width = heads * head_width
    layers: dict[str, Tensor] = {}
    for index in range(len(transformer.attn_processors)):
        layer = SD3IPAdapterJointAttnProcessor2_0(width, width, head_width, HEAD_WIDTH)
        layers |= {f"{index}.{name}": weight for name, weight in layer.state_dict().items()}
    projection = IPAdapterTimeImageProjection(
        embed_dim=ENCODER_WIDTH,
        output_dim=width,
        hidden_dim=HEAD_WIDTH,
        heads=1,
        num_queries=TOKENS,
        timestep_in_dim=8,
    )
    return {"image_proj": projection.state_dict(), "ip_adapter": layers}


def save_adapter(folder: Path, weights: Weights, encoder: Any, name: str = "ip-adapter") -> Path:
    """Write an adapter as hubs have it: a safetensors file, beside the encoder's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}.{n}": w.contiguous() for part, ws in weights.items() for n, w in ws.items()}
    save_file(tensors, folder / f"{name}.safetensors")
    encoder.save_pretrained(folder / "image_encoder")
    return folder


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": ENCODER_WIDTH,
        "intermediate_size": ENCODER_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_PX,
        "patch_size": 16,
        # Images have to matter, or one mixed up would go unseen.
        "initializer_range": 1.0,
    }


def _unet_layers(unet: Any) -> dict[str, Tensor]:
    """Keys and values for each cross attention, in their order."""
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    layers: dict[str, Tensor] = {}
    for index, name in enumerate(crossing):
        text = unet.get_submodule(name.removesuffix(".processor")).to_k
        for kind in ("to_k_ip", "to_v_ip"):
            layer = nn.Linear(text.in_features, text.out_features, bias=False)
            layers[f"{2 * index + 1}.{kind}.weight"] = LOUD * layer.weight.detach()
    return layers
