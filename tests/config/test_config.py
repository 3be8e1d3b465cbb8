"""Configs: round trip, overrides, and one clear line for whatever is wrong."""

import dataclasses
import json

import pytest
from absl import flags

from jaxgpt.cli.flags import config_of, define_config_flag, parse
from jaxgpt.config import Config, MeshConfig, ModelConfig
from jaxgpt.config.schema import fields_of, get_field, leaves_of, model_differences, set_field
from jaxgpt.config.stored import check_resume, from_stored, to_json
from jaxgpt.config.validate import validate
from jaxgpt.parallel.mesh import mesh_shape
from jaxgpt.system.errors import BadInput

FILE = "from jaxgpt.config import Config\ndef get_config():\n    return Config(batch_size=4)\n"


@pytest.fixture
def parse_args(tmp_path):
    (tmp_path / "c.py").write_text(FILE)

    def call(*args, config=f"--config={tmp_path / 'c.py'}"):
        argv = ["train", *([config] if config else []), *args]
        values = flags.FlagValues()
        define_config_flag(values, argv)
        return config_of(parse(values, argv, "doc"))

    return call


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + 1


def test_json_round_trip_of_every_field():
    config = Config()
    for path in fields_of(config):
        set_field(config, path, changed(get_field(config, path)))
    assert from_stored(json.loads(to_json(config))) == config
    assert from_stored(json.loads(to_json(config))) != Config()


def test_json_with_an_unknown_field_or_wrong_type():
    with pytest.raises(BadInput, match="unknown field model.nope"):
        from_stored({"model": {"nope": 1}})
    with pytest.raises(BadInput, match="batch_size='8' has type str, expected int"):
        from_stored({"batch_size": "8"})


def test_overrides(parse_args):
    config = parse_args(
        "--config.model.num_layers=7",
        "--config.optim.learning_rate=1",
        "--config.data.shuffle=false",
        "--config.data.source=text:a.txt",
        "--config.seed",
        "3",
    )
    assert config.batch_size == 4, "the file's own value stays"
    assert (config.model.num_layers, config.optim.learning_rate) == (7, 1.0)
    assert (config.data.shuffle, config.data.source, config.seed) == (False, "text:a.txt", 3)
    assert type(config.optim.learning_rate) is float


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--config.model.num_layer=3", "did you mean --config.model.num_layers"),
        ("--config.num_layers=3", "did you mean --config.model.num_layers"),
        ("--config.zzz=3", "unknown config field --config.zzz"),
        ("--config.batch_size=big", "--config.batch_size=big is not a valid value: expected int"),
        ("--config.optim.eps=x", "expected float"),
        ("--config.data.shuffle=perhaps", "expected bool"),
        ("--config.lr=1", "did you mean --config.optim.learning_rate?"),
        ("--config.md=1", "--config.model.mlp_dim or --config.optim.moment_dtype"),
        ("--config.layers=1", "or --config.model.num_layers?"),
        ("--confg.seed=1", "unknown flag --confg.seed; did you mean --config.seed"),
        ("--batch_size=4", "unknown flag --batch_size; did you mean --config.batch_size"),
        ("--lr=4", "did you mean --config.optim.learning_rate?"),
        ("--wrkdir=4", "Unknown command line flag"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_bad_arguments(parse_args, arg, message):
    with pytest.raises(BadInput, match=message):
        parse_args(arg)


def test_config_file_errors(parse_args, tmp_path):
    with pytest.raises(BadInput, match="--config=FILE is required"):
        parse_args(config=None)
    with pytest.raises(BadInput, match="nowhere.py does not exist"):
        parse_args(config="--config=nowhere.py")
    for text, message in (
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "KeyError"),
        ("def get_config(): return 1", "must return a jaxgpt.config.Config, not int"),
        ("def get_config(): raise ValueError('no')", "ValueError: no"),
    ):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(BadInput, match=message):
            parse_args(config=f"--config={tmp_path / 'bad.py'}")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.num_heads", 5, "model.embed_dim=768 is not divisible by model.num_heads=5"),
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("grad_accum", 3, "batch_size=8 is not divisible by grad_accum=3"),
        ("mesh.data", 3, "make batch_size a multiple of 3"),
        ("mesh.data", 0, "mesh.data=0 must be a positive number of devices"),
        ("mesh.fsdp", -1, "at most one of"),
        ("mesh.tensor", 5, "model.num_heads = 12 cannot be divided over mesh.tensor=5"),
        ("model.num_experts", 1, "experts_per_token=2 is more than model.num_experts=1"),
        ("mesh.expert", 2, "mesh.expert=2 needs a mixture"),
        ("compute.dtype", "float64", "choose one of float32, bfloat16"),
        ("compute.attention", "flash", "choose one of auto, xla, cudnn"),
        ("model.dropout", 1.0, "model.dropout=1.0"),
        ("optim.name", "adam", "choose one of adamw"),
        ("optim.learning_rate", 0.0, "optim.learning_rate=0.0"),
        ("optim.decay_fraction", 0.0, "optim.decay_fraction=0.0 must be above 0 and below 1"),
        ("optim.learning_rate", float("nan"), "optim.learning_rate=nan"),
        ("data.validation_fraction", 1.0, "data.validation_fraction=1.0"),
        ("batch_size", "8", "has type str, expected int"),
        ("model.num_layers", True, "has type bool, expected int"),
    ],
)
def test_cross_field_checks(path, value, message):
    config = Config()
    set_field(config, path, value)
    with pytest.raises(BadInput, match=message):
        validate(config)


