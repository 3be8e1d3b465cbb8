"""A student and its teacher: in the train step, in runs, over a kill, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import convert, evaluate, train
from jaxgpt.checkpointing.checkpoints import save_weights
from jaxgpt.config import DistillConfig, ObjectivesConfig, ShrinkConfig
from jaxgpt.config.stored import to_json
from jaxgpt.model import ModelSpec
from jaxgpt.optim.groups import trainable
from jaxgpt.tokenizer import save_tokenizer
from jaxgpt.tokenizer.base import ByteTokenizer
from jaxgpt.training.setup import make_training
from tests.conftest import mesh_of, random_batch, tiny_config

SOFTCAPPED = dict(logit_softcap=9.0, tie_embeddings=False, mup_base_width=16)
FIELDS = """
    num_steps=6, batch_size=8, log_every=1, checkpoint_every=3, eval_every=0,
    model=ModelConfig(max_seq_len=16, num_layers=2, num_heads=2, embed_dim=16),
    compute=ComputeConfig(scan_layers="true"),
    data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.2),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=1), sample=SampleConfig(max_new_tokens=2),
"""


def student(shape=(1, 1, 1), model=None, **fields):
    """A config that learns from a teacher nobody wrote: its spec and weights come from the test."""
    config = tiny_config(shape, **({"num_layers": 1} | SOFTCAPPED | (model or {})))
    config.objective = "distill"
    config.objectives = ObjectivesConfig(distill=DistillConfig(teacher="a", **fields))
    return config


def four_steps(monkeypatch, config, teacher_model):
    """Losses of four steps on one batch with a fresh teacher, and the parameters at the end."""
    from jaxgpt.distillation import teacher as module

    theirs = dataclasses.replace(tiny_config(**teacher_model), mesh=config.mesh)
    monkeypatch.setattr(module, "teacher_config", lambda config: theirs)
    with jax.set_mesh(mesh := mesh_of(config)):
        run = make_training(config, mesh)
        state, step = run.first_state(), run.compile_step()
        params = jax.jit(run.companions.spec.init)(jax.random.key(5))
        params = jax.tree.map(lambda a: 4 * a, params)  # it should have clear opinions
        found = []
        batch = jax.device_put(random_batch(config), run.batch_sharding)
        for _ in range(4):
            state, metrics = step(state, batch, {"teacher": params})
            found.append({name: float(value) for name, value in metrics.items()})
        return found, jax.device_get(state.params)


LAYERS, WEIGHT = "objectives.distill.hidden_layers", "objectives.distill.hidden_weight"
TEACHER = dict(embed_dim=48, num_layers=2, norm="rmsnorm", position="rope", max_seq_len=40)


@pytest.fixture(scope="module")
def on_one_device():
    with pytest.MonkeyPatch.context() as patch:
        return four_steps(
            patch, student(hidden_weight=0.3, hidden_layers="0:0", alpha=0.9), TEACHER
        )


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 1, 4), marks=pytest.mark.slow)])
def test_a_mesh_equals_one_device(monkeypatch, on_one_device, shape):
    config = student(shape, hidden_weight=0.3, hidden_layers="0:0", alpha=0.9)
    found, params = four_steps(monkeypatch, config, TEACHER)
    for one, two in zip(found, on_one_device[0], strict=True):
        for name, value in one.items():
            assert value == pytest.approx(two[name], rel=2e-4), name
    # Adam divides by the gradient's size: see `test_sharding.assert_same`
    close = dict(atol=2e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), params, on_one_device[1])


def test_every_part_of_the_loss_falls(on_one_device):
    """On one batch, also what a teacher of noise says can be learnt."""
    rows, params = on_one_device
    assert rows[-1]["soft_loss"] < rows[0]["soft_loss"]
    assert rows[-1]["hidden_loss"] < 0.85 * rows[0]["hidden_loss"], "0.74; without weight 0.98"
    assert all(row["hard_loss"] == row["loss"] for row in rows)
    assert params["objective"]["projection"]["kernel"].shape == (1, 32, 48)


def test_the_projection_is_trained_beside_loras_additions():
    params = {"objective": {"projection": {"kernel": 0}}, "blocks": {"lora_in": 0, "kernel": 0}}
    want = {"objective": {"projection": {"kernel": True}}}
    want |= {"blocks": {"lora_in": True, "kernel": False}}
    assert trainable(params, "", lora_rank=2) == want


def rows_of(workdir) -> list[dict]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "train"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for a teacher, its students and their cache."""
    return tmp_path_factory.mktemp("distill")


