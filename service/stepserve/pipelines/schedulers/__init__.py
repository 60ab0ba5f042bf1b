"""What schedulers can do, and a scheduler of its own for every request."""
