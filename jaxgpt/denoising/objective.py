"""The losses of masked language modelling and next sentence prediction, at the positions that have
a target: 15% of the logits are all that is computed."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE
from jaxgpt.model import GPT, ModelSpec
from jaxgpt.model.layers import INIT_STD
from jaxgpt.objectives.auxiliary import with_auxiliary
from jaxgpt.objectives.language import Batch, Micro, hidden, hidden_and_figures
from jaxgpt.objectives.smoothing import even_losses
from jaxgpt.optim.groups import OWN
from jaxgpt.parallel.rules import AxisRules, rowwise

HEAD = "next_sentence"


def most_masked(config: Config) -> int:
    """Returns how many tokens of a row are masked at most."""
    return math.ceil(getattr(config.objectives, config.objective).rate * config.model.max_seq_len)


def masked_lm(config: Config) -> Callable:
    """Returns the objective: the cross-entropy of the masked tokens, with `optim.z_loss` and
    `optim.label_smoothing` (see `causal_lm`)."""
    most = most_masked(config)

    def objective(model: GPT, micro: Micro, key: PRNGKeyArray):
        states, figures = hidden_and_figures(model, micro, key)
        total, loss, count = _masked_loss(config, model, states, micro, most)
        return with_auxiliary(total, count, {"loss": loss}, figures)

    return objective


def _masked_loss(
    config: Config, model: GPT, states: Float[Array, "B T D"], micro: Micro, most: int
):
    """Returns what is minimised, the cross-entropy in it, and the number of targets."""
    smoothing, vocabulary = config.optim.label_smoothing, model.vocabulary
    x, targets = at_targets(model, states, micro["targets"], most)
    nats, lse = vocabulary.losses(x, targets)
    loss = jnp.sum(nats)
    total = loss + config.optim.z_loss * jnp.sum(jnp.square(lse))
    if smoothing:
        total += smoothing * (jnp.sum(even_losses(vocabulary, x, lse, targets)) - loss)
    return total, loss, jnp.sum(targets != IGNORE)


def masked_lm_nsp(config: Config) -> Callable:
    """Returns the objective: that of `masked_lm`, and the mean cross-entropy of whether the second
    text follows the first (BERT, arXiv:1810.04805, appendix A.2). Beside the model it trains the
    head `next_sentence`; the row's `loss` is that of the masked tokens."""
    most = most_masked(config)

    def objective(model: GPT, micro: Micro, key: PRNGKeyArray, next_sentence: dict):
        states, figures = hidden_and_figures(model, micro, key)
        total, loss, count = _masked_loss(config, model, states, micro, most)
        pair_nats, right = pair_losses(states, micro["labels"], next_sentence, model.rules)
        # the step divides by the number of targets: so each microbatch's mean counts by its share
        pair_loss, accuracy = count * jnp.mean(pair_nats), count * jnp.mean(right)
        metrics = {"next_sentence_loss": pair_loss, "next_sentence_accuracy": accuracy}
        return with_auxiliary(total + pair_loss, count, {"loss": loss} | metrics, figures)

    return objective


def at_targets(
    model: GPT, states: Float[Array, "B T D"], targets: Int[Array, "B T"], most: int
) -> tuple[Float[Array, "B M D"], Int[Array, "B M"]]:
    """Returns the states of the positions that have a target, and their targets; at most `most` a
    row, those that are fewer filled up with IGNORE."""
    order = jnp.argsort(targets == IGNORE, axis=1, stable=True)[:, :most]
    rows = jnp.arange(len(targets))[:, None]
    x = states.at[rows, order].get(out_sharding=model.rules("batch", "seq", None))
    return x, targets.at[rows, order].get(out_sharding=model.rules("batch", "seq"))


def pair_losses(
    states: Float[Array, "B T D"], labels: Int[Array, "B"], head: dict, rules: AxisRules
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns the nats of each pair's label, and 1 where it is the likelier one: a projection of
    the first token's state, tanh, and a projection to two."""
    first = states[:, :1]
    out = rules("batch", "seq", None)
    pooled = rowwise("MD,DE->ME", first, head["pooler"]["kernel"], out, jnp.float32)
    pooled = jnp.tanh(pooled + head["pooler"]["bias"])
    logits = rowwise("MD,DE->ME", pooled, head["classifier"]["kernel"], out, jnp.float32)
    logits = (logits + head["classifier"]["bias"])[:, 0]
    is_label = jnp.arange(2) == labels[:, None]
    nats = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    return nats, (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def make_head(key: PRNGKeyArray, spec: ModelSpec) -> dict:
    """Returns the parameters of `pair_losses`, drawn as the model's own."""
    width, dtype = spec.model.embed_dim, jnp.dtype(spec.config.compute.param_dtype)
    sizes = {"pooler": width, "classifier": 2}
    init = jax.nn.initializers.normal(INIT_STD)
    return {
        name: {"kernel": init(k, (width, size), dtype), "bias": jnp.zeros(size, dtype)}
        for (name, size), k in zip(sizes.items(), jax.random.split(key))
    }


def masked_step(spec: ModelSpec, most: int) -> Callable[[dict, Batch], dict]:
    """Returns the jitted `(params, batch) -> figures of each row`, float32 [B], by name: `loss`
    (the sum of the nats of its targets, at most `most`), `masked_accuracy` (how many are the
    likeliest token); of pairs `next_sentence_loss` and `next_sentence_accuracy`."""

    def step(params, batch: Batch):
        micro = jax.tree.map(lambda a: a[0], batch)
        model = spec.bind(params)
        states = hidden(model, micro, None)
        nats, right = _guessed(model, *at_targets(model, states, micro["targets"], most))
        figures = {"loss": nats, "masked_accuracy": right}
        if "labels" in micro:
            head = params[OWN][HEAD]
            nats, right = pair_losses(states, micro["labels"], head, model.rules)
            figures |= {"next_sentence_loss": nats, "next_sentence_accuracy": right}
        return jax.sharding.reshard(figures, jax.P(None))

    return jax.jit(step)


def _guessed(
    model: GPT, x: Float[Array, "B M D"], targets: Int[Array, "B M"]
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns the sum of each row's nats, and how many of its targets are the likeliest token. The
    logits of one target of each row are in memory at a time."""
    table = model.vocabulary.table()

    def one(place):
        x, target = place
        logits = model.vocabulary.logits(x[:, None], table)[:, 0]
        is_target = jnp.arange(logits.shape[-1]) == target[:, None]
        picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
        nats = jax.nn.logsumexp(logits, axis=-1) - picked
        is_right = jnp.argmax(logits, axis=-1) == target
        return jnp.where(target == IGNORE, 0, jnp.stack([nats, is_right]))

    places = jnp.moveaxis(x, 1, 0), jnp.moveaxis(targets, 1, 0)
    nats, right = jnp.sum(jax.lax.map(one, places), axis=0)
    return nats, right
