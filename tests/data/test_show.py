"""The prompt that the end of a run suggests: of its own text, and as a shell takes it."""

import json
import subprocess

import pytest

from jaxgpt.config import DataConfig
from jaxgpt.data.prepare import prepare
from jaxgpt.data.show import (
    NO_EXAMPLE,
    Example,
    example_prompt,
    in_shell,
    save_example,
    saved_example,
)

CHATS = [
    {"messages": [{"role": "user", "content": says}, {"role": "assistant", "content": "Yes?"}]}
    for says in ("a question that is long", "Hi", "a third")
]
PAIR = {"prompt": "a question", "response": "an answer"}


@pytest.mark.parametrize(
    "kind, text, prompt",  # a prompt with a ">" in front is a chat's
    [
        ("text", "\n\nOnce upon\ta time there was\nmore\n", "Once upon a"),
        ("text", "naïve\n", "naïve"),
        ("text", '"""\nA title in words\n', "A title in"),
        ("text", "\n \n", ""),
        ("sft", "".join(json.dumps(row) + "\n" for row in CHATS), ">Hi"),
        ("sft", json.dumps(PAIR) + "\n", "a question"),
    ],
)
def test_the_prompt_is_of_the_run_s_own_text(kind, text, prompt, tmp_path):
    (tmp_path / "train").write_text("some text to train on, of any kind\n" * 9)
    (tmp_path / "v").write_text(text)
    source = f"text:{tmp_path}/train"
    data = prepare(DataConfig(source=source, validation_source=f"{kind}:{tmp_path}/v"))
    found = example_prompt(data.validation, data.tokenizer, "plain")
    assert found == Example(prompt.removeprefix(">"), prompt.startswith(">"))
    (tmp_path / "tokenizer").mkdir()
    assert saved_example(tmp_path / "tokenizer") == NO_EXAMPLE
    save_example(found, tmp_path / "tokenizer")
    assert saved_example(tmp_path / "tokenizer") == found


@pytest.mark.parametrize(
    "text", ["def ", "it's", "é: it's\n\\n\tb", "", "\U0001f600\n\u200b", "$(ls)\n`ls`"]
)
def test_a_shell_takes_it_back(text):
    quoted = in_shell(text)
    command = ["bash", "-c", f"printf %s {quoted}"]
    found = subprocess.run(command, capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=True)
    assert found.stdout.decode() == text and len(quoted.splitlines()) == 1
