"""What stands around the modules of a resident pipeline."""
