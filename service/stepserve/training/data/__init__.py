"""Artwork, captions, latents and folders of images to train on."""
