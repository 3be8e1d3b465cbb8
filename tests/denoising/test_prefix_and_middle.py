"""Prefixes of every length, and middles: documents that come back, cut anywhere, as often as
said."""

import numpy as np
import pytest

from jaxgpt.config.schema import IGNORE
from jaxgpt.denoising.middle import Middle, cut, move_middles
from jaxgpt.denoising.prefix import split_rows
from jaxgpt.denoising.words import words_of
from jaxgpt.tokenizer import make_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from tests.conftest import CORPUS

NAMES = "<|fim_prefix|>,<|fim_suffix|>,<|fim_middle|>"


def test_a_prefix_of_any_length_and_no_target_inside():
    rows, length = np.arange(20_000), 12
    tokens = np.tile(np.arange(length + 1), (len(rows), 1))
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:].copy()}
    arrays["targets"][::2, 10:] = IGNORE  # padding
    made = split_rows(arrays, 0, rows)
    prefix, targets = made["prefix"], made["targets"]
    # token 4 is the first target behind a prefix of 4: position 3 predicts it
    first = np.argmax(targets != IGNORE, axis=1)
    assert (first == prefix - 1).all() and (targets[np.arange(len(rows)), first] == prefix).all()
    behind = np.arange(length) >= prefix[:, None] - 1
    assert (targets == np.where(behind, arrays["targets"], IGNORE)).all()
    for some, most in ((slice(0, None, 2), 10), (slice(1, None, 2), 12)):
        counts = np.bincount(prefix[some], minlength=13)[1 : most + 1]
        assert counts.sum() == 10_000 and abs(counts * most / 10_000 - 1).max() < 0.16
    assert split_rows({k: v[5:6] for k, v in arrays.items()}, 0, rows[5:6])["prefix"] == prefix[5]


@pytest.fixture(scope="module", params=["byte", "sentencepiece:400"])
def how(request) -> Middle:
    text = TrainingText(lambda: [CORPUS], len(CORPUS))
    tokenizer = make_tokenizer(request.param, [text], NAMES)
    return Middle(tokenizer, *(tokenizer.special[name] for name in NAMES.split(",")))


