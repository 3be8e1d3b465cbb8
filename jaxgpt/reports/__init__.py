"""What happened in a run, or in several, on one page."""
