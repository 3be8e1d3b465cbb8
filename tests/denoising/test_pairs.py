"""Pairs of texts: half of them another document's, cut at sentences, and nothing else tells."""

import numpy as np
import pytest

from jaxgpt.denoising.pairs import Documents, Frame, PairChunks, pair_rows

CLS, SEP, END, DOT = 60_000, 60_001, 0, 1
ROOM = 61


@pytest.fixture(scope="module")
def source() -> PairChunks:
    """300 documents of 0 to 200 tokens; a token says where it stands, every ninth ends a
    sentence."""
    sizes = np.random.default_rng(0).integers(0, 200, 300)
    tokens = np.arange(2, 2 + sizes.sum() + 300)
    tokens[::9] = DOT
    starts = np.cumsum(sizes + 1) - sizes - 1
    tokens[starts] = END
    return PairChunks(tokens, Documents.of(starts, len(tokens)), ROOM + 3)


@pytest.fixture(scope="module")
def made(source):
    chunks = np.resize(np.arange(len(source)), 4000)
    frame = Frame(CLS, SEP, np.arange(70_000) == DOT)
    return pair_rows(source.read(chunks), source, frame, 0, np.arange(4000)), chunks


def place_of(source, text):
    """Where a part of the corpus stands: of its first token that says so."""
    known = np.nonzero(text > DOT)[0]
    return text[known[0]] - 2 - known[0]


def test_pieces_are_whole_documents(source):
    """Each token of a document of two or more is in one piece, but for a last one by itself."""
    covered = np.concatenate([np.arange(s, s + n) for s, n, _ in source.pieces])
    assert len(np.unique(covered)) == len(covered) and (source.tokens[covered] != END).all()
    lengths = source.pieces[:, 1]
    left_out = (source.tokens != END).sum() - len(covered)
    assert lengths.min() == 2 and lengths.max() == ROOM and left_out < 12
    read = source.read(np.arange(len(source)))["tokens"]
    for (start, length, _), row in zip(source.pieces, read):
        assert (row[:length] == source.tokens[start : start + length]).all()
        assert (row[length:] == 0).all()


def test_rows(source, made):
    """[CLS] A [SEP] B [SEP]; B goes on behind A, or begins in another document."""
    arrays, chunks = made
    labels = arrays["labels"]
    assert abs(labels.mean() - 0.5) < 0.03
    ends = source.documents.starts + source.documents.sizes
    begins_at_sentence, cut_at_sentence, lengths = [], [], {0: [], 1: []}
    for row, chunk in enumerate(chunks[:1500]):
        start, length, document = source.pieces[chunk]
        tokens = arrays["tokens"][row]
        seps = np.nonzero(tokens == SEP)[0]
        assert tokens[0] == CLS and len(seps) == 2
        first, second = tokens[1 : seps[0]], tokens[seps[0] + 1 : seps[1]]
        assert len(first) and len(second) and (tokens[seps[1] + 1 :] == 0).all()
        assert (first == source.tokens[start : start + len(first)]).all()
        types = np.repeat([0, 1, 0], [seps[0] + 1, seps[1] - seps[0], ROOM + 2 - seps[1]])
        assert (arrays["types"][row] == types).all()
        assert (arrays["segments"][row] == (np.arange(ROOM + 3) <= seps[1])).all()
        text = (arrays["segments"][row] == 1) & (tokens != CLS) & (tokens != SEP)
        assert (arrays["is_text"][row] == text).all()
        cut_at_sentence.append(first[-1] == DOT)
        lengths[labels[row]].append(len(second) / length)
        if not (second > DOT).any():
            continue
        place = place_of(source, second)
        if labels[row] == 0:
            assert place == start + len(first) and len(first) + len(second) == length
        else:
            other = np.searchsorted(ends, place, side="right")
            assert other != document and place + len(second) <= ends[other]
            begins_at_sentence.append(source.tokens[place - 1] == DOT)
    assert np.mean(cut_at_sentence) > 0.8 and np.mean(begins_at_sentence) > 0.8
    assert np.mean(lengths[1]) > 0.8 * np.mean(lengths[0])


def test_a_row_is_drawn_alike_in_any_company(source, made):
    arrays, chunks = made
    some = np.array([3999, 12, 500])
    frame = Frame(CLS, SEP, np.arange(70_000) == DOT)
    alone = pair_rows(source.read(chunks[some]), source, frame, 0, some)
    assert all((alone[name] == arrays[name][some]).all() for name in alone)
