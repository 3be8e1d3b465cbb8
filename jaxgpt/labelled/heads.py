"""Classes, word classes and answer spans from hidden states: fresh heads, and their losses.

A head is one matrix and a bias, in float32 products: {"kernel": [D, C], "bias": [C]}. Its
parameters are the objective's own (`optim.groups.OWN`), under the name `classifier`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE
from jaxgpt.labelled.labels import parse_weights
from jaxgpt.labelled.prepare import task_of
from jaxgpt.model import Model, ModelSpec
from jaxgpt.model.layers import INIT_STD, dropout
from jaxgpt.objectives.auxiliary import with_auxiliary
from jaxgpt.objectives.language import Micro, hidden_and_figures
from jaxgpt.parallel.rules import AxisRules, rowwise, whole

Head = dict[str, Array]
NEVER = -1e30  # the logit of a token that may not be in an answer: finite, so that 0 * it is 0


def make_head(key: PRNGKeyArray, spec: ModelSpec, outputs: int) -> Head:
    """Returns a fresh head of so many outputs on the states of a model."""
    dtype, width = jnp.dtype(spec.config.compute.param_dtype), spec.model.embed_dim
    init = jax.nn.initializers.normal(INIT_STD)
    kernel = init(key, (width, outputs), dtype, out_sharding=spec.rules("embed", None))
    return {"kernel": kernel, "bias": jnp.zeros(outputs, dtype)}


# From [B, T] of 1 for text and 0 for padding: how much each state counts in the text's
POOLING: dict[str, Callable[[Float[Array, "B T"]], Float[Array, "B T"]]] = {
    "first": lambda text: (jnp.arange(text.shape[1]) == 0) * text,
    "last": lambda text: (jnp.arange(text.shape[1]) == text.sum(axis=1, keepdims=True) - 1) * text,
    "mean": lambda text: text / jnp.maximum(text.sum(axis=1, keepdims=True), 1),
}


def pooled(
    x: Float[Array, "B T D"], segments: Int[Array, "B T"], pooling: str, rules: AxisRules
) -> Float[Array, "B D"]:
    """Returns the state that stands for each text: its first or last token's, or the mean."""
    shares = POOLING[pooling]((segments > 0).astype(jnp.float32))
    out = rules("batch", None)
    return jnp.einsum("BT,BTD->BD", shares, x.astype(jnp.float32), out_sharding=out)


def class_logits(
    model: Model,
    micro: Micro,
    key: PRNGKeyArray | None,
    head: Head,
    pooling: str,
    rate: float = 0.0,
) -> tuple[Float[Array, "B C"], dict]:
    """Returns the logits of each text's classes, float32, and the model's figures (see
    `hidden_and_figures`); a share `rate` of the states drops out where there is a key."""
    states, figures = hidden_and_figures(model, micro, key)
    x = pooled(states, micro["segments"], pooling, model.rules)
    x = dropout(x, rate, None if key is None else jax.random.fold_in(key, 1))
    kernel = whole(head["kernel"])
    out = model.rules("batch", None)
    logits = jnp.einsum("BD,DC->BC", x, kernel.astype(x.dtype), out_sharding=out)
    return logits + head["bias"].astype(jnp.float32), figures


def token_logits(
    model: Model, micro: Micro, key: PRNGKeyArray | None, head: Head, rate: float = 0.0
) -> tuple[Float[Array, "B T C"], dict]:
    """Returns the logits of each token's classes, float32, and the model's figures."""
    x, figures = hidden_and_figures(model, micro, key)
    x = dropout(x, rate, None if key is None else jax.random.fold_in(key, 1))
    kernel = whole(head["kernel"].astype(x.dtype))
    logits = rowwise("MD,DC->MC", x, kernel, model.rules("batch", "seq", None), jnp.float32)
    return logits + head["bias"].astype(jnp.float32), figures


