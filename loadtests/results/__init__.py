"""What load tests measure, and how it is shown."""
