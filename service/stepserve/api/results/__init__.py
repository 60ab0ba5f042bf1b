"""Finished images that are kept for a while, and signed links to them."""
