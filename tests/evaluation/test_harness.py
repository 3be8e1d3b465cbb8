"""lm-eval's harness over a jaxgpt model, against the plain forward pass."""

import json

import jax
import numpy as np
import pytest

from jaxgpt.model import ModelSpec
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import mesh_of, tiny_config

pytestmark = pytest.mark.parity  # needs the extra [lm_eval]

BYTES = make_tokenizer("byte")


@pytest.fixture
def model():
    from jaxgpt.evaluation.harness import HarnessModel

    config = tiny_config(vocab_size=257, max_seq_len=40)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config.model, "xla")
        params = jax.tree.map(lambda p: 5 * p, jax.jit(spec.init)(jax.random.key(0)))
        forward = jax.jit(lambda t: jax.nn.log_softmax(spec.for_decoding().bind(params)(t)))
        yield HarnessModel(spec, params, BYTES, 4), lambda ids: np.asarray(forward(np.array([ids])))[0]


def asked(*args):
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=args, idx=0)


def test_likelihoods_and_greedy(model):
    harness, forward = model
    pairs = [("the cat", " sat"), ("", "alone"), ("x" * 100, " end"), ("a", "b"), ("q", "r")]
    found = harness.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, end), (score, greedy) in zip(pairs, found, strict=True):
        ids = (list(context.encode()) or [BYTES.end_of_text]) + list(end.encode())
        ids = ids[-41:]
        logp = forward(ids[:-1])[-len(end) :]
        assert score == pytest.approx(sum(logp[i][t] for i, t in enumerate(end.encode())), abs=1e-4)
        assert greedy == all(row.argmax() == t for row, t in zip(logp, end.encode(), strict=True))


def test_rolling_counts_each_token_once(model):
    harness, forward = model
    (short,) = harness.loglikelihood_rolling([asked("hello")])
    ids = [BYTES.end_of_text, *b"hello"]
    logp = forward(ids[:-1])
    assert short == pytest.approx(sum(logp[i][t] for i, t in enumerate(ids[1:])), abs=1e-4)
    (long,) = harness.loglikelihood_rolling([asked("hello" * 30)])
    assert long < 20 * short / 5


def test_generation_stops_and_is_greedy(model):
    harness, forward = model
    (text,) = harness.generate_until([asked("abc", {"until": [], "max_gen_toks": 8})])
    ids = list(b"abc")
    for _ in range(8):
        ids.append(int(forward(ids)[-1].argmax()))
    assert text == BYTES.decode(np.array(ids[3:], np.int32))
    if len(text) > 3:
        (cut,) = harness.generate_until([asked("abc", {"until": [text[2]], "max_gen_toks": 8})])
        assert cut == text[: text.find(text[2])]


def test_a_whole_task_from_a_local_file(model, tmp_path):
    import lm_eval

    harness, _ = model
    rows = [{"q": f"number {i}", "choices": ["one", "two"], "answer": i % 2} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {"data_files": str(tmp_path / "t.jsonl")},
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(harness, tasks=[task], log_samples=False, bootstrap_iters=0)
    scores = harness.loglikelihood(
        [asked(row["q"], f" {choice}") for row in rows for choice in row["choices"]], disable_tqdm=True
    )
    best = np.array([score for score, _ in scores]).reshape(6, 2).argmax(axis=1)
    assert found["results"]["local"]["acc,none"] == np.mean(best == [row["answer"] for row in rows])
