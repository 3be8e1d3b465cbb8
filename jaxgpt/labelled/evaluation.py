"""How well a trained model does on labelled rows: classes, words' classes, answers, targets."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE
from jaxgpt.data.pipeline import of_array
from jaxgpt.evaluation.classes import class_scores, confusion_matrix
from jaxgpt.evaluation.spans import span_scores
from jaxgpt.evaluation.text_overlap import overlap_scores
from jaxgpt.inference.requests import BeamSettings
from jaxgpt.inference.seq2seq import Seq2SeqDecoder, decode_batch
from jaxgpt.labelled.examples import Arrays, RowChunks, RowTask
from jaxgpt.labelled.heads import class_logits, class_losses, span_logits, span_losses, token_logits
from jaxgpt.labelled.labels import ids_of
from jaxgpt.labelled.prepare import task_of
from jaxgpt.labelled.span_qa import best_span
from jaxgpt.labelled.store import RowSplit
from jaxgpt.metrics.progress import Bar
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.optim.groups import OWN
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput

MAX_PENDING = 2  # batches that are computed while the host reads an earlier one's results
Step = Callable[[dict, dict], tuple]  # (parameters, batch) -> arrays [B, ...]


class RowEvaluator:
    """`(parameters, rows at most; 0: all) -> figures` of a split; `batch` rows go at once."""

    def __init__(
        self, spec: ModelSpec, sharding: NamedSharding, task: RowTask, split: RowSplit, batch: int
    ):
        self.task, self.split, self.batch, self.sharding = task, split, batch, sharding
        self.label_ids = ids_of(split.labels, task.names) if task.labels_in else np.zeros(0)
        self.step, self.figures = FIGURES[task.name]
        self.step = self.step(spec, task.config)

    def chunks(self, limit: int = 0) -> RowChunks:
        """Returns the first rows, at most `limit` (0: all)."""
        end = min(limit, self.split.rows) if limit else self.split.rows
        return self.task.chunks(self.split, 0, end, self.label_ids)

    def __call__(self, params: dict, limit: int = 0) -> dict:
        """Returns `loss` (nats a target), `perplexity`, `bits_per_byte` (None where no text is
        predicted), `tokens` (targets), `bytes` (of the texts), and what the objective is judged
        by."""
        chunks = self.chunks(limit)
        figures = self.figures(self, chunks, self.outputs(params, chunks))
        rows = len(np.unique(chunks.rows))
        size = round(self.split.bytes * rows / max(self.split.rows, 1))
        loss = figures["loss"]
        common = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": None}
        return common | {"tokens": 0, "bytes": size} | figures

    def outputs(self, params: dict, chunks: RowChunks) -> Iterator[tuple[Arrays, tuple]]:
        """Yields the arrays of each batch, and what the step makes of it."""
        pending: deque = deque()
        with Bar("evaluate ", len(chunks), "rows") as bar:
            for start in range(0, len(chunks) + MAX_PENDING * self.batch, self.batch):
                numbers = np.arange(start, min(start + self.batch, len(chunks)))
                if len(numbers):
                    filled = np.resize(numbers, self.batch)  # rows again, which are cut off below
                    arrays = chunks.read(filled)
                    results = self.step(params, self.on_devices(arrays))
                    pending.append((len(numbers), arrays, results))
                if pending and start >= MAX_PENDING * self.batch:
                    count, arrays, results = pending.popleft()
                    bar.advance(count)
                    host = (np.asarray(a)[:count] for a in jax.device_get(results))
                    yield {name: a[:count] for name, a in arrays.items()}, tuple(host)

    def on_devices(self, arrays: Arrays) -> dict[str, jax.Array]:
        """Returns a batch, of which every process has all rows, as sharded arrays [1, B, ...]."""
        return {
            name: jax.make_array_from_callback(
                (1, *a.shape), of_array(self.sharding, a.ndim + 1), a[None].__getitem__
            )
            for name, a in arrays.items()
        }


def _replicated(arrays: tuple) -> tuple:
    return jax.sharding.reshard(arrays, jax.P())


def class_step(spec: ModelSpec, config: Config) -> Step:
    """Returns the jitted `(params, batch) -> (nats, logits)` of texts."""
    pooling = task_of(config).pooling

    @jax.jit
    def step(params, batch):
        micro, model, head = _parts(spec, params, batch)
        logits, _ = class_logits(model, micro, None, head, pooling)
        return _replicated((_nats(logits, micro["labels"]), logits))

    return step


def token_step(spec: ModelSpec, config: Config) -> Step:
    """Returns the jitted `(params, batch) -> (nats, predicted class)` of tokens."""

    @jax.jit
    def step(params, batch):
        micro, model, head = _parts(spec, params, batch)
        logits, _ = token_logits(model, micro, None, head)
        return _replicated((_nats(logits, micro["targets"]), logits.argmax(axis=-1)))

    return step


def _parts(spec: ModelSpec, params: dict, batch: dict):
    return jax.tree.map(lambda a: a[0], batch), spec.bind(params), params[OWN]["classifier"]


def _nats(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return class_losses(logits, labels, jnp.ones(logits.shape[-1]), 0.0)[1]


def class_figures(evaluator: RowEvaluator, chunks: RowChunks, outputs: Iterator) -> dict:
    """Returns the loss, `accuracy`, `macro_f1`, `matthews` and `confusion` ({right: {predicted:
    count}}) of classes."""
    names, nats = evaluator.task.names, 0.0
    confusion = np.zeros((len(names), len(names)), np.int64)
    for arrays, (losses, predicted) in outputs:
        labels = arrays["targets" if "targets" in arrays else "labels"]
        predicted = predicted if predicted.ndim == labels.ndim else predicted.argmax(axis=-1)
        counted = labels != IGNORE
        nats += float(losses[counted].astype(np.float64).sum())
        confusion += confusion_matrix(labels[counted], predicted[counted], len(names))
    total = int(confusion.sum())
    table = {
        right: dict(zip(names, row, strict=True))
        for right, row in zip(names, confusion.tolist(), strict=True)
    }
    scores = class_scores(confusion)
    return {"loss": nats / max(total, 1), "tokens": total} | scores | {"confusion": table}


def span_step(spec: ModelSpec, config: Config) -> Step:
    """Returns the jitted `(params, batch) -> (nats, logits of first and last tokens)`."""

    @jax.jit
    def step(params, batch):
        micro, model, head = _parts(spec, params, batch)
        logits, _ = span_logits(model, micro, None, head)
        return _replicated((span_losses(logits, micro["spans"])[0], logits))

    return step


def span_figures(evaluator: RowEvaluator, chunks: RowChunks, outputs: Iterator) -> dict:
    """Returns the loss, `exact_match` and `f1` (see `evaluation.spans`) of the likeliest spans."""
    nats, scored = 0.0, []
    for _, (losses, logits) in outputs:
        nats += float(losses.astype(np.float64).sum())
        scored += list(logits)
    predicted = answers(evaluator, chunks, scored)
    references = [evaluator.task.references(evaluator.split, row) for row in predicted]
    scores = span_scores(list(predicted.values()), references)
    return {"loss": nats / max(len(scored), 1), "tokens": len(scored)} | scores


def answers(evaluator: RowEvaluator, chunks: RowChunks, scored: list[np.ndarray]) -> dict[int, str]:
    """Returns the likeliest answer to each row, "" for none, from its windows' logits [T, 2]."""
    task, best, nothing = evaluator.task, {}, {}
    for row, start, window in zip(chunks.rows.tolist(), chunks.starts.tolist(), scored):
        # that there is no answer is as likely as in the window where it is least so
        nothing[row] = min(nothing.get(row, math.inf), float(window[0].sum()))
        first, last = window[1:].T
        score, span = best_span(first, last)
        if score > best.get(row, (-math.inf, ""))[0]:
            text = task.answer(evaluator.split, row, start, (span[0] + 1, span[1] + 1))
            best[row] = score, text
    return {row: text if score > nothing[row] else "" for row, (score, text) in best.items()}


