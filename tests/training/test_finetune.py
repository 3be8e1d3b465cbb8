"""Freezing, LoRA and DoRA, starting from other weights, early stopping, epochs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxgpt import checkpoint, convert, evaluate, sample, train
from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config import Config, LoraConfig, ModelConfig
from jaxgpt.config.stored import to_json
from jaxgpt.interchange.init_from import check_model
from jaxgpt.interchange.tokenizers import write_tokenizer
from jaxgpt.jobs import train as train_job
from jaxgpt.model import ModelSpec
from jaxgpt.optim.groups import join, split, trainable
from jaxgpt.parameters.lora import merge as merge_lora
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.tokenizer import make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from jaxgpt.tokenizer.gpt2 import Gpt2Tokenizer
from jaxgpt.training.end import read_end
from jaxgpt.training.loop import History
from jaxgpt.training.setup import make_training
from jaxgpt.training.warm_start import check_vocabulary
from tests.conftest import CORPUS, mesh_of, random_batch, tiny_config
from tests.evaluation.test_watch import no_more_waiting
from tests.interchange.test_import_export import model_folder, write_vocab

LORA = dict(rank=4, targets="query,value,out,up,down", alpha=8.0)


def run_steps(config, count=3):
    """The state before and after some steps, on the host, and the losses."""
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step = jax.jit(training.init)(), training.compile_step()
        before = jax.tree.map(np.asarray, state)
        losses = []
        for i in range(count):
            batch = jax.device_put(random_batch(config, i), training.batch_sharding)
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return before, jax.tree.map(np.asarray, state), losses


def moved(before, after) -> set[str]:
    one, two = leaves_by_path(before.params), leaves_by_path(after.params)
    return {path for path in one if not np.array_equal(one[path], two[path])}


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_frozen_parameters_do_not_change_by_a_bit(name):
    config = tiny_config()
    config.optim.name, config.optim.freeze, config.optim.ema_decay = name, "tokens,attention/", 0.5
    before, after, _ = run_steps(config)
    every = set(leaves_by_path(before.params))
    frozen = {path for path in every if "tokens" in path or "attention/" in path}
    assert moved(before, after) == every - frozen
    shapes = [leaf.shape for leaf in jax.tree.leaves(before.opt_state)]
    for frozen_shape in ((256, 32), (2, 32, 4, 8), (2, 32, 32)):
        assert frozen_shape not in shapes, "no optimizer state for what is frozen"
    ema, params = leaves_by_path(after.ema), leaves_by_path(after.params)
    for path in frozen:
        np.testing.assert_array_equal(ema[path], params[path])


def test_freezing_nothing_or_all_is_refused():
    params = {"tokens": jnp.ones(2), "blocks": {"kernel": jnp.ones(2)}}
    for freeze, message in (
        ("x", "'x' matches no parameter"),
        (".", "leaves no parameter"),
        ("(", "is not a list of patterns"),
    ):
        with pytest.raises(BadInput, match=message):
            trainable(params, freeze, 0)
    mask = trainable(params, "tok", 0)
    assert mask == {"tokens": False, "blocks": {"kernel": True}}
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, join(*split(params, mask)), params))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_lora_trains_its_additions_only_and_merges(shape, dora):
    config = tiny_config(shape, lora=LORA | {"dora": dora})
    before, after, losses = run_steps(config, 4)
    assert moved(before, after) == {
        path
        for path in leaves_by_path(before.params)
        if path.endswith(("lora_in", "lora_out", "magnitude"))
    }
    adam = jax.tree.leaves(before.opt_state)
    added = [l for p, l in leaves_by_path(before.params).items() if "lora" in p or "magnitude" in p]
    assert sum(leaf.size for leaf in adam) <= 2 * sum(leaf.size for leaf in added) + 4
    plain = tiny_config(shape)
    tokens = random_batch(config)["inputs"][0]
    with jax.set_mesh(mesh_of(tiny_config())):

        def logits(config, params):
            spec = ModelSpec(config, "xla")
            return np.asarray(jax.jit(lambda p, t: spec.bind(p)(t))(params, tokens))[..., :203]

        one = logits(config, after.params)
        np.testing.assert_allclose(
            logits(plain, merge_lora(after.params, config.lora)), one, atol=1e-5
        )
        base = logits(plain, merge_lora(before.params, config.lora))
        assert np.abs(one - base).max() > 1e-3
        if not dora:  # B starts at zero: nothing is added yet
            np.testing.assert_allclose(logits(config, before.params), base, atol=1e-6)


def test_lora_is_the_same_on_a_mesh():
    losses = [
        run_steps(tiny_config(shape, lora=LORA | {"dora": True}), 6)[2]
        for shape in ((1, 1, 1), (2, 2, 2))
    ]
    np.testing.assert_allclose(*losses, atol=1e-4)


def test_lora_of_gpt2_is_under_one_percent():
    config = Config(model=ModelConfig(vocab_size=50257).with_sizes(), lora=LoraConfig(rank=8))
    with jax.set_mesh(mesh_of(tiny_config())):
        params = jax.eval_shape(ModelSpec(config, "xla").init, jax.random.key(0))
    trained = sum(l.size for p, l in leaves_by_path(params).items() if "lora" in p)
    assert trained == 12 * 2 * 2 * 768 * 8
    assert trained / sum(leaf.size for leaf in jax.tree.leaves(params)) < 0.01


CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=4, batch_size=8, log_every=1, eval_every=2, checkpoint_every=2,
        init_from={init!r},
        model=ModelConfig(max_seq_len=24, num_layers=2, num_heads=4, embed_dim=32),
        data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.25),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
        sample=SampleConfig(max_new_tokens=0),
    )
"""


