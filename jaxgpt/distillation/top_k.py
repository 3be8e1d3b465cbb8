"""A teacher's most likely tokens instead of all its logits, and the divergence from them.

The teacher's distribution at temperature T is kept as the log-probabilities of its `top_k` most
likely tokens; what is left of its mass is one bucket more. The student is compared over the same
top_k + 1 outcomes, its bucket being all other tokens: the divergence is never more than that of
the whole distributions, and within the bucket the student keeps its own proportions.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config.schema import IGNORE, REPLICAS, DistillConfig
from jaxgpt.distillation.divergence import Kind, Losses, Output, Running, pulled_back, summed
from jaxgpt.ops.cross_entropy import LOWEST, part_logits, vocabulary_parts
from jaxgpt.parallel.rules import AxisRules

FULL = -1e-6  # above it the log of a mass has no room for a rest in float32


def top_k_losses(student: Output, micro: dict, cfg: DistillConfig, rules: AxisRules) -> Losses:
    """Returns the student's losses (see `divergence.Losses`) from a batch with `teacher_ids` and
    `teacher_logs`, both [B, T, K]: the teacher's most likely tokens and their log-probabilities at
    the temperature."""
    targets, logs = micro["targets"], micro["teacher_logs"]
    ids = jnp.concatenate([targets[..., None], micro["teacher_ids"]], axis=-1)
    picked, lse, soft_lse = picked_logits(student, ids, cfg.temperature, rules)
    ours = picked[..., 1:] / cfg.temperature - soft_lse[..., None]
    soft = cfg.temperature**2 * BUCKETED[cfg.divergence](logs, ours)
    losses = (lse - picked[..., 0], lse, soft)
    return Losses(*(jnp.where(targets != IGNORE, a, 0) for a in losses))


def with_rest(logs: Float[Array, "B T K"]) -> Float[Array, "B T K+1"]:
    """Returns log-probabilities with that of all other outcomes behind them."""
    mass = jnp.minimum(jax.nn.logsumexp(logs, axis=-1, keepdims=True), FULL)
    return jnp.concatenate([logs, jnp.log(-jnp.expm1(mass))], axis=-1)


def _divergence(log_p: Float[Array, "B T K"], log_q: Float[Array, "B T K"]):
    """Returns KL(p || q) over the outcomes and the bucket of the others."""
    log_p, log_q = with_rest(log_p), with_rest(log_q)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


BUCKETED = {"forward": _divergence, "reverse": lambda log_p, log_q: _divergence(log_q, log_p)}


def picked_logits(
    student: Output, ids: Int[Array, "B T K"], temperature: float, rules: AxisRules
) -> tuple[Float[Array, "B T K"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the logits of `ids` (0 for a negative one), and the logsumexp of all logits and of
    all logits / temperature. The vocabulary is read in parts, as in `cross_entropy`."""
    kind = Kind(student.finish, student.reader)
    arrays = jax.sharding.reshard((student.x, student.table, ids), _specs(kind, rules))
    return _picked(*arrays, kind, temperature, rules)


def _specs(kind: Kind, rules: AxisRules) -> tuple:
    """Returns the shardings of (x, table, ids)."""
    return rules("batch", "seq", None), rules(*kind.reader.axes), rules("batch", "seq", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _picked(x, table, ids, kind, temperature, rules):
    return _forward(x, table, ids, kind, temperature, rules)[0]


def _forward(x, table, ids, kind, temperature, rules):
    rows, vectors = rules("batch", "seq"), rules("batch", "seq", None)

    def local(x, table, ids):
        flat, wanted = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])

        def part(carry, numbered):
            hard, soft, picked = carry
            logits, columns, *_ = part_logits(flat, *numbered, kind.finish, rules, kind.reader)
            at, inside = _within(wanted, columns)
            picked = picked + jnp.where(inside, jnp.take_along_axis(logits, at, axis=-1), 0)
            return (hard.add(logits, 0.0), soft.add(logits / temperature, 0.0), picked), None

        start = (*[Running.start(flat.shape[0])] * 2, jnp.zeros(wanted.shape, jnp.float32))
        parts = vocabulary_parts(table, flat, kind.reader)
        (hard, soft, picked), _ = jax.lax.scan(part, start, parts)
        picked = jax.lax.psum(picked, "tensor").reshape(ids.shape)
        return picked, *(r.end()[0].reshape(ids.shape[:-1]) for r in (hard, soft))

    out = vectors, rows, rows
    run = jax.shard_map(local, in_specs=_specs(kind, rules), out_specs=out, check_vma=False)
    picked, lse, soft_lse = run(x, table, ids)
    return (picked, lse, soft_lse), (x, table, ids, lse, soft_lse)


