"""Hyper-parameter sweeps: which runs, how they are trained, and their results."""
