"""What the larger commands do once their flags are right: the first to import JAX."""
