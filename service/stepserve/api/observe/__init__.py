"""What is told of every HTTP exchange."""
