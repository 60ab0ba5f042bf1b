"""Routing policies against each other, in a simulation."""
