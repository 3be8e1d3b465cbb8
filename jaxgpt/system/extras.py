"""Optional libraries, which an extra of this package installs."""

import importlib
from types import ModuleType

from jaxgpt.system.errors import BadInput


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Returns the imported `module`. Raises `BadInput` if it is not installed; the message names
    the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise BadInput(
            f"{purpose} needs {module.partition('.')[0]} ({e}): pip install -e '.[{extra}]'"
        ) from e
