"""From a folder or a hub to a resident pipeline."""
