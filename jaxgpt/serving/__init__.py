"""Answering many at once: continuous batching, and the HTTP interface to it."""
