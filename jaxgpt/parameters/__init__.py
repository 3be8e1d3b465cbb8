"""How matrices are stored, and counted."""
