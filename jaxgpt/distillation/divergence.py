"""Cross-entropy and the divergence from a teacher, the vocabulary a part at a time: neither model's
logits are ever whole."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config.schema import IGNORE, REPLICAS
from jaxgpt.ops.cross_entropy import FLOATS, LOWEST, Reader, part_logits, vocabulary_parts
from jaxgpt.parallel.rules import AxisRules


class Output(NamedTuple):
    """What a model's logits come from: hidden states, the output embedding as it is stored, how it
    is read and what makes logits of products (see `ops.cross_entropy`)."""

    x: Float[Array, "B T D"]
    table: Any
    finish: Callable
    reader: Reader = FLOATS


class Losses(NamedTuple):
    """Of each target, 0 where there is none: its cross-entropy in nats, the logsumexp of the
    student's logits, and T**2 times the divergence at temperature T."""

    nats: Float[Array, "B T"]
    lse: Float[Array, "B T"]
    soft: Float[Array, "B T"]


def distillation_losses(
    student: Output,
    teacher: Output,
    targets: Int[Array, "B T"],
    temperature: float,
    divergence: str,
    rules: AxisRules,
) -> Losses:
    """Returns the student's losses; only its `x` and `table` get gradients.

    With p and q the teacher's and the student's softmax of logits / T, the divergence is
    KL(p || q) = sum p (log p - log q) ("forward", arXiv:1503.02531, section 2) or KL(q || p)
    ("reverse"); T**2 keeps its gradient's size as T changes. Both models have the same vocabulary.
    The logits of both are made anew, part by part, for the backward pass, as in `cross_entropy`,
    whose gradient is computed from the same products. Padding (logit -inf) counts nothing.
    """
    arrays = (student.x, student.table, teacher.x, teacher.table, targets)
    kinds = Kind(student.finish, student.reader), Kind(teacher.finish, teacher.reader)
    arrays = jax.sharding.reshard(arrays, _specs(kinds, rules))
    return _losses(*arrays, kinds, (temperature, DIVERGENCES[divergence]), rules)


class Kind(NamedTuple):
    """Of a model's output, what is no array."""

    finish: Callable
    reader: Reader


def _specs(kinds: tuple[Kind, Kind], rules: AxisRules) -> tuple:
    """Returns the shardings of (x, table, their_x, their_table, targets)."""
    hidden, tables = rules("batch", "seq", None), [rules(*kind.reader.axes) for kind in kinds]
    return hidden, tables[0], hidden, tables[1], rules("batch", "seq")


class Divergence(NamedTuple):
    """KL(lead || other): which of (student, teacher) leads, and the gradient by the student's
    logits / T, from both log-probabilities and the divergence."""

    lead: int
    gradient: Callable


DIVERGENCES = {
    "forward": Divergence(1, lambda log_q, log_p, kl: jnp.exp(log_q) - jnp.exp(log_p)),
    "reverse": Divergence(0, lambda log_q, log_p, kl: jnp.exp(log_q) * (minus(log_q, log_p) - kl)),
}


def minus(a, b):
    """Returns a - b, 0 where a is -inf: there both are, as padding."""
    return jnp.where(a == -jnp.inf, 0, a - b)


class Running(NamedTuple):
    """Over the columns so far: the highest logit, the sum of exp(logit - highest), and the sum of
    values weighted by it."""

    high: Float[Array, "M"]
    total: Float[Array, "M"]
    weighted: Float[Array, "M"]

    @classmethod
    def start(cls, rows: int) -> "Running":
        """Returns that of no columns."""
        zeros = jnp.zeros(rows, jnp.float32)
        return cls(zeros + LOWEST, zeros, zeros)

    def add(self, logits, values) -> "Running":
        """Returns it with more columns."""
        high = jnp.maximum(self.high, jnp.max(logits, axis=-1))
        shrink, p = jnp.exp(self.high - high), jnp.exp(logits - high[:, None])
        total = self.total * shrink + jnp.sum(p, axis=-1)
        return Running(high, total, self.weighted * shrink + jnp.sum(p * values, axis=-1))

    def end(self) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
        """Returns the logsumexp of all columns, of all devices along `tensor`, and the mean of the
        values under their softmax."""
        highest = jax.lax.pmax(self.high, "tensor")
        shrink = jnp.exp(self.high - highest)
        total = jax.lax.psum(self.total * shrink, "tensor")
        return highest + jnp.log(total), jax.lax.psum(self.weighted * shrink, "tensor") / total


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _losses(x, table, their_x, their_table, targets, kinds, measure, rules):
    return _forward(x, table, their_x, their_table, targets, kinds, measure, rules)[0]


