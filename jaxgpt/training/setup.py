"""A run's parts, built once from its config: mesh, model, step, state."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding

from jaxgpt.config import Config
from jaxgpt.config.validate import only_in_xla
from jaxgpt.data.pipeline import of_array
from jaxgpt.metrics.progress import elapsed
from jaxgpt.model import ModelSpec
from jaxgpt.model.spec import choose_kernel, resolved
from jaxgpt.objectives.companions import Companions
from jaxgpt.optim.optimizers import make_optimizer
from jaxgpt.parallel.mesh import rules_of
from jaxgpt.parameters.flops import flops_per_token
from jaxgpt.parameters.low_precision import check_device
from jaxgpt.system.errors import BadInput
from jaxgpt.system.pages import return_free_memory
from jaxgpt.training.objectives import companions_of
from jaxgpt.training.state import TrainState, init_state
from jaxgpt.training.step import make_train_step
from jaxgpt.training.warm_start import warm_params

# Of the order of computation: XLA's default for a CPU starts all it can as early as it can, so that
# what the backward pass computes again would be there from the start, for every layer
XLA_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


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
    `BadInput` if `compute.attention` or `compute.matmul` names what cannot run there."""
    model, compute = config.model, config.compute
    platform = mesh.devices.flat[0].platform
    kernel = choose_kernel(
        compute.attention, platform, compute.dtype, model.head_dim, only_in_xla(config)
    )
    if compute.remat == "offload" and platform == "cpu":
        raise BadInput(
            "compute.remat=offload: on a CPU there is no other memory to move to; set none"
        )
    check_device(compute.matmul, mesh.devices.flat[0])
    split = config.mesh.sequence_activations and mesh.shape["tensor"] > 1
    return ModelSpec(resolved(config, mesh), kernel, rules_of(mesh, split))


@dataclasses.dataclass(frozen=True)
class Training:
    """What the loop, `plan` and `benchmark` share. Its methods need `jax.set_mesh(mesh)`."""

    config: Config
    mesh: Mesh
    spec: ModelSpec
    companions: Companions

    @property
    def init(self) -> Callable[[], TrainState]:
        """The function that makes the first state."""
        cfg = self.config
        optimizer = make_optimizer(
            cfg.optim, cfg.num_steps, self.spec.model, cfg.shrink, self.spec.rules.torus
        )
        own = partial(self.companions.own_parameters, self.spec)
        return partial(init_state, self.spec, optimizer, cfg, own)

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
    def flops_per_token(self) -> int:
        """Model FLOPs of a step per token of the batch; see `parameters.flops`."""
        return flops_per_token(self.spec.model, self.companions.logits)

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch's arrays [grad_accum, batch, seq_len]; see `of_array`."""
        return NamedSharding(self.mesh, self.spec.rules(None, "batch", "seq"))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns a batch's shapes, dtypes and shardings."""
        cfg = self.config
        rows = cfg.grad_accum, cfg.batch_size // cfg.grad_accum
        return {
            name: jax.ShapeDtypeStruct(
                (*rows, *rest), dtype, sharding=of_array(self.batch_sharding, 2 + len(rest))
            )
            for name, (rest, dtype) in self.companions.batch_arrays().items()
        }

    def abstract_companions(self) -> dict[str, dict]:
        """Returns the shapes, dtypes and shardings of the companions' parameters."""
        specs = self.companions.specs
        return {name: jax.eval_shape(s.init, jax.random.key(0)) for name, s in specs.items()}

    def compile_step(self, options: dict | None = None):
        """Returns the compiled update `(state, batch) -> (state, metrics)`, which takes the
        companions' parameters too where there are any; `options` are XLA's."""
        step = make_train_step(self.spec, self.config, self.companions.specs)
        beside = filter(None, [self.abstract_companions()])
        lowered = step.lower(self.abstract_state(), self.abstract_batch(), *beside)
        options = XLA_OPTIONS.get(self.mesh.devices.flat[0].platform, {}) | (options or {})
        with elapsed("compile   the train step:"):
            compiled = lowered.compile(compiler_options=options)
        return_free_memory()
        return compiled

    def beside_companions(self, step: Callable) -> Callable:
        """Returns the compiled `step` as `(state, batch) -> (state, metrics)`, the companions'
        parameters loaded."""
        beside = list(filter(None, [self.companions.opened()]))
        return lambda state, batch: step(state, batch, *beside)


def make_training(config: Config, mesh: Mesh) -> Training:
    """Returns the parts of a run whose vocabulary is resolved (see `resolve_vocab`)."""
    companions = companions_of(config.objective)(config, mesh, model_spec)
    return Training(config, mesh, model_spec(config, mesh), companions)
