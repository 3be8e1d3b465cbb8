"""What a run will need, found by compiling its step: memory, FLOPs, traffic, time."""
