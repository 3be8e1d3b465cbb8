"""Objectives on labelled rows: seq2seq, classes of texts and of words, spans that answer."""
