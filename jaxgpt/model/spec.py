"""What a config means: a module that makes parameters and computes with them, its kernel, its
loops."""

import dataclasses
from functools import cached_property

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from jaxgpt.config import Config, ModelConfig
from jaxgpt.model.encoder_decoder import EncoderDecoder
from jaxgpt.model.gpt import GPT
from jaxgpt.parallel.rules import AxisRules
from jaxgpt.system.errors import BadInput

KINDS = {"decoder": GPT, "encoder": GPT, "encoder_decoder": EncoderDecoder}
# Parts of a module whose parameters are named as if they were its own: "tokens", "blocks/..."
UNNAMED = ("vocabulary", "stack")
NATIVE = {"gpu": "cudnn", "tpu": "splash"}  # each platform's flash kernel
UNROLLED_LAYERS = 12  # on a CPU


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """How to build a model: `init` draws parameters, `bind` puts given ones into a module.

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
        parts = nnx.to_pure_dict(nnx.state(self._make(key)))
        params = {name: part for name, part in parts.items() if name not in UNNAMED}
        for name in UNNAMED:
            params |= parts.get(name, {})
        return params

    def bind(self, params: dict) -> GPT | EncoderDecoder:
        """Returns the module that computes with `params`; not with what is beside the model's."""
        graphdef, state = nnx.split(nnx.eval_shape(lambda: self._make(0)))
        own = _within(params, state)
        for part in UNNAMED:
            own[part] = _within(params, state.get(part, {}))
        nnx.replace_by_pure_dict(state, own)
        return nnx.merge(graphdef, state)

    def for_decoding(self) -> "ModelSpec":
        """Returns the same model with activations whole over the batch axis."""
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, split_batch=False))

    def _make(self, key) -> GPT | EncoderDecoder:
        kind = KINDS[self.model.kind]
        return kind(self.config, self.rules, self.kernel, rngs=nnx.Rngs(params=key))


def _within(params: dict, state) -> dict:
    """Returns those parameters that have a place in `state`; layers apart (tuples) have none."""
    found = {}
    for name in set(params) & set(state):
        if isinstance(params[name], dict):
            found[name] = _within(params[name], state[name])
        elif not isinstance(params[name], tuple):
            found[name] = params[name]
    return found


def resolve_scan(config: Config, platform: str) -> Config:
    """Returns `config` with `compute.scan_layers=auto` decided for `platform` (`cpu`, ...).

    Layers of their own are faster on a CPU, but each takes its time to compile: beyond
    `UNROLLED_LAYERS` a scan, whose compile time does not grow with depth. Elsewhere a scan.
    """
    compute, layers = config.compute, config.model.num_layers + config.model.encoder_layers
    if compute.scan_layers != "auto":
        return config
    scan = "false" if platform == "cpu" and layers <= UNROLLED_LAYERS else "true"
    return dataclasses.replace(config, compute=dataclasses.replace(compute, scan_layers=scan))


def resolved(config: Config, mesh: Mesh) -> Config:
    """Returns `config` with what depends on the devices decided.

    In bfloat16 one CPU only multiplies projections and head: see `parameters.bfloat16`. Several
    stand in for accelerators, whose programs they run.
    """
    platform = mesh.devices.flat[0].platform
    config, compute = resolve_scan(config, platform), config.compute
    wanted = compute.dtype, compute.matmul, compute.fake_quantise
    if platform == "cpu" and mesh.size == 1 and wanted == ("bfloat16", "plain", "none"):
        mixed = dataclasses.replace(config.compute, dtype="float32", matmul="bfloat16")
        return dataclasses.replace(config, compute=mixed)
    return config


def choose_kernel(
    name: str, platform: str, dtype: str, head_dim: int, only_in_xla: str = ""
) -> str:
    """Returns the kernel that `compute.attention=name` means on `platform` (`cpu`, `gpu`, `tpu`);
    `only_in_xla` is a setting that no other can compute (see `config.validate.only_in_xla`).
    Raises `BadInput` if a kernel is asked for by name that cannot run; there is no quiet fallback.
    """
    wanted = NATIVE.get(platform, "xla") if name == "auto" else name
    needed = {kernel: platform for platform, kernel in NATIVE.items()}.get(wanted, platform)
    why_not = (
        ""
        if wanted == "xla"
        else f"the devices are {platform}, not {needed}"
        if platform != needed
        else f"only 'xla' attention has {only_in_xla}"
        if only_in_xla
        else f"compute.dtype={dtype} is not a 16-bit float"
        if wanted == "cudnn" and dtype == "float32"
        else f"heads of width {head_dim} are not a multiple of 8 up to 128"
        if wanted == "cudnn" and (head_dim % 8 or head_dim > 128)
        else ""
    )
    if why_not and name != "auto":
        raise BadInput(
            f"compute.attention={name} cannot run: {why_not}; set compute.attention=auto"
        )
    return "xla" if why_not else wanted
