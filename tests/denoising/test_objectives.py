"""Training and evaluation on corrupted text: losses by their definition, batches by their number,
runs that resume exactly."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import evaluate, train
from jaxgpt.config import Config, DataConfig, MeshConfig, ModelConfig
from jaxgpt.config.objectives import with_special_tokens
from jaxgpt.config.schema import IGNORE
from jaxgpt.config.validate import validate
from jaxgpt.data.prepare import prepare
from jaxgpt.data.show import show_batch
from jaxgpt.denoising.companions import TASKS, evaluated, masked_rows
from jaxgpt.denoising.evaluation import Restoration, pseudo_perplexity
from jaxgpt.denoising.objective import masked_step, most_masked
from jaxgpt.objectives.language import hidden, token_losses
from jaxgpt.optim.groups import OWN
from jaxgpt.parameters.flops import flops_per_token
from jaxgpt.tokenizer import save_tokenizer
from jaxgpt.tokenizer.base import ByteTokenizer
from jaxgpt.training.objectives import OBJECTIVES, companions_of
from jaxgpt.training.setup import make_training, model_spec, resolve_vocab
from jaxgpt.training.step import make_train_step
from tests.conftest import CORPUS, config_flag, mesh_of, tiny_config

KINDS = {name: "decoder" for name in TASKS} | {
    "masked_lm": "encoder",
    "masked_lm_nsp": "encoder",
    "span_corruption": "encoder_decoder",
}


def config_of(objective: str, shape=(1, 1, 1), **model):
    config = tiny_config(shape, kind=KINDS[objective], **model)
    return dataclasses.replace(config, objective=objective)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The licence in eight documents, with the special tokens of every objective."""
    folder = tmp_path_factory.mktemp("corpus")
    size = len(CORPUS) // 8
    for i in range(8):
        (folder / f"{i}.txt").write_text(CORPUS[i * size : (i + 1) * size])
    special = ""
    for objective in TASKS:
        config = config_of(objective)
        config.data.special_tokens = special
        special = with_special_tokens(config)
    cfg = DataConfig(
        source=f"text:{folder}/*.txt",
        validation_fraction=0.3,
        special_tokens=special,
        cache_dir=str(folder / "cache"),
    )
    return cfg, prepare(cfg)


def of_data(objective: str, data, shape=(1, 1, 1), **fields):
    """The config of an objective on the data, its vocabulary resolved."""
    cfg, prepared = data
    types = {"type_vocab_size": 2} if objective == "masked_lm_nsp" else {}
    config = config_of(objective, shape, vocab_size=0, **types)
    config = dataclasses.replace(config, data=dataclasses.replace(cfg), **fields)
    config.objectives.span_corruption.density = 0.4  # of 15%, 24 tokens have one span, at the end
    return resolve_vocab(config, prepared.tokenizer.vocab_size)


@pytest.mark.parametrize("objective", TASKS)
def test_batches_are_a_function_of_their_number(data, objective):
    """Whatever rows a host reads, however they are cut into microbatches; another batch, another
    seed and another epoch are drawn anew. The arrays are those that the program is compiled for."""
    config = of_data(objective, data, grad_accum=2)
    companions = companions_of(objective)
    stream = companions.stream(config, data[1])
    batch = stream.batch(5)
    shapes = companions(config, mesh_of(config), model_spec).batch_arrays()
    assert {name: (a.shape[2:], a.dtype) for name, a in batch.items()} == shapes
    assert all(a.shape[:2] == (2, 4) for a in batch.values())
    some = stream.batch(5, np.array([1, 3]))
    whole = companions.stream(dataclasses.replace(config, grad_accum=1), data[1]).batch(5)
    for name, array in batch.items():
        assert (some[name] == array[:, [1, 3]]).all()
        assert (whole[name] == array.reshape(1, 8, *array.shape[2:])).all()
    assert stream.num_targets(5) == (batch["targets"] != IGNORE).sum() > 0
    chunks = sum(map(len, stream.sources))
    reseeded = companions.stream(dataclasses.replace(config, seed=1), data[1])
    again = dataclasses.replace(stream, shuffle=False, batch_size=2 * chunks, grad_accum=2)
    first, second = again.batch(0)["targets"]  # two epochs, in one order
    assert (first != second).any() and (reseeded.batch(5)["targets"] != batch["targets"]).any()