def target_step(spec: ModelSpec, config: Config) -> Step:
    """Returns the jitted `(params, batch) -> (nats of each target,)`."""
    nats = make_eval_step(spec)
    return lambda params, batch: (nats(params, batch),)


def target_figures(evaluator: RowEvaluator, chunks: RowChunks, outputs: Iterator) -> dict:
    """Returns the loss and bits per byte of targets, each token predicted from those before it."""
    nats, tokens = 0.0, 0
    for arrays, (losses,) in outputs:
        counted = arrays["targets"] != IGNORE
        nats += float(losses[counted].astype(np.float64).sum())
        tokens += int(counted.sum())
    size = max(evaluator.task.target_bytes(evaluator.split, chunks.rows), 1)
    bits = nats / math.log(2) / size
    return {"loss": nats / max(tokens, 1), "bits_per_byte": bits, "tokens": tokens, "bytes": size}


FIGURES = {
    "classification": (class_step, class_figures),
    "token_classification": (token_step, class_figures),
    "span_qa": (span_step, span_figures),
    "seq2seq": (target_step, target_figures),
}


def decoded_scores(
    spec: ModelSpec,
    task: RowTask,
    split: RowSplit,
    params: dict,
    count: int,
    beams: BeamSettings | None = None,
) -> dict:
    """Returns the scores (see `evaluation.text_overlap`) of the targets that the model writes for
    the first `count` sources of a split, token by token the likeliest, or the best that `beams`
    find; without `[metrics]` `exact_match` alone."""
    decoder = Seq2SeqDecoder.of(spec, params, task.tokenizer)
    sources = task.sources(split, np.arange(count))
    written = decode_batch(decoder, task.tokenizer, sources, beams=beams)
    stored = split.arrays["reference"]
    search = {} if beams is None else dataclasses.asdict(beams)
    wanted = [stored[row].tobytes().decode() for row in range(count)]
    try:
        return search | overlap_scores(written, wanted)
    except BadInput as e:
        say(f"metrics   exact match alone: {e}")
        hits = sum(map(str.__eq__, written, wanted))
        return search | {"examples": len(written), "exact_match": hits / max(len(written), 1)}


