"""The update: gradients over microbatches, the optimizer, and what a bad step leaves alone."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import Config
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import Batch, Micro
from jaxgpt.optim.groups import OWN, join, split, trainable
from jaxgpt.optim.optimizers import at_step, make_optimizer
from jaxgpt.optim.schedules import make_schedule
from jaxgpt.parallel import replicas
from jaxgpt.training import loss_scale
from jaxgpt.training.divergence import judge, update_if
from jaxgpt.training.objectives import OBJECTIVES
from jaxgpt.training.state import TrainState, to_float32


def make_train_step(
    spec: ModelSpec, config: Config, companions: Mapping[str, ModelSpec] | None = None
) -> Callable:
    """Returns the jitted update `(state, batch) -> (state, metrics)`; it donates `state`.

    With `companions`, models that the objective asks for by name, the update takes their parameters
    too: `(state, batch, {name: params})`. They are neither trained nor donated.

    The gradient is that of the mean over all targets of all microbatches, so that `grad_accum`
    changes memory and nothing else. Metrics are scalars on the device: the objective's own (`loss`
    is one, see `objectives.language`), `grad_norm` (before clipping), `learning_rate` (that of the
    update), `in_a_row` and `skipped` (bad steps, see `training.divergence`).
    """
    optimizer = make_optimizer(
        config.optim, config.num_steps, spec.model, config.shrink, spec.rules.torus
    )
    schedule = make_schedule(config.optim, config.num_steps)
    objective = OBJECTIVES[config.objective](config)

    def train_step(
        state: TrainState, batch: Batch, frozen_models: Mapping[str, dict] | None = None
    ):
        mask = trainable(state.params, config.optim.freeze, spec.config.lora.rank)
        trained, frozen = split(state.params, mask)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)  # for dropout
        scale = loss_scale.factor(state.loss_scale)
        positions = batch["inputs"].size

        def scaled_loss(trained, micro: Micro, key):
            others = {name: companions[name].bind(p) for name, p in (frozen_models or {}).items()}
            params = join(trained, frozen)
            others |= params.get(OWN, {})
            total, count, metrics = objective(spec.bind(params), micro, key, **others)
            metrics = jax.tree.map(lambda sum_: sum_ / positions, metrics)
            # A mean over what counts in this microbatch: of a mean over all positions, where few
            # count, float16 would lose the gradients, and of a sum it would overflow
            filled = jnp.maximum(count, 1).astype(jnp.float32) / micro["inputs"].size
            return scale * (total / (positions * filled)), (count, metrics, filled)

        def gradient(micro: Micro, index):
            grad = jax.grad(scaled_loss, has_aux=True)
            grads, (*sums, filled) = grad(summed_later, micro, jax.random.fold_in(key, index))
            return jax.tree.map(lambda g: replicas.scale(g, filled), grads), tuple(sums)

        summed_later = replicas.sum_later(trained, config)
        grads, (count, metrics) = _sum_over_microbatches(gradient, batch, summed_later)
        grads = replicas.sum_gradients(grads, config.compute.slice_gradient_dtype)
        share = positions / jnp.maximum(count, 1).astype(jnp.float32)
        grads = jax.tree.map(lambda g, p: (g * (share / scale)).astype(p.dtype), grads, trained)
        metrics = jax.tree.map(lambda mean: mean * share, metrics)

        @jax.named_scope("optimizer")
        def updated(trained, opt_state, ema):
            opt_state = at_step(opt_state, state.step)
            updates, opt_state = optimizer.update(grads, opt_state, trained)
            trained = optax.apply_updates(trained, updates)
            ema = _average(ema, join(trained, frozen), mask, config.optim.ema_decay)
            return trained, opt_state, ema

        norm = optax.global_norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        old = trained, state.opt_state, state.ema
        trained, opt_state, ema = update_if(good, updated, old)
        judged = judge(state.loss_scale, state.bad, good)
        new = TrainState(join(trained, frozen), opt_state, state.step + 1, ema, *judged)
        metrics |= {"grad_norm": norm, "learning_rate": schedule(state.step)}
        return new, metrics | new.bad

    return jax.jit(train_step, donate_argnames="state")


def _sum_over_microbatches(gradient: Callable, batch: Batch, params: dict):
    """Returns `gradient`'s results summed; one microbatch needs neither loop nor buffer.

    Gradients are summed in float32: in bfloat16 the 257th of equal ones would change nothing.
    """
    num_micro = batch["inputs"].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if num_micro == 1:
        return gradient(first, 0)

    def add(total, numbered):
        micro, index = numbered
        return jax.tree.map(jnp.add, total, gradient(micro, index)), None

    _, scalars = jax.eval_shape(gradient, first, 0)
    zeros = jax.tree.map(lambda p: replicas.zeros_like_gradient(p, jnp.float32), params)
    start = zeros, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), scalars)
    return jax.lax.scan(add, start, (batch, jnp.arange(num_micro)))[0]


def _average(ema: dict, params: dict, mask: dict, decay: float) -> dict:
    """Returns the exponential moving average of the trained ones one step on; {} stays {}.

    In float32: in bfloat16 a decay of 0.999 is 1, and the average would never move.
    """

    def one(a, p, trained: bool):
        return decay * a + (1 - decay) * to_float32(p) if trained else a

    return ema and jax.tree.map(one, ema, params, mask)