def test_packed_rows_of_an_encoder_begin_documents_with_cls(data):
    """In place of end-of-text, which an encoder does not read; nothing else is another token."""
    config, tokenizer = of_data("masked_lm", data), data[1].tokenizer
    config.data.pack = True
    companions = companions_of("masked_lm")
    stream = companions.stream(config, data[1])
    batch = dataclasses.replace(stream, batch_size=len(stream.sources[0])).batch(0)  # all chunks
    shapes = companions(config, mesh_of(config), model_spec).batch_arrays()
    assert {name: (a.shape[2:], a.dtype) for name, a in batch.items()} == shapes
    inputs, targets = batch["inputs"], batch["targets"]
    assert (inputs != tokenizer.end_of_text).all() and (targets < 256).all()
    begins = (batch["positions"] == 0) & (batch["segments"] > 0)
    is_cls = inputs == tokenizer.special["[CLS]"]
    assert is_cls.any() and not (is_cls & ~begins).any()
    assert (targets[batch["segments"] == 0] == IGNORE).all()


@pytest.mark.parametrize("objective", TASKS)
@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_is_shown(data, objective, pack):
    """With the special tokens by name, and the document that a row is from."""
    config = of_data(objective, data)
    if pack and objective in ("masked_lm_nsp", "span_corruption"):
        pytest.skip("not packed")
    config.data.pack = pack
    stream = companions_of(objective).stream(config, data[1])
    told = "\n".join(show_batch(stream, data[1], 3))
    assert told.count("=== row ") == 8 and ".txt (from its token " in told
    special = {"prefix_lm": "", "span_corruption": "<extra_id_0>"}.get(objective, "[MASK]")
    assert ("<|fim_middle|>" if objective == "fill_in_the_middle" else special) in told


def reference_losses(model, micro):
    """Each target's nats from whole logits, and whether it is the likeliest token."""
    logits = model(micro["inputs"], segments=micro.get("segments"), types=micro.get("types"))
    is_target = jnp.arange(logits.shape[-1]) == micro["targets"][..., None]
    nats = -jnp.sum(jnp.where(is_target, jax.nn.log_softmax(logits), 0), axis=-1)
    return nats, logits.argmax(-1) == micro["targets"]


def micro_of(config, data) -> dict:
    stream = companions_of(config.objective).stream(config, data[1])
    return {name: jnp.asarray(a[0]) for name, a in stream.batch(3).items()}


def test_masked_lm_is_the_cross_entropy_of_the_masked(data):
    """Loss and gradient, though logits are made at the masked positions only; and the figures of
    evaluation."""
    config = of_data("masked_lm", data)
    mesh = mesh_of(config)
    spec, micro = model_spec(config, mesh), micro_of(config, data)
    with jax.set_mesh(mesh):
        params = jax.jit(spec.init)(jax.random.key(0))
        objective = OBJECTIVES["masked_lm"](config)

        def ours(params):
            total, count, metrics = objective(spec.bind(params), micro, jax.random.key(0))
            return total / count, metrics["loss"] / count

        def theirs(params):
            nats, right = reference_losses(spec.bind(params), micro)
            counted = micro["targets"] != IGNORE
            mean = partial(jnp.mean, where=counted)
            return mean(nats), mean(right)

        (loss, metric), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
        (expected, accuracy), wanted = jax.jit(jax.value_and_grad(theirs, has_aux=True))(params)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5) and metric == loss
        for ours_, theirs_ in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours_, theirs_, rtol=1e-4, atol=1e-6)
        most = most_masked(config)
        assert most == 4  # of 24: a sixth of the logits
        figures = masked_step(spec, most)(params, {n: a[None] for n, a in micro.items()})
        figures = {name: float(values.sum()) for name, values in figures.items()}
        count = int((micro["targets"] != IGNORE).sum())
        assert figures["loss"] / count == pytest.approx(float(expected), rel=1e-5)
        assert figures["masked_accuracy"] / count == pytest.approx(float(accuracy))


