"""Prompt and response, chats and tasks: what is learnt of them, and only that."""

import json

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxgpt import convert, evaluate, train
from jaxgpt.config import Config, DataConfig, ModelConfig
from jaxgpt.config.schema import IGNORE
from jaxgpt.config.validate import validate
from jaxgpt.data.pipeline import training_stream
from jaxgpt.data.prepare import prepare
from jaxgpt.evaluation.tasks import AnswerScorer, answer_words, questions, word_f1
from jaxgpt.evaluation.windows import evaluation_batch
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.system.errors import BadInput
from jaxgpt.text.chat import (
    JINJA,
    ROW_KINDS,
    TEMPLATES,
    TURNS,
    reply_prompt,
    row_spans,
    user_message,
)
from jaxgpt.text.tasks import Example, read_examples
from jaxgpt.tokenizer.base import ByteTokenizer
from jaxgpt.training.setup import make_training
from tests.conftest import config_flag, mesh_of, tiny_config

CHAT = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
}
ROWS = [
    {"prompt": "What is 1+1? ", "response": "2"},
    {"prompt": "Say: ", "response": "yes"},
    {"prompt": "Held ", "response": "out"},
]


def write_rows(tmp_path, rows, name="sft.jsonl"):
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / name


def prepare_rows(tmp_path, **data):
    write_rows(tmp_path, ROWS[:1], "rows-1.jsonl")
    write_rows(tmp_path, [CHAT], "rows-2.jsonl")  # another kind, in a file of its own
    write_rows(tmp_path, ROWS[1:], "rows-3.jsonl")
    source = f"sft:{tmp_path}/rows-*.jsonl"
    return prepare(DataConfig(source=source, validation_fraction=0.1, **data))


def learnt(data) -> list[str]:
    """The stretches of text whose tokens are targets; | is the end-of-text."""
    text = "".join("|" if t == 256 else chr(t) for t in data.train.tokens)
    marks = "".join(c if m else "\0" for c, m in zip(text, data.train.mask, strict=True))
    return [part for part in marks.split("\0") if part]


def test_only_responses_are_learnt(tmp_path):
    data = prepare_rows(tmp_path)
    assert learnt(data) == ["2|", " Hello!\n", " See you|", "yes"]
    text = bytes(t for t in data.train.tokens if t < 256).decode()
    assert (
        text == "What is 1+1? 2User: Hi\nAssistant: Hello!\nUser: Bye\nAssistant: See youSay: yes"
    )
    assert data.train.num_targets == 2 + 8 + 9 + 3 and data.train.target_bytes == 1 + 8 + 8 + 3


@pytest.mark.parametrize("pack", [False, True])
def test_batches_carry_the_mask(tmp_path, pack):
    data = prepare_rows(tmp_path)
    config = Config(
        model=ModelConfig(max_seq_len=16).with_sizes(), batch_size=1, data=DataConfig(pack=pack)
    )
    stream = training_stream(data.train, config)
    count = len(stream.sources[0])
    batches = [stream.batch(k) for k in range(count)]
    targets = np.concatenate([b["targets"].ravel() for b in batches])
    counted = sorted(targets[targets != IGNORE].tolist())
    assert sum(stream.num_targets(k) for k in range(count)) == len(counted)
    wanted = [int(t) for t, m in zip(data.train.tokens, data.train.mask, strict=True) if m]
    if pack:  # every document's end is a target there, the last one's too
        assert counted == sorted([*wanted, 256])
    else:
        assert counted == sorted(wanted[: len(counted)])


def test_the_loss_is_the_masked_loss_by_hand(tmp_path):
    """The train step's loss: cross-entropies of the response's tokens over their number."""
    data = prepare_rows(tmp_path)
    config = tiny_config(vocab_size=257, max_seq_len=24)
    config.data, config.batch_size = DataConfig(pack=True, shuffle=False), 2
    stream = training_stream(data.train, config)
    batch = stream.batch(0)
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step = jax.jit(training.init)(), training.compile_step()
        spec = ModelSpec(config, "xla")
        micro = {name: jnp.asarray(a[0]) for name, a in batch.items()}
        run = jax.jit(
            lambda p: spec.bind(p)(
                micro["inputs"], positions=micro["positions"], segments=micro["segments"]
            )
        )
        logits = np.asarray(run(state.params), np.float64)[..., :257]
        _, metrics = step(state, jax.device_put(batch, training.batch_sharding))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = [
        -logp[r, t, target]
        for r, row in enumerate(micro["targets"])
        for t, target in enumerate(row.tolist())
        if target != IGNORE
    ]
    assert 0 < len(nats) < micro["targets"].size / 2
    assert float(metrics["loss"]) == pytest.approx(np.mean(nats), abs=1e-5)


