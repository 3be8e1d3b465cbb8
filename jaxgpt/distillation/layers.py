"""Hidden states inside a student and its teacher: which layers are compared, and the distance."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxgpt.config.validate import UNIFORM
from jaxgpt.model import GPT
from jaxgpt.model.stacked.blocks import Part
from jaxgpt.ops.context.order import exchanged
from jaxgpt.parallel.rules import AxisRules, rowwise, whole
from jaxgpt.system.errors import BadInput

SMALLEST = 1e-6  # added to mean squares, as norms of layers do


def layer_pairs(text: str, layers: int, their_layers: int) -> list[tuple[int, int]]:
    """Returns the (student's, teacher's) layers whose outputs are compared, from 0: those that
    `objectives.distill.hidden_layers` lists, "0:1,1:3", [] where it is "".

    `uniform` pairs every layer of the student with that of the teacher at the same share of its
    depth (arXiv:1909.10351, section 3): of 2 and 4 layers 0:1 and 1:3. Raises `BadInput` if a
    layer is not there.
    """
    if text == UNIFORM:
        return [(i, max((i + 1) * their_layers // layers - 1, 0)) for i in range(layers)]
    pairs = [tuple(map(int, pair.split(":"))) for pair in text.split(",") if pair]
    for ours, theirs in pairs:
        if ours >= layers or theirs >= their_layers:
            raise BadInput(
                f"objectives.distill.hidden_layers={text}: {ours}:{theirs} names a layer that is"
                f" not there: the student's are 0 to {layers - 1}, the teacher's 0 to"
                f" {their_layers - 1}"
            )
    return pairs


def comparison(text: str, student: GPT, teacher: GPT | None) -> Callable:
    """Returns (student's hidden states, teacher's, kernel of the projection) -> the distance of
    every position, [B, T]: of these or, with `objectives.distill.hidden_layers`, of the outputs
    of layers. Call it before the models run, which are those of one use."""
    rules = student.rules
    if not text:
        return lambda x, theirs, kernel: hidden_distance(x, theirs, kernel, rules)
    pairs = layer_pairs(text, student.stack.num_layers, teacher.stack.num_layers)
    ours, theirs = (record(m, ls) for m, ls in zip((student, teacher), zip(*pairs, strict=True)))
    return lambda x, _, kernel: distances(ours(), jax.lax.stop_gradient(theirs()), kernel, rules)


def record(model: GPT, layers: Sequence[int]) -> Callable[[], list[Float[Array, "B T D"]]]:
    """Returns what gives, after the model has run once, the outputs of these layers in the order
    of `layers`. The layers of this model then run in several scans, each of which ends after one
    of these."""
    stack, rules, found = model.stack, model.rules, {}
    run_part, reach = stack.run_part, stack.reach
    stack.blocks.parts = cut(stack.blocks.parts, stack.blocks.kinds, layers)

    def recording(part: Part, *arguments) -> tuple:
        x, losses = run_part(part, *arguments)
        if part.stop - 1 in layers:
            state = exchanged(x, reach, back=True)
            found[part.stop - 1] = jax.sharding.reshard(state, rules("batch", "seq", None))
        return x, losses

    stack.run_part = recording
    return lambda: [found[layer] for layer in layers]


def cut(parts: tuple[Part, ...], kinds: tuple, layers: Sequence[int]) -> tuple[Part, ...]:
    """Returns the parts of a stack, cut after each of these layers."""
    ends = {part.stop for part in parts} | {layer + 1 for layer in layers}
    starts = [0, *sorted(ends)]
    pieces = zip(starts, starts[1:], strict=False)
    return tuple(Part(a, b, _period(kinds[a:b])) for a, b in pieces if b > a)


def _period(kinds: tuple) -> int:
    """Returns the length of the shortest pattern that gives `kinds` when it is repeated."""
    lengths = range(1, len(kinds) + 1)
    return next(p for p in lengths if kinds == kinds[:p] * (len(kinds) // p))


def distances(
    ours: Sequence[Float[Array, "B T D"]],
    theirs: Sequence[Float[Array, "B T E"]],
    kernels: Float[Array, "P D E"],
    rules: AxisRules,
) -> Float[Array, "B T"]:
    """Returns the mean over the pairs of `hidden_distance` of both states divided by their root
    mean square: what a layer adds to is larger the deeper it is."""
    pairs = zip(ours, theirs, kernels, strict=True)
    found = [hidden_distance(_scaled(x), _scaled(y), kernel, rules) for x, y, kernel in pairs]
    return sum(found) / len(found)


def _scaled(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + SMALLEST)).astype(x.dtype)


def hidden_distance(
    x: Float[Array, "B T D"],
    theirs: Float[Array, "B T E"],
    kernel: Float[Array, "D E"],
    rules: AxisRules,
) -> Float[Array, "B T"]:
    """Returns the mean over E of (x kernel - theirs)**2 (arXiv:1909.10351, eq. 8)."""
    kernel = whole(kernel.astype(x.dtype))
    projected = rowwise("MD,DE->ME", x, kernel, rules("batch", "seq", None), jnp.float32)
    return jnp.mean(jnp.square(projected - theirs.astype(jnp.float32)), axis=-1)


def make_projection(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype, rules: AxisRules
) -> dict[str, Float[Array, "*P D E"]]:
    """Returns the parameters of `hidden_distance`, or of `distances`, drawn from N(0, 1/D)."""
    init = jax.nn.initializers.normal(shape[-2] ** -0.5)
    spec = jax.P(*(None,) * (len(shape) - 2), *rules("embed", None))
    return {"kernel": init(key, shape, jnp.dtype(dtype), out_sharding=spec)}
