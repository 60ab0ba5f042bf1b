"""A request's own copy of a resident pipeline."""
