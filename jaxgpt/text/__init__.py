"""Text: where documents come from, and how they are cleaned."""
