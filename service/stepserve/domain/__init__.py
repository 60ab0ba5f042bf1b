"""Words every room shares: requests, events, states, errors, timings. Standard library only."""
