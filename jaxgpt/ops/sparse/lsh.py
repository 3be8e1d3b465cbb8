"""LSH attention (Reformer, arXiv:2001.04451, section 2): queries read the keys most like them.

Queries and keys are the same vectors, keys of unit length. Each round hashes them by the nearest of
some random directions and their opposites (arXiv:1509.02897), sorts them by hash, and cuts them
into chunks; a query reads the keys of its chunk and of the one before. The softmax runs over the
union of what the rounds find: a key found in N of them counts 1/N in each (appendix A). T tokens
make 2T / chunk buckets, so that a bucket fills half a chunk on average; the sort is by segment
first.

The directions are fixed and the same in all heads and layers: a run is still a function of its
seed, whatever the mesh. Decoding does not hash, but sees every token before it, as infinitely many
rounds would: what padding or another prompt's length changes in the chunks then changes no sample.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.ops.mask import AttentionMask
from jaxgpt.ops.sparse.gathered import NONE, check_no_prefix, merge, places, softmax_part
from jaxgpt.ops.sparse.patterns import Lsh

SELF = 1e5  # taken from the score of a query's own key, which counts only if there is no other
MOST = 128  # buckets of one set of directions; more are pairs of hashes


def unit_length(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Returns the keys of queries: sqrt(H) x / |x|, whose scores, divided by sqrt(H), are those of
    the paper's unit vectors."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def lsh_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    mask: AttentionMask,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale * q k^T) v over the keys that hashing finds among the visible ones; k
    is `unit_length(q)`.

    Raises:
      BadInput: for a mask with a prefix.
    """
    check_no_prefix(mask)
    pattern, length = mask.reach.pattern, q.shape[1]
    padding = -length % pattern.chunk

    def laid_out(x):
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    _, at = places(mask)
    last = jnp.iinfo(jnp.int32).max  # the padding's segment, which is sorted behind all others
    positions = jnp.pad(at[:, 0], ((0, 0), (0, padding)), constant_values=NONE)
    segments = jnp.pad(at[:, 1], ((0, 0), (0, padding)), constant_values=last)
    q, k, v = laid_out(q), laid_out(k), laid_out(v)
    order, ranks = sorted_by_hash(q, segments, pattern)
    at = jnp.stack([positions, segments], -1)[:, None]  # [B 1 T 2]
    chunks = ranks.transpose(0, 2, 3, 1) // pattern.chunk  # [B N T R]
    rounds = []
    for r in range(pattern.rounds):
        there, back = order[:, r], ranks[:, r]

        def chunked(x, there=there, back=back):
            return cut(permute(jnp.broadcast_to(x, (*there.shape, x.shape[-1])), there, back))

        def cut(x):
            return x.reshape(*x.shape[:2], -1, pattern.chunk, x.shape[-1])

        allowed, penalty = _pairs(chunked(at), chunked(chunks), mask.reach.causal)
        keys, values = with_previous(chunked(k)), with_previous(chunked(v))
        found, log = softmax_part(
            chunked(q)[:, :, None], keys, values, allowed[:, :, None], scale, penalty[:, :, None]
        )
        both = jnp.concatenate([found, log[..., None]], axis=-1)
        both = permute(both.reshape(*there.shape, -1), back, there)
        rounds.append((both[..., :-1], both[..., -1]))
    return merge(rounds)[:, :, :length].transpose(0, 2, 1, 3).astype(v.dtype)


def sorted_by_hash(
    q: Float[Array, "B N T H"], segments: Int[Array, "B T"], pattern: Lsh
) -> tuple[Int[Array, "B R N T"], Int[Array, "B R N T"]]:
    """Returns each round's tokens in order of segment and hash, and each token's rank in it."""
    found = hashes(q, q.shape[2], pattern).transpose(0, 3, 1, 2)
    tokens = jnp.broadcast_to(jnp.arange(q.shape[2]), found.shape)
    segments = jnp.broadcast_to(segments[:, None, None], found.shape)
    order = jax.lax.sort((segments, found, tokens), num_keys=2, is_stable=True)[2]
    return order, jnp.argsort(order, axis=-1)


def hashes(q: Float[Array, "B N T H"], length: int, pattern: Lsh) -> Int[Array, "B N T R"]:
    """Returns the buckets of each token in each round, of about 2 * length / chunk."""
    bits = max(math.ceil(math.log2(2 * length / pattern.chunk)), 1)
    factors = [2**bits] if 2**bits <= MOST else [2 ** (bits // 2), 2 ** (bits - bits // 2)]
    draw, found = np.random.default_rng(0), 0
    for buckets in factors:
        shape = (pattern.rounds, q.shape[-1], buckets // 2)
        directions = jnp.asarray(draw.normal(size=shape), jnp.float32)
        near = jnp.einsum("BNTH,RHD->BNTRD", jax.lax.stop_gradient(q), directions)
        found = found * buckets + jnp.argmax(jnp.concatenate([near, -near], axis=-1), axis=-1)
    return found


def with_previous(x: Array) -> Array:
    """Returns each chunk of x [B N C m _] behind the one before it."""
    before = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))[:, :, :-1]
    return jnp.concatenate([before, x], axis=3)


def _pairs(at, chunks, causal: bool):
    """Returns which pairs of a chunk's queries and keys may meet, and what is taken from their
    scores: the logarithm of the number of rounds in which they do, and `SELF` for oneself."""
    keys_at, keys_chunks = with_previous(at), with_previous(chunks)
    (q_at, q_segment), (k_at, k_segment) = (
        (at[..., :, None, 0], at[..., :, None, 1]),
        (keys_at[..., None, :, 0], keys_at[..., None, :, 1]),
    )
    own = jnp.arange(keys_at.shape[3]) >= at.shape[3]
    exists = own | (jnp.arange(at.shape[2]) > 0)[:, None]  # nothing is before the first chunk
    allowed = (q_segment == k_segment) & exists[:, None, :] & (k_at != NONE)
    allowed = allowed & (k_at <= q_at) if causal else allowed
    apart = chunks[..., :, None, :] - keys_chunks[..., None, :, :]
    rounds = ((apart >= 0) & (apart <= 1)).sum(axis=-1)
    penalty = jnp.log(jnp.maximum(rounds, 1).astype(jnp.float32))
    return allowed, penalty + SELF * (q_at == k_at)


@jax.custom_vjp
def permute(
    x: Float[Array, "B N T _"] | Int[Array, "B N T _"],
    order: Int[Array, "B N T"],
    back: Int[Array, "B N T"],
) -> Array:
    """Returns x in another order along T. Its gradient is put `back` in order: no scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=2)


def _permute(x, order, back):
    return permute(x, order, back), (order, back)


def _permute_back(orders, grad):
    order, back = orders
    return permute(grad, back, order), None, None


permute.defvjp(_permute, _permute_back)
