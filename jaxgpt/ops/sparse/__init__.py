"""Attention that is not full: patterns as values, and the kernels that skip what they leave out."""
