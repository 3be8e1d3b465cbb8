"""What earlier versions wrote, and old spellings of fields."""

import json
import shutil

import pytest
from etils import epath

from jaxgpt import checkpoint, evaluate, train
from jaxgpt.config import ComputeConfig, Config, LoraConfig, ModelConfig
from jaxgpt.config.migrate import FORMAT, RENAMED
from jaxgpt.config.schema import get_field
from jaxgpt.config.stored import from_stored, read_config, to_json
from jaxgpt.system.errors import BadInput

# As format 1 was written, with another value than the default in every field that has moved.
FORMAT_1 = """{
  "seed": 0, "num_steps": 8, "num_epochs": 0.0, "init_from": "", "init_fresh": "", "early_stop": 0,
  "batch_size": 8, "grad_accum": 1, "log_every": 1, "max_bad_steps": 10, "max_rollbacks": 3,
  "eval_every": 4, "eval_batches": 2, "sample_every": 225, "checkpoint_every": 4,
  "keep_checkpoints": 3, "keep_every": 0,
  "model": {
    "vocab_size": 4096, "max_seq_len": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
    "head_dim": 8, "embed_dim": 32, "mlp_dim": 128, "norm": "layernorm", "norm_eps": 1e-05,
    "norm_position": "pre", "position": "learned", "rope_theta": 10000.0, "rope_scaling": "none",
    "rope_factor": 1.0, "rope_original_len": 8192, "activation": "gelu_tanh", "bias": true,
    "qkv_bias": false, "tie_embeddings": true, "scale_embeddings": false, "qk_norm": false,
    "window": 0, "full_attention_every": 0, "logit_softcap": 0.0, "mup_base_width": 0,
    "dropout": 0.0, "lora_rank": 2, "lora_alpha": 8.0, "lora_targets": "out", "lora_dora": true,
    "dtype": "bfloat16", "param_dtype": "bfloat16", "attention": "xla", "remat": "dots",
    "scan_layers": false
  },
  "data": {
    "source": "builtin", "tokenizer": "sentencepiece:4096", "validation_source": "",
    "validation_fraction": 0.02, "field": "text", "data_dir": "", "clean": "", "pack": false,
    "chat_template": "plain", "special_tokens": "", "shuffle": true, "cache_dir": ""
  },
  "optim": {
    "name": "muon", "learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 2,
    "final_lr_ratio": 0.1, "decay_fraction": 0.2, "weight_decay": 0.1, "b1": 0.95, "b2": 0.95,
    "eps": 1e-08, "moment_dtype": "", "clip_norm": 1.0, "z_loss": 0.0, "ema_decay": 0.0,
    "freeze": "", "lr_multipliers": ""
  },
  "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence_activations": false},
  "sample": {"prompt": "class ", "max_new_tokens": 4, "temperature": 0.8, "top_k": 40}
}"""


def in_format_1(config: Config) -> str:
    """The config's text as format 1 had it."""
    nested = json.loads(to_json(config))
    for old, new in RENAMED.items():
        nested["model"][old.removeprefix("model.")] = get_field(config, new)
    nested["model"]["scan_layers"] = config.compute.scan_layers == "true"
    known = json.loads(FORMAT_1)["model"]
    nested["model"] = {name: value for name, value in nested["model"].items() if name in known}
    later_ones = ("format", "compute", "lora", "shrink", "objective", "objectives", "init_layers")
    for later in (*later_ones, "track"):
        del nested[later]
    for group, later in (
        ("optim", "warmup_fraction"),
        ("optim", "label_smoothing"),
        ("mesh", "expert"),
        ("mesh", "context"),
        ("mesh", "pipeline"),
    ):
        del nested[group][later]
    return json.dumps(nested, indent=2) + "\n"


def test_format_1_is_read():
    config = from_stored(json.loads(FORMAT_1))
    assert config.compute == ComputeConfig("bfloat16", "bfloat16", "xla", "dots", "false")
    assert config.lora == LoraConfig(2, 8.0, "out", True)
    assert config.model == ModelConfig(4096, 64, 2, 4, 4, 8, 32, 128)
    assert (config.num_steps, config.optim.name, config.mesh.data) == (8, "muon", -1)
    assert json.loads(in_format_1(config)) == json.loads(FORMAT_1), "every field has its place"
    assert (
        from_stored(json.loads(FORMAT_1.replace('"scan_layers": false', '"scan_layers": true')))
        != config
    )


