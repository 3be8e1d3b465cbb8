"""The GPT."""

from jaxgpt.model.gpt import GPT
from jaxgpt.model.spec import ModelSpec

__all__ = ["GPT", "ModelSpec"]
