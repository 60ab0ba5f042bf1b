"""IP-Adapters: reference images that requests are drawn after, with a scale for each."""