def span_logits(
    model: Model, micro: Micro, key: PRNGKeyArray | None, head: Head, rate: float = 0.0
) -> tuple[Float[Array, "B T 2"], dict]:
    """Returns the logits of each token to be the first and the last of the answer, `NEVER` where
    `context` is 0, and the model's figures."""
    logits, figures = token_logits(model, micro, key, head, rate)
    return jnp.where(micro["context"][..., None] > 0, logits, NEVER), figures


def class_losses(
    logits: Float[Array, "*B C"],
    labels: Int[Array, "*B"],
    weights: Float[Array, "C"],
    smoothing: float,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns for each label what is minimised, its nats, and 1 where it has the highest logit;
    all 0 where it is IGNORE.

    Minimised is `(1 - e) w[label] nats + e / C sum_c w[c] (-log p[c])`, as PyTorch's cross_entropy
    has it (arXiv:1512.00567, section 7, with weights w and smoothing e).
    """
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    costs = -jax.nn.log_softmax(logits, axis=-1)
    nats = jnp.sum(jnp.where(is_label, costs, 0), axis=-1)
    weighted = nats * jnp.sum(is_label * weights, axis=-1)
    spread = jnp.sum(jnp.where(labels[..., None] == IGNORE, 0, costs) * weights, axis=-1)
    loss = (1 - smoothing) * weighted + smoothing / logits.shape[-1] * spread
    hits = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    return loss, nats, hits


def classification(config: Config) -> Callable:
    """Returns the objective of a class for each text: cross-entropy in nats a text. Weights do not
    change the count, so that the loss of all microbatches is theirs together."""
    task, rate = task_of(config), config.model.dropout

    def objective(model: Model, micro: Micro, key: PRNGKeyArray, classifier: Head):
        logits, figures = class_logits(model, micro, key, classifier, task.pooling, rate)
        return with_auxiliary(*_class_sums(config, logits, micro["labels"]), figures)

    return objective


def token_classification(config: Config) -> Callable:
    """Returns the objective of a class for each word: cross-entropy in nats a word."""
    rate = config.model.dropout

    def objective(model: Model, micro: Micro, key: PRNGKeyArray, classifier: Head):
        logits, figures = token_logits(model, micro, key, classifier, rate)
        return with_auxiliary(*_class_sums(config, logits, micro["targets"]), figures)

    return objective


def _class_sums(config: Config, logits: Array, labels: Array) -> tuple[Array, Array, dict]:
    task = task_of(config)
    field = task.flag("class_weights")
    weights = parse_weights(task.cfg.class_weights, logits.shape[-1], field)
    smoothing = config.optim.label_smoothing
    loss, nats, hits = class_losses(logits, labels, jnp.asarray(weights), smoothing)
    metrics = {"loss": jnp.sum(nats), "accuracy": jnp.sum(hits)}
    return jnp.sum(loss), jnp.sum(labels != IGNORE), metrics


def span_losses(
    logits: Float[Array, "B T 2"], spans: Int[Array, "B 2"]
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns the mean of the nats of an answer's first and last token, and 1 where both have the
    highest logits; 0 where the span is IGNORE."""
    by_end = jnp.moveaxis(logits, -1, -2)  # [B, 2, T]
    _, nats, hits = class_losses(by_end, spans, jnp.ones(by_end.shape[-1]), 0.0)
    return jnp.mean(nats, axis=-1), jnp.min(hits, axis=-1)


def span_qa(config: Config) -> Callable:
    """Returns the objective of a question's answer: the mean cross-entropy of its ends, in nats a
    window (arXiv:1810.04805, section 4.2)."""
    rate = config.model.dropout

    def objective(model: Model, micro: Micro, key: PRNGKeyArray, classifier: Head):
        logits, figures = span_logits(model, micro, key, classifier, rate)
        nats, hits = span_losses(logits, micro["spans"])
        metrics = {"loss": jnp.sum(nats), "accuracy": jnp.sum(hits)}
        return with_auxiliary(jnp.sum(nats), jnp.asarray(nats.size), metrics, figures)

    return objective


def num_outputs(config: Config) -> int:
    """Returns how many outputs the objective's head has. Raises `BadInput` if the labels are not
    known yet."""
    task = task_of(config)
    return len(task.known_names()) if task.labels_in else 2
