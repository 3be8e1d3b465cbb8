"""The layers of a stack as one tree of arrays, and how a program runs through them."""
