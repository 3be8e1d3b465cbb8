"""What a workdir costs to keep and to run."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.inference.decode import generate
from jaxgpt.inference.requests import Sampling
from jaxgpt.inference.trained import Trained
from jaxgpt.shrinking.quantise import projections

BATCHES = (1, 8)
PROMPT, NEW, ROUNDS = 16, 100, 3


def decode_speeds(models: Sequence[Trained]) -> list[dict[str, float | int]]:
    """Returns, of each model laid out for decoding, `resident_bytes` of its weights, and
    `tokens_per_second_1` and `_8`: greedy decoding of that many rows, the median of several rounds
    in which the models take turns, so that what else the machine does is spread over all."""
    decoders = []
    for model in models:
        with jax.set_mesh(model.mesh):
            decoders.append(model.decoder())
    found: list[dict[str, float | int]] = [
        {"resident_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(decoder.params))}
        for decoder in decoders
    ]
    for batch in BATCHES:
        seconds: list[list[float]] = [[] for _ in models]
        for _ in range(1 + ROUNDS):  # the first compiles
            for model, decoder, taken in zip(models, decoders, seconds, strict=True):
                began = time.perf_counter()
                count = _generate(model, decoder, batch)
                taken.append((time.perf_counter() - began) / count)
        for row, taken in zip(found, seconds, strict=True):
            row[f"tokens_per_second_{batch}"] = batch / statistics.median(taken[1:])
    return found


def _generate(model: Trained, decoder, batch: int) -> int:
    """Generates a batch of rows; returns the tokens of each."""
    context = model.config.model.max_seq_len
    prompt = min(PROMPT, context // 2)
    new = min(NEW, context - prompt)
    rows = [np.arange(prompt, dtype=np.int32) % model.tokenizer.vocab_size] * batch
    with jax.set_mesh(model.mesh):
        generate(decoder, rows, new, Sampling(temperature=0.0))
    return new


def share_of_zeros(params: dict) -> float:
    """Returns the share of the projections' weights that are 0; of those in few bits none count."""
    arrays = jax.tree.leaves([kernel for _, kernel in projections(params["blocks"])])
    arrays = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    zeros = sum(int(np.count_nonzero(np.asarray(a) == 0)) for a in arrays)
    return zeros / max(sum(a.size for a in arrays), 1)


def bytes_in(folder: Path) -> int:
    """Returns the bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