def test_evaluation_counts_responses_only(tmp_path):
    data = prepare_rows(tmp_path)
    split = data.train
    batch = evaluation_batch(split.tokens, 16, 8, 0, split.mask)
    assert (batch["targets"] != IGNORE).sum() == split.num_targets


def test_chatml_uses_its_special_tokens(tmp_path):
    data = prepare_rows(tmp_path, chat_template="chatml", special_tokens="<|im_start|>,<|im_end|>")
    ids = data.train.tokens[:36].tolist()
    assert data.train.tokens[36] == 256 and not data.train.mask[36], "behind what is not learnt"
    assert ids[1] == 257 and 258 in ids and ids.count(256) == 1
    text = data.tokenizer.decode(data.train.tokens)
    assert text.startswith("<|im_start|>user\nWhat is 1+1? <|im_end|>\n<|im_start|>assistant\n2")
    marked = data.train.tokens[np.asarray(data.train.mask, bool)]
    assert marked[:2].tolist() == [ord("2"), 258], "the model learns to end its turn"
    bad = Config(data=DataConfig(chat_template="chatml"))
    with pytest.raises(BadInput, match=r"needs data.special_tokens='<\|im_start\|>,<\|im_end\|>'"):
        validate(bad)


ALPACA = {"instruction": "Say it in French", "input": "Hello", "output": "Bonjour"}
# Written out by hand, from Stanford Alpaca's
ALPACA_TEXT = """Below is an instruction that describes a task, paired with an input that provides \
further context. Write a response that appropriately completes the request.

### Instruction:
Say it in French

### Input:
Hello

### Response:Bonjour"""
ALPACA_TEXT_WITHOUT = """Below is an instruction that describes a task. Write a response that \
appropriately completes the request.

### Instruction:
Say it in French

### Response:Bonjour"""
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be kind"},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
}
START, END = "<|im_start|>", "<|im_end|>"


@pytest.mark.parametrize(
    ("row", "template", "text", "targets"),
    [
        (ALPACA, "alpaca", ALPACA_TEXT, ["Bonjour"]),
        (ALPACA | {"input": ""}, "alpaca", ALPACA_TEXT_WITHOUT, ["Bonjour"]),
        (ALPACA | {"input": None, "id": 7}, "alpaca", ALPACA_TEXT_WITHOUT, ["Bonjour"]),
        (ALPACA, "plain", "User: Say it in French\nHello\nAssistant: Bonjour", [" Bonjour"]),
        (
            ALPACA,
            "chatml",
            f"{START}user\nSay it in French\nHello{END}\n{START}assistant\nBonjour{END}\n",
            ["Bonjour", END],
        ),
        (SHAREGPT, "plain", "System: Be kind\nUser: Hi\nAssistant: Hello", [" Hello"]),
        (SHAREGPT, "alpaca", "Be kind\n\n### Instruction:\nHi\n\n### Response:Hello", ["Hello"]),
        ({"prompt": "a ", "completion": "b"}, "plain", "a b", ["b"]),
        (
            {"prompt": "a", "completion": "b", "messages": None},
            "alpaca",
            ALPACA_TEXT_WITHOUT.replace("Say it in French", "a").replace("Bonjour", "b"),
            ["b"],
        ),
    ],
)
def test_rows_as_people_have_them(row, template, text, targets):
    spans = row_spans(row, template, "x")
    assert "".join(span.text for span in spans) == text
    assert [span.text for span in spans if span.is_target] == targets


EXAMPLES = [CHAT, SHAREGPT, ROWS[0], {"prompt": "a", "completion": "b"}, ALPACA]


def test_the_kind_of_row_is_said_once(tmp_path, capsys):
    assert len(EXAMPLES) == len(ROW_KINDS)
    for number, (name, row) in enumerate(zip(ROW_KINDS, EXAMPLES, strict=True)):
        file = write_rows(tmp_path, [row] * 9, f"{number}.jsonl")
        data = prepare(DataConfig(source=f"sft:{file}", validation_fraction=0.2))
        assert data.train.num_targets
        assert capsys.readouterr().err.count(f": rows of {name}, chat template plain\n") == 1
    prepare(DataConfig(source=f"sft:{tmp_path}/[0-4].jsonl", validation_fraction=0.2))
    assert capsys.readouterr().err.count(": rows of ") == len(ROW_KINDS)


