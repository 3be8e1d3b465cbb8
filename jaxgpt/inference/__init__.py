"""Sampling text."""
