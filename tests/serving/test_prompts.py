"""What the page starts with, and messages that the server puts into a run's chat template."""

import html
import re

import pytest

from jaxgpt.data.show import NO_EXAMPLE, Example
from jaxgpt.inference.chat import Chat
from jaxgpt.inference.generation import Continuation
from jaxgpt.serving.app import page
from jaxgpt.serving.openai import ApiError, parse_body
from jaxgpt.tokenizer import make_tokenizer
from jaxgpt.tokenizer.base import ByteTokenizer
from jaxgpt.tokenizer.special import SpecialTokens
from tests.conftest import tiny_config

CHATML = Chat("chatml")
TOKENIZER = SpecialTokens(ByteTokenizer(), ["<|im_start|>", "<|im_end|>"])


def parse(body: dict, chat: Chat | None = CHATML):
    return parse_body(body, "m", TOKENIZER, tiny_config(max_seq_len=64).model, chat)


def test_a_message_becomes_the_prompt_of_training():
    """Bytes, end-of-text 256, then the two special tokens; a message cannot forge them."""
    asked = parse({"prompt": "<|im_end|>", "chat": True, "max_tokens": 9, "stop": "x"})
    ((ids, request),) = asked.choices
    middle = [*b"user\n<|im_end|>", 258, *b"\n"]
    assert ids.tolist() == [256, 257, *middle, 257, *b"assistant\n"]
    assert request.stop == ("x", "<|im_end|>")
    ((plain, request),) = parse({"prompt": "<|im_end|>", "stop": "x"}).choices
    assert plain.tolist() == [*b"<|im_end|>"] and request.stop == ("x",)
    for body, chat, says in (
        ({"chat": True, "prompt": "x"}, None, "this model has no chat template"),
        ({"chat": 1, "prompt": "x"}, CHATML, "chat=1 must be true or false"),
        ({"chat": True, "prompt": [1, 2]}, CHATML, "a message of a chat must be text"),
        ({"chat": True, "prompt": "x" * 50}, CHATML, "more than the model's context"),
    ):
        with pytest.raises(ApiError, match=says) as e:
            parse(body, chat)
        assert e.value.status_code == 400 and "slide" not in e.value.detail


def test_a_suffix_asks_for_the_text_in_front_of_it():
    """Bytes, end-of-text 256, then the marks of prefix, suffix and middle in their order."""
    names = "<|fim_prefix|>,<|fim_suffix|>,<|fim_middle|>"
    tokenizer = make_tokenizer("byte", special_tokens=names)
    cfg = tiny_config(max_seq_len=64).model
    for prompt, text in (("ab", "ab"), ("", ""), ([97, 98], "ab")):
        body = {"prompt": prompt, "suffix": "<|fim_middle|>", "max_tokens": 3}
        ((ids, request),) = parse_body(body, "m", tokenizer, cfg).choices
        assert ids.tolist() == [256, 257, *text.encode(), 258, *b"<|fim_middle|>", 259]
        growing = Continuation(tokenizer, request, ids)
        growing.feed([*b"xyz"], [0.0] * 3)
        assert growing.text == "xyz" and growing.details[0].offset == len(text)
    plain = make_tokenizer("byte", special_tokens="<|fim_prefix|>,<|fim_middle|>")
    for body, tokens, says in (
        ({"suffix": "x"}, plain, r"token <\|fim_suffix\|>, which the tokenizer lacks: train with"),
        ({"suffix": 3}, tokenizer, "suffix must be text"),
        ({"suffix": "\ud800"}, tokenizer, "suffix holds half a surrogate pair"),
        ({"suffix": "x", "echo": True}, tokenizer, "suffix and echo do not go together"),
        ({"suffix": "x" * 59}, tokenizer, "context of 64"),
    ):
        with pytest.raises(ApiError, match=says) as e:
            parse_body({"prompt": "a", "max_tokens": 9} | body, "m", tokens, cfg)
        assert e.value.status_code == 400


@pytest.mark.parametrize("prompt", ["\n</textarea><b>&amp;", "<!--CHAT-->", "Say c€"])
def test_the_page_starts_with_the_run_s_own_prompt(prompt):
    found = re.search(r"<textarea[^>]*>\n([^<]*)</textarea>", page(Example(prompt, True)))
    assert html.unescape(found[1]) == prompt
    assert 'data-chat="true"' in page(Example(prompt, True))
    assert 'data-chat="false"' in page(NO_EXAMPLE) and ">\n</textarea>" in page(NO_EXAMPLE)
