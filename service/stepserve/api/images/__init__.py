"""From a checked request to the response with its images."""
