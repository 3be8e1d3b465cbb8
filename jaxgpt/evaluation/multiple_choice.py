"""Accuracy on benchmarks whose answers are chosen by likelihood (see `evaluation.benchmarks`).

The split into tokens is that of EleutherAI's evaluation harness, apart from the end-of-text token
that our models have in front of each document.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from jaxgpt.evaluation.benchmarks import Item
from jaxgpt.evaluation.tasks import AnswerScorer
from jaxgpt.tokenizer import Tokenizer


def token_pair(
    tokenizer: Tokenizer, prompt: str, continuation: str
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "C"]]:
    """Returns the tokens of a prompt and of its continuation, as the harness separates them.

    Spaces at the prompt's end go to the continuation, and both are encoded together: of "a " and
    "b" it scores " b", which is one token in most vocabularies.
    """
    prompt_ids = tokenizer.encode(prompt.rstrip())
    return prompt_ids, tokenizer.encode(prompt + continuation)[len(prompt_ids) :]


def multiple_choice(items: Sequence[Item], scorer: AnswerScorer, params: dict) -> dict:
    """Returns `examples`, `accuracy` (of the likeliest choice) and `accuracy_norm` (of the choice
    that is likeliest by character)."""
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    pairs = [token_pair(scorer.tokenizer, *pair) for pair in pairs]
    scores, start, right, right_norm = scorer.scores(params, pairs), 0, 0, 0
    for item in items:
        item_scores = scores[start : start + len(item.choices)]
        start += len(item.choices)
        right += int(item_scores.argmax()) == item.right
        lengths = np.array([len(choice) - 1 for choice in item.choices])  # without the space
        right_norm += int((item_scores / np.maximum(lengths, 1)).argmax()) == item.right
    count = len(items)
    return {"examples": count, "accuracy": right / count, "accuracy_norm": right_norm / count}


def last_words(items: Sequence[Item], scorer: AnswerScorer, params: dict, greedy: Callable) -> dict:
    """Returns `examples`, `accuracy` (greedy decoding gives the word) and `perplexity` of the word.
    `greedy(prompt tokens, count)` returns the next `count` tokens."""
    pairs = [token_pair(scorer.tokenizer, item.prompt, item.choices[0]) for item in items]
    scores = scorer.scores(params, pairs)
    right = sum(np.array_equal(greedy(prompt, len(word)), word) for prompt, word in pairs)
    perplexity = math.exp(min(-float(scores.mean()), 700))
    return {"examples": len(items), "accuracy": right / len(items), "perplexity": perplexity}
