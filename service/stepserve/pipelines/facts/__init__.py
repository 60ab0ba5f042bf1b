"""What is read off a pipeline without running it."""
