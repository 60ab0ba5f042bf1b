"""Which replica a request goes to. Pure: no Ray, no clock of its own."""
