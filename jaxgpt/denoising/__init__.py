"""Objectives on unlabelled text: a part of it is hidden, moved or marked, and the model finds it.

`masked`, `pairs`, `spans`, `prefix` and `middle` make a batch's arrays of rows of tokens, as pure
functions of (tokens, seed, indices of the rows): numpy on the host, all rows at once.
"""
