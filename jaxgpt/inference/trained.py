"""A trained model, opened from its workdir."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config import Config, MeshConfig
from jaxgpt.config.stored import read_config
from jaxgpt.config.validate import only_in_xla
from jaxgpt.inference.decode import Decoder
from jaxgpt.inference.sliding import announce
from jaxgpt.model import ModelSpec
from jaxgpt.model.spec import choose_kernel, resolved
from jaxgpt.optim.groups import OWN
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaf_path
from jaxgpt.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Trained:
    """A workdir's config, tokenizer and model, and the checkpoint chosen."""

    config: Config
    tokenizer: Tokenizer
    spec: ModelSpec
    mesh: Mesh
    checkpoints: Checkpoints
    step: int

    def params(self, own: Callable[[], dict] | None = None) -> dict:
        """Returns the parameters on `mesh`; call under `jax.set_mesh(mesh)`. `own` makes those that
        the objective trains beside the model's, which are then returned too, under `OWN`."""
        abstract = jax.eval_shape(self.spec.init, jax.random.key(0))
        abstract |= {OWN: jax.eval_shape(own)} if own else {}
        average = self.config.optim.ema_decay > 0
        return self.checkpoints.restore_params(self.step, abstract, average)

    def finite_params(self) -> dict:
        """Returns `params`. Raises `BadInput` if a weight is not a finite number."""
        params = self.params()
        finite = jax.tree.map(lambda p: jnp.isfinite(p).all(), params)
        for path, is_finite in jax.tree.leaves_with_path(jax.device_get(finite)):
            if not is_finite:
                raise BadInput(
                    f"checkpoint {self.step} of {self.checkpoints.folder.parent} holds weights that"
                    f" are not finite ({leaf_path(path)});"
                    " choose another with --step"
                )
        return params

    def decoder(self, slides: bool = False) -> Decoder:
        """Returns the decoder of `finite_params`; call under `jax.set_mesh(mesh)`. With `slides`
        texts may grow beyond the context, which a line says. Raises `BadInput` if the context is
        too short to slide."""
        decoder = Decoder.of(self.spec, self.finite_params(), self.tokenizer.vocab_size)
        return dataclasses.replace(decoder, slides=slides and announce(self.spec.model))


def open_trained(workdir: str, step: int | str | None) -> Trained:
    """Returns what `workdir` holds at `step`, which may be "best" or None: see `Checkpoints.pick`.

    The run's own mesh is not used: each of this machine's devices holds the whole model and takes
    a share of the batch.

    Raises:
      BadInput: if there is no run, no such checkpoint, or no tokenizer.
    """
    folder = epath.Path(workdir)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    checkpoints = Checkpoints(folder, read_only=True)
    step = checkpoints.pick(step)
    devices = jax.devices()
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=-1),
        grad_accum=1,
        batch_size=-(-config.batch_size // config.grad_accum // len(devices)) * len(devices),
    )
    model = config.model
    kernel = choose_kernel(
        "auto", devices[0].platform, config.compute.dtype, model.head_dim, only_in_xla(config)
    )
    mesh = make_mesh(config, devices)
    return Trained(
        config, tokenizer, ModelSpec(resolved(config, mesh), kernel), mesh, checkpoints, step
    )