def test_mesh_shape():
    config = Config(batch_size=16, mesh=MeshConfig(-1, 2, 2))
    assert mesh_shape(config, 8) == (2, 2, 2, 1, 1, 1)
    with pytest.raises(BadInput, match="a multiple of 4 devices, but there are 6"):
        mesh_shape(config, 6)
    with pytest.raises(BadInput, match="needs 4 devices, but there are 8"):
        mesh_shape(dataclasses.replace(config, mesh=MeshConfig(1, 2, 2)), 8)
    with pytest.raises(BadInput, match="model.embed_dim = 36"):
        small = Config(batch_size=8, mesh=MeshConfig(1, 8, 1), model=ModelConfig(embed_dim=36))
        mesh_shape(small, 8)


def test_what_a_resumed_run_may_change():
    """The contract's list: steps, cadences and retention, the mesh, and how it is computed."""
    assert {path for path, field in leaves_of().items() if field.metadata.get("may_change")} == {
        *("num_steps", "num_epochs", "early_stop", "grad_accum", "max_bad_steps", "max_rollbacks"),
        *("log_every", "eval_every", "sample_every", "checkpoint_every"),
        *("keep_checkpoints", "keep_every", "track"),
        *("compute.attention", "compute.remat", "compute.scan_layers"),
        *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert"),
        *("mesh.context", "mesh.pipeline", "mesh.sequence_activations"),
        *("compute.expert_buffer", "compute.context_attention"),
        *("compute.pipeline_microbatches", "compute.pipeline_rounds"),
        "objectives.distill.teacher",  # its place; a checkpoint knows which teacher it was
    }


def test_which_fields_make_another_function_of_the_parameters():
    def differing(one: dict, other: dict, *also):
        return model_differences(ModelConfig(**one), ModelConfig(**other), *also)

    free = dict(vocab_size=9, max_seq_len=9, dropout=0.1, tie_embeddings=False, qkv_bias=True)
    free |= dict(rope_theta=9.0, rope_original_len=9)
    assert differing(free, {}) == []
    assert differing(free, {}, "domain") == ["vocab_size", "max_seq_len"]
    assert differing(free | {"bias": False}, {"bias": False}, "parameters") == [
        "qkv_bias",
        "tie_embeddings",
    ]
    rope = dict(position="rope", rope_theta=9.0)
    assert differing(free | {"position": "rope"}, {"position": "rope"}) == ["rope_theta"]
    assert differing(rope | {"rope_scaling": "llama3"}, rope) == ["rope_scaling"]
    llama3 = rope | {"rope_scaling": "llama3"}
    assert differing(llama3 | {"rope_original_len": 9}, llama3) == ["rope_original_len"]
    assert differing({"norm": "rmsnorm", "window": 4}, {}) == ["norm", "window"]


def test_resume_rules():
    old, new = Config(), Config()
    whole_mesh = [path for path in fields_of(new) if path.startswith("mesh.")]
    assert "mesh.sequence_activations" in whole_mesh
    for path in ("num_steps", "log_every", "grad_accum", "compute.remat", *whole_mesh):
        set_field(new, path, changed(get_field(new, path)))
    assert "num_steps: 1000 -> 1001" in check_resume(old, new, "w")
    new.model.num_layers = 13
    new.data.tokenizer = "byte2"
    with pytest.raises(BadInput, match=r"model.num_layers: 12 -> 13; data.tokenizer: byte"):
        check_resume(old, new, "w")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model.expert_every": 5},
            "model.expert_every=5 must divide the 12 layers that model.num_layers=12 has after"
            " model.first_dense_layers=0",
        ),
        ({"model.first_dense_layers": 12}, "the 0 layers that model.num_layers=12 has after"),
        ({"model.num_experts": 0, "model.expert_every": 2}, "model.expert_every=2 and"),
        ({"mesh.expert": 3}, "model.num_experts = 4 cannot be divided over mesh.expert=3"),
        ({"model.expert_dim": 15, "mesh.tensor": 2}, "model.expert_dim = 15 cannot be divided"),
        ({"lora.rank": 2, "lora.targets": "up"}, "experts have no additions; choose from"),
        ({"shrink.sparsity": 0.5}, "experts are not quantised, pruned or factorised"),
        ({"model.kind": "encoder_decoder"}, "mixtures are decoders or encoders"),
    ],
)
def test_what_does_not_go_with_experts(fields, message):
    config = Config(batch_size=24)
    for path, value in ({"model.num_experts": 4} | fields).items():
        set_field(config, path, value)
    with pytest.raises(BadInput, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, ""),
        ({"model.max_seq_len": 1028}, "model.max_seq_len=1028 cannot be cut into 8 chunks"),
        ({"model.kind": "encoder", "objective": "masked_lm"}, "masked_lm, which picks positions"),
        ({"mesh.context": 3}, "mesh.context=3 must divide 64"),
        ({"model.attention_pattern": "lsh"}, "lsh, which sorts whole sequences"),
        ({"model.num_experts": 4, "model.expert_capacity": 1.0}, "counted along whole sequences"),
        ({"model.dropout": 0.1}, "context_attention=ring with model.dropout=0.1, which needs all"),
        ({"model.window": 9}, "context_attention=ring with model.window=9, which needs all keys"),
        ({"model.window": 9, "model.full_attention_every": 2}, ""),
        ({"objective": "prefix_lm"}, "context_attention=ring with objective=prefix_lm"),
    ],
)
def test_what_does_not_go_with_a_split_context(fields, message):
    config = Config()
    given = {"mesh.context": 4, "compute.context_attention": "ring"} | fields
    for path, value in given.items():
        set_field(config, path, value)
    if not message:
        validate(config)
        return
    with pytest.raises(BadInput, match=message):
        validate(config)
