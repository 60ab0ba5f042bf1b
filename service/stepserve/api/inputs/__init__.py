"""Images that requests bring along: by upload, as text, by address."""
