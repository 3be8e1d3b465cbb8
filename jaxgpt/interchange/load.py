"""The weights of a workdir or a model folder, for a run that starts or learns from them."""

import dataclasses
import operator
from pathlib import Path

import jax
import numpy as np
from etils import epath

from jaxgpt.checkpointing.checkpoints import Checkpoints, concrete
from jaxgpt.config import Config, LoraConfig, MeshConfig, ModelConfig, ShrinkConfig
from jaxgpt.config.stored import read_config
from jaxgpt.hub.models import located
from jaxgpt.interchange.folder import open_folder, say_skipped
from jaxgpt.interchange.init_from import is_workdir
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.parameters.lora import merge as merge_lora
from jaxgpt.parameters.weights import as_read, dense
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path


def load_weights(
    path: str, stored: ShrinkConfig | None = None, rounded: bool = False
) -> tuple[dict[str, np.ndarray], ModelConfig]:
    """Returns the parameters of a workdir or a model folder by path, on the host, and its model
    config. LoRA's additions are merged and every matrix is made floats, unless it is `stored` like
    that there; what is two factors there stays so if `stored.ranks` are the same. Of what was
    trained to be rounded (`compute.fake_quantise`), `rounded` gives what that run read. Raises
    `BadInput` if additions would have to be merged into few bits."""
    path = located(path)
    if is_workdir(path):
        config = read_config(epath.Path(path))
        checkpoints = Checkpoints(path, read_only=True)
        spec = ModelSpec(config, "xla")
        alone = dataclasses.replace(config, mesh=MeshConfig(data=1))
        with jax.set_mesh(make_mesh(alone, jax.local_devices()[:1])):
            abstract = concrete(jax.eval_shape(spec.init, jax.random.key(0)))
            average = config.optim.ema_decay > 0
            params = checkpoints.restore_params(checkpoints.pick(None), abstract, average)
            if rounded:
                dtype = config.compute.dtype
                params = jax.jit(lambda params: as_read(config, params, dtype)[1])(params)
            form = operator.attrgetter("weights", "group", "keep", "ranks", "tensor_train")
            if not stored or stored.weights == "float" or form(stored) != form(config.shrink):
                _, params = as_floats(config, params, stored)
            elif config.lora.rank:
                raise BadInput(
                    f"init_from={path} holds additions to {stored.weights} weights, which cannot be"
                    " merged into them: resume that run, or start from what it started from"
                )
            return {p: np.asarray(leaf) for p, leaf in leaves_by_path(params).items()}, spec.model
    folder = open_folder(Path(path))
    say_skipped(folder)
    spec = ModelSpec(Config(model=folder.model), "xla")
    return leaves_by_path(
        read_params(folder, jax.eval_shape(spec.init, jax.random.key(0)))
    ), spec.model


def as_floats(
    config: Config, params: dict, stored: ShrinkConfig | None = None
) -> tuple[Config, dict]:
    """Returns the same model without LoRA and without small storage: its config, and its parameters
    on the host, with additions merged and every matrix as floats of its own shape, or as two
    factors, or three cores, where `stored` has the same. What was trained to be rounded is not."""
    stored, mine = stored or ShrinkConfig(), config.shrink
    ranks = mine.ranks if stored.ranks == mine.ranks else ""
    train = mine.tensor_train if stored.tensor_train == mine.tensor_train else 0
    shrink = ShrinkConfig(ranks=ranks, tensor_train=train)
    bare = dataclasses.replace(config, lora=LoraConfig(), shrink=shrink)
    wanted = jax.eval_shape(ModelSpec(bare, "xla").init, jax.random.key(0))
    floats = dense(jax.device_get(params), config.shrink, wanted)
    return bare, merge_lora(floats, config.lora)


def put_like(value: np.ndarray, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Returns `value`, which every process holds whole, in the dtype and sharding of `like`."""
    value = value.astype(like.dtype, copy=False)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
