"""`init_from`: parameters to start from, out of a workdir or a model folder."""

import re

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxgpt.config import Config, ModelConfig
from jaxgpt.config.experts import layers_with
from jaxgpt.config.validate import parse_patterns
from jaxgpt.interchange.init_from import check_model, chosen_layers, tokenizer_of
from jaxgpt.interchange.load import load_weights, put_like
from jaxgpt.interchange.upcycling import ROUTER, describe, is_upcycled, upcycled
from jaxgpt.model import ModelSpec
from jaxgpt.parameters.lora import column_norms, is_addition
from jaxgpt.processes import hosts
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.compare import difference

# Tables and vectors that may have another number of rows: of the vocabulary, and of positions
VOCABULARY = ("tokens", "head", "head_bias")
POSITIONS = ("positions/kernel", "encoder/positions/kernel", "decoder/positions/kernel")


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
    elif found := difference(theirs, tokenizer):
        raise BadInput(
            f"init_from={path} has another tokenizer than data.tokenizer={kind}: {found};"
            " take that one, or name tokens in init_fresh to draw the embeddings anew"
        )


def warm_params(config: Config, spec: ModelSpec) -> dict:
    """Returns the parameters a run with `init_from` starts from, laid out on the current mesh.

    What `init_fresh` names, and LoRA's additions, are drawn anew. A vocabulary with more tokens
    keeps the rows it has; a context may be cut short; of the layers `init_layers` chooses.

    Raises:
      BadInput: naming the fields or the first array that do not fit.
    """
    check_model(config)
    source, theirs = load_weights(config.init_from, config.shrink)
    layers = chosen_layers(config, theirs.num_layers)
    if len(layers) < theirs.num_layers:
        source = {path: _taken(path, a, layers, theirs) for path, a in source.items()}
    fresh = jax.jit(spec.init)(jax.random.key(config.seed))
    wanted, anew = leaves_by_path(fresh), parse_patterns(config.init_fresh, "init_fresh")
    if is_upcycled(theirs, spec.model):
        say(describe(config.init_from, spec.model))
        source = upcycled(source, spec.model, wanted)
        anew.append(re.compile(ROUTER))
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
            params[path] = put_like(column_norms(kernel, leaf.shape), leaf)
    return unflatten_dict(params, sep="/")


def _taken(path: str, a: np.ndarray, layers: list[int], model: ModelConfig) -> np.ndarray:
    """Returns the rows of an array that are of these layers; the array if it is of none."""
    if not path.startswith("blocks/"):
        return a
    stacked = layers_with(path.removeprefix("blocks/"), model)
    return a[[row for row, layer in enumerate(stacked) if layer in layers]]


def _any(patterns: list[re.Pattern], path: str) -> bool:
    return any(pattern.search(path) for pattern in patterns)


def _fit(path: str, value: np.ndarray, leaf: jax.Array, vocab: int, where: str) -> jax.Array:
    value = np.asarray(value)
    if path in VOCABULARY + POSITIONS and value.shape[1:] == leaf.shape[1:]:
        rows = vocab if path in VOCABULARY else len(value)
        whole = np.array(hosts.gather_to_host(leaf))
        kept = min(rows, len(whole))
        whole[:kept] = value[:kept]
        value = whole
    if value.shape != leaf.shape:
        raise BadInput(
            f"init_from={where}: {path} has shape {value.shape} there, {leaf.shape} here"
        )
    return put_like(value, leaf)
