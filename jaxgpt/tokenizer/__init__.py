"""Text to token ids and back, behind one small protocol."""

from jaxgpt.tokenizer.base import Tokenizer
from jaxgpt.tokenizer.incremental import IncrementalDetokenizer, decode_prompt
from jaxgpt.tokenizer.load import load_tokenizer, make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.special import special_id

__all__ = [
    "IncrementalDetokenizer",
    "Tokenizer",
    "decode_prompt",
    "load_tokenizer",
    "make_tokenizer",
    "save_tokenizer",
    "special_id",
]
