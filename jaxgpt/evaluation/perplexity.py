"""Loss, perplexity and bits per byte of a split, as the contract counts them."""

import math

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config import BadInput
from jaxgpt.data.pipeline import evaluation_batch, evaluation_windows, put
from jaxgpt.data.shards import Split
from jaxgpt.ops.cross_entropy import IGNORE


class Perplexity:
    """Evaluates parameters on a split by non-overlapping windows.

    `eval_step` gives nats per row (`training.step.make_eval_step`); the rows are summed in
    float64 on the host, so that neither batch size nor mesh shows in the result.
    """

    def __init__(self, eval_step, sharding: NamedSharding, split: Split, seq_len: int, batch: int):
        if split.num_targets < 1:
            raise BadInput("the split to evaluate holds no token")
        self.eval_step, self.sharding, self.split = eval_step, sharding, split
        self.seq_len, self.batch = seq_len, batch

    def __call__(self, params: dict, max_batches: int = 0) -> dict:
        """Returns `loss` (nats per token), `perplexity`, `bits_per_byte`, `tokens`, `bytes`.

        `max_batches` > 0 looks at that many windows batches from the start only; its bytes are
        then the split's in proportion to the tokens.
        """
        seq_len, batch = self.seq_len, self.batch
        batches = -(-evaluation_windows(self.split.tokens, seq_len) // batch)
        batches = min(batches, max_batches) if max_batches else batches
        rows, shape = np.arange(batch), (1, batch, seq_len)
        pending, counted = [], 0
        for k in range(batches):
            host = evaluation_batch(self.split.tokens, seq_len, batch, k, self.split.mask)
            counted += int(np.count_nonzero(host["targets"] != IGNORE))
            device = {name: put(a, rows, self.sharding, shape) for name, a in host.items()}
            pending.append(self.eval_step(params, device))
        nats = float(sum(np.sum(jax.device_get(rows), dtype=np.float64) for rows in pending))
        tokens = max(counted, 1)
        size = max(round(self.split.target_bytes * tokens / max(self.split.num_targets, 1)), 1)
        return {
            "loss": nats / tokens,
            "perplexity": math.exp(min(nats / tokens, 700)),  # exp(710) overflows a float64
            "bits_per_byte": nats / math.log(2) / size,
            "tokens": tokens,
            "bytes": size,
        }
