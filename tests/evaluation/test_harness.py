"""lm-eval's harness over a jaxgpt model, against the plain forward pass."""

import json

import jax
import numpy as np
import pytest

from jaxgpt import evaluate, train
from jaxgpt.model import ModelSpec
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import mesh_of, tiny_config

pytestmark = pytest.mark.parity  # needs the extra [lm-eval]

BYTES = make_tokenizer("byte")
CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=3, batch_size=8, eval_every=0, eval_batches=1, sample_every=0,
        model=ModelConfig(max_seq_len=40, num_layers=2, num_heads=2, embed_dim=32).with_sizes(),
        data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.25),
        optim=OptimConfig(warmup_steps=2), sample=SampleConfig(max_new_tokens=0),
    )
"""


@pytest.fixture
def model():
    from jaxgpt.evaluation.harness import HarnessModel

    config = tiny_config(vocab_size=257, max_seq_len=40)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        params = jax.tree.map(lambda p: 5 * p, jax.jit(spec.init)(jax.random.key(0)))
        forward = jax.jit(lambda t: jax.nn.log_softmax(spec.for_decoding().bind(params)(t)))
        yield (
            HarnessModel(spec, params, BYTES, 4),
            lambda ids: np.asarray(forward(np.array([ids])))[0],
        )


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


def test_a_context_cut_within_a_character_still_fits(model):
    harness, forward = model
    (text,) = harness.generate_until([asked("é" * 50, {"until": [], "max_gen_toks": 9})])
    ids = list(("é" * 15).encode())  # of the 31 tokens that fit the first is half a character
    for _ in range(9):
        ids.append(int(forward(ids)[-1].argmax()))
    assert text == BYTES.decode(np.array(ids[30:], np.int32))


def test_the_command_runs_a_task_s_own_file(command, tmp_path, corpus):
    import yaml

    from jaxgpt.evaluation.harness import HarnessModel
    from jaxgpt.inference.trained import open_trained

    (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus))
    code, _, err = command(train.main, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w")
    assert code == 0, err
    rows = [{"q": f"number {i}", "choices": ["one", "two"], "answer": i % 2} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "test_split": "train",
        "dataset_kwargs": {"data_files": str(tmp_path / "t.jsonl")},
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task))
    run = f"--workdir={tmp_path}/w"
    code, out, err = command(evaluate.main, run, f"--lm_eval={tmp_path}/t.yaml")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    trained = open_trained(f"{tmp_path}/w", None)
    with jax.set_mesh(trained.mesh):
        harness = HarnessModel(trained.spec, trained.params(), trained.tokenizer, 4)
        pairs = [(row["q"], f" {choice}") for row in rows for choice in row["choices"]]
        scores = harness.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    best = np.array([score for score, _ in scores]).reshape(6, 2).argmax(axis=1)
    want = np.mean(best == [row["answer"] for row in rows])
    assert found["step"] == 3 and found["lm_eval"]["local"]["acc,none"] == want
    code, _, err = command(evaluate.main, run, "--lm_eval=no_such_task")
    assert code == 2 and "--lm_eval" in err and "no_such_task" in err and err.count("\n") < 9, err
