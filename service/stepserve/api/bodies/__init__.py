"""Bodies of requests: read within limits, parsed, validated."""
