"""Accuracy on tasks recast as text (see `jaxgpt.text.tasks`)."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.chunks import next_token
from jaxgpt.evaluation.windows import on_devices
from jaxgpt.metrics.progress import Bar
from jaxgpt.system.errors import BadInput
from jaxgpt.text.tasks import LABELS, Example
from jaxgpt.tokenizer import Tokenizer


def document_start(tokenizer: Tokenizer, prompt: np.ndarray, limit: int) -> np.ndarray:
    """Returns an end-of-text token and the prompt's tokens, at most the last `limit` of them.

    Every training document begins with that token: the model has never seen a text without it.
    """
    return np.concatenate([[tokenizer.end_of_text], prompt])[-limit:].astype(np.int32)


class AnswerScorer:
    """Scores answers to prompts by their log-likelihood."""

    def __init__(
        self, eval_step, sharding: NamedSharding, tokenizer: Tokenizer, seq_len: int, batch: int
    ):
        self.eval_step, self.sharding, self.tokenizer = eval_step, sharding, tokenizer
        self.seq_len, self.batch = seq_len, batch

    def scores(self, params: dict, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Returns ln P(answer | prompt) of each pair of tokens (prompt, answer), in float64.

        The model reads an end-of-text token in front of the prompt, as in training. A prompt too
        long for the context loses its beginning.
        """
        scores, shape = np.zeros(len(pairs)), (1, self.batch, self.seq_len)
        with Bar("evaluate ", len(pairs), "answers") as bar:
            for start in range(0, len(pairs), self.batch):
                inputs, targets = np.zeros(shape, np.int32), np.full(shape, IGNORE, np.int32)
                group = pairs[start : start + self.batch]
                for i, (prompt, answer) in enumerate(group):
                    if len(answer) >= self.seq_len:
                        text = self.tokenizer.decode(answer[:40])[:40]
                        raise BadInput(f"the answer {text!r} is longer than the model's context")
                    prompt = document_start(self.tokenizer, prompt, self.seq_len - len(answer))
                    text = np.concatenate([prompt, answer])
                    row = next_token(text, np.arange(1, len(text)) >= len(prompt))
                    inputs[0, i, : len(text) - 1] = row["inputs"]
                    targets[0, i, : len(text) - 1] = row["targets"]
                batch = on_devices({"inputs": inputs, "targets": targets}, self.sharding)
                nats = np.asarray(jax.device_get(self.eval_step(params, batch)), np.float64)
                scores[start : start + len(group)] = -nats[: len(group)].sum(axis=-1)
                bar.advance(len(group))
        return scores


def classification(
    task: str, examples: Sequence[Example], scorer: AnswerScorer, params: dict
) -> dict:
    """Returns `examples`, `accuracy` and `confusion` ({right label: {predicted label: count}}); the
    predicted label is the likeliest."""
    right = [example.answers[0] for example in examples]
    labels = list(LABELS[task])
    if set(right) - set(labels):
        labels = sorted({*right, *labels})
    encode = scorer.tokenizer.encode  # prompt and label apart, as they were learnt
    answers = [encode(f" {label}") for label in labels]
    prompts = [encode(example.prompt) for example in examples]
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    likeliest = scorer.scores(params, pairs).reshape(len(examples), -1).argmax(axis=1)
    confusion = {label: dict.fromkeys(labels, 0) for label in labels}
    for label, predicted in zip(right, likeliest, strict=True):
        confusion[label][labels[predicted]] += 1
    hits = sum(confusion[label][label] for label in labels)
    return {"examples": len(right), "accuracy": hits / len(right), "confusion": confusion}


def questions(examples: Sequence[Example], answer: Callable[[str], str]) -> dict:
    """Returns `examples`, `exact_match` and `f1` of `answer(prompt)`, as SQuAD v1.1 counts them
    (arXiv:1606.05250, section 6.1): the best over the right answers, words normalised."""
    exact = f1 = 0.0
    for example in examples:
        given = answer_words(answer(example.prompt))
        right = [answer_words(answer) for answer in example.answers]
        exact += given in right
        f1 += max(word_f1(given, words) for words in right)
    count = len(examples)
    return {"examples": count, "exact_match": exact / count, "f1": f1 / count}


def answer_words(text: str) -> list[str]:
    """Returns the words of an answer: lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(given: list[str], right: list[str]) -> float:
    """Returns the F1 of two answers' words."""
    common = sum((Counter(given) & Counter(right)).values())
    if not common:
        return float(given == right)
    precision, recall = common / len(given), common / len(right)
    return 2 * precision * recall / (precision + recall)