@pytest.fixture
def at(command, corpus, folders, monkeypatch):
    """Trains `at(workdir, *flags)` -> (exit code, stderr)."""
    monkeypatch.setenv("JAXGPT_CACHE", str(folders / "cache"))
    if not (folders / "corpus").exists():
        shutil.copytree(corpus, folders / "corpus")

    def run(workdir: str, *flags: str):
        text = FIELDS.format(corpus=folders / "corpus")
        config = folders / "c.py"
        header = "from jaxgpt.config import *\ndef get_config():\n    return Config("
        config.write_text(f"{header}{text})\n")
        named = (f"--config.{flag}" for flag in flags)
        code, _, err = command(
            train.main, f"--config={config}", f"--workdir={folders}/{workdir}", *named
        )
        return code, err

    if not (folders / "teacher").exists():
        write_teacher(folders / "teacher")
    return run


def test_a_teacher_trained_to_be_rounded_is_read_as_it_was_trained(tmp_path):
    """By its own groups, what it keeps and its factors: not the product of the factors rounded."""
    rounding = ShrinkConfig(group=8, keep="down", ranks="up=4")
    model = dict(vocab_size=257, num_layers=1, num_heads=2, embed_dim=16)
    theirs = dataclasses.replace(tiny_config(**model), shrink=rounding)
    theirs.compute.fake_quantise = "int4"
    params = write_teacher(tmp_path / "teacher", theirs)
    config = student(model=dict(vocab_size=257))
    config.objectives.distill.teacher = str(tmp_path / "teacher")
    with jax.set_mesh(mesh := mesh_of(config)):
        teacher = make_training(config, mesh).companions
        tokens = jnp.arange(24)[None] % 17
        got, want = (
            np.asarray(jax.jit(lambda params, spec=spec: spec.bind(params)(tokens))(params))
            for spec, params in (
                (teacher.spec, teacher.params()),
                (ModelSpec(theirs, "xla"), params),
            )
        )
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want[..., :257]).max())


def write_teacher(folder, config=None) -> dict:
    """Writes a workdir of a model that nobody trained; returns its parameters."""
    config = config or tiny_config(vocab_size=257, num_layers=3, num_heads=2, embed_dim=16)
    with jax.set_mesh(mesh_of(config)):
        params = jax.jit(ModelSpec(config, "xla").init)(jax.random.key(5))
        params = jax.tree.map(lambda a: np.asarray(4 * a), params)
    save_weights(folder, params, {"tokens": 0, "seconds": 0.0, "data_fingerprint": ""})
    save_tokenizer(ByteTokenizer(), folder / "tokenizer")
    (folder / "config.json").write_text(to_json(config))
    return params


