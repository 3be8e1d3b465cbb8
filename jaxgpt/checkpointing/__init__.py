"""Saving and restoring the whole state."""
