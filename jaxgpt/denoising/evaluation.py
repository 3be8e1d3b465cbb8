"""How well a model restores text, on rows that are always corrupted alike."""

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.chunks import Chunks
from jaxgpt.data.pipeline import of_array
from jaxgpt.denoising.rows import Arrays, Corrupted, MaskedRows
from jaxgpt.metrics.progress import Bar

MAX_PENDING = 2  # batches that are computed while the host reads an earlier one's figures
SEED = 0  # of the corruption: runs of any seed are compared on the same rows
OF_ROWS = ("next_sentence_loss", "next_sentence_accuracy")  # means over rows, not over targets


@dataclasses.dataclass(frozen=True)
class Restoration:
    """`(parameters, windows at most; 0: all) -> figures` of a split's windows.

    `step(parameters, batch)` gives sums over each row [B], by name. They are added in float64 on
    the host: the figures do not depend on the batch size or the mesh.
    """

    step: Callable[[dict, dict], dict]
    sharding: NamedSharding
    rows: Corrupted
    batch: int

    def __call__(self, params: dict, max_windows: int = 0) -> dict:
        """Returns `loss` (nats per target), `perplexity`, `bits_per_byte` (None: a part of the
        text is predicted, from another part), `tokens` (targets) and what else the step gives."""
        windows = min(len(self.rows), max_windows or len(self.rows))
        numbers = (np.stack([w, w], axis=1) for w in _batches(windows, self.batch))
        reads = (self.rows.read(numbered) for numbered in numbers)
        sums, rows, tokens = self.sums(params, reads, windows)
        figures = {n: s / max(rows if n in OF_ROWS else tokens, 1) for n, s in sums.items()}
        perplexity = math.exp(min(figures["loss"], 700))
        common = {"loss": figures["loss"], "perplexity": perplexity, "bits_per_byte": None}
        return common | figures | {"tokens": tokens}

    def sums(
        self, params: dict, batches: Iterator[Arrays], total: int
    ) -> tuple[dict[str, float], int, int]:
        """Returns the sums by name over the rows of `batches`, and how many rows and targets they
        have; `total` rows are awaited."""
        sums, rows, tokens = defaultdict(float), 0, 0
        pending: deque = deque()
        with Bar("evaluate ", total, "rows") as bar:

            def take() -> None:
                count, figures = pending.popleft()
                bar.advance(count)
                for name, values in jax.device_get(figures).items():
                    sums[name] += float(np.asarray(values, np.float64)[:count].sum())

            for arrays in batches:
                count = len(arrays["targets"])
                rows, tokens = rows + count, tokens + int((arrays["targets"] != IGNORE).sum())
                filled = {n: np.resize(a, (self.batch, *a.shape[1:])) for n, a in arrays.items()}
                pending.append((count, self.step(params, self.on_devices(filled))))
                if len(pending) > MAX_PENDING:
                    take()
            while pending:
                take()
        return dict(sums), rows, tokens

    def on_devices(self, arrays: Arrays) -> dict[str, jax.Array]:
        """Returns a batch, of which every process has all rows, as sharded arrays [1, B, ...]."""
        return {
            name: jax.make_array_from_callback(
                (1, *a.shape), of_array(self.sharding, a.ndim + 1), a[None].__getitem__
            )
            for name, a in arrays.items()
        }


def _batches(count: int, batch: int) -> Iterator[np.ndarray]:
    return (np.arange(start, min(start + batch, count)) for start in range(0, count, batch))


def pseudo_perplexity(restoration: Restoration, params: dict, rows: MaskedRows, limit: int) -> dict:
    """Returns `pseudo_perplexity`, exp of the mean nats of each token when it alone is masked
    (arXiv:1910.14659, eq. 4), and of how many tokens, `pseudo_tokens`. They are those of the first
    `limit` windows (0: all); a window takes as many rows as it has tokens. The step of
    `restoration` gives one target a row."""
    chunks = restoration.rows.chunks
    windows = min(len(chunks), limit or len(chunks))
    batches = _one_by_one(chunks, rows, windows, restoration.batch)
    sums, _, tokens = restoration.sums(params, batches, windows * restoration.rows.seq_len)
    mean = sums["loss"] / max(tokens, 1)
    return {"pseudo_perplexity": math.exp(min(mean, 700)), "pseudo_tokens": tokens}


def _one_by_one(chunks: Chunks, rows: MaskedRows, windows: int, batch: int) -> Iterator[Arrays]:
    for window in range(windows):
        arrays, is_text = rows.framed(chunks, np.array([window]))
        tokens = arrays["inputs"][0]
        places = np.nonzero(is_text[0] & ~rows.is_special[tokens])[0]
        for some in _batches(len(places), batch):
            here = np.arange(len(tokens)) == places[some, None]
            yield {name: np.repeat(a, len(some), axis=0) for name, a in arrays.items()} | {
                "inputs": np.where(here, rows.masking.mask, tokens).astype(np.int32),
                "targets": np.where(here, tokens, IGNORE).astype(np.int32),
            }
