"""A request as a greenlet that parks at each module call."""
