"""A resident pipeline behind an engine."""
