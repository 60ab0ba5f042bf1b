"""Parked module calls: their arguments, which may share a forward, and how they are stacked."""