@pytest.mark.parametrize("name", ["plain", "chatml", "alpaca"])
def test_the_saved_template_says_the_same(name):
    messages = CHAT["messages"]
    parts = row_spans(CHAT, name, "x")
    template = jinja2.Environment().from_string(JINJA[name])
    assert template.render(messages=messages) == "".join(part.text for part in parts)
    asked = template.render(messages=messages[:3], add_generation_prompt=True)
    whole = "".join(
        part.text for part in TEMPLATES[name]([(m["role"], m["content"]) for m in messages])
    )
    assert whole.startswith(asked)
    spans = reply_prompt([(m["role"], m["content"]) for m in messages[:3]], name)
    assert "".join(span.text for span in spans) == asked
    assert [s[::2] for s in spans] == [s[::2] for s in parts[: len(spans)]], "cut as in training"
    assert user_message(asked, name) == "Bye" and TURNS[name].before in asked
    assert user_message(asked + "x", name) == user_message("Bye", name) == ""
    following = template.render(messages=[*messages, {"role": "user", "content": "x"}])
    assert f"See you{TURNS[name].stop}" in following


@pytest.mark.parametrize("text", [ALPACA_TEXT, ALPACA_TEXT_WITHOUT])
def test_what_alpaca_s_rows_taught_is_asked_for_in_the_same_words(text):
    prompt = text.removesuffix("Bonjour")
    message = user_message(prompt, "alpaca")
    assert "".join(span.text for span in reply_prompt([("user", message)], "alpaca")) == prompt
    template = jinja2.Environment().from_string(JINJA["alpaca"])
    messages = [{"role": "user", "content": message}]
    assert template.render(messages=messages, add_generation_prompt=True) == prompt


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "response": ""}, "line 2 has no response to learn: all of it would be"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2 has no response to learn"),
        ({"prompt": "a"}, r"line 2 has neither messages, nor .* \(its fields are prompt\)"),
        (["a"], r"line 2 has neither messages, nor .* \(not an object\)"),
        ({"prompt": 1, "response": "x"}, "prompt and response must be text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot' is unknown"),
        ({"messages": ["x"]}, "a message needs role and content"),
        ({"messages": {"a": 1}}, "line 2: the turns of a chat must be a list"),
        ({"conversations": [{"from": "human"}]}, "line 2: a message needs from and value"),
        ({"conversations": [{"from": [], "value": "x"}]}, "one of system, human, gpt"),
        ({"instruction": "a", "output": 2}, "instruction and input and output must be text"),
        ({"prompt": "a", "completion": ["b"]}, "prompt and completion must be text"),
    ],
)
def test_rows_that_cannot_be_learnt(tmp_path, row, message):
    good = next((r for r in EXAMPLES if isinstance(row, dict) and row.keys() <= r.keys()), ROWS[0])
    file = write_rows(tmp_path, [good, row])
    with pytest.raises(BadInput, match=message) as e:
        prepare(DataConfig(source=f"sft:{file}"))
    assert str(file) in str(e.value)
    with pytest.raises(BadInput, match="not bin:, sft: or task:"):
        prepare(DataConfig(source=f"sft:{write_rows(tmp_path, ROWS)}", clean="unicode"))


def test_a_file_holds_rows_of_one_kind(tmp_path):
    file = write_rows(tmp_path, [ALPACA, ALPACA, SHAREGPT])
    with pytest.raises(BadInput, match="has conversations, but line 1 has instruction and output"):
        prepare(DataConfig(source=f"sft:{file}"))


