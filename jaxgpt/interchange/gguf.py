"""GGUF files, which llama.cpp reads: GPT-2's architecture, matrices in the few bits they are stored
in. The format is that of ggml's docs/gguf.md, version 3, the blocks those of ggml-common.h.

A block holds 32 weights of one output that follow each other: a float16 scale d, and then

    Q8_0  32 int8 q, w = q d
    Q4_0  16 bytes: the low four bits of byte i are q[i], the high ones q[i + 16], w = (q - 8) d
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.interchange.families import GPT2
from jaxgpt.interchange.weights import tensors_of
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path

BLOCK = 32
ALIGNMENT = 32  # of each tensor's data, in bytes
F32, Q4_0, Q8_0 = 0, 2, 8  # ggml's numbers of the types
FILE_TYPES = {"float": 0, "int4": 2, "int8": 7}  # llama.cpp's: what most of a file is
NORMAL, CONTROL = 1, 3  # types of tokens
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}


class Packed(NamedTuple):
    """A tensor as it is in the file: its type, its lengths, the innermost first, and its bytes."""

    kind: int
    lengths: tuple[int, ...]
    data: bytes


def check_gguf(cfg: ModelConfig, weights: str) -> None:
    """Raises `BadInput` where GGUF has no form of this model or of weights stored like that."""
    if weights == "nf4":
        raise BadInput("GGUF has no nf4: shrink the run by int8 or int4 instead")
    different = GPT2.differences(cfg)
    if cfg.activation != "gelu_tanh":
        different.append(f"model.activation={cfg.activation!r}")
    if different:
        raise BadInput(
            "GGUF is written of GPT-2's architecture, which does not support"
            f" {', '.join(different)}"
        )


def pack(w: np.ndarray, scales: np.ndarray | None, kind: str) -> Packed:
    """Returns a tensor [..., inputs] with the scale of each weight (None: no codes) in blocks, or
    as float32 where the inputs are no whole blocks or a scale is no ordinary float16."""
    lengths = w.shape[::-1]
    if scales is not None and w.shape[-1] % BLOCK == 0:
        blocks, of_weights = (a.reshape(-1, BLOCK) for a in (w, scales))
        d = of_weights[:, :1].astype(np.float16)
        ordinary = (d == 0) | (np.isfinite(d) & (d >= np.finfo(np.float16).tiny))
        if ordinary.all() and (of_weights == of_weights[:, :1]).all():
            codes = np.rint(blocks / np.where(of_weights == 0, 1, of_weights))
            if kind == "int8":
                return Packed(Q8_0, lengths, _bytes(d, codes.astype(np.int8)))
            q = (codes + 8).astype(np.uint8)
            return Packed(Q4_0, lengths, _bytes(d, q[:, :16] | q[:, 16:] << 4))
    return Packed(F32, lengths, np.ascontiguousarray(w, "<f4").tobytes())


def _bytes(d: np.ndarray, codes: np.ndarray) -> bytes:
    return np.concatenate([d.astype("<f2").view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()


def packed_tensors(
    params: dict, scales: dict | None, cfg: ModelConfig, kind: str
) -> Iterator[tuple[str, Packed]]:
    """Yields (name, tensor) of GPT-2's parameters as floats; `scales` holds the scale of each
    weight in the same arrays, 0 for what is stored as floats."""
    ours, of_ours = leaves_by_path(params), leaves_by_path(scales or {})
    for theirs, tensor in tensors_of(GPT2, ours, cfg).items():
        stem, _, suffix = theirs.rpartition(".")
        prefix, layer, stem = (
            ("", "", stem) if stem[:2] != "h." else ("blk.", *stem[2:].split(".", 1))
        )
        name = f"{prefix}{layer}{'.' * bool(prefix)}{NAMES[stem]}.{suffix}"
        arrays = [tensor.rule.to_theirs(tensor.arrays(a)) for a in (ours, of_ours) if a]
        if stem not in ("wte", "wpe", "lm_head"):
            arrays = [a.T for a in arrays]  # ours: inputs first
        coded = len(arrays) > 1 and suffix == "weight" and stem != "wpe" and np.any(arrays[1])
        yield name, pack(arrays[0], arrays[1] if coded else None, kind)


def metadata(cfg: ModelConfig, kind: str, vocabulary: dict) -> dict:
    """Returns the keys and values of a file's head."""
    return {
        "general.architecture": "gpt2",
        "general.name": "jaxgpt",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        "gpt2.vocab_size": cfg.vocab_size,
        "gpt2.context_length": cfg.max_seq_len,
        "gpt2.embedding_length": cfg.embed_dim,
        "gpt2.feed_forward_length": cfg.mlp_dim,
        "gpt2.block_count": cfg.num_layers,
        "gpt2.attention.head_count": cfg.num_heads,
        "gpt2.attention.layer_norm_epsilon": float(cfg.norm_eps),
    } | vocabulary


def vocabulary_of(tokenizer: dict, end: int) -> dict:
    """Returns a file's keys for a `tokenizer.json` of byte-level BPE; those of no vocabulary, for
    any other: llama.cpp then takes ids, not text."""
    model, pre = tokenizer.get("model", {}), tokenizer.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or pre.get("type") != "ByteLevel":
        return {"tokenizer.ggml.model": "no_vocab"}
    added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}
    tokens = {i: text for text, i in model["vocab"].items()} | added
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [tokens[i] for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [
            CONTROL if i in added else NORMAL for i in range(len(tokens))
        ],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
    }


def write_gguf(file: Path, head: dict, tensors: dict[str, Packed]) -> None:
    """Writes a GGUF file."""
    with open(file, "wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(head)))
        for key, value in head.items():
            kind, data = _value(value)
            out.write(_text(key) + struct.pack("<I", kind) + data)
        offset = 0
        for name, tensor in tensors.items():
            lengths = struct.pack(f"<I{len(tensor.lengths)}Q", len(tensor.lengths), *tensor.lengths)
            out.write(_text(name) + lengths + struct.pack("<IQ", tensor.kind, offset))
            offset += len(tensor.data) + -len(tensor.data) % ALIGNMENT
        out.write(b"\0" * (-out.tell() % ALIGNMENT))
        for tensor in tensors.values():
            out.write(tensor.data + b"\0" * (-len(tensor.data) % ALIGNMENT))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value) -> tuple[int, bytes]:
    """Returns a value's type and bytes: uint32, float32, text, or a list of text or int32."""
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return 9, struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)
        return 9, struct.pack("<IQ", 8, len(value)) + b"".join(map(_text, value))
    if isinstance(value, str):
        return 8, _text(value)
    return (
        (6, struct.pack("<f", value)) if isinstance(value, float) else (4, struct.pack("<I", value))
    )
