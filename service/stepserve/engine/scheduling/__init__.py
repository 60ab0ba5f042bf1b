"""Who goes next, at what cost, by when, and whether to take on more. Pure: no torch."""