def test_fine_tuning_on_a_task_learns_it(command, tmp_path):
    """Sentiment by a word: accuracy from a coin's to all right, in a minute's model."""
    rng = np.random.default_rng(0)
    words = {"positive": ["good", "fine"], "negative": ["bad", "poor"]}
    rows = [
        {
            "text": f"{rng.choice(['It', 'This', 'He'])} is {rng.choice(words[label])}",
            "label": ["negative", "positive"].index(label) if i % 2 else label,
        }
        for i, label in enumerate(rng.choice(["positive", "negative"], 200))
    ]
    write_rows(tmp_path, rows[:160], "train.jsonl")
    test_file = write_rows(tmp_path, rows[160:], "test.jsonl")
    flag = config_flag(
        tmp_path,
        "num_steps=60, batch_size=16, eval_every=0, checkpoint_every=0,"
        " model=ModelConfig(max_seq_len=48, num_layers=1, num_heads=2, embed_dim=32),"
        f" data=DataConfig(source='task:sentiment:{tmp_path}/train.jsonl', pack=True),"
        " optim=OptimConfig(learning_rate=1e-2, warmup_steps=5)",
    )
    code, _, err = command(train.main, flag, f"--workdir={tmp_path}/w")
    assert code == 0, err
    argv = (f"--workdir={tmp_path}/w",)
    code, out, err = command(evaluate.main, *argv, f"--task=sentiment:{test_file}")
    found = json.loads(out)
    assert code == 0 and found["accuracy"] == 1.0 and found["examples"] == 40, err
    table = found["confusion"]
    assert set(table) == {"negative", "positive"} and table["negative"]["positive"] == 0
    assert sum(map(sum, (row.values() for row in table.values()))) == 40
    flipped = [
        {
            "text": r["text"],
            "label": {"positive": "negative", "negative": "positive"}.get(
                r["label"], 1 - r["label"] if isinstance(r["label"], int) else ""
            ),
        }
        for r in rows[160:]
    ]
    code, out, _ = command(
        evaluate.main, *argv, f"--task=sentiment:{write_rows(tmp_path, flipped, 'f.jsonl')}"
    )
    assert json.loads(out)["accuracy"] == 0.0
    code, _, err = command(evaluate.main, *argv, "--task=poetry:x")
    assert code == 2 and "--task=poetry:x is unknown" in err
    code, _, err = command(convert.main, "export", *argv, f"--to={tmp_path}/out")
    assert code == 0 and "Assistant:" in (tmp_path / "out/chat_template.jinja").read_text(), err
    asked = [{"context": "It is good", "question": "Is it?", "answers": {"text": ["positive"]}}]
    code, out, err = command(
        evaluate.main, *argv, f"--task=questions:{write_rows(tmp_path, asked, 'q.jsonl')}"
    )
    assert code == 0 and {"exact_match", "f1"} <= set(json.loads(out)), err


def test_real_formats_of_the_tasks(tmp_path):
    rows = [
        {"premise": "A dog runs", "hypothesis": "An animal moves", "label": 0},
        {"premise": "A", "hypothesis": "B", "label": "neutral"},
    ]
    found = list(read_examples("entailment", [str(write_rows(tmp_path, rows))]))
    assert found[0].prompt == "Premise: A dog runs\nHypothesis: An animal moves\nRelation:"
    assert [e.answers for e in found] == [("entailment",), ("neutral",)]
    for task, row, message in (
        (
            "entailment",
            {"premise": "A", "label": 0},
            "line 1 is no row of task entailment: KeyError",
        ),
        ("sentiment", {"text": "A", "label": 2}, "label 2 is neither a word nor one of 0..1"),
        ("questions", {"context": "A", "question": "B", "answers": []}, "answers must be texts"),
    ):
        with pytest.raises(BadInput, match=message):
            list(read_examples(task, [str(write_rows(tmp_path, [row]))]))


def test_squad_figures_by_hand():
    examples = [Example("a", ("the Eiffel Tower", "Paris"), ""), Example("b", ("in 1999",), "")]
    answers = {"a": "Eiffel tower!", "b": "the year 1999"}
    found = questions(examples, answers.__getitem__)
    assert found["exact_match"] == 0.5
    assert found["f1"] == pytest.approx((1 + 0.5) / 2)
    best = questions([Example("a", ("Rome", "Paris in France"), "")], lambda _: "Paris")
    assert best["f1"] == pytest.approx(0.5) and best["exact_match"] == 0, "of any right answer"
    assert answer_words("The  Cat, an ox.") == ["cat", "ox"]
    assert word_f1([], []) == 1.0 and word_f1(["x"], []) == 0.0


def test_a_choice_is_scored_by_its_own_tokens_only():
    """ln P(answer | prompt), by hand; a prompt too long loses its beginning, not the answer."""
    config = tiny_config(vocab_size=257, max_seq_len=12)
    pairs = [("ab", " yes"), ("ab", " no"), ("a long prompt", " no")]
    with jax.set_mesh(mesh := mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.jit(spec.init)(jax.random.key(0))
        sharding = NamedSharding(mesh, spec.rules(None, "batch", "seq"))
        choices = AnswerScorer(make_eval_step(spec), sharding, ByteTokenizer(), 12, 2)
        encode = ByteTokenizer().encode
        found = choices.scores(params, [(encode(a), encode(b)) for a, b in pairs])
        expected = []
        for prompt, answer in pairs:
            ids = np.array([256, *prompt.encode()][-(12 - len(answer)) :] + [*answer.encode()])
            run = jax.jit(lambda p, t: spec.bind(p)(t))
            logits = np.asarray(run(params, jnp.asarray(ids[None, :-1], jnp.int32)))[0, :, :257]
            logp = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
            picked = logp[np.arange(len(ids) - 1), ids[1:]]
            expected.append(picked[-len(answer) :].sum())
    np.testing.assert_allclose(found, expected, atol=1e-4)
