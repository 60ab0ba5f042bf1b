"""Stepserve: a diffusion-model server that batches at every denoising step."""

__version__ = "0.2.0"
