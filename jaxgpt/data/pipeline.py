"""Batches as a pure function of (seed, step), read ahead by Grain."""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config import Config
from jaxgpt.data.chunks import Chunks, ContiguousChunks, PackedChunks
from jaxgpt.data.mixture import MixtureSchedule
from jaxgpt.data.packing import plan_for
from jaxgpt.data.prepare import cache_folder
from jaxgpt.data.shards import Split
from jaxgpt.system.errors import BadInput

ON_DEVICE = 1  # batches sent ahead of the one in use: the copy runs beside the step
SHUFFLE_ROUNDS = 4  # of grain's block cipher over indices


@dataclasses.dataclass(frozen=True)
class Stream:
    """The training stream: batch k (from 0) holds examples k*B .. k*B + B-1 of an endless sequence.

    The schedule says which source each example comes from. Each source goes through all its chunks
    once an epoch, in an order that a permutation seeded by (seed, epoch) computes chunk by chunk:
    nothing but k is needed to find a batch.
    """

    sources: tuple[Chunks, ...]
    schedule: MixtureSchedule
    batch_size: int
    grad_accum: int
    seed: int
    shuffle: bool

    def chunks(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source, chunk) of the examples at `indices` of the endless sequence."""
        source, rank = self.schedule.at(indices)
        pairs = zip(source.tolist(), rank.tolist(), strict=True)
        return source, np.array([self._chunk(i, r) for i, r in pairs], np.int64)

    def _chunk(self, source: int, rank: int) -> int:
        count = len(self.sources[source])
        epoch, within = divmod(rank, count)
        if not self.shuffle:
            return within
        return grain.experimental.index_shuffle(
            within,
            max_index=count - 1,
            seed=_epoch_seed(self.seed, epoch, source),
            rounds=SHUFFLE_ROUNDS,
        )

    def indices(self, k: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Returns where batch k's examples are in the endless sequence, [grad_accum, rows]."""
        micro = self.batch_size // self.grad_accum
        rows = np.arange(micro) if rows is None else rows
        return k * self.batch_size + np.arange(self.grad_accum)[:, None] * micro + rows

    def batch(self, k: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns batch k's `inputs` and `targets` (packed: `segments` and `positions` too),
        int32 [grad_accum, rows, seq_len].

        `rows` picks rows of each microbatch (a host's own); default all.
        """
        indices = self.indices(k, rows)
        source, chunk = self.chunks(indices.ravel())
        batch: dict[str, np.ndarray] = {}
        for i, reader in enumerate(self.sources):
            if not (is_source := source == i).any():
                continue
            for name, values in reader.read(chunk[is_source]).items():
                batch.setdefault(name, np.empty((indices.size, *values.shape[1:]), values.dtype))
                batch[name][is_source] = values
        return {name: a.reshape(*indices.shape, *a.shape[1:]) for name, a in batch.items()}

    def num_targets(self, k: int) -> int:
        """Returns how many targets batch k has, over all hosts."""
        source, chunk = self.chunks(self.indices(k).ravel())
        return sum(r.num_targets(chunk[source == i]) for i, r in enumerate(self.sources))


@functools.lru_cache(maxsize=1024)
def _epoch_seed(seed: int, epoch: int, source: int) -> int:
    entropy = [seed, epoch, source] if source else [seed, epoch]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def training_stream(split: Split, config: Config) -> Stream:
    """Returns the batches of a run. Raises `BadInput` if a source is shorter than one chunk."""
    seq_len, sources = config.model.max_seq_len, []
    locks = cache_folder(config.data) / "locks"
    for number, part in enumerate(split.parts):
        if config.data.pack:
            plan = plan_for(split, number, seq_len, locks)
            sources.append(PackedChunks(split.tokens, seq_len, plan, split.end_of_text, split.mask))
            continue
        own = slice(part.first, part.end)
        mask = None if split.mask is None else split.mask[own]
        sources.append(ContiguousChunks(split.tokens[own], seq_len, mask))
        if len(sources[-1]) < 1:
            raise BadInput(
                f"the training part of {part.source} has {part.end - part.first:,} tokens, shorter"
                f" than one chunk of model.max_seq_len={seq_len} + 1; give more text or a smaller"
                " max_seq_len, or set data.pack=true"
            )
    schedule = MixtureSchedule(tuple(part.weight for part in split.parts))
    sizes = config.batch_size, config.grad_accum
    return Stream(tuple(sources), schedule, *sizes, config.seed, config.data.shuffle)


def device_batches(
    stream: Stream,
    sharding: NamedSharding,
    start: int,
    stop: int,
    batch_of: Callable[[int], int] = lambda step: step - 1,
) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of steps `start` + 1 .. `stop` on the devices; each host reads its own
    rows only. `batch_of` says which batch (from 0) trains a step (from 1).

    `sharding` is that of an array [grad_accum, batch, seq_len].
    """
    shape = stream.grad_accum, stream.batch_size // stream.grad_accum
    rows = _local_rows(sharding, (*shape, stream.sources[0].seq_len))
    steps = grain.MapDataset.range(start + 1, stop + 1)
    batches = steps.map(lambda step: stream.batch(batch_of(int(step)), rows))

    def to_devices(local: np.ndarray) -> jax.Array:
        def shard(index):
            wanted = np.searchsorted(rows, np.arange(shape[1])[index[1]])
            return local[(index[0], wanted, *index[2:])]

        whole, spec = (*shape, *local.shape[2:]), of_array(sharding, local.ndim)
        return jax.make_array_from_callback(whole, spec, shard)

    read_ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    sent: deque[dict[str, jax.Array]] = deque()
    for batch in batches.to_iter_dataset(read_ahead):
        sent.append({name: to_devices(array) for name, array in batch.items()})
        if len(sent) > ON_DEVICE:
            yield sent.popleft()
    yield from sent


def of_array(sharding: NamedSharding, ndim: int) -> NamedSharding:
    """Returns the sharding of a batch's array of `ndim` axes, from that of [A, B, T]."""
    return NamedSharding(sharding.mesh, jax.P(*sharding.spec[:ndim]))


def _local_rows(sharding: NamedSharding, shape: tuple) -> np.ndarray:
    """Returns which rows (axis 1) this process's devices hold."""
    slices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[1])[index[1]] for index in slices]))
