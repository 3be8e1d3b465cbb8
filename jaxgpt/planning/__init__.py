"""What a run will need, measured by compiling its step: memory, FLOPs, traffic, time."""
