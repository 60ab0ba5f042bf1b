"""Training of the small embedded diffusion models (DDPM objective)."""
