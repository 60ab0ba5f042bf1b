"""LoRA adapters of a resident pipeline."""
