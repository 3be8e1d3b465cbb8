"""The special tokens that an objective needs, and a text with those that its model expects."""

from collections.abc import Iterable

from jaxgpt.tokenizer.base import FIRST, ROLES, Tokenizer
from jaxgpt.tokenizer.special import special_id

SENTINEL = "<extra_id_{}>"


def role_id(tokenizer: Tokenizer, purpose: str, role: str) -> int:
    """Returns the id of the special token that serves as `role`, one of `base.ROLES`. Raises
    `BadInput` if there is none: `purpose` needs it."""
    found = tokenizer.role(role)
    return special_id(tokenizer, purpose, *ROLES[role]) if found is None else found


def sentinels(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of `<extra_id_0>`, `<extra_id_1>`, ..., up to the first that is missing."""
    found: list[int] = []
    while (token := tokenizer.special.get(SENTINEL.format(len(found)))) is not None:
        found.append(token)
    return found


def framed(
    tokenizer: Tokenizer, first: Iterable, second: Iterable | None = None
) -> tuple[list[int], list[int]]:
    """Returns the ids of one text or two with the special tokens that the model expects around
    them, and each token's type.

    BERT: `[CLS] first [SEP] second [SEP]` of types 0 and 1; RoBERTa:
    `<s> first </s> </s> second </s>` of type 0; T5: `first </s> second </s>`. Without such tokens
    `end_of_text` stands after each text.
    """
    ids: list[int] = []
    types: list[int] = []
    for token, kind in tokenizer.frame(second is not None):
        part = [token] if token >= 0 else first if token == FIRST else second
        ids += map(int, part)
        types += [kind] * len(part)
    return ids, types
