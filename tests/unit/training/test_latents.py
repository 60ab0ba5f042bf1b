"""Latents are computed once for each autoencoder and artwork."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from stepserve.training.data.artwork import Artwork
from stepserve.training.data.images import BACKGROUNDS, artwork_tensor, paint, shrink
from stepserve.training.data.latents import encode_artwork
from stepserve.training.stages.vae import build_autoencoder
from tiny_recipe import tiny_recipe


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return build_autoencoder(tiny_recipe().vae).eval()


def test_latents_are_of_unit_variance_and_in_order(
    autoencoder: AutoencoderKL, artwork: Artwork, tmp_path: Path
) -> None:
    images = artwork_tensor(artwork)
    latents = encode_artwork(autoencoder, images, tmp_path / "latents.safetensors")
    assert latents.scaled.shape == (len(artwork), len(BACKGROUNDS), 2, 4, 8, 8)
    assert latents.scaled.float().std().item() == pytest.approx(1, abs=0.01)
    blue = list(BACKGROUNDS).index("blue")
    painted = paint(shrink(images[3:4], 16), torch.tensor([BACKGROUNDS["blue"]])).flip(-1)
    with torch.no_grad():
        wanted = autoencoder.encode(painted).latent_dist.mode() * latents.scaling_factor
    torch.testing.assert_close(latents.select([3], [blue], [True]), wanted, rtol=0.05, atol=0.05)


def test_latents_are_kept_but_not_those_of_another_autoencoder(
    autoencoder: AutoencoderKL, artwork: Artwork, tmp_path: Path
) -> None:
    images, path = artwork_tensor(artwork), tmp_path / "latents.safetensors"
    first = encode_artwork(autoencoder, images, path)
    written = path.stat().st_mtime_ns
    encode_artwork(autoencoder, images, path)
    assert path.stat().st_mtime_ns == written
    with torch.no_grad():
        autoencoder.encoder.conv_in.weight.mul_(2)
    second = encode_artwork(autoencoder, images, path)
    assert not torch.equal(first.scaled, second.scaled)
    assert len(encode_artwork(autoencoder, images[:2], path).scaled) == 2


def test_latents_from_before_origins_were_kept_are_believed(
    autoencoder: AutoencoderKL, artwork: Artwork, tmp_path: Path
) -> None:
    images, path = artwork_tensor(artwork), tmp_path / "latents.safetensors"
    encode_artwork(autoencoder, images, path)
    stored = load_file(path)
    stored["scaled"] = torch.zeros_like(stored["scaled"])
    save_file(stored, path)
    assert encode_artwork(autoencoder, images, path).scaled.count_nonzero() == 0