@pytest.mark.slow
def test_next_sentence_prediction_on_a_mesh(data):
    """The head's loss by its definition, and all of it alike on (2,2,2): loss, gradients, a
    step."""
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        config = of_data("masked_lm_nsp", data, shape)
        mesh = mesh_of(config)
        run = make_training(config, mesh)
        batch = companions_of(config.objective).stream(config, data[1]).batch(3)
        with jax.set_mesh(mesh):
            state = run.first_state()
            head = jax.device_get(state.params[OWN]["next_sentence"])
            micro = micro_of(config, data)
            if shape == (1, 1, 1):
                states = jax.jit(lambda p, m, spec: hidden(spec.bind(p), m, None), static_argnums=2)
                first = np.asarray(states(state.params, micro, run.spec)[:, 0], np.float64)
                pooled = np.tanh(first @ head["pooler"]["kernel"] + head["pooler"]["bias"])
                logits = pooled @ head["classifier"]["kernel"] + head["classifier"]["bias"]
                logits -= np.log(np.exp(logits).sum(1, keepdims=True))
                nats = -np.take_along_axis(logits, micro["labels"][:, None], 1)[:, 0]
            shardings = jax.tree.map(lambda a: a.sharding, run.abstract_batch())
            sharded = jax.device_put(batch, shardings)
            state, metrics = jax.jit(make_train_step(run.spec, config))(state, sharded)
            found.append(jax.device_get((metrics, state.params)))
    (one, params), (many, split) = found
    assert one["next_sentence_loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert one["next_sentence_accuracy"] == np.mean(logits.argmax(1) == micro["labels"])
    for name in ("loss", "next_sentence_loss", "grad_norm"):
        assert many[name] == pytest.approx(one[name], rel=1e-4)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm", "fill_in_the_middle"])
def test_every_objective_makes_a_step(data, objective):
    """The program takes the batch's arrays (it is traced, not compiled)."""
    config = of_data(objective, data)
    mesh = mesh_of(config)
    run = make_training(config, mesh)
    with jax.set_mesh(mesh):
        step = make_train_step(run.spec, config)
        _, metrics = jax.eval_shape(step, run.abstract_state(), run.abstract_batch())
    assert metrics["loss"].shape == ()
    rows = evaluated(config, data[1].tokenizer, data[1].validation, "validation")
    arrays = rows.read(np.array([[0, 0], [1, 1]]))
    assert (arrays["targets"] != IGNORE).any() and len(rows) > 1


def test_prefix_is_read_in_both_directions(data):
    """And nothing that is predicted is seen: the gradient of each target's loss."""
    config = of_data("prefix_lm", data)
    mesh = mesh_of(config)
    spec, micro = model_spec(config, mesh), micro_of(config, data)
    with jax.set_mesh(mesh):
        params = jax.jit(spec.init)(jax.random.key(0))
        losses = jax.jit(lambda m: token_losses(spec.bind(params), m, None)[0])
        row = int(np.argmin(abs(micro["prefix"] - 12)))
        prefix, before = int(micro["prefix"][row]), losses(micro)[row]
        changed = {}
        for place in (prefix - 1, prefix):  # the prefix's last token, and the first behind it
            other = micro | {"inputs": micro["inputs"].at[row, place].add(1)}
            changed[place] = np.asarray(losses(other)[row] != before)
    assert not changed[prefix - 1][: prefix - 1].any() and changed[prefix - 1][prefix - 1 :].all()
    assert not changed[prefix][:prefix].any() and changed[prefix][prefix]


def test_pseudo_perplexity_masks_each_token_once(data):
    """Against a loop over the tokens; any batch size gives it, and any the evaluation."""
    config = of_data("masked_lm", data)
    mesh = mesh_of(config)
    spec, tokenizer = model_spec(config, mesh), data[1].tokenizer
    rows = evaluated(config, tokenizer, data[1].validation, "validation")
    make = masked_rows(config, tokenizer)
    mask = tokenizer.special["[MASK]"]
    with jax.set_mesh(mesh):
        params = jax.jit(spec.init)(jax.random.key(0))
        sharding = jax.NamedSharding(mesh, spec.rules(None, "batch", "seq"))
        found = {}
        for batch in (3, 16):
            restore = Restoration(masked_step(spec, 1), sharding, rows, batch)
            whole = Restoration(masked_step(spec, 4), sharding, rows, batch)
            figures = whole(params)
            assert figures.pop("bits_per_byte") is None
            found[batch] = pseudo_perplexity(restore, params, make, 2), figures
        last = len(rows) - 1  # the padded one
        ids = np.asarray(data[1].validation.tokens)[last * 22 :].astype(np.int32)
        padded = make.framed(rows.chunks, np.array([last]))[0]
        logits = jax.jit(lambda x: spec.bind(params)(x))
        nats = []
        for window in range(2):
            tokens = make.framed(rows.chunks, np.array([window]))[0]["inputs"][0]
            assert tokens[0] == tokenizer.special["[CLS]"] and tokens[-1] == mask + 2
            for place in range(1, 23):
                if tokens[place] == tokenizer.end_of_text:
                    continue
                guess = logits(np.where(np.arange(24) == place, mask, tokens)[None])[0, place]
                nats.append(-float(jax.nn.log_softmax(guess)[tokens[place]]))
    assert padded["inputs"][0].tolist() == [mask + 1, *ids, mask + 2] + [0] * (22 - len(ids))
    assert padded["segments"][0].sum() == len(ids) + 2
    pseudo, figures = found[3]
    assert pseudo["pseudo_tokens"] == len(nats)
    assert pseudo["pseudo_perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    for one, other in zip(found[3], found[16]):
        assert one == pytest.approx(other, rel=1e-5)
    assert 0 < figures["masked_accuracy"] < 1
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


FIELDS = """num_steps={steps}, batch_size=8, log_every=1, eval_every=2, checkpoint_every=2,
        objective="{objective}", optim=OptimConfig(schedule="constant", warmup_steps=0),
        model=ModelConfig(max_seq_len=24, num_layers=1, num_heads=2, embed_dim=16, kind="{kind}"),
        data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.4, {more})"""


@pytest.fixture
def run(command, corpus, tmp_path):
    """Trains in `name`: `run(name, objective, steps, *flags) -> (exit code, stdout, stderr)`."""

    def call(name: str, objective: str, steps: int, *flags: str, more: str = ""):
        fields = FIELDS.format(
            steps=steps, objective=objective, kind=KINDS[objective], corpus=corpus, more=more
        )
        flag = config_flag(tmp_path, fields)
        return command(train.main, flag, f"--workdir={tmp_path}/{name}", *flags)

    return call


def rows_of(folder) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "step_seconds", "tokens_per_second", "mfu")
    return [{name: v for name, v in row.items() if name not in timed} for row in rows]


@pytest.mark.slow
def test_a_masked_run_resumes_exactly_and_is_evaluated(run, command, tmp_path):
    """The special tokens are added by themselves; rows, accuracy and evaluation are those of a run
    that was not interrupted, bit for bit."""
    code, _, told = run("whole", "masked_lm", 4, "--config.sample.prompt=for a decoder")
    assert code == 0 and "[MASK],[CLS],[SEP]" in told and "masked accuracy" in told
    sample = json.loads((tmp_path / "whole/samples.jsonl").read_text().splitlines()[-1])
    assert sample["prompt"].count("[MASK]") == 1 and len(sample["text"].split(" | ")) == 5
    names = json.loads((tmp_path / "whole/tokenizer/special_tokens.json").read_text())
    assert names == ["[MASK]", "[CLS]", "[SEP]"]
    assert run("cut", "masked_lm", 2)[0] == 0
    code, _, told = run("cut", "masked_lm", 4)
    assert code == 0 and "from checkpoint 2" in told
    whole, cut = (rows_of(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut and [row["step"] for row in whole] == [1, 2, 2, 3, 4, 4]
    assert whole[-1]["bits_per_byte"] is None and 0 <= whole[-1]["masked_accuracy"] <= 1
    argv = (f"--workdir={tmp_path}/whole", "--limit=1")
    code, out, told = command(evaluate.main, *argv)
    figures = json.loads(out.splitlines()[-1])
    assert code == 0 and figures["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-6)
    assert {"step", "split", "perplexity", "bytes", "pseudo_perplexity"} < figures.keys()
    assert figures["masked_accuracy"] == pytest.approx(whole[-1]["masked_accuracy"])
    assert 15 < figures["pseudo_tokens"] <= 22
    assert command(evaluate.main, *argv, "--stride=3")[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("objective", [name for name in TASKS if name != "masked_lm"])
def test_a_run_of_each_objective(run, command, tmp_path, objective):
    """It trains, validates and is evaluated; evaluation is that of the run."""
    more = "--config.model.type_vocab_size=2" if objective == "masked_lm_nsp" else "--config.seed=1"
    code, _, told = run("w", objective, 2, more)
    assert code == 0, told
    rows = rows_of(tmp_path / "w")
    code, out, _ = command(evaluate.main, f"--workdir={tmp_path}/w")
    figures = json.loads(out.splitlines()[-1])
    assert code == 0 and figures["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    if objective == "masked_lm_nsp":
        assert 0 <= rows[-1]["next_sentence_accuracy"] <= 1
        assert rows[0]["next_sentence_loss"] == pytest.approx(math.log(2), abs=0.05)


@pytest.mark.parametrize(
    "objective, flags, message",
    [
        ("masked_lm", ["model.kind=decoder"], "objective=masked_lm needs model.kind=encoder, not"),
        ("masked_lm", ["objective=causal_lm"], "objective=masked_lm or masked_lm_nsp"),
        ("prefix_lm", ["model.kind=encoder_decoder"], "objective=span_corruption learns"),
        ("masked_lm", ["objectives.masked_lm.mask_share=0.95"], "more than 1 together"),
        ("masked_lm", ["objectives.masked_lm.rate=1"], "objectives.masked_lm.rate=1"),
        ("masked_lm", ["data.tokenizer=hf:{hf}"], "data.special_tokens='[MASK]'"),
        ("masked_lm", ["data.source=sft:{hf}/x.jsonl"], "masked_lm learns from running text"),
        ("span_corruption", ["data.pack=true"], "data.pack=True with objective=span_corruption"),
        ("span_corruption", ["model.max_source_len=200"], "max_seq_len=24: set it to 45"),
        ("span_corruption", ["data.tokenizer=hf:{hf}"], "data.special_tokens='<extra_id_0..99>'"),
        ("fill_in_the_middle", ["data.tokenizer=hf:{hf}"], "special_tokens='<|fim_prefix|>'"),
        ("masked_lm_nsp", ["data.validation_fraction=0.05"], "of different documents"),
        ("masked_lm_nsp", ["model.type_vocab_size=1"], "types 0 and 1; set 2, or 0"),
    ],
)
def test_what_does_not_fit_is_one_line(run, tmp_path, objective, flags, message):
    save_tokenizer(ByteTokenizer(), tmp_path / "hf" / "tokenizer")
    (tmp_path / "hf" / "x.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    flags = [f"--config.{flag}".format(hf=tmp_path / "hf") for flag in flags]
    code, out, told = run("w", objective, 2, *flags)
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == "" and len(lines) == 1 and message in lines[0], told
    assert not (tmp_path / "w").exists()


def test_flops_leave_out_the_logits_that_are_not_made():
    """Three times XLA's count of the loss alone, of a model whose vocabulary is most of it."""
    sizes = dict(vocab_size=1024, max_seq_len=64, num_layers=1, num_heads=2, embed_dim=16)
    model = ModelConfig(**sizes, kind="encoder")
    config = Config(objective="masked_lm", model=model, batch_size=2, mesh=MeshConfig(data=1))
    config = validate(config)
    run = make_training(config, mesh_of(config))
    with jax.set_mesh(run.mesh):
        micro = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), run.abstract_batch()
        )

        def loss(params, micro):
            key = jax.random.key(0)  # of no use without dropout
            return OBJECTIVES["masked_lm"](config)(run.spec.bind(params), micro, key)[0]

        lowered = jax.jit(loss).lower(run.abstract_state().params, micro)
        counted = lowered.compile().cost_analysis()["flops"]
    assert 0.9 < 3 * counted / (2 * 64 * run.flops_per_token) < 1.4
    assert run.flops_per_token < 0.5 * flops_per_token(config.model)
