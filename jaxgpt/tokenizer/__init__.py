"""Text to token ids and back, behind one small protocol."""

from jaxgpt.tokenizer.base import Tokenizer
from jaxgpt.tokenizer.growing import GrowingText, text_before
from jaxgpt.tokenizer.load import load_tokenizer, make_tokenizer, save_tokenizer

__all__ = [
    "GrowingText",
    "Tokenizer",
    "load_tokenizer",
    "make_tokenizer",
    "save_tokenizer",
    "text_before",
]