def started(command, tmp_path, corpus, init, *args, workdir="w"):
    file = tmp_path / "c.py"
    file.write_text(CONFIG.format(init=str(init), corpus=corpus))
    return command(train.main, f"--config={file}", f"--workdir={tmp_path}/{workdir}", *args)


def test_init_from_a_folder_and_from_a_workdir(command, tmp_path, corpus):
    """A learning rate of (almost) nothing leaves what it started from."""
    model_folder(tmp_path / "hf")
    command(convert.main, "import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/imported")
    still = ("--config.optim.learning_rate=1e-30", "--config.optim.weight_decay=0")
    expected = None
    for source, work in (("hf", "a"), ("imported", "b"), ("a", "c")):
        code, _, err = started(command, tmp_path, corpus, tmp_path / source, *still, workdir=work)
        assert code == 0, err
        code, out, err = command(
            evaluate.main, f"--workdir={tmp_path}/{work}", f"--data=text:{corpus}/*.txt"
        )
        loss = json.loads(out)["loss"]
        expected = expected or loss
        assert loss == pytest.approx(expected, abs=1e-6)
    _, out, _ = command(
        evaluate.main, f"--workdir={tmp_path}/imported", f"--data=text:{corpus}/*.txt"
    )
    assert json.loads(out)["loss"] == pytest.approx(expected, abs=1e-6)


def test_what_init_from_refuses(command, tmp_path, corpus):
    model_folder(tmp_path / "hf")
    command(convert.main, "import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/imported")
    for args, message in (
        (("--config.model.num_layers=3",), "is another model: model.num_layers: 2 there, 3 here"),
        (("--config.model.max_seq_len=25",), "has 24 positions, model.max_seq_len=25"),
        (("--config.init_from=nowhere",), "nowhere is neither a workdir with checkpoints nor"),
        ((f"--workdir={tmp_path}/imported",), "holds imported weights: start from them"),
        (("--config.data.tokenizer=char",), "has another tokenizer than data.tokenizer=char"),
    ):
        code, _, err = started(command, tmp_path, corpus, tmp_path / "hf", *args)
        assert code == 2 and message in err, err
        assert not (tmp_path / "w").exists(), "nothing half-written"


LLAMA3 = dict(position="rope", rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0)


