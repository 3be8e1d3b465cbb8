"""The update: loss, gradients over microbatches, optimizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE
from jaxgpt.model import GPT, ModelSpec
from jaxgpt.optim.groups import join, split, trainable
from jaxgpt.optim.optimizers import at_step, make_optimizer
from jaxgpt.optim.schedules import make_schedule
from jaxgpt.training import loss_scale
from jaxgpt.training.divergence import counted, keep_if
from jaxgpt.training.state import TrainState, widened

Batch = dict[str, Int[Array, "A B T"]]  # inputs, targets (packed: segments, positions too)
Micro = dict[str, Int[Array, "B T"]]


def make_train_step(spec: ModelSpec, config: Config) -> Callable:
    """Returns the jitted update `(state, batch) -> (state, metrics)`; it donates `state`.

    The gradient is that of the mean over all targets of all microbatches, so that `grad_accum`
    changes memory and nothing else. Metrics are scalars on the device: `loss` (cross-entropy in
    nats, without z-loss), `grad_norm` (before clipping), `learning_rate` (that of the update),
    `in_a_row` and `skipped` (bad steps, see `training.divergence`).
    """
    optimizer = make_optimizer(config.optim, config.num_steps, spec.model)
    schedule = make_schedule(config.optim, config.num_steps)
    z_loss, seed, ema_decay = config.optim.z_loss, config.seed, config.optim.ema_decay

    def objective(trained, frozen, micro: Micro, num_targets, key, scale):
        nats, lse = token_losses(spec.bind(join(trained, frozen)), micro, key)
        loss = jnp.sum(nats) / num_targets
        return scale * (loss + z_loss * jnp.sum(jnp.square(lse)) / num_targets), loss

    def train_step(state: TrainState, batch: Batch):
        mask = trainable(state.params, config.optim.freeze, spec.config.lora.rank)
        trained, frozen = split(state.params, mask)
        num_targets = jnp.maximum(jnp.sum(batch["targets"] != IGNORE), 1).astype(jnp.float32)
        key = jax.random.fold_in(jax.random.key(seed), state.step)  # for dropout
        scale = loss_scale.factor(state.loss_scale)

        def gradient(micro: Micro, index):
            grad = jax.grad(objective, has_aux=True)
            return grad(trained, frozen, micro, num_targets, jax.random.fold_in(key, index), scale)

        grads, loss = _sum_over_microbatches(gradient, batch, trained)
        if state.loss_scale:
            grads = jax.tree.map(lambda g: g / scale, grads)
        opt_state = at_step(state.opt_state, state.step)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        params = join(optax.apply_updates(trained, updates), frozen)
        new = TrainState(
            params,
            opt_state,
            state.step + 1,
            _average(state.ema, params, mask, ema_decay),
            state.loss_scale,
            state.bad,
        )
        norm = optax.global_norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = _guarded(state, new, good)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": schedule(state.step)}
        return new, metrics | new.bad

    return jax.jit(train_step, donate_argnames="state")


def token_losses(model: GPT, micro: Micro, dropout_key):
    """Returns (nats, logsumexp) of each target, [B, T], without making all logits at once."""
    x, _ = model.hidden(
        micro["inputs"],
        positions=micro.get("positions"),
        segments=micro.get("segments"),
        dropout_key=dropout_key,
    )
    return model.losses(x, micro["targets"])


def _sum_over_microbatches(gradient: Callable, batch: Batch, params: dict):
    """Returns the summed (gradients, loss); one microbatch needs neither loop nor buffer.

    The sum is float32: in bfloat16 the 257th of equal gradients would change nothing.
    """
    num_micro = batch["inputs"].shape[0]
    if num_micro == 1:
        return gradient(jax.tree.map(lambda x: x[0], batch), 0)

    def add(total, numbered):
        micro, index = numbered
        return jax.tree.map(jnp.add, total, gradient(micro, index)), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    start = (zeros, jnp.zeros((), jnp.float32))
    grads, loss = jax.lax.scan(add, start, (batch, jnp.arange(num_micro)))[0]
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), loss


def _average(ema: dict, params: dict, mask: dict, decay: float) -> dict:
    """Returns the exponential moving average of the trained ones one step on; {} stays {}.

    In float32: in bfloat16 a decay of 0.999 is 1, and the average would never move.
    """

    def one(a, p, trained: bool):
        return decay * a + (1 - decay) * widened(p) if trained else a

    return ema and jax.tree.map(one, ema, params, mask)


def _guarded(old: TrainState, new: TrainState, good) -> TrainState:
    """Returns `new` where the step was good, else `old` a step on and a bad step more.

    With loss scaling an overflow is no fault of the step's while the scale can still fall.
    """
    kept = keep_if(good, new, old)
    scale, blame = old.loss_scale, good
    if scale:
        blame = good | (scale["scale"] > 1)
        scale = loss_scale.adjust(scale, good)
    bad = counted(old.bad, blame)
    return TrainState(kept.params, kept.opt_state, new.step, kept.ema, scale, bad)


def make_eval_step(spec: ModelSpec) -> Callable[[dict, Batch], Float[Array, "B T"]]:
    """Returns the jitted `(params, batch) -> nats of every target`, 0 where there is none."""

    def eval_step(params, batch: Batch):
        micro = jax.tree.map(lambda a: a[0], batch)
        nats, _ = token_losses(spec.bind(params), micro, None)
        return jax.sharding.reshard(nats, jax.P(None, None))

    return jax.jit(eval_step)
