"""A run's parts, built once from its config: mesh, model, step, state."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxgpt.config import Config
from jaxgpt.metrics.progress import elapsed
from jaxgpt.model import ModelSpec
from jaxgpt.model.gpt import resolve_scan
from jaxgpt.ops.attention import choose_kernel
from jaxgpt.optim.optimizers import make_optimizer
from jaxgpt.parallel.mesh import devices_along
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.parallel.torus import torus_of
from jaxgpt.system.errors import BadInput
from jaxgpt.training.state import TrainState, init_state
from jaxgpt.training.step import make_train_step
from jaxgpt.training.warm_start import warm_params


def resolve_vocab(config: Config, tokenizer_vocab_size: int) -> Config:
    """Returns `config` with `model.vocab_size` = 0 replaced by the tokenizer's size. Raises
    `BadInput` if the field is set to less than the tokenizer's size."""
    size = config.model.vocab_size or tokenizer_vocab_size
    if size < tokenizer_vocab_size:
        raise BadInput(
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer_vocab_size};"
            " set it to 0 to use the tokenizer's"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def model_spec(config: Config, mesh: Mesh) -> ModelSpec:
    """Returns the model of a config (its vocabulary resolved) for the devices of `mesh`. Raises
    `BadInput` if `compute.attention` names a kernel that cannot run there."""
    model, compute = config.model, config.compute
    platform = mesh.devices.flat[0].platform
    kernel = choose_kernel(
        compute.attention, platform, compute.dtype, model.head_dim, model.dropout
    )
    if compute.remat == "offload" and platform == "cpu":
        raise BadInput(
            "compute.remat=offload: on a CPU there is no other memory to move to; set none"
        )
    split = config.mesh.sequence_activations and mesh.shape["tensor"] > 1
    return ModelSpec(
        resolve_scan(config, platform),
        kernel,
        AxisRules(split_residual=split, torus=torus_of(devices_along(mesh, "fsdp"))),
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """What the loop, `plan` and `benchmark` share. Its methods need `jax.set_mesh(mesh)`."""

    config: Config
    mesh: Mesh
    spec: ModelSpec

    @property
    def init(self) -> Callable[[], TrainState]:
        """The function that makes the first state."""
        cfg = self.config
        optimizer = make_optimizer(cfg.optim, cfg.num_steps, self.spec.model)
        return partial(init_state, self.spec, optimizer, cfg)

    def first_state(self) -> TrainState:
        """Returns the first state on the devices: fresh, or from `init_from`."""
        if not self.config.init_from:
            return jax.jit(self.init)()
        params = warm_params(self.config, self.spec)
        return jax.jit(lambda params: self.init(params=params), donate_argnums=0)(params)

    def abstract_state(self) -> TrainState:
        """Returns the state's shapes, dtypes and shardings."""
        return jax.eval_shape(self.init)

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch's arrays [grad_accum, batch, seq_len]."""
        return NamedSharding(self.mesh, self.spec.rules(None, "batch", "seq"))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns a batch's shapes, dtypes and shardings."""
        cfg = self.config
        shape = (cfg.grad_accum, cfg.batch_size // cfg.grad_accum, cfg.model.max_seq_len)
        array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        packed = ("segments", "positions") if cfg.data.pack else ()
        return dict.fromkeys(("inputs", "targets", *packed), array)

    def compile_step(self, options: dict | None = None):
        """Returns the compiled update `(state, batch) -> (state, metrics)`; `options` are XLA's."""
        step = make_train_step(self.spec, self.config)
        lowered = step.lower(self.abstract_state(), self.abstract_batch())
        with elapsed("compile   the train step:"):
            return lowered.compile(compiler_options=options)


def make_training(config: Config, mesh: Mesh) -> Training:
    """Returns the parts of a run whose vocabulary is resolved (see `resolve_vocab`)."""
    return Training(config, mesh, model_spec(config, mesh))
