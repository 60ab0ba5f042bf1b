"""What is found out about a pipeline by small requests, before it serves."""