def _backward(kind, temperature, rules, kept, cotangents):
    rows, vectors = rules("batch", "seq"), rules("batch", "seq", None)

    def local(x, table, ids, lse, soft_lse, grad_picked, grad_lse, grad_soft):
        flat, wanted = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])
        grad_picked = grad_picked.reshape(wanted.shape)
        columns = (a.reshape(-1, 1) for a in (lse, soft_lse, grad_lse, grad_soft))
        lse, soft_lse, grad_lse, grad_soft = columns
        row = jnp.arange(flat.shape[0])[:, None]

        def part(grad_x, numbered):
            found = part_logits(flat, *numbered, kind.finish, rules, kind.reader)
            logits, columns, kernel, pullback = found
            soft = jnp.exp(logits / temperature - soft_lse) / temperature
            grad_logits = grad_lse * jnp.exp(logits - lse) + grad_soft * soft
            at, inside = _within(wanted, columns)
            grad_logits = grad_logits.at[row, at].add(jnp.where(inside, grad_picked, 0))
            found = numbered[0], kernel, pullback
            return pulled_back(grad_x, grad_logits, flat, *found, kind.reader, rules)

        zeros = jnp.zeros(flat.shape, jnp.float32)
        parts = vocabulary_parts(table, flat, kind.reader)
        grad_x, grad_table = jax.lax.scan(part, zeros, parts)
        grad_x = jax.lax.psum(grad_x.astype(x.dtype), "tensor").reshape(x.shape)
        return grad_x, kind.reader.join(grad_table)

    specs = _specs(kind, rules)
    run = jax.shard_map(
        local,
        in_specs=(*specs, rows, rows, vectors, rows, rows),
        out_specs=(vectors, jax.P(REPLICAS, *specs[1])),
        check_vma=False,
    )
    grad_x, grad_table = run(*kept, *cotangents)
    return grad_x, summed(grad_table, kept[1]), None


_picked.defvjp(_forward, _backward)


def _within(ids, columns):
    """Returns where ids are among a part's columns, and which are there at all."""
    at = ids - columns[0]
    inside = (at >= 0) & (at < columns.shape[0])
    return jnp.where(inside, at, 0), inside


def most_likely(
    teacher: Output, k: int, temperature: float, rules: AxisRules
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
    """Returns the k most likely ids of every position, the likeliest first, and their
    log-probabilities at the temperature."""
    vectors, split = rules("batch", "seq", None), rules(*teacher.reader.axes)

    def local(x, table):
        flat = x.reshape(-1, x.shape[-1])

        def part(carry, numbered):
            running, ids, values = carry
            logits, columns, *_ = part_logits(
                flat, *numbered, teacher.finish, rules, teacher.reader
            )
            logits = logits / temperature
            new, at = jax.lax.top_k(logits, min(k, logits.shape[-1]))
            return (running.add(logits, 0.0), *_best(ids, values, columns[at], new)), None

        start = jnp.zeros((flat.shape[0], k))
        start = Running.start(flat.shape[0]), start.astype(jnp.int32), start + LOWEST
        parts = vocabulary_parts(table, flat, teacher.reader)
        (running, ids, values), _ = jax.lax.scan(part, start, parts)
        ids, values = (jax.lax.all_gather(a, "tensor", axis=1, tiled=True) for a in (ids, values))
        ids, values = _best(ids[:, :0], values[:, :0], ids, values, k)
        shape = (*x.shape[:-1], k)
        return ids.reshape(shape), (values - running.end()[0][:, None]).reshape(shape)

    arrays = jax.sharding.reshard((teacher.x, teacher.table), (vectors, split))
    return jax.shard_map(
        local, in_specs=(vectors, split), out_specs=(vectors, vectors), check_vma=False
    )(*arrays)


def _best(ids, values, more_ids, more_values, k=None):
    """Returns the ids of the k highest of both rows of values (default: as many as there are in
    the first), and those."""
    ids = jnp.concatenate([ids, more_ids], axis=1)
    values, at = jax.lax.top_k(jnp.concatenate([values, more_values], axis=1), k or values.shape[1])
    return jnp.take_along_axis(ids, at, axis=1), values
