"""Layers in stages over the mesh axis `pipeline`."""
