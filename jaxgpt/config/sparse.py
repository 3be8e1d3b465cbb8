"""Checks of sparse attention, across fields."""

import math

from jaxgpt.config.schema import SPARSE, Config, ModelConfig
from jaxgpt.system.errors import BadInput

SPLASH = ("longformer", "bigbird")  # patterns of whole blocks, which splash can skip


def check_sparse(config: Config, model: ModelConfig) -> None:
    """Raises `BadInput` where `model.attention_pattern` does not fit the sizes, or another part of
    the run does not fit the pattern."""
    if model.attention_pattern not in SPARSE:
        return
    _check_sizes(model)
    for refused in (_of_model, _of_run):
        if why := refused(config, model):
            raise BadInput(f"model.attention_pattern={model.attention_pattern} {why}")


def _check_sizes(model: ModelConfig) -> None:
    length, block, kind = model.max_seq_len, model.sparse_block, model.attention_pattern
    blocks = -(-length // block)
    for field, value, most, what in (
        ("sparse_block", block, length, f"model.max_seq_len={length}"),
        ("global_tokens", model.global_tokens, length, f"model.max_seq_len={length}"),
        (
            "dilation",
            model.dilation if kind == "longformer" else 1,
            max(length // block, 1),
            f"model.max_seq_len={length} / model.sparse_block={block}",
        ),
        (
            "random_blocks",
            model.random_blocks if kind == "bigbird" else 0,
            blocks,
            f"the {blocks} blocks of model.sparse_block={block} in model.max_seq_len={length}",
        ),
    ):
        if value > most:
            raise BadInput(f"model.{field}={value} is more than {what}")
    sources = model.max_source_len or length  # what an encoder-decoder's encoder reads
    if kind == "axial" and (length % block or sources % block):
        name, whole = ("max_seq_len", length) if length % block else ("max_source_len", sources)
        fits = next(d for d in range(block, 0, -1) if math.gcd(length, sources) % d == 0)
        raise BadInput(
            f"model.attention_pattern=axial: rows of model.sparse_block={block} do not divide"
            f" model.{name}={whole}; choose {fits}"
        )


def _of_model(config: Config, model: ModelConfig) -> str:
    """Returns what of the model the pattern cannot have, and what to do."""
    if model.window:
        return f"with model.window={model.window}: it has a reach of its own; set model.window=0"
    if model.position == "relative":
        return "with model.position=relative: it has no bias of the scores; choose another position"
    if model.attention_pattern != "lsh":
        return ""
    if model.num_kv_heads != model.num_heads:
        return (
            f"with model.num_kv_heads={model.num_kv_heads}: its queries are its keys, so there are"
            f" as many; set model.num_kv_heads={model.num_heads}"
        )
    if model.dropout:
        return f"with model.dropout={model.dropout}: it has no dropout; set model.dropout=0"
    if config.lora.rank and "key" in config.lora.targets.split(","):
        return f"with lora.targets={config.lora.targets}: it has no key projection; leave key out"
    return ""


def _of_run(config: Config, model: ModelConfig) -> str:
    """Returns what of the run the pattern cannot have, and what to do."""
    kernel, placed = config.compute.attention, model.attention_pattern in ("axial", "bigbird")
    if kernel == "cudnn":
        return (
            "with compute.attention=cudnn, which would read every key; set compute.attention=auto"
        )
    skips = model.attention_pattern in SPLASH and model.dilation == 1
    if kernel == "splash" and not skips:
        return (
            "with compute.attention=splash, which has no blocks to skip; set compute.attention=auto"
        )
    if config.objective == "prefix_lm":
        return "with objective=prefix_lm: it has no prefix; set model.attention_pattern=full"
    if config.data.pack and placed:
        return (
            "with data.pack=true: what a document's tokens see would depend on its place in the"
            " row; set data.pack=false"
        )
    if config.data.pack and model.attention_pattern == "longformer" and model.global_tokens:
        return (
            f"with model.global_tokens={model.global_tokens} and data.pack=true: only the first"
            " document of a row would have them; set model.global_tokens=0 or data.pack=false"
        )
    return ""
