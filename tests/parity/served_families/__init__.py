"""Families of the parity suite as an operator serves them and as clients reach them over HTTP."""
