"""What step caches cost an image, and what they gain."""
