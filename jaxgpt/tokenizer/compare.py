"""Whether two tokenizers are the same."""

import numpy as np

from jaxgpt.tokenizer.base import Tokenizer

# A text and ids by which two tokenizers are told apart
PROBE = (
    "The naïve café (東京), 2024: is this the one?\n\n"
    "\tfor i in range(10):\n    return x != None  # don't\n"
)
PROBED_IDS = 2000


def difference(theirs: Tokenizer, mine: Tokenizer) -> str:
    """Says what differs between two tokenizers, in the text of ids or in the ids of a text; '' if
    nothing does. Two classes may read the same vocabulary, so files are not compared."""
    if theirs.end_of_text != mine.end_of_text:
        return f"its end-of-text is {theirs.end_of_text}, not {mine.end_of_text}"
    shared = min(theirs.vocab_size, mine.vocab_size)
    for i in range(0, shared, max(1, shared // PROBED_IDS)):
        if (one := theirs.decode([i])) != (other := mine.decode([i])):
            return f"its id {i} is {one!r}, not {other!r}"
    if not np.array_equal(theirs.encode(PROBE), mine.encode(PROBE)):
        return f"it cuts {PROBE!r} elsewhere"
    return ""
