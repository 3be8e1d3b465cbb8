"""jaxgpt: a small, sharded, trustworthy GPT trainer in JAX and Flax."""

__version__ = "0.1.0"
