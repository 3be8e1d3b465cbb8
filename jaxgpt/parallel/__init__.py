"""Devices as a mesh of named axes, and which array axis lies on which."""
