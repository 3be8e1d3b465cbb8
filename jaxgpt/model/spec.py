"""A model's config as what makes its parameters and binds them to its module."""

import dataclasses
from functools import cached_property

from flax import nnx
from jaxtyping import PRNGKeyArray

from jaxgpt.config import Config, ModelConfig
from jaxgpt.model.gpt import GPT
from jaxgpt.parallel.rules import AxisRules


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """How to build a GPT: `init` draws parameters, `bind` puts given ones into a module.

    Parameters travel as a nested dict of arrays (a plain pytree, no Flax types).
    """

    config: Config  # whose `model`, `compute` and `lora` say what to build
    kernel: str
    rules: AxisRules = AxisRules()

    @cached_property
    def _hash(self) -> int:
        return hash((dataclasses.astuple(self.config), self.kernel, self.rules))

    def __hash__(self) -> int:
        return self._hash  # kept: a program that is called for a few tokens hashes it each time

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.config.model

    def init(self, key: PRNGKeyArray) -> dict:
        """Returns fresh parameters; under `jax.eval_shape`, their shapes and shardings."""
        model = GPT(self.config, self.rules, self.kernel, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(model))

    def bind(self, params: dict) -> GPT:
        """Returns the module that computes with `params`; not with what is beside the model's."""
        model = nnx.eval_shape(
            lambda: GPT(self.config, self.rules, self.kernel, rngs=nnx.Rngs(params=0))
        )
        graphdef, state = nnx.split(model)
        own = {n: p for n, p in params.items() if n in state and not isinstance(p, tuple)}
        nnx.replace_by_pure_dict(state, own)
        return nnx.merge(graphdef, state)

    def for_decoding(self) -> "ModelSpec":
        """Returns the same model with activations whole over the batch axis."""
        return dataclasses.replace(self, rules=AxisRules(split_batch=False))
