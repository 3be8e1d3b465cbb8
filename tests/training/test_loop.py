"""What a run validates, and what its samples and validations cannot do to it."""

import json
from collections.abc import Callable
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import train
from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config import Config, DataConfig, ModelConfig
from jaxgpt.data.pipeline import training_stream
from jaxgpt.data.prepare import prepare
from jaxgpt.evaluation.perplexity import Perplexity
from jaxgpt.metrics.rows import Reporter
from jaxgpt.objectives.training_sample import TrainingSample
from jaxgpt.training.loop import Loop
from jaxgpt.training.setup import make_training, resolve_vocab
from jaxgpt.training.state import TrainState
from tests.conftest import mesh_of

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=2, batch_size=8, log_every=1, eval_every=1, sample_every=1,
        model=ModelConfig(max_seq_len=16, num_layers=1, num_heads=2, embed_dim=16),
        data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.25),
        sample=SampleConfig(max_new_tokens=4),
    )
"""


@pytest.fixture
def run(command, corpus, tmp_path):
    """Trains two steps in `w`: `run(*flags) -> (exit code, stdout, stderr)`."""
    (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus))
    argv = (f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w")
    return lambda *flags: command(train.main, *argv, *flags)


class Rows:
    """Stands for a run's reporter."""

    active = False

    def __init__(self):
        self.metrics = lambda row: setattr(self, "last", row)


@pytest.fixture
def loop_of(corpus):
    """Makes the loop of a tiny run: `loop_of(grad_accum) -> (loop, its training)`."""
    data = DataConfig(source=f"text:{corpus}/*.txt", validation_fraction=0.25)
    model = ModelConfig(max_seq_len=16, num_layers=1, num_heads=2, embed_dim=16).with_sizes()
    prepared = prepare(data)

    def make(grad_accum: int):
        config = Config(batch_size=8, grad_accum=grad_accum, eval_batches=2, model=model, data=data)
        config.mesh.data = 1
        config = resolve_vocab(config, prepared.tokenizer.vocab_size)
        training = make_training(config, mesh_of(config))
        stream = training_stream(prepared.train, config)
        evaluate = training.companions.evaluator(training.spec, training.batch_sharding, prepared)
        rest = (Mock(spec=kind) for kind in (TrainingSample, Callable, Checkpoints, Reporter))
        loop = Loop(training, prepared, stream, evaluate, *rest)
        loop.report = Rows()
        return loop, training

    return make


def test_what_is_validated_does_not_depend_on_grad_accum(loop_of):
    """Two batches of 8 windows, in device batches of 8, 4 or 2; each window has its own nats."""
    found = []
    for accum in (1, 2, 4):
        loop, training = loop_of(accum)
        with jax.set_mesh(training.mesh):
            loop.evaluate.eval_step = lambda params, batch: batch["targets"][0].astype(float)
            loop._validate(jax.eval_shape(training.init), 1)
        found.append(loop.report.last["loss"])
    tokens = loop.data.validation.tokens
    np.testing.assert_allclose(found, tokens[1 : 2 * 8 * 16 + 1].mean(), rtol=1e-6)
    assert found[0] != pytest.approx(tokens[1:].mean())


def test_the_average_is_what_is_validated_and_sampled(loop_of):
    loop, _ = loop_of(1)
    used, figures = [], {"loss": 1.0, "perplexity": 1.0, "bits_per_byte": 1.0}
    loop.evaluate = lambda params, windows: used.append(params) or figures
    loop.sample.side_effect = lambda params, seed: used.append(params) or ""
    for ema in ({"w": 2.0}, {}):
        state = TrainState({"w": 1.0}, (), jnp.int32(3), ema=ema)
        loop._validate(state, 3)
        loop._sample(state, 3)
    assert used == [{"w": 2.0}] * 2 + [{"w": 1.0}] * 2


def test_a_sample_or_validation_that_fails_never_ends_the_run(run, tmp_path, monkeypatch):
    def fails(*args):
        raise IndexError("piece id is out of range\nand more")

    monkeypatch.setattr(TrainingSample, "__call__", fails)
    monkeypatch.setattr(Perplexity, "__call__", fails)
    code, _, err = run()
    assert code == 0, err
    assert "Traceback" not in err and "and more" not in err
    for what in ("validation", "sample"):
        for step in (1, 2):
            line = f"failed    {what} at step {step}: IndexError: piece id is out of range;"
            assert line in err
    assert (tmp_path / "w/checkpoints/2").is_dir()
    assert "done      no validation loss after 2 steps" in err
    rows = (tmp_path / "w/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["split"] for row in rows] == ["train"] * 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("sample.top_k=3000000000", "sample.top_k=3000000000 must be"),
        ("sample.temperature=inf", "sample.temperature=inf must be"),
        ("sample.prompt=" + "x" * 99, "sample.prompt has 99 tokens, more than"),
        ("model.mlp_dim=10000000000", "model.mlp_dim=10000000000 must be"),
        ("model.embed_dim=1048576", " GiB) a device, "),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_step(run, tmp_path, flag, message):
    code, out, err = run(f"--config.{flag}")
    assert (code, out) == (2, ""), err
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "w").exists()
