"""Attention whose positions are split over the mesh axis `context`."""
