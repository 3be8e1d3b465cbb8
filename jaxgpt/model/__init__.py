"""The GPT."""

from jaxgpt.model.gpt import GPT, ModelSpec

__all__ = ["GPT", "ModelSpec"]
