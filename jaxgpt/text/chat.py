"""Rows of prompts and responses as documents of which only the responses are targets of the loss.

A row is {"prompt": ..., "response": ...} or {"messages": [{"role": "user", "content": ...}, ...]}.
Other rows, and rows without a target, raise `BadInput`, which names file and line.
"""

import os
from collections.abc import Iterator

from etils import epath

from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.text.formats import json_rows
from jaxgpt.text.pieces import Piece, Span

ROLES = ("system", "user", "assistant")
START, END = "<|im_start|>", "<|im_end|>"  # special tokens of the chatml template
TEMPLATE_FILE = "chat_template.jinja"
JINJA = {
    "plain": (
        "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
        "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}  # for transformers; `TEMPLATES` below gives the same text


def read_chat(file: str, template: str) -> Iterator[Piece]:
    """Yields a document per line of JSON, in spans that say what is a target."""
    for _, number, row in json_rows([file]):
        yield supervised_piece(row_spans(row, template, f"{file}, line {number}"), file, number)


def supervised_piece(spans: list[Span], file: str, number: int) -> Piece:
    """Returns the document that consists of `spans`."""
    if not any(span.is_target and span.text for span in spans):
        raise BadInput(f"{file}, line {number} has no response to learn: all of it would be masked")
    text = check_text("".join(span.text for span in spans), f"{file}, line {number}")
    return Piece(text, file, number, spans=tuple(spans))


def row_spans(row, template: str, where: str) -> list[Span]:
    """Returns the spans of one row."""
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return TEMPLATES[template]([_message(m, where) for m in row["messages"]])
    if isinstance(row, dict) and {"prompt", "response"} <= set(row):
        prompt, response = row["prompt"], row["response"]
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise BadInput(f"{where}: prompt and response must be text")
        if template == "plain":
            return [Span(prompt), Span(response, is_target=True)]
        return TEMPLATES[template]([("user", prompt), ("assistant", response)])
    raise BadInput(f"{where} has neither prompt and response nor a list of messages")


def _message(message, where: str) -> tuple[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise BadInput(f"{where}: a message needs role and content, both text")
    if message.get("role") not in ROLES:
        raise BadInput(
            f"{where}: role {message.get('role')!r} is unknown; one of {', '.join(ROLES)}"
        )
    return message["role"], message["content"]


def _plain(messages: list[tuple[str, str]]) -> list[Span]:
    spans = []
    for number, (role, content) in enumerate(messages, start=1):
        end = "\n" if number < len(messages) else ""
        is_target = role == "assistant" and bool(content)
        spans += [Span(f"{role.capitalize()}:"), Span(f" {content}{end}", is_target)]
    return spans


def _chatml(messages: list[tuple[str, str]]) -> list[Span]:
    spans = []
    for role, content in messages:
        is_target = role == "assistant" and bool(content)
        spans += [Span(START, special=True), Span(f"{role}\n"), Span(content, is_target)]
        spans += [Span(END, is_target, special=True), Span("\n")]
    return spans


TEMPLATES = {"plain": _plain, "chatml": _chatml}


def save_template(template: str, folder: os.PathLike) -> None:
    """Writes the chat template beside a tokenizer, as Jinja."""
    (epath.Path(folder) / TEMPLATE_FILE).write_text(JINJA[template])


def saved_template(folder: os.PathLike) -> str:
    """Returns the Jinja template in `folder`, '' if there is none."""
    file = epath.Path(folder) / TEMPLATE_FILE
    return file.read_text() if file.exists() else ""
