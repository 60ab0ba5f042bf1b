"""The catalogue of models, and the embedded ones."""
