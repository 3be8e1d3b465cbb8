"""Which experts a token goes to, and with what weight: routers by name, and what they are judged
by."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.config import ModelConfig


class Choice(NamedTuple):
    """The k experts of each token, `num_experts` where a full one drops it, and their weights."""

    ids: Int[Array, "B T k"]
    gates: Float[Array, "B T k"]


class Sums(NamedTuple):
    """What a router did, summed over tokens."""

    chosen: Float[Array, "E"]  # how often each expert was, dropped ones included
    scores: Float[Array, "E"]  # of each expert, as shares of the token's
    square_lse: Float[Array, ""]  # of the logits
    entropy: Float[Array, ""]  # of the shares, in nats
    dropped: Float[Array, ""]


def softmax_topk(logits: Float[Array, "B T E"], bias, k: int) -> tuple:
    """Returns (ids, scores) of the k highest, and the shares of all: Mixtral's (arXiv:2401.04088,
    section 2.1)."""
    shares = jax.nn.softmax(logits)
    gates, ids = jax.lax.top_k(shares, k)
    return ids, gates, shares


def sigmoid_topk(logits: Float[Array, "B T E"], bias: Float[Array, "E"], k: int) -> tuple:
    """Returns the same by sigmoids, of which the k highest after `bias` is added are taken; the
    weights are without it (DeepSeek-V3, arXiv:2412.19437, equations 13 to 16)."""
    scores = jax.nn.sigmoid(logits)
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(scores + bias), k)
    gates = jnp.take_along_axis(scores, ids, axis=-1)
    return ids, gates, scores / jnp.sum(scores, axis=-1, keepdims=True)


ROUTERS: dict[str, Callable] = {"softmax_topk": softmax_topk, "sigmoid_topk": sigmoid_topk}


def choose(
    logits: Float[Array, "B T E"], bias: Float[Array, "E"] | None, cfg: ModelConfig
) -> tuple[Choice, Sums]:
    """Returns each token's experts from float32 logits, and the sums over these tokens."""
    ids, gates, shares = ROUTERS[cfg.router](logits, bias, cfg.experts_per_token)
    if cfg.normalize_gates:
        gates = gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), 1e-20)
    chosen = jnp.sum(_one_hot(ids, cfg.num_experts), axis=(0, 1, 2))
    kept = _kept(ids, cfg)
    sums = Sums(
        chosen,
        jnp.sum(shares, axis=(0, 1)),
        jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        -jnp.sum(jax.lax.stop_gradient(shares * jnp.log(jnp.maximum(shares, 1e-30)))),
        jnp.sum(~kept, dtype=jnp.float32),
    )
    ids, gates = jnp.where(kept, ids, cfg.num_experts), jnp.where(kept, gates, 0)
    return Choice(ids, cfg.gate_scale * gates), sums


def _one_hot(ids, experts: int) -> Float[Array, "*B E"]:
    return (ids[..., None] == jnp.arange(experts)).astype(jnp.float32)


def _kept(ids: Int[Array, "B T k"], cfg: ModelConfig) -> Array:
    """Returns which choices an expert has room for: in each sequence the first so many, at
    `expert_capacity` times the mean, so that neither mesh nor batch change what is dropped."""
    batch, length, k = ids.shape
    if not cfg.expert_capacity:
        return jnp.ones(ids.shape, bool)
    room = math.ceil(cfg.expert_capacity * length * k / cfg.num_experts)
    counts = _one_hot(ids.reshape(batch, -1), cfg.num_experts)
    before = jnp.sum((jnp.cumsum(counts, axis=1) - counts) * counts, axis=-1)
    return (before < room).reshape(ids.shape)


def measure(sums: Sums, tokens: int, bias, cfg: ModelConfig) -> dict[str, Array]:
    """Returns what a layer adds to the model's loss ("auxiliary_loss", weighted) and its figures by
    name, from the sums over all tokens; each divided by the number of such layers.

    The balance loss is E * sum(f * P), f how often a token chooses each expert and P its mean
    share (Switch, arXiv:2101.03961, equation 4): it is experts_per_token where all are even.
    """
    share = sums.chosen / (tokens * cfg.experts_per_token)
    balance = cfg.num_experts * jnp.dot(sums.chosen / tokens, sums.scores / tokens)
    z_loss = sums.square_lse / tokens  # ST-MoE, arXiv:2202.08906, equation 5
    added = cfg.balance_loss * balance + cfg.router_z_loss * z_loss
    if bias is not None:
        added += _toward_even(bias, share)
    figures = {
        "auxiliary_loss": added,
        "balance_loss": balance,
        "router_z_loss": z_loss,
        "router_entropy": sums.entropy / tokens,
        "dropped_share": sums.dropped / (tokens * cfg.experts_per_token),
        "expert_load": jnp.max(share) * cfg.num_experts,
        "expert_share": share,
    }
    return {name: figure / num_mixtures(cfg) for name, figure in figures.items()}


BIAS_GRADIENT = 1e-6  # small, so that it does not show in the gradient's norm


def _toward_even(bias: Float[Array, "E"], share: Float[Array, "E"]) -> Float[Array, ""]:
    """Returns 0, with a gradient by the bias whose sign says which experts have too many tokens.
    The optimizer follows the sign alone (see `optim.experts`): no loss disturbs the model
    (arXiv:2408.15664, algorithm 1)."""
    excess = jax.lax.stop_gradient(share - 1 / len(share))
    return BIAS_GRADIENT * jnp.dot(bias - jax.lax.stop_gradient(bias), excess)


def num_mixtures(cfg: ModelConfig) -> int:
    """Returns how many layers have experts."""
    return len(cfg.mixture_layers)
