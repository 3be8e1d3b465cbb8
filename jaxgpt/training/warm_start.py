"""`init_from`: parameters to start from, out of a workdir or a model folder."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from jaxgpt.checkpointing.checkpoints import Checkpoints, concrete
from jaxgpt.config import Config, MeshConfig, ModelConfig
from jaxgpt.config.stored import read_config
from jaxgpt.config.validate import parse_patterns
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.init_from import check_model, is_workdir, tokenizer_of
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from jaxgpt.model.lora import column_norms, is_addition
from jaxgpt.model.lora import merge as merge_lora
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.processes import hosts
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.tokenizer import Tokenizer

ROWS = ("tokens", "head", "positions/kernel")  # tables that may have another number of rows
# Texts and ids by which two tokenizers are told apart
PROBE = (
    "The naïve café (東京), 2024: is this the one?\n\n"
    "\tfor i in range(10):\n    return x != None  # don't\n"
)
PROBED_IDS = 2000


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Raises `BadInput` if the ids of the tokenizer at `init_from` mean another text than those of
    `tokenizer`, unless `init_fresh` names the embeddings (`tokens`). Further ids are no difference.
    """
    path, kind = config.init_from, config.data.tokenizer
    if _any(parse_patterns(config.init_fresh, "init_fresh"), "tokens"):
        return
    theirs = tokenizer_of(path)
    if theirs is None:
        say(f"init_from {path} holds no tokenizer: data.tokenizer={kind} must be the one it knows")
    elif difference := _difference(theirs, tokenizer):
        raise BadInput(
            f"init_from={path} has another tokenizer than data.tokenizer={kind}: {difference};"
            " take that one, or name tokens in init_fresh to draw the embeddings anew"
        )


def _difference(theirs: Tokenizer, mine: Tokenizer) -> str:
    """Says what differs between two tokenizers, in the text of ids or in the ids of a text; '' if
    nothing does. Two classes may read the same vocabulary, so files are not compared."""
    if theirs.end_of_text != mine.end_of_text:
        return f"its end-of-text is {theirs.end_of_text}, not {mine.end_of_text}"
    shared = min(theirs.vocab_size, mine.vocab_size)
    for i in range(0, shared, max(1, shared // PROBED_IDS)):
        if (one := theirs.decode([i])) != (other := mine.decode([i])):
            return f"its id {i} is {one!r}, not {other!r}"
    if not np.array_equal(theirs.encode(PROBE), mine.encode(PROBE)):
        return f"it cuts {PROBE!r} elsewhere"
    return ""


def warm_params(config: Config, spec: ModelSpec) -> dict:
    """Returns the parameters a run with `init_from` starts from, laid out on the current mesh.

    What `init_fresh` names, and LoRA's additions, are drawn anew. A vocabulary with more tokens
    keeps the rows it has; a context may be cut short.

    Raises:
      BadInput: naming the fields or the first array that do not fit.
    """
    check_model(config)
    source, theirs = _load(config.init_from)
    fresh = jax.jit(spec.init)(jax.random.key(config.seed))
    wanted, anew = leaves_by_path(fresh), parse_patterns(config.init_fresh, "init_fresh")
    if strange := set(source) - set(wanted) - {p for p in source if _any(anew, p)}:
        raise BadInput(
            f"init_from={config.init_from} has {', '.join(sorted(strange))}, which this model"
            " lacks; set the model alike, or name it in init_fresh"
        )
    params = {}
    for path, leaf in wanted.items():
        if _any(anew, path) or is_addition(path):
            params[path] = leaf
            continue
        if path == "head" and path not in source:  # an untied head starts as the embedding
            source[path] = source["tokens"]
        if path not in source:
            raise BadInput(
                f"init_from={config.init_from} lacks {path}; name it in init_fresh to draw it anew"
            )
        params[path] = _fit(path, source[path], leaf, theirs.vocab_size, config.init_from)
    for path, leaf in wanted.items():
        if path.endswith("/magnitude"):
            kernel = hosts.gather_to_host(params[path.replace("magnitude", "kernel")])
            params[path] = _put_like(column_norms(kernel, leaf.shape), leaf)
    return unflatten_dict(params, sep="/")


def _any(patterns: list[re.Pattern], path: str) -> bool:
    return any(pattern.search(path) for pattern in patterns)


def _fit(path: str, value: np.ndarray, leaf: jax.Array, vocab: int, where: str) -> jax.Array:
    value = np.asarray(value)
    if path in ROWS and value.shape[1:] == leaf.shape[1:]:
        rows = vocab if path in ("tokens", "head") else len(value)
        whole = np.array(hosts.gather_to_host(leaf))
        kept = min(rows, len(whole))
        whole[:kept] = value[:kept]
        value = whole
    if value.shape != leaf.shape:
        raise BadInput(
            f"init_from={where}: {path} has shape {value.shape} there, {leaf.shape} here"
        )
    return _put_like(value, leaf)


def _put_like(value: np.ndarray, like: jax.Array) -> jax.Array:
    """Returns `value`, which every process holds whole, in the dtype and sharding of `like`."""
    value = value.astype(like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def _load(path: str) -> tuple[dict, ModelConfig]:
    """Returns the source's parameters by path, on the host, and its model config."""
    if is_workdir(path):
        config = read_config(epath.Path(path))
        checkpoints = Checkpoints(path, read_only=True)
        spec = ModelSpec(config, "xla")
        alone = dataclasses.replace(config, mesh=MeshConfig(data=1))
        with jax.set_mesh(make_mesh(alone, jax.local_devices()[:1])):
            abstract = concrete(jax.eval_shape(spec.init, jax.random.key(0)))
            average = config.optim.ema_decay > 0
            params = checkpoints.restore_params(checkpoints.pick(None), abstract, average)
            params = merge_lora(params, config.lora)
            return {p: np.asarray(leaf) for p, leaf in leaves_by_path(params).items()}, spec.model
    folder = open_folder(Path(path))
    spec = ModelSpec(Config(model=folder.model), "xla")
    return leaves_by_path(
        read_params(folder, jax.eval_shape(spec.init, jax.random.key(0)))
    ), spec.model