@pytest.mark.parametrize(
    ("there", "here", "fresh", "message"),
    [
        (LLAMA3, LLAMA3, "", ""),
        (LLAMA3, {"position": "rope"}, "", "model.rope_theta: 500000.0 there, 10000.0 here; model"),
        (LLAMA3, LLAMA3 | {"rope_factor": 4.0}, "", "model.rope_factor: 8.0 there, 4.0 here"),
        (LLAMA3, LLAMA3 | {"rope_scaling": "linear"}, "", "rope_scaling: 'llama3' there, 'linear'"),
        (LLAMA3, LLAMA3 | {"rope_original_len": 16}, "", "rope_original_len: 8192 there, 16 here"),
        (LLAMA3, LLAMA3 | {"rope_factor": 4.0}, "head,rope", ""),
        (LLAMA3, {"position": "none"}, "rope", "model.position: 'rope' there, 'none' here"),
        ({}, {"rope_theta": 7.0}, "", ""),
        ({"position": "rope"}, {"position": "rope", "rope_original_len": 16}, "", ""),
    ],
)
def test_init_from_takes_rope_as_it_is_there(tmp_path, there, here, fresh, message):
    source = tiny_config(**there)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(to_json(source))
    config = dataclasses.replace(tiny_config(**here), init_from=str(tmp_path), init_fresh=fresh)
    if message:
        with pytest.raises(BadInput, match=message):
            check_model(config)
    else:
        check_model(config)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ("byte", "byte", ""),
        ("byte", "gpt2:{}", ""),  # the same ids in other files
        ("byte", "hf:{}", ""),
        ("byte", "byte <a>,<b>", ""),
        ("byte <a>", "byte", ""),
        ("byte", "char", "its end-of-text is 256, not"),
        ("byte", "sentencepiece:400", "its end-of-text is 256, not"),
        ("sentencepiece:400", "sentencepiece:400", ""),
        ("gpt2:{}", "hf:{}/swapped", "its id 97 is 'a', not 'b'"),
        ("gpt2:{}", "hf:{}/merged", "its id"),
        ("gpt2:{}/merged", "gpt2:{}/unmerged", "it cuts"),
    ],
)
def test_init_from_takes_the_tokenizer_that_is_there(tmp_path, there, here, message):
    write_vocab(tmp_path)
    merged_ids = {"th": 97, "a": 257}
    for name, change in (
        ("swapped", {"a": 98, "b": 97}),
        ("merged", merged_ids),
        ("unmerged", merged_ids),
    ):
        (tmp_path / name).mkdir()
        vocab = json.loads((tmp_path / "vocab.json").read_text()) | change
        (tmp_path / name / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / name / "merges.txt").write_text("t h\n" if name == "merged" else "")
    for folder in (tmp_path, *(tmp_path / name for name in ("swapped", "merged", "unmerged"))):
        write_tokenizer(Gpt2Tokenizer.open(folder), folder, 24, "")
        (folder / "config.json").write_text('{"eos_token_id": 256}')
    texts = [TrainingText(lambda: [CORPUS], len(CORPUS))]

    def tokenizer(text: str):
        spec, _, special = text.format(tmp_path).partition(" ")
        return make_tokenizer(spec, texts, special)

    (tmp_path / "w/checkpoints").mkdir(parents=True)
    save_tokenizer(tokenizer(there), tmp_path / "w/tokenizer")
    config = dataclasses.replace(tiny_config(), init_from=str(tmp_path / "w"))
    mine = tokenizer(here)
    if not message:
        return check_vocabulary(config, mine)
    with pytest.raises(BadInput, match=message):
        check_vocabulary(config, mine)
    check_vocabulary(dataclasses.replace(config, init_fresh="tokens"), mine)


