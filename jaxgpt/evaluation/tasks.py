"""Accuracy on tasks recast as text (see `jaxgpt.text.tasks`)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.pipeline import put
from jaxgpt.system.errors import BadInput
from jaxgpt.text.tasks import LABELS, Example
from jaxgpt.tokenizer import Tokenizer


def document_start(tokenizer: Tokenizer, prompt: np.ndarray, most: int) -> np.ndarray:
    """Returns an end-of-text token and the prompt's tokens, the last `most` of them all.

    Every document of training begins so: a prompt without it is one that the model never saw.
    """
    return np.concatenate([[tokenizer.end_of_text], prompt])[-most:].astype(np.int32)


class Choices:
    """Scores continuations of prompts by their log-likelihood."""

    def __init__(
        self, eval_step, sharding: NamedSharding, tokenizer: Tokenizer, seq_len: int, batch: int
    ):
        self.eval_step, self.sharding, self.tokenizer = eval_step, sharding, tokenizer
        self.seq_len, self.batch = seq_len, batch

    def scores(self, params: dict, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Returns ln P(continuation | prompt) of each pair of tokens (prompt, continuation).

        The model reads an end-of-text token in front of the prompt, as in training. A prompt too
        long for the context loses its beginning.
        """
        rows = [self._row(prompt, continuation) for prompt, continuation in pairs]
        found = []
        for start in range(0, len(rows), self.batch):
            some = rows[start : start + self.batch]
            shape = (1, self.batch, self.seq_len)
            host = {
                "inputs": np.zeros(shape, np.int32),
                "targets": np.full(shape, IGNORE, np.int32),
            }
            for i, (inputs, targets) in enumerate(some):
                host["inputs"][0, i, : len(inputs)] = inputs
                host["targets"][0, i, : len(targets)] = targets
            device = {
                n: put(a, np.arange(self.batch), self.sharding, shape) for n, a in host.items()
            }
            nats = np.asarray(jax.device_get(self.eval_step(params, device)), np.float64)
            found += (-nats[: len(some)].sum(axis=-1)).tolist()
        return np.array(found)

    def _row(self, prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(answer) >= self.seq_len:
            text = self.tokenizer.decode(answer[:40])[:40]
            raise BadInput(f"the answer {text!r} is longer than the model's context")
        ids = document_start(self.tokenizer, prompt, self.seq_len - len(answer))
        whole = np.concatenate([ids, answer]).astype(np.int32)
        targets = np.where(np.arange(1, len(whole)) >= len(ids), whole[1:], IGNORE)
        return whole[:-1], targets


def classification(task: str, examples: Sequence[Example], choices: Choices, params: dict) -> dict:
    """Returns `examples`, `accuracy` and `confusion` ({right: {given: count}}).

    The answer given is the label of the largest likelihood.
    """
    labels = sorted({example.answers[0] for example in examples} | set(LABELS[task]))
    if not {example.answers[0] for example in examples} - set(LABELS[task]):
        labels = list(LABELS[task])
    encode = choices.tokenizer.encode  # prompt and label apart, as they were learnt
    answers = [encode(f" {label}") for label in labels]
    prompts = [encode(example.prompt) for example in examples]
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    scores = choices.scores(params, pairs).reshape(len(examples), len(labels))
    given = [labels[i] for i in scores.argmax(axis=1)]
    confusion = {right: dict.fromkeys(labels, 0) for right in labels}
    for example, answer in zip(examples, given, strict=True):
        confusion[example.answers[0]][answer] += 1
    right = sum(confusion[label][label] for label in labels)
    return {"examples": len(examples), "accuracy": right / len(examples), "confusion": confusion}


def questions(examples: Sequence[Example], answer: Callable[[str], str]) -> dict:
    """Returns `examples`, `exact_match` and `f1` of `answer(prompt)`, as SQuAD v1.1 counts them
    (arXiv:1606.05250, section 6.1): the best over the right answers, words normalised."""
    exact = f1 = 0.0
    for example in examples:
        given = normalised(answer(example.prompt))
        right = [normalised(a) for a in example.answers]
        exact += any(given == a for a in right)
        f1 += max(overlap(given, a) for a in right)
    return {
        "examples": len(examples),
        "exact_match": exact / len(examples),
        "f1": f1 / len(examples),
    }


def normalised(text: str) -> list[str]:
    """Returns the words of an answer: lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def overlap(given: list[str], right: list[str]) -> float:
    """Returns the F1 of two answers' words."""
    common = sum((Counter(given) & Counter(right)).values())
    if not common:
        return float(given == right)
    precision, recall = common / len(given), common / len(right)
    return 2 * precision * recall / (precision + recall)
