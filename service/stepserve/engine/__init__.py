"""Step-level batching: many pipeline calls, one forward at a time, shared where calls agree."""
