"""Weights that stay zero while the others are trained, and pruning while training."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgpt.config import ShrinkConfig
from jaxgpt.config.validate import PRUNED_AT
from jaxgpt.optim.groups import by_path, is_hidden_matrix


def sparsity(cfg: ShrinkConfig, num_steps: int) -> tuple[optax.GradientTransformation, ...]:
    """Returns the last parts of an optimizer's chain: what keeps zeros, where there are any."""
    if cfg.sparsity:
        return (prune_gradually(cfg, num_steps),)
    return (keep_zeros(),) if cfg.zeros == "keep" else ()


def keep_zeros() -> optax.GradientTransformation:
    """Returns the transform that has no update for a projection's weight that is exactly 0, so
    that what was pruned stays so to the bit. The weights themselves are the mask: nothing more is
    in the checkpoint."""

    def update(updates, params):
        hidden = by_path(is_hidden_matrix, updates)
        return jax.tree.map(lambda u, p, h: _kept(u, p) if h else u, updates, params, hidden)

    return optax.stateless(update)


def _kept(update, param):
    return jnp.where(param != 0, update, jnp.zeros_like(update))


def share_at(step, cfg: ShrinkConfig, last: int) -> Float[Array, ""]:
    """Returns the share of weights that are zero after update `step`: 0 until `prune_from`, then
    fast first, slower towards `sparsity` at `last` (arXiv:1710.01878, eq. 1)."""
    left = 1 - (step - cfg.prune_from) / max(last - cfg.prune_from, 1)
    return cfg.sparsity * (1 - jnp.clip(left, 0, 1) ** 3)


def prune_gradually(cfg: ShrinkConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns `keep_zeros` that also sets the smallest weights of each projection of each layer to
    zero, every `prune_every` updates from `prune_from` on, until `share_at` of them are.

    Its state has the type of a schedule's, whose count follows the run's steps (see
    `optimizers.at_step`).
    """
    last = cfg.prune_to or round(PRUNED_AT * num_steps)

    def init(params):
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        step = state.count + 1
        since = step - cfg.prune_from
        due = (since >= 0) & ((since % cfg.prune_every == 0) | (step == last))
        share, hidden = share_at(step, cfg, last), by_path(is_hidden_matrix, updates)

        def one(u, p, is_hidden: bool):
            if not is_hidden:
                return u
            u = _kept(u, p)
            return jax.lax.cond(due, lambda: _pruned(u, p, share), lambda: u)

        new = jax.tree.map(one, updates, params, hidden)
        return new, optax.ScaleByScheduleState(count=step)

    return optax.GradientTransformation(init, update)


def _pruned(update, param, share):
    """Returns the update after which the smallest `share` of each layer's weights are zero."""
    size = jnp.abs(param + update.astype(param.dtype))
    whole = jax.sharding.reshard(size, P(*(None,) * size.ndim)).reshape(size.shape[0], -1)
    removed = jnp.round(share * whole.shape[1]).astype(jnp.int32)
    largest = jnp.take(jnp.sort(whole, axis=1), jnp.maximum(removed - 1, 0), axis=1)
    limit = jnp.where(removed > 0, largest, -1.0).reshape(-1, *(1,) * (size.ndim - 1))
    return jnp.where(size > limit, update, -param.astype(update.dtype))
