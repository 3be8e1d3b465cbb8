"""Fill in the middle (arXiv:2207.14255): documents whose middle a decoder writes last.

A document is cut at two random characters into prefix, middle and suffix, each tokenized by
itself, and becomes, with a marker in front of each part,

    PSM    <prefix> the prefix <suffix> the suffix <middle> the middle <end of text>
    SPM    <prefix> <suffix> the suffix <middle> the prefix the middle <end of text>

(PSM of section 3, SPM's variant 2 of appendix D). This is done within a row, to each document or
part of one that the row holds, and keeps its length: the ends of the suffix, then the start of the
prefix make room for the markers. So rows are packed as before.
"""

from typing import NamedTuple

import numpy as np

from jaxgpt.denoising.draws import uniforms
from jaxgpt.denoising.words import Words, words_of
from jaxgpt.tokenizer.base import Tokenizer

MARKERS = 3
LONGEST_WORD = 16  # tokens on either side of a cut: beyond, what stands there is no word


class Middle(NamedTuple):
    """How documents are changed: a share `rate` of them, a share `spm_rate` of those to SPM."""

    tokenizer: Tokenizer
    prefix: int
    suffix: int
    middle: int
    rate: float = 0.5
    spm_rate: float = 0.5


def move_middles(
    arrays: dict[str, np.ndarray], how: Middle, seed: int, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns a decoder's `arrays` (`inputs`, `targets` [n, T], packed: `segments`), some of their
    documents changed. A changed document's last target is end-of-text, whatever followed."""
    inputs, targets = arrays["inputs"].copy(), arrays["targets"].copy()
    end = how.tokenizer.end_of_text
    begins = inputs == end
    if "segments" in arrays:
        segments = arrays["segments"]
        begins |= np.diff(segments, axis=1, prepend=0) != 0  # also where the padding begins
    for number, row in enumerate(rows):
        starts = np.union1d(0, np.nonzero(begins[number])[0])
        draws = uniforms(seed, np.array([row]), 4 * len(starts))[0].reshape(-1, 4)
        for start, stop, draw in zip(starts, [*starts[1:], inputs.shape[1]], draws):
            if draw[0] >= how.rate or ("segments" in arrays and not segments[number, start]):
                continue
            has_end = inputs[number, start] == end
            start += has_end
            changed = change(inputs[number, start:stop], how, *draw[1:])
            if changed is not None:
                inputs[number, start:stop] = changed
                targets[number, start : stop - 1] = changed[1:]
                targets[number, stop - 1] = end
                if has_end:
                    targets[number, start - 1] = changed[0]
    return arrays | {"inputs": inputs, "targets": targets}


def change(
    tokens: np.ndarray, how: Middle, kind: float, first: float, second: float
) -> np.ndarray | None:
    """Returns a document's `tokens`, without its end-of-text, in the new order and as many; None if
    its middle leaves no room. The draws from [0, 1) say whether to SPM, and where to cut."""
    words = words_of(how.tokenizer)
    length = int(words.sizes[tokens].sum())
    first, second = sorted((int(first * (length + 1)), int(second * (length + 1))))
    prefix, rest = cut(tokens, first, how.tokenizer, words)
    behind = max(second - int(words.sizes[prefix].sum()), 0)
    middle, suffix = cut(rest, behind, how.tokenizer, words)
    room = len(tokens) - MARKERS - len(middle)
    if room < 0:
        return None
    prefix = prefix[max(len(prefix) - room, 0) :]
    suffix = suffix[: room - len(prefix)]
    if kind < how.spm_rate:
        parts = [how.prefix, how.suffix], suffix, [how.middle], prefix, middle
    else:
        parts = [how.prefix], prefix, [how.suffix], suffix, [how.middle], middle
    return np.concatenate(parts).astype(np.int32)


def cut(
    tokens: np.ndarray, place: int, tokenizer: Tokenizer, words: Words
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of the text's first `place` bytes (fewer, so that no character is cut),
    and of the rest.

    Where that is inside a token, the two halves of its word are tokenized anew. No token spans two
    words, so this is what the two texts as a whole would give. A tokenizer that does not give a
    word's tokens again by itself (one that puts a space in front of any text) cuts in front of the
    token.
    """
    sizes = np.cumsum(words.sizes[tokens])
    at = int(np.searchsorted(sizes, place, side="right"))  # the token that `place` is in
    before = int(sizes[at - 1]) if at else 0
    while at < len(tokens) and place and 0x80 <= words.texts[tokens[at]][place - before] < 0xC0:
        place -= 1  # the byte goes on with the character before it, if the row has that
        at = int(np.searchsorted(sizes, place, side="right"))
        before = int(sizes[at - 1]) if at else 0
    if at == len(tokens) or place == before:
        return tokens[:at], tokens[at:]
    starts = words.starts(tokens[max(at - LONGEST_WORD, 0) : at + LONGEST_WORD])
    offset = max(at - LONGEST_WORD, 0)
    here = at - offset
    low = here - int(np.argmax(starts[here::-1]))
    later = starts[here + 1 :]
    high = here + 1 + (int(np.argmax(later)) if later.any() else len(later))
    low, high = offset + low, offset + high
    text = b"".join(words.texts[token] for token in tokens[low:high].tolist())
    inside = place - (int(sizes[low - 1]) if low else 0)
    left = text[:inside].decode("utf-8", "ignore")
    right = text[len(left.encode()) :].decode("utf-8", "replace")
    whole, *halves = map(tokenizer.encode, (left + right, left, right))
    if not np.array_equal(whole, tokens[low:high]):
        return tokens[:at], tokens[at:]
    return np.append(tokens[:low], halves[0]), np.append(halves[1], tokens[high:])
