"""`evaluate`'s numbers against GPT-2 in NumPy, in float64, over windows cut by hand."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from jaxgpt import evaluate
from jaxgpt.config import DataConfig
from jaxgpt.data.prepare import prepare_whole
from jaxgpt.evaluation.perplexity import Perplexity
from jaxgpt.inference.trained import open_trained
from jaxgpt.interchange.safetensors import SafetensorsFile
from jaxgpt.jobs.convert import import_folder
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.objectives.text import batch_sharding
from jaxgpt.tokenizer import make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from tests.conftest import CORPUS
from tests.interchange.test_import_export import model_folder

CONTEXT, HEADS, END = 24, 4, 256
DOCUMENTS = [CORPUS[:90], CORPUS[200:201], "naïve – \U0001f600\n", CORPUS[300:420]]
CHATS = [
    {"prompt": "What is 1+1? ", "response": "2"},
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "é"},
        ]
    },
    {"prompt": CORPUS[:60], "response": CORPUS[60:130]},
]
LEARNT = [[(False, "What is 1+1? "), (True, "2")]]
LEARNT += [
    [
        *((False, "User:"), (False, " Hi\n"), (False, "Assistant:"), (True, " Hello!\n")),
        *((False, "User:"), (False, " Bye\n"), (False, "Assistant:"), (True, " é")),
    ],
    [(False, CORPUS[:60]), (True, CORPUS[60:130])],
]


def log_probabilities(weights: dict, ids: list[int]) -> np.ndarray:
    """GPT-2 (Radford et al. 2019) written from the paper: ln P(next token) at each position."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][ids] + weights["wpe.weight"][: len(ids)]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(2):
        h = f"h.{layer}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
        q, k, v = (a.reshape(len(ids), HEADS, -1) for a in np.split(qkv, 3, -1))
        scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1]) + future
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), v)
        x = x + linear(mixed.reshape(len(ids), -1), f"{h}.attn.c_proj")
        up = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        up = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + linear(up, f"{h}.mlp.c_proj")
    logits = norm(x, "ln_f") @ weights["wte.weight"].T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, nats): an imported model, and the function that gives each target's nats.

    `nats(ids, stride)[p]` is -ln P(ids[p]) in the first window that has it as a target.
    """
    folder = tmp_path_factory.mktemp("numbers")
    model_folder(folder / "hf")
    import_folder(folder / "hf", folder / "w")
    file = SafetensorsFile(folder / "hf/model.safetensors")
    names = {name: name.removeprefix("transformer.") for name in file.shapes}
    weights = {short: file.read(name).astype(np.float64) for name, short in names.items()}

    def nats(ids: list[int], stride: int) -> dict[int, float]:
        found: dict[int, float] = {}
        for start in range(0, len(ids) - 1, stride):
            window = ids[start : start + CONTEXT]
            logp = log_probabilities(weights, window)
            for i in range(len(window)):
                if (place := start + i + 1) < len(ids):
                    found.setdefault(place, -logp[i, ids[place]])
        return found

    (folder / "a.txt").write_text(CORPUS[:333])
    rows = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    (folder / "b.jsonl").write_text(rows)
    for number, row in enumerate(CHATS):  # a file holds rows of one kind
        (folder / f"c{number}.jsonl").write_text(json.dumps(row) + "\n")
    return folder, nats


def stream(documents) -> tuple[list[int], list[bool]]:
    """Tokens of documents of (learnt, text) parts, and which are learnt: an end-of-text is where
    it follows what is learnt."""
    ids, mask, last = [], [], True
    for parts in documents:
        ids.append(END)
        mask.append(last)
        for learnt, text in parts:
            ids += text.encode()
            mask += [learnt] * len(text.encode())
            last = learnt
    return ids, mask


PLAIN = [[(True, text)] for text in DOCUMENTS]
ONE = [[(True, CORPUS[:333])]]
SPLITS = {
    "text:{}/a.txt": [("text:{}/a.txt", ONE)],
    "jsonl:{}/b.jsonl": [("jsonl:{}/b.jsonl", PLAIN)],
    "sft:{}/c*.jsonl": [("sft:{}/c*.jsonl", LEARNT)],
    "0.3*text:{}/a.txt,0.7*jsonl:{}/b.jsonl": [("text:{}/a.txt", ONE), ("jsonl:{}/b.jsonl", PLAIN)],
    "0.5*jsonl:{}/b.jsonl,0.5*sft:{}/c*.jsonl": [
        ("jsonl:{}/b.jsonl", PLAIN),
        ("sft:{}/c*.jsonl", LEARNT),
    ],
}


def by_hand(parts, nats, stride: int) -> tuple[float, int, int, dict]:
    """Returns (nats, targets, bytes) of the whole, and (nats, targets) of each source."""
    ids, mask, ends = [], [], []
    size = 0
    for _, documents in parts:
        more, learnt = stream(documents)
        ids, mask = ids + more, mask + learnt
        ends.append(len(ids))
        size += sum(len(t.encode()) for parts_ in documents for is_, t in parts_ if is_)
    found, sources, begin = nats(ids, stride), {}, 0
    for (spec, _), end in zip(parts, ends, strict=True):
        places = [p for p in range(max(begin, 1), end) if mask[p]]
        sources[spec] = (sum(found[p] for p in places), len(places))
        begin = end
    total, count = map(sum, zip(*sources.values(), strict=True))
    return total, count, size, sources


@pytest.mark.parametrize("source", SPLITS)
def test_every_split_by_every_stride(run, source):
    folder, nats = run
    trained = open_trained(str(folder / "w"), None)
    data = source.replace("{}", str(folder))
    split = prepare_whole(data, DataConfig(), trained.tokenizer, folder / "cache")
    with jax.set_mesh(trained.mesh):
        params, step = trained.params(), make_eval_step(trained.spec)
        for stride, batch in ((0, 8), (CONTEXT, 16), (7, 8), (1, 8), (CONTEXT - 1, 8)):
            sharding = batch_sharding(trained)
            found = Perplexity(step, sharding, split, CONTEXT, batch, stride)(params)
            total, count, size, sources = by_hand(SPLITS[source], nats, stride or CONTEXT)
            assert (found["tokens"], found["bytes"]) == (count, size), stride
            assert found["loss"] == pytest.approx(total / count, abs=1e-5), stride
            assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
            assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, abs=1e-4)
            if len(sources) == 1:
                assert "sources" not in found
                continue
            assert set(found["sources"]) == {s.replace("{}", str(folder)) for s in sources}
            for spec, (part, number) in sources.items():
                row = found["sources"][spec.replace("{}", str(folder))]
                assert row["tokens"] == number
                assert row["loss"] == pytest.approx(part / number, abs=1e-5)
                assert row["perplexity"] == pytest.approx(math.exp(part / number), rel=1e-5)


def test_the_first_windows_alone(run):
    """As validation with `eval_batches` counts: its bytes are the split's by the share of
    tokens."""
    folder, nats = run
    trained = open_trained(str(folder / "w"), None)
    split = prepare_whole(f"text:{folder}/a.txt", DataConfig(), trained.tokenizer, folder / "cache")
    with jax.set_mesh(trained.mesh):
        measure = Perplexity(
            make_eval_step(trained.spec), batch_sharding(trained), split, CONTEXT, 8
        )
        found = measure(trained.params(), max_windows=9)
    ids, _ = stream(ONE)
    first = [value for place, value in nats(ids, CONTEXT).items() if place <= 9 * CONTEXT]
    size = round(len(CORPUS[:333].encode()) * len(first) / (len(ids) - 1))
    assert len(first) == 9 * CONTEXT < len(ids) - 1
    assert (found["tokens"], found["bytes"]) == (len(first), size)
    assert found["loss"] == pytest.approx(sum(first) / len(first), abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(first) / math.log(2) / size, abs=1e-4)


def test_the_command_says_the_same(run, command):
    folder, nats = run
    source = "0.3*text:{}/a.txt,0.7*jsonl:{}/b.jsonl"
    argv = (f"--workdir={folder}/w", f"--data={source.replace('{}', str(folder))}", "--stride=5")
    code, out, err = command(evaluate.main, *argv)
    assert code == 0, err
    row, (total, count, size, _) = json.loads(out), by_hand(SPLITS[source], nats, 5)
    assert row["loss"] == pytest.approx(total / count, abs=1e-5)
    assert (row["step"], row["tokens"], row["bytes"]) == (0, count, size)
    assert row["split"] == source.replace("{}", str(folder)) and row["seconds"] > 0


@pytest.mark.parametrize("names", [[], ["<a>"]])
def test_characters_that_the_model_does_not_know_are_counted(run, command, tmp_path, names):
    shutil.copytree(run[0] / "w", tmp_path / "w")
    tokenizer = make_tokenizer("char", [TrainingText(lambda: ["abcdefg \n"], 9)], ",".join(names))
    save_tokenizer(tokenizer, tmp_path / "w/tokenizer")
    for name, text, known in (("a", "bad é cab x\n", False), ("b", "bad cab\n" * 3, True)):
        (tmp_path / f"{name}.txt").write_text(text)
        source = f"text:{tmp_path}/{name}.txt"
        code, _, err = command(evaluate.main, f"--workdir={tmp_path}/w", f"--data={source}")
        assert code == 0, err
        says = f"unknown   2 of 12 characters of {source} are none of the model's 9:"
        assert known or says in err
        assert not known or "unknown" not in err
