"""State, loss, step and loop."""
