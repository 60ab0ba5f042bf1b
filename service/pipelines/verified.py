"""Pipelines whose requests the parity suite has seen to get at once what each gets alone."""

VERIFIED = frozenset({"StableDiffusionPipeline"})
