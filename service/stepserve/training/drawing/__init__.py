"""Images of how training goes and of what a diffusion model does."""
