"""Models: GPT, and encoder-decoders."""

from jaxgpt.model.encoder_decoder import EncoderDecoder
from jaxgpt.model.gpt import GPT
from jaxgpt.model.spec import ModelSpec

Model = GPT | EncoderDecoder

__all__ = ["GPT", "EncoderDecoder", "Model", "ModelSpec"]
