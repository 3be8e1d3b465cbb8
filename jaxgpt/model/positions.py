"""Position embeddings: what is added to the token embeddings."""

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxgpt.config import Config
from jaxgpt.model.layers import INIT_STD
from jaxgpt.ops.rope import sinusoids
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parameters.weights import table_storage


class LearnedPositions(nnx.Module):
    """A learned vector per position, as GPT-2 has it."""

    def __init__(self, config: Config, rules: AxisRules, *, rngs: nnx.Rngs):
        self.out = rules("batch", "residual", None)
        shape = config.model.max_seq_len, config.model.embed_dim
        self.storage = table_storage(config, "positions", shape)
        self.kernel = self.storage.make(rngs, rules(None, "embed"), INIT_STD)

    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]):
        return x + self.storage.lookup(self.kernel, positions, x.dtype, self.out)


def add_sinusoids(x: Float[Array, "B T D"], positions: Int[Array, "B T"]):
    """Returns x plus fixed sines and cosines (arXiv:1706.03762, section 3.5)."""
    return x + sinusoids(positions, x.shape[-1]).astype(x.dtype)


def add_nothing(x: Float[Array, "B T D"], positions: Int[Array, "B T"]):
    """Returns x: for `none`, for `rope`, which turns queries and keys instead, and for `relative`,
    which `model.relative` adds to scores."""
    return x


POSITIONS = {  # each called with (config, rules, rngs=...), as LearnedPositions is
    "learned": LearnedPositions,
    "sinusoidal": lambda *_, rngs: add_sinusoids,
    "rope": lambda *_, rngs: add_nothing,
    "none": lambda *_, rngs: add_nothing,
    "relative": lambda *_, rngs: add_nothing,
}
