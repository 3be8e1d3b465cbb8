"""A chat run from its training to `sample --chat`: its template in every place, as in training."""

import io
import json
import os
import re

import jax
import numpy as np
import pytest
from etils import epath

from jaxgpt import sample
from jaxgpt.inference.chat import open_chat
from jaxgpt.inference.generation import encode_request
from jaxgpt.inference.requests import GenerationRequest
from jaxgpt.inference.trained import open_trained
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import load_tokenizer
from jaxgpt.tokenizer.base import ByteTokenizer
from tests.conftest import config_flag, xla_flags
from tests.processes.forks import Python
from tests.processes.processes import finish

NAMES = ("anna", "bo", "c€é")
ANSWERS = {name: f"{name}, naïve €!" for name in NAMES}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few chats that it has learnt by heart, and what it said."""
    folder = tmp_path_factory.mktemp("chats")
    turns = [[("user", f"Say {name}"), ("assistant", ANSWERS[name])] for name in NAMES * 20]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flag = config_flag(
        folder,
        "num_steps=80, batch_size=8, eval_every=40, checkpoint_every=0,"
        " model=ModelConfig(max_seq_len=72, num_layers=1, num_heads=2, embed_dim=32),"
        f" data=DataConfig(source='sft:{folder}/rows.jsonl', pack=True, chat_template='chatml',"
        f" special_tokens='<|im_start|>,<|im_end|>', cache_dir='{folder}/cache'),"
        " optim=OptimConfig(learning_rate=1e-2, warmup_steps=5),"
        " sample=SampleConfig(max_new_tokens=30, temperature=0.0)",
    )
    argv = (flag, f"--workdir={folder}/w")
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    codes, _, (err,) = finish([Python("-m", "jaxgpt.train", *argv, env=env)])
    assert codes == [0], err
    return folder / "w", err


def plain_greedy(workdir, ids: list[int], count: int) -> list[int]:
    """Token by token, over the whole text with the plain forward."""
    run = open_trained(str(workdir), None)
    with jax.set_mesh(run.mesh):
        forward, params = jax.jit(lambda p, t: run.spec.for_decoding().bind(p)(t)), run.params()
        start = len(ids)
        for _ in range(count):
            padded = np.zeros((1, 72), np.int32)
            padded[0, : len(ids)] = ids
            logits = np.asarray(forward(params, padded))[0, len(ids) - 1]
            ids = [*ids, int(np.argmax(logits[:259]))]
    return ids[start:]


def test_the_reply_is_that_of_the_tokens_of_training(trained, command):
    """Bytes 0..255, end-of-text 256, then <|im_start|> and <|im_end|>: written out by hand."""
    workdir, _ = trained
    text = lambda s: list(s.encode())  # noqa: E731
    ids = [256, 257, *text("user\nSay bo"), 258, *text("\n"), 257, *text("assistant\n")]
    tokenizer = load_tokenizer(epath.Path(workdir) / "tokenizer")
    asked = open_chat(str(workdir)).ask(GenerationRequest("Say bo"))
    assert encode_request(tokenizer, asked).tolist() == ids
    with pytest.raises(BadInput, match=r"has no special token <\|im_start\|>"):
        encode_request(ByteTokenizer(), asked)
    want = plain_greedy(workdir, ids, 30)
    assert bytes(want[: want.index(258)]).decode() == ANSWERS["bo"], "learnt"
    flags = (f"--workdir={workdir}", "--chat", "--max_new_tokens=30", "--temperature=0")
    for more in ((), ("--stream",)):
        code, out, err = command(sample.main, *flags, "--prompt=Say bo", *more)
        assert (code, out) == (0, f"{ANSWERS['bo']}\n"), err
    assert command(sample.main, *flags[:1], "--prompt=Say bo", *flags[2:])[1] != out


def test_rows_of_messages_and_lines(trained, command, tmp_path, monkeypatch):
    workdir, _ = trained
    rows = [{"prompt": "Say anna"}, {"messages": [{"role": "user", "content": "Say bo"}]}]
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--workdir={workdir}", "--chat", "--max_new_tokens=30", "--temperature=0")
    code, out, err = command(sample.main, *flags, f"--prompt_file={tmp_path}/rows")
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in found] == [ANSWERS["anna"], ANSWERS["bo"]]
    assert [row["finish_reason"] for row in found] == ["stop"] * 2
    monkeypatch.setattr("sys.stdin", io.StringIO("Say anna\nSay bo\n"))
    code, out, err = command(sample.main, *flags, "--interactive")
    assert (code, out) == (0, f"{ANSWERS['anna']}\n{ANSWERS['bo']}\n"), err


def test_the_end_of_training_names_what_works(trained, command):
    """The sample of the training and the suggested command are those of a chat."""
    workdir, said = trained
    found = re.search(r"jaxgpt.sample --workdir=\S+ --chat --prompt='(.*)' (\S+)\n", said)
    name = found[1].removeprefix("Say ")
    assert name in NAMES
    code, out, err = command(
        sample.main, f"--workdir={workdir}", "--chat", f"--prompt={found[1]}", found[2]
    )
    assert code == 0 and out.startswith(name[0]), err
    (row,) = map(json.loads, (workdir / "samples.jsonl").read_text().splitlines())
    assert row["prompt"].startswith("<|im_start|>user\nSay ") and row["text"] in ANSWERS.values()
    assert f"<|im_start|>user\n{found[1]}<|im_end|>\n" in said


@pytest.mark.parametrize(
    ("flags", "rows", "says"),
    [
        (["--chat"], None, "--chat needs a message: --prompt=TEXT, --prompt_file=F or"),
        (["--prompt=x", "--system=y"], None, "--system goes with --chat"),
        (["--chat"], [{"messages": []}], "line 1: the last message must be the user's"),
        (["--chat"], [{"messages": [3]}], "line 1: a message needs role and content"),
        ([], [{"messages": []}], "line 1 has no field 'prompt'"),
    ],
)
def test_what_is_no_chat(trained, command, tmp_path, flags, rows, says):
    if rows:
        (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = [*flags, f"--prompt_file={tmp_path}/rows"]
    code, out, err = command(sample.main, f"--workdir={trained[0]}", *flags)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err


def test_a_run_without_chats_says_so(trained, command, tmp_path):
    (tmp_path / "config.json").write_text((trained[0] / "config.json").read_text())
    code, _, err = command(sample.main, f"--workdir={tmp_path}", "--chat", "--prompt=x")
    assert code == 2 and f"{tmp_path} has no chat template, as it was not trained on" in err
    code, _, err = command(
        sample.main, f"--workdir={epath.Path(tmp_path) / 'no'}", "--chat", "--prompt=x"
    )
    assert code == 2 and "holds no run" in err
