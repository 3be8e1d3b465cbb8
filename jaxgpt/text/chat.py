"""Rows of prompts and responses as documents of which only the responses are learnt.

A row is {"prompt": ..., "response": ...} or {"messages": [{"role": "user", "content": ...}, ...]}.
"""

import os
from collections.abc import Iterator

from etils import epath

from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.text.formats import json_rows
from jaxgpt.text.pieces import Part, Piece

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
}  # for transformers; the functions below say the same


def read_chat(files: list[str], template: str) -> Iterator[Piece]:
    """Yields a document per line of JSON, in parts that say what is learnt.

    Raises:
      BadInput: naming file and line, if a row is malformed or nothing of it would be learnt.
    """
    for file, number, row in json_rows(files):
        yield piece_of(row_parts(row, template, f"{file}, line {number}"), file, number)


def piece_of(parts: list[Part], file: str, number: int) -> Piece:
    """Returns the document of these parts.

    Raises:
      BadInput: if none of them is learnt.
    """
    if not any(part.learn and part.text for part in parts):
        raise BadInput(f"{file}, line {number} has no response to learn: all of it would be masked")
    for part in parts:
        check_text(part.text, f"{file}, line {number}")
    return Piece("".join(part.text for part in parts), file, number, parts=tuple(parts))


def row_parts(row, template: str, where: str) -> list[Part]:
    """Returns the parts of one row.

    Raises:
      BadInput: if it is neither of the two kinds.
    """
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        messages = [_message(m, where) for m in row["messages"]]
        return TEMPLATES[template](messages)
    if isinstance(row, dict) and {"prompt", "response"} <= set(row):
        prompt, response = row["prompt"], row["response"]
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise BadInput(f"{where}: prompt and response must be text")
        if template == "plain":
            return [Part(prompt), Part(response, learn=True)]
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


def _plain(messages: list[tuple[str, str]]) -> list[Part]:
    parts = []
    for number, (role, content) in enumerate(messages, start=1):
        end = "\n" if number < len(messages) else ""
        learn = role == "assistant" and bool(content)
        parts += [Part(f"{role.capitalize()}:"), Part(f" {content}{end}", learn=learn)]
    return parts


def _chatml(messages: list[tuple[str, str]]) -> list[Part]:
    parts = []
    for role, content in messages:
        learn = role == "assistant" and bool(content)
        parts += [
            Part(START, special=True),
            Part(f"{role}\n"),
            Part(content, learn=learn),
            Part(END, learn=learn, special=True),
            Part("\n"),
        ]
    return parts


TEMPLATES = {"plain": _plain, "chatml": _chatml}


def save_template(template: str, folder: os.PathLike) -> None:
    """Writes the chat template beside a tokenizer, as Jinja."""
    (epath.Path(folder) / TEMPLATE_FILE).write_text(JINJA[template])


def saved_template(folder: os.PathLike) -> str:
    """Returns the Jinja template in `folder`, '' if there is none."""
    file = epath.Path(folder) / TEMPLATE_FILE
    return file.read_text() if file.exists() else ""
