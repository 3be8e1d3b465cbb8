"""Batches as a pure function of (seed, step), read ahead by Grain."""

import dataclasses
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config import BadInput
from jaxgpt.ops.cross_entropy import IGNORE

SHUFFLE_ROUNDS = 4  # of grain's block cipher over indices


@dataclasses.dataclass(frozen=True)
class Windows:
    """The training stream: batch k (from 0) holds windows k*B .. k*B + B-1 of an endless sequence.

    The sequence runs through all windows of `seq_len` + 1 tokens once an epoch, in an order
    that a seeded permutation of (seed, epoch) gives; nothing but k is needed to find a batch.
    """

    tokens: np.ndarray
    seq_len: int
    batch_size: int
    grad_accum: int
    seed: int
    shuffle: bool

    def __post_init__(self):
        if self.num_windows < 1:
            raise BadInput(
                f"the training split has {len(self.tokens):,} tokens, shorter than one window of"
                f" model.max_seq_len={self.seq_len} + 1; give more text or a smaller max_seq_len"
            )

    @property
    def num_windows(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def window_of(self, place: int) -> int:
        """Returns which window stands at `place` of the endless sequence."""
        epoch, within = divmod(place, self.num_windows)
        if not self.shuffle:
            return within
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        return grain.experimental.index_shuffle(
            within, max_index=self.num_windows - 1, seed=seed, rounds=SHUFFLE_ROUNDS
        )

    def batch(self, k: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns batch k's `inputs` and `targets`, int32 [grad_accum, rows, seq_len].

        `rows` picks rows of each microbatch (a host's own); default all.
        """
        micro = self.batch_size // self.grad_accum
        rows = np.arange(micro) if rows is None else rows
        places = (k * self.batch_size + np.arange(self.grad_accum)[:, None] * micro + rows).ravel()
        starts = np.array([self.window_of(int(p)) for p in places]) * self.seq_len
        ids = self.tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int32)
        ids = ids.reshape(self.grad_accum, len(rows), self.seq_len + 1)
        return {"inputs": ids[..., :-1], "targets": ids[..., 1:]}


@dataclasses.dataclass(frozen=True)
class _HostBatches:
    """What Grain reads from: this host's part of every batch up to `num_batches`."""

    windows: Windows
    rows: np.ndarray
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, k) -> dict[str, np.ndarray]:
        return self.windows.batch(int(k), self.rows)


def device_batches(
    windows: Windows, sharding: NamedSharding, start: int, stop: int
) -> Iterator[dict[str, jax.Array]]:
    """Yields batches `start` .. `stop` - 1 on the devices; each host reads its own rows only.

    `sharding` is that of an array [grad_accum, batch, seq_len].
    """
    shape = (windows.grad_accum, windows.batch_size // windows.grad_accum, windows.seq_len)
    rows = _local_rows(sharding, shape)
    source = grain.MapDataset.source(_HostBatches(windows, rows, stop))
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    for batch in source.slice(slice(start, stop)).to_iter_dataset(ahead):
        yield {name: put(array, rows, sharding, shape) for name, array in batch.items()}


def _local_rows(sharding: NamedSharding, shape: tuple) -> np.ndarray:
    """Returns which rows (axis 1) this process's devices hold."""
    slices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[1])[index[1]] for index in slices]))


def put(local: np.ndarray, rows: np.ndarray, sharding: NamedSharding, shape: tuple) -> jax.Array:
    """Returns the global array of `shape` whose `rows` (axis 1) are `local` on this host."""

    def piece(index):
        wanted = np.arange(shape[1])[index[1]]
        return local[index[0], np.searchsorted(rows, wanted), index[2]]

    return jax.make_array_from_callback(shape, sharding, piece)


def evaluation_windows(tokens: np.ndarray, seq_len: int) -> int:
    """Returns how many non-overlapping windows cover every target of a split."""
    return -(-(len(tokens) - 1) // seq_len)


def evaluation_batch(
    tokens: np.ndarray, seq_len: int, batch_size: int, k: int
) -> dict[str, np.ndarray]:
    """Returns windows k*batch_size .. of a split, in order, int32 [1, batch_size, seq_len].

    What lies past the end has input 0 and target IGNORE.
    """
    first = k * batch_size * seq_len
    flat = np.asarray(tokens[first : first + batch_size * seq_len + 1]).astype(np.int32)
    inputs = np.zeros(batch_size * seq_len, np.int32)
    targets = np.full(batch_size * seq_len, IGNORE, np.int32)
    count = max(len(flat) - 1, 0)
    inputs[:count], targets[:count] = flat[:-1], flat[1:]
    shape = (1, batch_size, seq_len)
    return {"inputs": inputs.reshape(shape), "targets": targets.reshape(shape)}