def predict(
    spec: ModelSpec, sharding: NamedSharding, task: RowTask, params: dict, batch: int, prompt: str
) -> Iterator[str]:
    """Yields what a trained model says of a prompt, a line each: of a text (a pair has a tab in
    between) `LABEL<TAB>PROBABILITY`, the likeliest first; of words `WORD<TAB>LABEL`; of a question,
    a tab and a context the answer. Raises `BadInput` if the prompt is too long or has no tab."""
    split = task.split_of(prompt)
    if any(task.cut(split).values()):
        length = task.config.model.max_seq_len
        raise BadInput(f"the prompt is longer than the model takes (model.max_seq_len={length})")
    evaluator = RowEvaluator(spec, sharding, task, split, batch)
    chunks = evaluator.chunks()
    outputs = list(evaluator.outputs(params, chunks))
    yield from SHOWN[task.name](evaluator, chunks, outputs, prompt)


def _shown_classes(evaluator: RowEvaluator, chunks: RowChunks, outputs: list, prompt: str):
    ((_, (_, (logits,))),) = outputs
    shares = np.exp(logits - logits.max())
    names = zip((shares / shares.sum()).tolist(), evaluator.task.names, strict=True)
    yield from (f"{name}\t{share:.4f}" for share, name in sorted(names, reverse=True))


def _shown_words(evaluator: RowEvaluator, chunks: RowChunks, outputs: list, prompt: str):
    ((arrays, (_, predicted)),) = outputs
    classes, words = predicted[arrays["targets"] != IGNORE].tolist(), prompt.split()
    if len(classes) < len(words):
        lost = len(words) - len(classes)
        raise BadInput(f"the tokenizer has no token for {lost} of the prompt's {len(words)} words")
    for word, label in zip(words, classes, strict=True):
        yield f"{word}\t{evaluator.task.names[label]}"


def _shown_answer(evaluator: RowEvaluator, chunks: RowChunks, outputs: list, prompt: str):
    scored = [window for _, (_, logits) in outputs for window in logits]
    yield from answers(evaluator, chunks, scored).values()


SHOWN = {
    "classification": _shown_classes,
    "token_classification": _shown_words,
    "span_qa": _shown_answer,
}
