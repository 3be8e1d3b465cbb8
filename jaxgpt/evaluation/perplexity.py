"""Loss, perplexity and bits per byte of a split."""

import math
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config.schema import IGNORE
from jaxgpt.data.shards import Split
from jaxgpt.evaluation.windows import evaluation_batch, evaluation_windows, on_devices
from jaxgpt.metrics.progress import Bar
from jaxgpt.system.errors import BadInput

MAX_PENDING = 2  # batches that are computed while the host reads an earlier one's losses


class Perplexity:
    """Evaluates parameters on a split by windows `stride` tokens apart (0: not overlapping).

    `eval_step` gives the nats of each target (`objectives.language.make_eval_step`); they are
    summed in float64 on the host, so that the result does not depend on the batch size or the mesh.
    A smaller stride gives each target more context, at seq_len / stride times the work.
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

        `max_windows` > 0 evaluates only that many windows, from the start; `bytes` is then the
        split's in proportion to the tokens.
        """
        parts, split = self.split.parts, self.split
        nats, counts = np.zeros(len(parts)), np.zeros(len(parts), np.int64)
        ends = np.array([part.end for part in parts])
        for positions, losses in self._losses(params, max_windows):
            source = np.minimum(np.searchsorted(ends, positions, side="right"), len(parts) - 1)
            nats += np.bincount(source, losses, len(parts))
            counts += np.bincount(source, minlength=len(parts))
        total, tokens = float(nats.sum()), max(int(counts.sum()), 1)
        size = max(round(split.target_bytes * tokens / max(split.num_targets, 1)), 1)
        result = _loss_and_perplexity(total, tokens)
        result |= {"bits_per_byte": total / math.log(2) / size, "tokens": tokens, "bytes": size}
        if len(parts) > 1:
            result["sources"] = {
                part.source: _loss_and_perplexity(part_nats, max(count, 1)) | {"tokens": count}
                for part, part_nats, count in zip(parts, nats.tolist(), counts.tolist())
            }
        return result

    def _losses(self, params: dict, max_windows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (positions in the split, nats in float64) of the targets of each batch."""
        tokens, mask = self.split.tokens, self.split.mask
        windows = evaluation_windows(len(tokens), self.seq_len, self.stride)
        windows = min(windows, max_windows) if max_windows else windows
        pending, batches = deque(), -(-windows // self.batch)
        with Bar("evaluate ", windows, "windows") as bar:
            for k in range(batches + MAX_PENDING):
                if k < batches:
                    batch = evaluation_batch(tokens, self.seq_len, self.batch, k, mask, self.stride)
                    window = k * self.batch + np.arange(self.batch)[:, None]
                    positions = window * self.stride + 1 + np.arange(self.seq_len)
                    is_target = (batch["targets"][0] != IGNORE) & (window < windows)
                    nats = self.eval_step(params, on_devices(batch, self.sharding))
                    pending.append((positions[is_target], is_target, nats))
                if k >= MAX_PENDING:
                    bar.advance(self.batch)
                    positions, is_target, nats = pending.popleft()
                    yield positions, np.asarray(jax.device_get(nats), np.float64)[is_target]


def _loss_and_perplexity(nats: float, tokens: int) -> dict:
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}  # exp(710) overflows a float64
