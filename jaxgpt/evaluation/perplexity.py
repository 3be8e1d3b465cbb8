"""Loss, perplexity and bits per byte of a split, as the contract counts them."""

import math
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.pipeline import put
from jaxgpt.data.shards import Split
from jaxgpt.evaluation.windows import evaluation_batch, evaluation_windows
from jaxgpt.system.errors import BadInput

LAG = 2  # batches on the device whose numbers are not asked for yet


class Perplexity:
    """Evaluates parameters on a split by windows `stride` tokens apart (0: not overlapping).

    `eval_step` gives the nats of each target (`training.step.make_eval_step`); they are summed in
    float64 on the host, so that neither batch size nor mesh shows in the result. A smaller stride
    gives each target more context, at seq_len / stride times the work.
    """

    def __init__(
        self,
        eval_step,
        sharding: NamedSharding,
        split: Split,
        seq_len: int,
        batch: int,
        stride: int = 0,
    ):
        if split.num_targets < 1:
            raise BadInput("the split to evaluate holds no token")
        if not 0 <= stride <= seq_len:
            raise BadInput(f"--stride={stride} must be from 1 to model.max_seq_len={seq_len}")
        self.eval_step, self.sharding, self.split = eval_step, sharding, split
        self.seq_len, self.batch, self.stride = seq_len, batch, stride or seq_len

    def __call__(self, params: dict, max_windows: int = 0) -> dict:
        """Returns `loss` (nats per token), `perplexity`, `bits_per_byte`, `tokens`, `bytes`; of a
        mixture also `sources`, {source: {"loss", "perplexity", "tokens"}}.

        `max_windows` > 0 looks at that many windows from the start only; its bytes are then the
        split's in proportion to the tokens.
        """
        parts = self.split.parts
        nats, counts = np.zeros(len(parts)), np.zeros(len(parts), np.int64)
        ends = np.array([part.end for part in parts])
        for at, found in self._losses(params, max_windows):
            source = np.minimum(np.searchsorted(ends, at, side="right"), len(parts) - 1)
            nats += np.bincount(source, found, len(parts))
            counts += np.bincount(source, minlength=len(parts))
        total, tokens = float(nats.sum()), max(int(counts.sum()), 1)
        size = max(round(self.split.target_bytes * tokens / max(self.split.num_targets, 1)), 1)
        figures = _figures(total, tokens)
        figures["bits_per_byte"] = total / math.log(2) / size
        figures |= {"tokens": tokens, "bytes": size}
        if len(parts) > 1:
            rows = zip(parts, nats.tolist(), counts.tolist(), strict=True)
            figures["sources"] = {
                part.source: _figures(sum_, max(count, 1)) | {"tokens": count}
                for part, sum_, count in rows
            }
        return figures

    def _losses(self, params: dict, max_windows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (places in the split, nats in float64) of the targets of each batch."""
        seq_len, batch, tokens = self.seq_len, self.batch, self.split.tokens
        windows = evaluation_windows(len(tokens), seq_len, self.stride)
        windows = min(windows, max_windows) if max_windows else windows
        rows, shape = np.arange(batch), (1, batch, seq_len)
        pending: deque = deque()

        def first():
            starts, counted, nats = pending.popleft()
            places = starts[:, None] + 1 + np.arange(seq_len)
            return places[counted], np.asarray(jax.device_get(nats), np.float64)[counted]

        for k in range(-(-windows // batch)):
            host = evaluation_batch(tokens, seq_len, batch, k, self.split.mask, self.stride)
            device = {name: put(a, rows, self.sharding, shape) for name, a in host.items()}
            number = k * batch + rows
            counted = (host["targets"][0] != IGNORE) & (number < windows)[:, None]
            pending.append((number * self.stride, counted, self.eval_step(params, device)))
            if len(pending) > LAG:
                yield first()
        while pending:
            yield first()


def _figures(nats: float, tokens: int) -> dict:
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}  # exp(710) overflows a float64
