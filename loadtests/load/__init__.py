"""The requests that load tests send, who sends them, and what comes back."""
