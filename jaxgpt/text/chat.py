"""Rows of prompts and responses as documents of which only the responses are targets of the loss.

A row is of one of `ROW_KINDS`, told by its fields; the rows of a file are of one kind:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    {"prompt": "Hi", "response": "Hello"}
    {"prompt": "Hi", "completion": "Hello"}
    {"instruction": "Translate into French", "input": "Hello", "output": "Bonjour"}

A chat template makes text of them. Other rows, and rows without a target, raise `BadInput`, which
names file and row.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from etils import epath

from jaxgpt.system.console import say
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.text.formats import json_rows
from jaxgpt.text.pieces import Piece, Span

Messages = list[tuple[str, str]]  # (role, content)

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# Alpaca's prompt, without and with an input (github.com/tatsu-lab/stanford_alpaca, train.py)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request."
)
ALPACA_WITH_INPUT = ALPACA.replace(
    "task.", "task, paired with an input that provides further context."
)
ALPACA_INPUT = "\n\n### Input:\n"  # between instruction and input, which are one message
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
    "alpaca": (
        "{% if messages[0]['role'] != 'system' %}"
        "{% if '\\n\\n### Input:\\n' in messages[0]['content'] %}{{ '"
        + ALPACA_WITH_INPUT
        + "' }}{% else %}{{ '"
        + ALPACA
        + "' }}{% endif %}{{ '\\n\\n' }}{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '### Instruction:\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '### Response:' }}{% endif %}{{ m['content'] }}"
        "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\n### Response:' }}{% endif %}"
    ),
}  # for transformers; `TEMPLATES` below gives the same text


class ChatReader:
    """Reads the files of an `sft:` source; says of each kind of row, once, that it was met."""

    def __init__(self, spec: str, template: str):
        self.spec, self.template, self.said = spec, template, set()

    def __call__(self, file: str) -> Iterator[Piece]:
        """Yields a document per row of JSON, in spans that say what is a target."""
        first = None
        for where, number, row in json_rows([file]):
            kind = kind_of(row, where)
            first = first or (where.removeprefix(f"{file}, "), kind)
            if kind != first[1]:
                raise BadInput(
                    f"{where} has {kind}, but {first[0]} has {first[1]}: put rows of another kind"
                    " into a file of their own"
                )
            if kind not in self.said:
                self.said.add(kind)
                say(f"data      {self.spec}: rows of {kind}, chat template {self.template}")
            spans = row_spans(row, self.template, where)
            yield Piece(check_spans(spans, where), file, number, spans=tuple(spans))


def check_spans(spans: Sequence[Span], where: str) -> str:
    """Returns the text of `spans`. Raises `BadInput` if nothing in it is a target."""
    if not any(span.is_target and span.text for span in spans):
        raise BadInput(f"{where} has no response to learn: all of it would be masked")
    return check_text("".join(span.text for span in spans), where)


def kind_of(row, where: str) -> str:
    """Returns which of `ROW_KINDS` a row is; a field that is null is none. Raises `BadInput` if it
    is none of them."""
    for name, kind in ROW_KINDS.items():
        if isinstance(row, dict) and all(row.get(field) is not None for field in kind.fields):
            return name
    has = f"its fields are {', '.join(row)}" if isinstance(row, dict) else "not an object"
    raise BadInput(f"{where} has neither {', nor '.join(ROW_KINDS)} ({has})")


def row_spans(row, template: str, where: str) -> list[Span]:
    """Returns the spans of one row."""
    try:
        return ROW_KINDS[kind_of(row, where)].read(row, template)
    except ValueError as e:
        raise BadInput(f"{where}: {e}") from e


class RowKind(NamedTuple):
    """A kind of row: the fields by which it is known, and the spans of a row by a template. `read`
    raises ValueError where a field holds something else than it should."""

    fields: tuple[str, ...]
    read: Callable[[dict, str], list[Span]]


def _messages(row: dict, template: str) -> list[Span]:
    roles = {role: role for role in ROLES}
    return TEMPLATES[template](_turns(row["messages"], "role", "content", roles))


def _conversations(row: dict, template: str) -> list[Span]:
    return TEMPLATES[template](_turns(row["conversations"], "from", "value", SHAREGPT_ROLES))


def _response(row: dict, template: str) -> list[Span]:
    return _exchange(*_texts(row, "prompt", "response"), template)


def _completion(row: dict, template: str) -> list[Span]:
    return _exchange(*_texts(row, "prompt", "completion"), template)


def _alpaca(row: dict, template: str) -> list[Span]:
    row = row | {"input": row["input"] if row.get("input") is not None else ""}
    instruction, given, output = _texts(row, "instruction", "input", "output")
    if given:
        instruction += (ALPACA_INPUT if template == "alpaca" else "\n") + given
    return TEMPLATES[template]([("user", instruction), ("assistant", output)])


ROW_KINDS = {
    "messages": RowKind(("messages",), _messages),
    "conversations": RowKind(("conversations",), _conversations),
    "prompt and response": RowKind(("prompt", "response"), _response),
    "prompt and completion": RowKind(("prompt", "completion"), _completion),
    "instruction and output": RowKind(("instruction", "output"), _alpaca),
}


def _turns(turns, role: str, content: str, roles: dict[str, str]) -> Messages:
    """Returns the messages of a list of objects with these fields; `roles`: theirs to ours."""
    if not isinstance(turns, list):
        raise ValueError("the turns of a chat must be a list")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(content), str):
            raise ValueError(f"a message needs {role} and {content}, both text")
        if not isinstance(turn.get(role), str) or turn[role] not in roles:
            raise ValueError(f"{role} {turn.get(role)!r} is unknown; one of {', '.join(roles)}")
        messages.append((roles[turn[role]], turn[content]))
    return messages


def _texts(row: dict, *fields: str) -> list[str]:
    if not all(isinstance(row[field], str) for field in fields):
        raise ValueError(f"{' and '.join(fields)} must be text")
    return [row[field] for field in fields]


def _exchange(prompt: str, response: str, template: str) -> list[Span]:
    """The plain template leaves the two as they are."""
    if template == "plain":
        return [Span(prompt), Span(response, is_target=True)]
    return TEMPLATES[template]([("user", prompt), ("assistant", response)])


def _plain(messages: Messages) -> list[Span]:
    spans = []
    for number, (role, content) in enumerate(messages, start=1):
        end = "\n" if number < len(messages) else ""
        is_target = role == "assistant" and bool(content)
        spans += [Span(f"{role.capitalize()}:"), Span(f" {content}{end}", is_target)]
    return spans


def _chatml(messages: Messages) -> list[Span]:
    spans = []
    for role, content in messages:
        is_target = role == "assistant" and bool(content)
        spans += [Span(START, special=True), Span(f"{role}\n"), Span(content, is_target)]
        spans += [Span(END, is_target, special=True), Span("\n")]
    return spans


def _alpaca_text(messages: Messages) -> list[Span]:
    if messages[:1] and messages[0][0] != "system":
        has_input = ALPACA_INPUT in messages[0][1]
        messages = [("system", ALPACA_WITH_INPUT if has_input else ALPACA), *messages]
    headings = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:"}
    spans = []
    for number, (role, content) in enumerate(messages, start=1):
        end = "\n\n" if number < len(messages) else ""
        is_target = role == "assistant" and bool(content)
        spans += [Span(headings[role]), Span(content + end, is_target)]
    return spans


TEMPLATES = {"plain": _plain, "chatml": _chatml, "alpaca": _alpaca_text}


class Turn(NamedTuple):
    """What a template writes in front of a user's message and behind it, up to the reply; and the
    text that ends a reply, where end-of-text does not."""

    before: str
    after: str
    stop: str


TURNS = {
    "plain": Turn("User: ", "\nAssistant:", "\nUser:"),
    "chatml": Turn(f"{START}user\n", f"{END}\n{START}assistant\n", END),
    "alpaca": Turn("### Instruction:\n", "\n\n### Response:", "\n\n### Instruction:"),
}


def reply_prompt(messages: Messages, template: str) -> list[Span]:
    """Returns the spans in front of the assistant's reply to `messages`: the same as in training,
    and as `JINJA` gives with `add_generation_prompt`."""
    spans = TEMPLATES[template]([*messages, ("assistant", "a reply")])
    for is_reply in (False, True):  # first what follows the reply
        while spans[-1].is_target == is_reply:
            spans.pop()
    return [span._replace(is_target=False) for span in spans]


def user_message(prompt: str, template: str) -> str:
    """Returns the last message in a prompt that a template wrote, '' if it did not write it."""
    before, after, _ = TURNS[template]
    head, found, message = prompt.removesuffix(after).rpartition(before)
    return message if found and prompt.endswith(after) else ""


def chat_messages(row: dict, where: str) -> Messages:
    """Returns the `messages` of a row of JSON that ask for a reply. Raises `BadInput` if they are
    malformed, or the user's does not come last."""
    try:
        messages = _turns(row["messages"], "role", "content", {role: role for role in ROLES})
    except ValueError as e:
        raise BadInput(f"{where}: {e}") from e
    if not messages or messages[-1][0] != "user":
        raise BadInput(f"{where}: the last message must be the user's")
    for _, content in messages:
        check_text(content, f"{where}: a message")
    return messages


def save_template(template: str, folder: os.PathLike) -> None:
    """Writes the chat template beside a tokenizer, as Jinja."""
    (epath.Path(folder) / TEMPLATE_FILE).write_text(JINJA[template])


def saved_template(folder: os.PathLike) -> str:
    """Returns the Jinja template in `folder`, '' if there is none."""
    file = epath.Path(folder) / TEMPLATE_FILE
    return file.read_text() if file.exists() else ""
