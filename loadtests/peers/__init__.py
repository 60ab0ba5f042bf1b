"""Other ways to serve the same model: short servers, each as its own documentation recommends."""
