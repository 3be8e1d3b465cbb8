"""Which documents are held out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data.split import hold_out, measure
from jaxgpt.text import pieces


def split(texts, fraction):
    def documents():
        return (piece for text in texts for piece in pieces.split_into_pieces([text], "f"))

    parts = hold_out(documents, measure(documents, "s"), fraction)
    return tuple([piece.text for piece in pieces.join_pieces(part())] for part, _ in parts)


def test_whole_documents_are_held_out_from_the_end():
    texts = [f"{i:03}" for i in range(10)]
    assert split(texts, 0.1) == (texts[:9], texts[9:])
    assert split(texts, 0.34) == (texts[:7], texts[7:])
    assert split(texts, 0.001) == (texts[:9], texts[9:]), "at least one"
    assert split(texts, 0.999) == (texts[:1], texts[1:]), "not all"
    assert split(["x" * 10, "y" * 50, "z" * 40], 0.4) == (["x" * 10, "y" * 50], ["z" * 40])
    assert split(["x" * 60, "y" * 30, "z" * 10], 0.4) == (["x" * 60], ["y" * 30, "z" * 10])
    assert split(["x" * 90, "y" * 5, "z" * 5], 0.05) == (["x" * 90, "y" * 5], ["z" * 5])


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(10))
    train, validation = split([text], 0.25)
    assert "".join(train + validation) == text
    assert validation == ["line 8\nline 9\n"], "the first line within the last quarter"
    assert split(["a\n" + "b" * 98], 0.5) == (["a\n"], ["b" * 98]), "else the last line"
    assert split(["x" * 100], 0.1) == (["x" * 90], ["x" * 10]), "else the character"


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from("ab\n"), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(1, 9),
)
def test_a_single_document_in_pieces_is_cut_where_a_whole_one_is(text, fraction, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARS", size)
        found = split([text], fraction)
    cut = min(max(1, round(len(text) * (1 - fraction))), len(text) - 1)
    line = text.find("\n", cut - 1) + 1
    if not 0 < line < len(text):
        line = text.rfind("\n", 0, cut) + 1
    assert found == ([text[: line or cut]], [text[line or cut :]])