def test_config_json_says_its_format(tmp_path):
    assert json.loads(to_json(Config()))["format"] == FORMAT == 2
    with pytest.raises(BadInput, match="unknown field model.dtype"):
        from_stored({"format": 2, "model": {"dtype": "bfloat16"}})
    for number in (0, -1, "2", 1.0, True, None):
        with pytest.raises(BadInput, match="is not the number of a format"):
            from_stored({"format": number})
    (tmp_path / "config.json").write_text('{"format": 3, "model": {"kind": "decoder"}}')
    with pytest.raises(BadInput, match="config.json: format 3 is that of a newer version") as e:
        read_config(epath.Path(tmp_path))
    assert "damaged" not in str(e.value) and "up to 2: update jaxgpt" in str(e.value)


CONFIG = """
from jaxgpt.config import *
def get_config():
    config = Config(
        num_steps=8, batch_size=8, log_every=1, eval_every=4, checkpoint_every=4,
        model=ModelConfig(max_seq_len=16, num_layers=2, num_heads=2, embed_dim=16),
        compute=ComputeConfig(dtype="bfloat16", scan_layers="false"), lora=LoraConfig(rank=2),
        data=DataConfig(source="text:{corpus}/*.txt"), optim=OptimConfig(warmup_steps=2),
        sample=SampleConfig(max_new_tokens=1),
    )
    {more}
    return config
"""


def losses(workdir) -> list[tuple]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["split"], row["loss"]) for row in rows]


def test_a_workdir_of_format_1_resumes_to_the_same_losses(command, corpus, tmp_path):
    file, workdir = tmp_path / "c.py", tmp_path / "w"
    file.write_text(CONFIG.format(corpus=corpus, more=""))
    code, _, err = command(train.main, f"--config={file}", f"--workdir={workdir}")
    assert code == 0, err
    whole, written = losses(workdir), (workdir / "config.json").read_text()
    shutil.rmtree(workdir / "checkpoints/8")
    (workdir / "end.json").unlink()
    (workdir / "config.json").write_text(in_format_1(read_config(epath.Path(workdir))))
    for main, *args in ((evaluate.main,), (checkpoint.main, "show")):
        code, _, err = command(main, *args, f"--workdir={workdir}")
        assert code == 0, err
    changed = "--config.lora.rank=3"
    code, _, err = command(train.main, f"--config={file}", f"--workdir={workdir}", changed)
    assert code == 2 and "another config (lora.rank: 2 -> 3)" in err
    code, _, err = command(train.main, f"--config={file}", f"--workdir={workdir}")
    assert code == 0 and "step 5/8" in err and "step 4/8" not in err, err
    assert losses(workdir) == whole and (workdir / "config.json").read_text() == written


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.model.dtype=bfloat16", "--config.model.dtype is now --config.compute.dtype"),
        ("--config.model.lora_rank=8", "--config.model.lora_rank is now --config.lora.rank"),
        ("--noconfig.model.scan_layers", "is now --config.compute.scan_layers"),
        ("--config.lora_rank=8", "did you mean --config.lora.rank?"),
        ("--lora_rank=8", "did you mean --config.lora.rank?"),
    ],
)
def test_an_old_flag_gets_the_new_spelling(command, corpus, tmp_path, flag, says):
    (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus, more=""))
    code, out, err = command(
        train.main, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w", flag
    )
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), err
    assert says in err and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "config.model.dtype = 'bfloat16'",
            "the config file sets model.dtype, which is now compute.dtype",
        ),
        ("config.model.lora_rank = 8", "model.lora_rank, which is now lora.rank"),
        ("config.model = ModelConfig(remat='full')", "model.remat is now compute.remat"),
        ("config.model = presets.gpt2(2, 2, 16, dtype='bfloat16')", "is now compute.dtype"),
        ("config.batch_size = len(config.model.lora_targets)", "is now lora.targets"),
        ("config.compute.scan_layers = False", "expected str: one of auto, true, false"),
    ],
)
def test_an_old_config_file_gets_the_new_spelling(command, corpus, tmp_path, line, says):
    (tmp_path / "c.py").write_text(CONFIG.format(corpus=corpus, more=line))
    code, out, err = command(train.main, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), err
    assert says in err and not (tmp_path / "w").exists()
