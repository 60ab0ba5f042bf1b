"""Artwork, captions and latents to train on."""