def test_a_larger_vocabulary_a_shorter_context_a_new_head_and_lora(command, tmp_path, corpus):
    _, params = model_folder(tmp_path / "hf")
    code, _, err = started(
        command,
        tmp_path,
        corpus,
        tmp_path / "hf",
        "--config.data.special_tokens=<a>,<b>",
        "--config.model.max_seq_len=16",
        "--config.model.tie_embeddings=false",
        "--config.lora.rank=2",
        "--config.lora.dora=true",
        "--config.init_fresh=head",
    )
    assert code == 0 and "of them trained" in err, err
    from etils import epath

    from jaxgpt.config.stored import read_config

    config = read_config(epath.Path(tmp_path / "w"))
    with jax.set_mesh(mesh_of(tiny_config())):
        abstract = jax.eval_shape(ModelSpec(config, "xla").init, jax.random.key(0))
        found = Checkpoints(tmp_path / "w", read_only=True).restore_params(4, abstract)
    tokens, kernel = np.asarray(found["tokens"]), found["blocks"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(tokens[:257], params["tokens"][:257])
    assert np.abs(tokens[257:259]).max() > 0, "new tokens are drawn"
    np.testing.assert_array_equal(kernel, params["blocks"]["attention"]["query"]["kernel"])
    assert not np.array_equal(found["head"], found["tokens"])
    code, _, err = command(
        convert.main, "export", f"--workdir={tmp_path}/w", f"--to={tmp_path}/out"
    )
    assert code == 0, err
    assert "lora" not in (tmp_path / "out/config.json").read_text()


def test_patience():
    history = History(validations=[(10, 3.0), (20, 2.0), (30, 2.5)])
    assert history.best == (20, 2.0)
    assert not history.is_out_of_patience(2) and history.is_out_of_patience(1)
    assert not history.is_out_of_patience(0)
    history.validations.append((40, 2.0))
    assert history.is_out_of_patience(2), "as good is not better"


@pytest.mark.slow
def test_early_stopping_keeps_the_best_and_stays_stopped(command, tmp_path, corpus, monkeypatch):
    """A learning rate that ruins the model: the first validation is the best."""
    args = (
        "--config.num_steps=40",
        "--config.early_stop=2",
        "--config.keep_checkpoints=1",
        "--config.optim.learning_rate=3",
        "--config.optim.schedule=constant",
        "--config.optim.clip_norm=0",
        "--config.eval_every=2",
    )
    code, _, err = started(command, tmp_path, corpus, "", *args)
    assert code == 0 and "stopped early; the best checkpoint is " in err, err
    assert "jaxgpt.sample --workdir" in err and "/w --step=best --prompt" in err
    losses = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["loss"] for row in losses if row["split"] == "validation"}
    best = min(found, key=found.get)
    assert max(found) == best + 4 and max(found) < 40
    steps = sorted(int(p.name) for p in (tmp_path / "w/checkpoints").iterdir())
    assert steps == [best, max(found)]
    before = (tmp_path / "w/metrics.jsonl").read_text()
    code, _, err = started(command, tmp_path, corpus, "", *args)
    assert code == 0 and f"stopped early after step {max(found)}" in err
    assert (tmp_path / "w/metrics.jsonl").read_text() == before
    assert err.rstrip().endswith(": --step=best")
    workdir, newest = f"--workdir={tmp_path}/w", max(found)
    code, out, err = command(checkpoint.main, "list", workdir)
    assert [r["step"] for r in json.loads(out) if r["best"]] == [best]
    assert [line.endswith("| whole | best") for line in err.splitlines()] == [True, False]
    for step, used in (((), best), (("--step=best",), best), ((f"--step={newest}",), newest)):
        code, out, err = command(evaluate.main, workdir, *step)
        assert code == 0 and json.loads(out)["step"] == used, err
        assert abs(json.loads(out)["loss"] - found[used]) < 1e-4
        assert (f"using checkpoint {best}" in err) == (not step)
    code, _, err = command(sample.main, workdir, "--prompt=a", "--max_new_tokens=1")
    assert code == 0 and f"using checkpoint {best}" in err
    code, _, err = command(convert.main, "export", workdir, f"--to={tmp_path}/hf")
    assert code == 0 and f"using checkpoint {best}" in err and f"exported  step {best} of" in err
    for main, action in ((sample.main, ()), (evaluate.main, ()), (checkpoint.main, ("show",))):
        code, _, err = command(main, *action, workdir, "--step=nonsense")
        last = err.strip().splitlines()[-1]
        assert code == 2 and last.startswith("error: flag --step=nonsense"), err
        assert "a checkpoint's step, or best" in last
    assert read_end(epath.Path(tmp_path / "w")) == "early_stop"
    no_more_waiting(monkeypatch)
    code, out, err = command(evaluate.main, f"--workdir={tmp_path}/w", "--watch")
    assert code == 0 and [json.loads(line)["step"] for line in out.splitlines()] == steps, err

    def begin(workdir, *_):
        raise BadInput(f"while training the end is {read_end(workdir)!r}")

    monkeypatch.setattr(train_job, "Reporter", begin)
    code, _, err = started(command, tmp_path, corpus, "", *args, "--config.early_stop=9")
    assert code == 2 and "while training the end is ''" in err


def test_epochs(command, tmp_path, corpus):
    code, _, err = started(command, tmp_path, corpus, "", "--config.num_epochs=0.25")
    assert code == 0, err
    tokens = len(CORPUS.encode()) * 0.75
    steps = round(0.25 * (tokens // 24) / 8)
    assert "done      validation loss" in err
    rows = (tmp_path / "w/metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(rows[-1])["step"] - steps) <= 1
    assert "warning" not in err
    code, _, err = started(command, tmp_path, corpus, "", "--config.num_epochs=0.25")
    assert code == 0 and "finished" in err


def test_a_warm_up_of_half_the_run_is_warned_of_and_a_share_follows_the_epochs(
    command, tmp_path, corpus
):
    half = ("--config.num_steps=4", "--config.optim.warmup_steps=2")
    code, _, err = started(command, tmp_path, corpus, "", *half)
    assert code == 0 and "warning   the warm-up takes 2 of 4 steps; for a twentieth" in err, err
    share = ("--config.optim.warmup_steps=0", "--config.optim.warmup_fraction=0.15")
    args = ("--config.num_epochs=0.25", "--config.optim.schedule=constant", *share)
    code, _, err = started(command, tmp_path, corpus, "", *args, workdir="share")
    assert code == 0 and "warning" not in err, err
    rows = [
        json.loads(line) for line in (tmp_path / "share/metrics.jsonl").read_text().splitlines()
    ]
    rates = [row["learning_rate"] for row in rows if row["split"] == "train"]
    warm = round(0.15 * len(rates))
    assert warm >= 2 and rates[warm - 1] == max(rates) > rates[warm - 2]
    code, _, err = started(command, tmp_path, corpus, "", *args, workdir="share")
    assert code == 0 and "finished" in err, err
