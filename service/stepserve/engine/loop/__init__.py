"""The engine thread: decide, run, settle."""
