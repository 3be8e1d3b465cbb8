"""Configs of earlier versions: what their fields are called now.

`config.json` carries its format's number. Format 1 had none, and had the fields of `compute.` and
`lora.` under `model.`:

    {"seed": 0, ..., "model": {"num_layers": 2, ..., "lora_rank": 0, "scan_layers": true}}
"""

import re
from collections.abc import Iterable, Iterator

from jaxgpt.system.errors import BadInput

FORMAT = 2
RENAMED = {
    "model.lora_rank": "lora.rank",
    "model.lora_alpha": "lora.alpha",
    "model.lora_targets": "lora.targets",
    "model.lora_dora": "lora.dora",
    "model.dtype": "compute.dtype",
    "model.param_dtype": "compute.param_dtype",
    "model.attention": "compute.attention",
    "model.remat": "compute.remat",
    "model.scan_layers": "compute.scan_layers",
}


class NewerFormat(BadInput):
    """A config in a format that only a newer version reads."""


def format_of(nested: dict) -> tuple[int, dict]:
    """Returns the number of a stored config's format, and the config without it.

    Raises:
      NewerFormat: if a newer version than this wrote it.
      BadInput: if there is no such format.
    """
    fields = {name: value for name, value in nested.items() if name != "format"}
    number = nested.get("format", 1)
    if type(number) is int and number > FORMAT:
        raise NewerFormat(
            f"format {number} is that of a newer version of jaxgpt; this one reads formats up to"
            f" {FORMAT}: update jaxgpt"
        )
    if type(number) is not int or number < 1:
        raise BadInput(f"format={number!r} is not the number of a format")
    return number, fields


def migrated(fields: Iterable[tuple[str, object]], number: int) -> Iterator[tuple[str, object]]:
    """Yields the paths and values of format `number` as they are today."""
    for path, value in fields:
        if number == 1 and path == "model.scan_layers" and type(value) is bool:
            value = str(value).lower()
        yield RENAMED.get(path, path) if number == 1 else path, value


def renamed_in(message: str) -> str:
    """Returns `; model.dtype is now compute.dtype` where an exception's message says that
    `ModelConfig` lacks a field that it had in format 1; else ""."""
    match = re.search(
        r"(?:ModelConfig\.__init__\(\)|TypeError:) got an unexpected keyword argument '(\w+)'"
        r"|'ModelConfig' object has no attribute '(\w+)'",
        message,
    )
    old = match and f"model.{match[1] or match[2]}"
    return f"; {old} is now {RENAMED[old]}" if old in RENAMED else ""