def taught(folders, *flags, teacher="teacher"):
    """The flags of a student of `teacher`."""
    return ("objective=distill", f"objectives.distill.teacher={folders / teacher}", *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag", ["objectives.distill.hidden_weight=0.1", "objectives.distill.top_k=4"]
)
def test_a_resumed_student_equals_one_that_was_not_killed(at, command, folders, flag):
    """Also with the same teacher elsewhere; another one is refused."""
    name = flag.partition("=")[0].rpartition(".")[2]
    whole, parts, moved = (folders / f"{name}-{what}" for what in ("whole", "parts", "moved"))
    code, err = at(whole.name, *taught(folders, flag))
    assert code == 0, err
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/6")  # as if killed after step 3
    shutil.copytree(folders / "teacher", moved)
    code, err = at(parts.name, *taught(folders, flag, teacher=whole.name))
    assert code == 2 and f"{whole} is not the teacher of checkpoint 3, which was" in err, err
    assert f"was {folders / 'teacher'} (fingerprint" in err.splitlines()[-1], err
    code, err = at(parts.name, *taught(folders, flag, teacher=moved.name))
    assert code == 0 and "resume    from checkpoint 3" in err, err
    assert len(rows_of(whole)) == 6
    for one, two in zip(rows_of(whole), rows_of(parts), strict=True):
        for key in ("loss", "soft_loss", "hard_loss", "grad_norm"):
            assert one[key] == two[key], (one["step"], key)
    assert ("hidden_loss" in rows_of(whole)[0]) == (name == "hidden_weight")
    # What it learned with is not needed to use it
    code, out, err = command(evaluate.main, f"--workdir={whole}")
    assert code == 0 and json.loads(out.splitlines()[-1])["loss"] > 0, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("model.max_seq_len=32",),
            "teacher takes 24 tokens at once, fewer than model.max_seq_len",
        ),
        (
            ("data.tokenizer=char",),
            "another tokenizer than data.tokenizer=char: its end-of-text is",
        ),
        (("model.vocab_size=300",), "has a vocabulary of 257 tokens, the student of 300"),
        (
            (f"{LAYERS}=0:3", f"{WEIGHT}=1"),
            "0:3 names a layer that is not there: the student's are",
        ),
        ((f"{LAYERS}=uniform",), "hidden_layers=uniform needs objectives.distill.hidden_weight"),
        ((f"{LAYERS}=1:0,0:1", f"{WEIGHT}=1"), "must be uniform, or pairs of the student's and"),
        ((f"{LAYERS}=0:x:1", f"{WEIGHT}=1"), "must be uniform, or pairs of the student's and"),
        (("objectives.distill.teacher=nowhere",), "distill.teacher=nowhere is neither a workdir"),
        (("objectives.distill.teacher={}/empty",), "checkpoints holds no checkpoint; train first"),
        (("objectives.distill.teacher={}/encoder",), "is an encoder: the teacher of a decoder is"),
        (("objectives.distill.teacher=",), "objective=distill needs a teacher"),
        (("objective=causal_lm",), "needs objective=distill"),
        (("objectives.distill.top_k=257",), "top_k=257 must be less than the 257 tokens"),
        (
            ("objectives.distill.top_k=2", "objectives.distill.hidden_weight=1"),
            "hidden_weight=1.0 with objectives.distill.top_k=2",
        ),
    ],
)
def test_what_cannot_teach_is_refused(at, folders, flags, message):
    (folders / "empty/checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer/tokenizer_kind.json"):
        (folders / "empty/tokenizer").mkdir(exist_ok=True)
        shutil.copy(folders / "teacher" / name, folders / "empty" / name)
    shutil.copytree(folders / "teacher", folders / "encoder", dirs_exist_ok=True)
    config = json.loads((folders / "encoder/config.json").read_text())
    config["model"]["kind"], config["objective"] = "encoder", "masked_lm"
    (folders / "encoder/config.json").write_text(json.dumps(config))
    code, err = at("refused", *taught(folders, *(flag.format(folders) for flag in flags)))
    assert code == 2 and message in err.splitlines()[-1], err
    assert not (folders / "refused").exists(), "nothing half-written"


@pytest.mark.slow
def test_a_config_that_leaves_all_to_the_teacher(at, folders, command):
    """configs/distill.py: from every second layer, and from nothing."""
    flags = [f"--config.{flag}" for flag in taught(folders)[1:]]
    flags += ["--config.num_steps=1", "--config.eval_every=0", "--config.log_every=1"]
    flags += [
        f"--config.data.source=text:{folders}/corpus/*.txt",
        "--config.sample.max_new_tokens=1",
    ]
    from_it = (f"--config.init_from={folders}/teacher", "--config.init_layers=every_second")
    sizes = "--config.model.num_layers=1", "--config.objectives.distill.hidden_weight=1"
    for start, layers in ((from_it, 2), (sizes, 1)):
        workdir = folders / f"open-{layers}"
        code, _, err = command(
            train.main, "--config=configs/distill.py", f"--workdir={workdir}", *flags, *start
        )
        assert code == 0, err
        model = json.loads((workdir / "config.json").read_text())["model"]
        assert model["num_layers"] == layers and model["embed_dim"] == 16
    code, _, err = command(convert.main, "export", f"--workdir={workdir}", f"--to={folders}/hf")
    assert code == 0 and "the same logits" in err, "what it learned with is not exported"
