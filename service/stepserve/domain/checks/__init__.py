"""Checks of requests against what their models take, and how their messages say it."""
