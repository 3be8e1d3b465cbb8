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
from jaxgpt.data.mixture import Turns
from jaxgpt.data.packing import plan_for
from jaxgpt.data.prepare import cache_folder
from jaxgpt.data.shards import Split
from jaxgpt.data.windows import Contiguous, Packed
from jaxgpt.system.errors import BadInput

ON_DEVICE = 1  # batches sent ahead of the one in use: the copy runs beside the step
SHUFFLE_ROUNDS = 4  # of grain's block cipher over indices


@dataclasses.dataclass(frozen=True)
class Stream:
    """The training stream: batch k (from 0) holds windows k*B .. k*B + B-1 of an endless sequence.

    The sources take turns; each runs through all its windows once an epoch, in an order that a
    seeded permutation of (seed, epoch) gives without ever making it; nothing but k is needed to
    find a batch.
    """

    sources: tuple[Contiguous | Packed, ...]
    turns: Turns
    batch_size: int
    grad_accum: int
    seed: int
    shuffle: bool

    def windows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (source, window) at each place of the endless sequence."""
        source, turn = self.turns.at(places)
        pairs = zip(source.tolist(), turn.tolist(), strict=True)
        return source, np.array([self._window(i, t) for i, t in pairs], np.int64)

    def _window(self, source: int, turn: int) -> int:
        count = len(self.sources[source])
        epoch, within = divmod(turn, count)
        if not self.shuffle:
            return within
        return grain.experimental.index_shuffle(
            within,
            max_index=count - 1,
            seed=_epoch_seed(self.seed, epoch, source),
            rounds=SHUFFLE_ROUNDS,
        )

    def places(self, k: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Returns the places of batch k's rows, [grad_accum, rows]; see `batch`."""
        micro = self.batch_size // self.grad_accum
        rows = np.arange(micro) if rows is None else rows
        return k * self.batch_size + np.arange(self.grad_accum)[:, None] * micro + rows

    def batch(self, k: int, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns batch k's `inputs` and `targets` (packed: `segments` and `positions` too),
        int32 [grad_accum, rows, seq_len].

        `rows` picks rows of each microbatch (a host's own); default all.
        """
        places = self.places(k, rows)
        source, window = self.windows(places.ravel())
        found: dict[str, np.ndarray] = {}
        for i, reader in enumerate(self.sources):
            if not (mine := source == i).any():
                continue
            for name, values in reader.read(window[mine]).items():
                found.setdefault(name, np.empty((places.size, values.shape[1]), np.int32))
                found[name][mine] = values
        return {name: a.reshape(*places.shape, -1) for name, a in found.items()}

    def num_targets(self, k: int) -> int:
        """Returns how many targets batch k has, over all hosts."""
        source, window = self.windows(self.places(k).ravel())
        return sum(r.num_targets(window[source == i]) for i, r in enumerate(self.sources))


@functools.lru_cache(maxsize=1024)
def _epoch_seed(seed: int, epoch: int, source: int) -> int:
    entropy = [seed, epoch, source] if source else [seed, epoch]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def training_stream(split: Split, config: Config) -> Stream:
    """Returns the batches of a run.

    Raises:
      BadInput: if a source is shorter than one window.
    """
    seq_len, sources = config.model.max_seq_len, []
    locks = cache_folder(config.data) / "locks"
    for number, part in enumerate(split.parts):
        if config.data.pack:
            plan = plan_for(split, number, seq_len, locks)
            sources.append(Packed(split.tokens, seq_len, plan, split.end_of_text, split.mask))
            continue
        span = slice(part.first, part.end)
        mask = None if split.mask is None else split.mask[span]
        source = Contiguous(split.tokens[span], seq_len, mask)
        if len(source) < 1:
            raise BadInput(
                f"the training part of {part.source} has {len(source.tokens):,} tokens, shorter"
                f" than one window of model.max_seq_len={seq_len} + 1; give more text or a smaller"
                " max_seq_len, or set data.pack=true"
            )
        sources.append(source)
    turns = Turns(tuple(part.weight for part in split.parts))
    return Stream(
        tuple(sources),
        turns,
        config.batch_size,
        config.grad_accum,
        config.seed,
        config.data.shuffle,
    )


@dataclasses.dataclass(frozen=True)
class _HostBatches:
    """What Grain reads from: this host's part of every batch up to `num_batches`."""

    stream: Stream
    rows: np.ndarray
    num_batches: int
    batch_of: Callable[[int], int]

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, k) -> dict[str, np.ndarray]:
        return self.stream.batch(self.batch_of(int(k) + 1), self.rows)


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
    shape = (stream.grad_accum, stream.batch_size // stream.grad_accum, stream.sources[0].seq_len)
    rows = _local_rows(sharding, shape)
    source = grain.MapDataset.source(_HostBatches(stream, rows, stop, batch_of))
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    coming: deque[dict[str, jax.Array]] = deque()  # on their way to the devices
    for batch in source.slice(slice(start, stop)).to_iter_dataset(ahead):
        coming.append({name: put(a, rows, sharding, shape) for name, a in batch.items()})
        if len(coming) > ON_DEVICE:
            yield coming.popleft()
    yield from coming


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
