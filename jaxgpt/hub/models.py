"""Model folders of the hub, downloaded into `huggingface_hub`'s cache."""

from functools import cache
from pathlib import Path

from jaxgpt.hub.client import snapshot
from jaxgpt.hub.names import Name, model_name
from jaxgpt.system.console import say

# No code of a repository, and a pickle only where there is nothing else: `TorchFile` runs none
SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.txt", "spiece.model"),
)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


def located(path: str, weights: bool = True) -> str:
    """Returns the local folder of what `path` names: for a model of the hub (see `names`) a folder
    of the cache with its files, without `weights` only the small ones; else `path` itself.

    Raises:
      BadInput: if the hub has no such model, or it is not cached and the hub cannot be reached.
    """
    name = model_name(path)
    return path if name is None else str(_folder(name, weights))


def pinned_model(name: Name) -> Name:
    """Returns the model at the commit that is its revision now; its small files are downloaded."""
    return name.at(_folder(name, weights=False).name)


@cache
def _folder(name: Name, weights: bool) -> Path:
    if not name.is_pinned:
        folder = snapshot(name, "model", SETTINGS)
        return _folder(name.at(folder.name), weights)
    if not weights:
        return snapshot(name, "model", SETTINGS)
    say(f"hub       model {name}")
    for files in (WEIGHTS, PICKLED):
        folder = snapshot(name, "model", (*SETTINGS, *files))
        if any(folder.glob("*.safetensors")):
            break
    return folder
