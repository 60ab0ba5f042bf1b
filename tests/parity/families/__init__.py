"""Tiny pipelines of every family with random weights, built from configs without a download."""
