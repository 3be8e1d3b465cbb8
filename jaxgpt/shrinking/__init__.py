"""Smaller models: quantised, pruned, factorised."""
