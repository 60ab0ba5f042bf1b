"""The deployment that holds one resident pipeline."""
