"""Stage 2: text encoder and denoiser, trained together to predict velocity from noisy latents."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepserve.training.data.artwork import Artwork
from stepserve.training.data.captions import Caption, write_caption
from stepserve.training.data.images import BACKGROUNDS
from stepserve.training.data.latents import LatentSet
from stepserve.training.diffusion import NoiseSchedule, spread_timesteps
from stepserve.training.drawing.grids import save_grid
from stepserve.training.errors import StartingModelError
from stepserve.training.loop.fingerprint import describe_settings, digest_text, digest_weights
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.loop.loop import Trainer


@dataclass(frozen=True)
class DenoiserConfig:
    """Shapes of the text encoder and the UNet, the noise schedule, and the loss."""

    latent_size: int = 8
    latent_channels: int = 16
    block_channels: tuple[int, ...] = (192, 256)
    attention_head_width: int = 64
    time_embedding_width: int = 512
    norm_groups: int = 32
    text_width: int = 256
    text_layers: int = 3
    text_heads: int = 4
    vocabulary: int = 3072
    max_tokens: int = 32
    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.02
    snr_gamma: float = 5.0
    caption_dropout: float = 0.1
    white_share: float = 0.5


SAMPLE_PROMPTS = (
    "red heart",
    "pizza",
    "rocket on a blue background",
    "smiling face with sunglasses",
    "cat face",
    "birthday cake on a pink background",
    "guitar",
    "sunflower",
    "red apple on a black background",
    "house",
    "fire engine",
    "octopus on a yellow background",
)


def build_unet(config: DenoiserConfig) -> UNet2DConditionModel:
    """An untrained UNet. Captions steer it by cross-attention and through the time embedding."""
    blocks = len(config.block_channels)
    return UNet2DConditionModel(
        sample_size=config.latent_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        layers_per_block=1,
        block_out_channels=config.block_channels,
        # One attention over image and caption together and no feed-forward layers, as in
        # DeepFloyd IF: fewer operations for the same size, and each of them gives a row the same
        # bits whatever other rows it shares a forward with (in bfloat16, channels last).
        down_block_types=("SimpleCrossAttnDownBlock2D",) * blocks,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * blocks,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.attention_head_width,
        norm_num_groups=config.norm_groups,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=config.time_embedding_width,
        addition_embed_type="text",
        addition_embed_type_num_heads=config.text_heads,
    )


def build_text_encoder(config: DenoiserConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder in CLIP's layout."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            projection_dim=config.text_width,
            intermediate_size=3 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.max_tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler(config: DenoiserConfig) -> DDIMScheduler:
    """The scheduler whose settings every other scheduler class is made from."""
    return DDIMScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        # Latents are not bounded by 1: clipping would ruin them.
        clip_sample=False,
        set_alpha_to_one=True,
        # Unused with trailing timesteps; StableDiffusionPipeline insists on it.
        steps_offset=1,
    )


class DenoiserStage:
    """Loss and sample grids of the denoiser over latents that were computed before."""

    def __init__(
        self,
        config: DenoiserConfig,
        loop: LoopConfig,
        artwork: Artwork,
        latents: LatentSet,
        tokenizer: CLIPTokenizer,
        autoencoder: AutoencoderKL,
        folder: Path,
    ) -> None:
        self.config = config
        self.loop = loop
        self.artwork = artwork
        self.latents = latents
        self.tokenizer = tokenizer
        self.autoencoder = autoencoder
        self.folder = folder
        self.schedule = NoiseSchedule.scaled_linear(
            config.timesteps, config.beta_start, config.beta_end
        )
        self.unet = build_unet(config)
        self.unet.to(memory_format=torch.channels_last)
        self.text_encoder = build_text_encoder(config, tokenizer)
        self.started_from: dict[str, str] = {}

    def start_from(self, earlier: StableDiffusionPipeline) -> None:
        """Begin with the weights of an earlier model instead of random ones.

        Raises:
            StartingModelError: its text encoder or denoiser has other shapes.
        """
        for name in ("unet", "text_encoder"):
            part = getattr(earlier, name)
            try:
                getattr(self, name).load_state_dict(part.state_dict())
            except RuntimeError as error:
                raise StartingModelError(
                    f"the {name} to start from does not fit: {error}"
                ) from error
            self.started_from[f"start.{name}"] = digest_weights(part)

    def train(self) -> StableDiffusionPipeline:
        """Train, or finish an interrupted training, and return the assembled pipeline."""
        modules = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        on_sample, origin = self.draw_samples, self.origin()
        Trainer("denoiser", self.loop, modules, self.loss, self.folder, on_sample, origin).run()
        return self.pipeline()

    def origin(self) -> dict[str, str]:
        """What the loss depends on: shapes, captions, tokens and latents."""
        return {
            **describe_settings("denoiser", self.config),
            "artwork.names": digest_text([*self.artwork.names, *self.artwork.styles]),
            "tokenizer": digest_text(sorted(map(repr, self.tokenizer.get_vocab().items()))),
            "autoencoder": digest_weights(self.autoencoder),
            **self.started_from,
        }

    def pipeline(self) -> StableDiffusionPipeline:
        """An ordinary diffusers pipeline around the parts as they are now."""
        return StableDiffusionPipeline(
            vae=self.autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=build_scheduler(self.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def loss(self, step: int, generator: torch.Generator) -> torch.Tensor:
        """Weighted squared error of the predicted velocities of one batch (scalar)."""
        x_0, captions = self.batch(generator)
        t = spread_timesteps(len(x_0), self.schedule.timesteps, generator)
        noise = torch.randn(x_0.shape, generator=generator)
        x_t = self.schedule.add_noise(x_0, noise, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            text = self.text_encoder(self.tokens(captions))[0]
            predicted = self.unet(x_t, t, text).sample
        error = (predicted.float() - self.schedule.velocity(x_0, noise, t)) ** 2
        weight = self.schedule.loss_weight(t, self.config.snr_gamma)
        return (error.mean(dim=(1, 2, 3)) * weight).mean()

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        """Scaled latents (batch, channels, size, size) and their captions, some left empty."""
        size = self.loop.batch_size
        chance = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
        colours = list(BACKGROUNDS)
        images = torch.randint(len(self.artwork), (size,), generator=generator).tolist()
        backgrounds = [self._background(chance, colours) for _ in images]
        mirrored = [chance.random() < 0.5 for _ in images]
        captions = [
            self._caption(image, colours[background], chance)
            for image, background in zip(images, backgrounds, strict=True)
        ]
        return self.latents.select(images, backgrounds, mirrored), captions

    def tokens(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids (captions, tokens), padded to the fixed length that the pipeline uses too."""
        ids: torch.Tensor = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.config.max_tokens,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    def draw_samples(self, step: int) -> None:
        """The same prompts and seeds every time, so that sheets can be compared."""
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = pipeline(
                list(SAMPLE_PROMPTS),
                num_inference_steps=20,
                guidance_scale=4.0,
                generator=[torch.Generator().manual_seed(i) for i in range(len(SAMPLE_PROMPTS))],
                output_type="pt",
            ).images
        save_grid(images.float() * 2 - 1, self.folder / f"samples-{step:06d}.png", columns=6)

    def _background(self, chance: random.Random, colours: list[str]) -> int:
        if chance.random() < self.config.white_share:
            return colours.index("white")
        return chance.randrange(len(colours))

    def _caption(self, image: int, background: str, chance: random.Random) -> str:
        if chance.random() < self.config.caption_dropout:
            return ""
        name, style = self.artwork.names[image], self.artwork.styles[image]
        return write_caption(Caption(name, style, background), chance)
