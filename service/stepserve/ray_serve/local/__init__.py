"""A service on one machine, from its start to its end."""
