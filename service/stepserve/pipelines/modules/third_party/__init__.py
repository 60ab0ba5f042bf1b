"""Functions and classes of other libraries that are given another meaning, each with its reason."""