def _forward(x, table, their_x, their_table, targets, kinds, measure, rules):
    rows, (temperature, divergence) = rules("batch", "seq"), measure

    def local(x, table, their_x, their_table, targets):
        flat, theirs = x.reshape(-1, x.shape[-1]), their_x.reshape(-1, their_x.shape[-1])
        target = targets.reshape(-1, 1)

        def part(carry, numbered):
            hard, lead, other, picked = carry
            (logits, ids, *_), (their_logits, *_) = _both(flat, theirs, numbered, kinds, rules)
            soft = logits / temperature, their_logits / temperature
            first, second = soft[divergence.lead], soft[1 - divergence.lead]
            picked = picked + jnp.sum(jnp.where(ids == target, logits, 0), axis=-1)
            lead = lead.add(first, minus(first, second))
            return (hard.add(logits, 0.0), lead, other.add(second, 0.0), picked), None

        start = (*[Running.start(flat.shape[0])] * 3, jnp.zeros(flat.shape[0], jnp.float32))
        carry, _ = jax.lax.scan(part, start, _parts(table, their_table, flat, kinds))
        (lse, _), (lead_lse, mean), (other_lse, _) = (running.end() for running in carry[:3])
        kl = mean - lead_lse + other_lse
        nats = lse - jax.lax.psum(carry[3], "tensor")
        lses = (other_lse, lead_lse) if divergence.lead else (lead_lse, other_lse)
        return tuple(a.reshape(targets.shape) for a in (nats, lse, kl, *lses))

    specs = _specs(kinds, rules)
    run = jax.shard_map(local, in_specs=specs, out_specs=(rows,) * 5, check_vma=False)
    nats, lse, kl, *soft_lses = run(x, table, their_x, their_table, targets)
    kept = (x, table, their_x, their_table, targets, lse, kl, *soft_lses)
    losses = (nats, lse, temperature**2 * kl)
    return Losses(*(jnp.where(targets != IGNORE, a, 0) for a in losses)), kept


def _backward(kinds, measure, rules, kept, cotangents):
    rows, (temperature, divergence) = rules("batch", "seq"), measure

    def local(x, table, their_x, their_table, targets, *columns):
        flat, theirs = x.reshape(-1, x.shape[-1]), their_x.reshape(-1, their_x.shape[-1])
        target = targets.reshape(-1, 1)
        lse, kl, soft_lse, their_lse, *grads = (a.reshape(-1, 1) for a in columns)
        grad_nats, grad_lse, grad_soft = (jnp.where(target == IGNORE, 0, g) for g in grads)

        def part(grad_x, numbered):
            ours, (their_logits, *_) = _both(flat, theirs, numbered, kinds, rules)
            logits, ids, kernel, pullback = ours
            log_q = logits / temperature - soft_lse
            log_p = their_logits / temperature - their_lse
            grad_logits = (grad_nats + grad_lse) * jnp.exp(logits - lse)
            grad_logits = grad_logits - jnp.where(ids == target, grad_nats, 0)
            soft = divergence.gradient(log_q, log_p, kl)  # T**2 times it, by logits / T
            grad_logits = grad_logits + grad_soft * temperature * soft
            found = numbered[0], kernel, pullback
            return pulled_back(grad_x, grad_logits, flat, *found, kinds[0].reader, rules)

        zeros = jnp.zeros(flat.shape, jnp.float32)
        grad_x, grad_table = jax.lax.scan(part, zeros, _parts(table, their_table, flat, kinds))
        grad_x = jax.lax.psum(grad_x.astype(x.dtype), "tensor").reshape(x.shape)
        return grad_x, kinds[0].reader.join(grad_table)

    specs = _specs(kinds, rules)
    each = specs[0], jax.P(REPLICAS, *specs[1])
    given = (*specs, *[rows] * 7)
    run = jax.shard_map(local, in_specs=given, out_specs=each, check_vma=False)
    grad_x, grad_table = run(*kept, *cotangents)
    return grad_x, summed(grad_table, kept[1]), None, None, None


_losses.defvjp(_forward, _backward)


def _parts(table, their_table, flat, kinds):
    """Returns what the scans run over: the same parts of both models' rows, and their first ids."""
    ours, theirs = (kind.reader for kind in kinds)
    parts, first, _ = vocabulary_parts(table, flat, ours)
    return parts, vocabulary_parts(their_table, flat, theirs)[0], first


def _both(flat, theirs, numbered, kinds, rules):
    """Returns what `part_logits` does of a part of the student's and of the teacher's."""
    kernel, their_kernel, first = numbered
    each = zip((flat, theirs), (kernel, their_kernel), kinds, strict=True)
    ours, other = (part_logits(x, k, first, None, of.finish, rules, of.reader) for x, k, of in each)
    return ours, other


def pulled_back(grad_x, grad_logits, flat, part, kernel, pullback, reader: Reader, rules):
    """Returns `grad_x` with a part's own added, in float32, and this device's share of the gradient
    of the part's rows of the table, None where it is not trained."""
    (grad_raw,) = pullback(grad_logits)
    grad_raw = grad_raw.astype(flat.dtype)
    grad_kernel = reader.grad(grad_raw, flat)
    grad_kernel = reader.scatter(grad_kernel, part, rules.torus)
    added = jnp.einsum("MV,VD->MD", grad_raw, kernel, preferred_element_type=jnp.float32)
    return grad_x + added, grad_kernel


def summed(grad_table, table):
    """Returns what `Reader.join` gave, summed over the devices, in the table's dtype."""
    dtype = jax.tree.leaves(table)[0].dtype
    return jax.tree.map(lambda g: jnp.sum(g, axis=0).astype(dtype), grad_table)