def documents(how: Middle, length: int, count: int) -> dict[str, np.ndarray]:
    """`count` rows of the licence's tokens: [part of one] end-of-text [start of another]."""
    ids = np.resize(how.tokenizer.encode(CORPUS), count * 97 + length)
    tokens = np.stack([ids[97 * i :][: length + 1] for i in range(count)])
    tokens[:, length // 3] = how.tokenizer.end_of_text
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def parts(tokens: np.ndarray, how: Middle, is_spm: bool) -> tuple[str, str, str]:
    """(prefix, middle, suffix) of a changed document; of SPM, prefix and middle as one."""
    text = how.tokenizer.decode(tokens)
    begin, suffix, middle = NAMES.split(",")
    if is_spm:
        assert text.startswith(begin + suffix)
        after, before = text.removeprefix(begin + suffix).split(middle)
        return before, "", after
    assert text.startswith(begin)
    before, rest = text.removeprefix(begin).split(suffix)
    after, inside = rest.split(middle)
    return before, inside, after


def test_documents_come_back(how):
    """Prefix, middle and suffix are the document's own text, but for what made room: the suffix's
    end, then the prefix's start. Rows stay as long, and targets are the next tokens."""
    arrays, rows, end = documents(how, 120, 200), np.arange(200), how.tokenizer.end_of_text
    for spm_rate in (0.0, 1.0):
        made = move_middles(arrays, how._replace(rate=1.0, spm_rate=spm_rate), 0, rows)
        whole = 0
        for row in rows:
            for some in (slice(0, 40), slice(41, 120)):
                tokens, original = made["inputs"][row, some], arrays["inputs"][row, some]
                if np.array_equal(tokens, original):
                    continue  # its middle left no room
                targets = made["targets"][row, some]
                assert (targets[:-1] == tokens[1:]).all() and targets[-1] == end
                before, inside, after = parts(tokens, how, spm_rate == 1.0)
                text = how.tokenizer.decode(original)
                assert before + inside + after in text or text.startswith(before + inside)
                whole += (before + inside + after).strip() != ""
        assert whole > 380
        assert (made["inputs"][:, 40] == end).all()
        assert (made["targets"][:, 40] == made["inputs"][:, 41]).all()
        assert (arrays["inputs"] == documents(how, 120, 200)["inputs"]).all()


def test_packed_documents_keep_their_places(how):
    """Segments say where documents end; padding stays."""
    arrays, rows = documents(how, 120, 50), np.arange(50)
    arrays["segments"] = np.repeat([1, 2, 0], [40, 60, 20])[None].repeat(50, 0)
    arrays["inputs"] = np.where(arrays["segments"], arrays["inputs"], 0)
    made = move_middles(arrays, how._replace(rate=1.0), 0, rows)
    assert (made["inputs"][:, 100:] == 0).all() and "segments" in made
    assert (made["targets"][:, 100:] == arrays["targets"][:, 100:]).all()
    changed = made["inputs"][:, 40] == how.tokenizer.end_of_text
    assert changed.all() and ((made["inputs"] == how.middle).sum(1) == 2).mean() > 0.9


def test_a_rest_of_a_document_leaves_the_segment_before_alone(how):
    """A packed row's segment without end-of-text in front goes on with a longer document: what
    stands before it is another one's last token, which is followed by end-of-text."""
    arrays, rows, end = documents(how, 120, 50), np.arange(50), how.tokenizer.end_of_text
    arrays["inputs"] = arrays["inputs"].copy()
    arrays["inputs"][:, 40] = how.tokenizer.encode("a")[-1]
    arrays["segments"] = np.repeat([1, 2], [40, 80])[None].repeat(50, 0)
    arrays["targets"] = np.where(np.arange(120) == 39, end, arrays["targets"])
    made = move_middles(arrays, how._replace(rate=1.0), 0, rows)
    assert (made["inputs"][:, 40] == how.prefix).mean() > 0.9
    assert (made["targets"][:, 39] == end).all()


def test_as_many_as_said(how):
    arrays, rows = documents(how, 400, 2000), np.arange(2000)
    made = move_middles(arrays, how._replace(rate=0.6, spm_rate=0.25), 1, rows)["inputs"]
    is_spm = (made[:, :-1] == how.prefix) & (made[:, 1:] == how.suffix)
    changed = (made == how.middle).sum()
    assert abs(changed / 4000 - 0.6) < 0.03 and abs(is_spm.sum() / changed - 0.25) < 0.03
    some = np.array([1999, 7])
    alone = move_middles(
        {name: array[some] for name, array in arrays.items()},
        how._replace(rate=0.6, spm_rate=0.25),
        1,
        rows[some],
    )
    assert (alone["inputs"] == made[some]).all()


def test_a_cut_inside_a_token_tokenizes_both_halves_anew(how):
    """At each byte: the halves are the text's, and what the tokenizer makes of them as a whole."""
    tokenizer, words = how.tokenizer, words_of(how.tokenizer)
    text = "Each Contributor grants_2 you a café licence: ∂x,\n    (and) no more."
    tokens = tokenizer.encode(text)
    seen = set()
    for place in range(len(text.encode()) + 1):
        left, right = cut(tokens, place, tokenizer, words)
        halves = tokenizer.decode(left), tokenizer.decode(right)
        assert "".join(halves) == text and place - len(halves[0].encode()) in (0, 1, 2)
        for half, ids in zip(halves, (left, right)):
            assert ids.tolist() == tokenizer.encode(half).tolist()
        seen.add(len(halves[0]))
    assert seen == set(range(len(text) + 1))  # every character


def test_a_row_that_begins_inside_a_character_is_cut_behind_it():
    """A row of bytes begins anywhere; a cut in its first, broken character is in front of it."""
    tokenizer = make_tokenizer("byte", special_tokens=NAMES)
    words, tokens = words_of(tokenizer), tokenizer.encode("日本é")
    for first in range(len(tokens)):
        for place in range(len(tokens) - first + 1):
            left, right = cut(tokens[first:], place, tokenizer, words)
            assert np.append(left, right).tolist() == tokens[first:].tolist()
            assert len(left) <= place and (not len(right) or right[0] >> 6 != 2 or not len(left))
