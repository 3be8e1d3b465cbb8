"""One config fine-tunes whatever is at `init_from`: architecture and tokenizer come from there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from jaxgpt import plan, prepare, sample, train
from jaxgpt.cli.flags import load_file
from jaxgpt.config import Config, DataConfig, ModelConfig, presets
from jaxgpt.config.schema import left_open
from jaxgpt.config.stored import read_config, to_json
from jaxgpt.interchange.families import family_of
from jaxgpt.interchange.init_from import CONTEXT, completed
from jaxgpt.interchange.weights import write_params
from jaxgpt.model import ModelSpec
from jaxgpt.sweeps.grid import apply_choice
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from tests.conftest import CORPUS, ROOT, mesh_of, tiny_config
from tests.interchange.test_import_export import LLAMA, VOCAB, model_folder, run_export, run_import

CONFIG = f"--config={ROOT}/configs/finetune.py"
UNTIED = LLAMA | dict(tie_embeddings=False, norm_eps=1e-6, rope_theta=5e5, max_seq_len=4096)
GPT2 = dict(activation="gelu", max_seq_len=64)
ROWS = [
    {"instruction": "Greet", "input": name, "output": f"Hello {name}!"}
    for name in ("Anna", "Ben", "Clara", "David") * 16
]


def fresh_folder(folder, **model) -> ModelConfig:
    """A model folder of weights to train from."""
    cfg, _ = model_folder(folder, **model)
    with jax.set_mesh(mesh_of(tiny_config())):
        params = jax.jit(ModelSpec(Config(model=cfg), "xla").init)(jax.random.key(0))
        params = jax.tree.map(np.asarray, params)
    write_params(folder / "model.safetensors", family_of(cfg), params, cfg, np.float32)
    return cfg


def fine_tune(command, tmp_path, source, *flags, workdir="w"):
    """The README's command, with a learning rate for a model that knows nothing yet."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return command(
        *(train.main, CONFIG, f"--config.init_from={source}", f"--workdir={tmp_path}/{workdir}"),
        f"--config.data.source=sft:{tmp_path}/rows.jsonl",
        *("--config.optim.learning_rate=1e-2", "--config.num_epochs=12", "--config.batch_size=8"),
        *("--config.model.max_seq_len=64", "--config.log_every=1", *flags),
    )


def losses(workdir) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), "workdir"])
def test_one_command_without_a_flag_of_the_architecture(command, tmp_path, kind):
    cfg = fresh_folder(tmp_path / "hf", **(GPT2 if kind == "gpt2" else UNTIED))
    source = tmp_path / "hf"
    if kind == "workdir":
        run_import(command, tmp_path / "hf", source := tmp_path / "imported")
    code, _, err = fine_tune(command, tmp_path, source)
    assert code == 0, err
    assert f"start     from {source}, with a context of 64 and the tokenizer" in err
    assert losses(tmp_path / "w")[0] > 4 and losses(tmp_path / "w")[-1] < 1.5
    config = read_config(epath.Path(tmp_path / "w"))
    assert config.model == dataclasses.replace(cfg, max_seq_len=64)
    assert config.data.tokenizer == f"{'hf' if kind == 'workdir' else 'gpt2'}:{source}"
    if kind != "llama":
        return
    code, _, err = fine_tune(command, tmp_path, source)
    assert code == 0 and "finished  " in err, "the same command finds its run"
    code, _, err = fine_tune(command, tmp_path, source, "--config.num_epochs=13")
    assert code == 0 and "resume    from checkpoint" in err, err
    assert f"exported  step {len(losses(tmp_path / 'w'))}" in run_export(
        command, tmp_path / "w", tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("model.num_layers=3", "is another model: model.num_layers: 2 there, 3 here; leave these"),
        ("model.num_layers=12", "model.num_layers: 2 there, 12 here"),  # the class's default
        ("model.bias=true", "model.bias: False there, True here"),
        ("model.norm=layernorm", "model.norm: 'rmsnorm' there, 'layernorm' here"),
        ("model.rope_theta=1e4", "model.rope_theta: 500000.0 there, 10000.0 here; name rope in"),
        ("model.tie_embeddings=true", "model.tie_embeddings: False there, True here"),
        ("data.tokenizer=char", "has another tokenizer than data.tokenizer=char: its end-of-text"),
        ("model.num_layers=0", "model.num_layers=0 must be at least 1"),
        ("init_from=nowhere", "init_from=nowhere is neither a workdir with checkpoints nor"),
        ("init_from=", "--config.init_from=DIR is missing: a workdir or a Hugging Face folder"),
    ],
)
def test_what_contradicts_the_folder_is_refused(command, tmp_path, flag, message):
    model_folder(tmp_path / "hf", **UNTIED)
    code, _, err = fine_tune(command, tmp_path, tmp_path / "hf", f"--config.{flag}")
    assert code == 2 and message in err.splitlines()[-1], err
    assert not (tmp_path / "w").exists(), "nothing half-written"


def test_what_may_be_chosen(tmp_path):
    cfg, _ = model_folder(tmp_path / "hf", **UNTIED)
    given = dict(max_seq_len=16, dropout=0.25)
    config = Config(init_from=str(tmp_path / "hf"), model=presets.from_init(**given))
    config.data = DataConfig(tokenizer="", special_tokens="<a>,<b>")
    assert completed(config).model == dataclasses.replace(cfg, vocab_size=VOCAB + 2, **given)
    config.data.special_tokens, config.lora.rank = "", 2
    assert completed(config).model == dataclasses.replace(cfg, **given)
    config.data.tokenizer, config.model = "byte", presets.from_init()
    found = completed(config)
    assert found.model == dataclasses.replace(cfg, vocab_size=0, max_seq_len=CONTEXT)
    assert found.data.tokenizer == "byte" and not left_open(found)
    assert left_open(config), "the one that was given stays as it was"


@pytest.mark.parametrize("kind", ["char", "sentencepiece:400", "byte", "byte <a>,<b>"])
def test_the_tokenizer_of_a_workdir(tmp_path, kind):
    spec, _, special = kind.partition(" ")
    there = make_tokenizer(spec, [TrainingText(lambda: [CORPUS], len(CORPUS))], special)
    source = tiny_config(vocab_size=there.vocab_size)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(to_json(source))
    save_tokenizer(there, tmp_path / "tokenizer")
    config = Config(init_from=str(tmp_path), model=presets.from_init())
    config.data.tokenizer = ""
    found = completed(config)
    here = make_tokenizer(found.data.tokenizer)
    assert found.model == source.model
    assert here.encode(CORPUS[:99]).tolist() == there.encode(CORPUS[:99]).tolist()
    config.data.special_tokens = "<b>,<c>"
    more = 1 if special else 2  # <b> is there already
    assert completed(config).model.vocab_size == there.vocab_size + more


def test_a_folder_without_a_tokenizer(tmp_path):
    model_folder(tmp_path / "hf")
    (tmp_path / "hf/vocab.json").unlink()
    config = Config(init_from=str(tmp_path / "hf"), model=presets.from_init())
    config.data.tokenizer = ""
    with pytest.raises(BadInput, match="hf holds no tokenizer: set data.tokenizer"):
        completed(config)
    config = Config(data=DataConfig(tokenizer=""))
    with pytest.raises(BadInput, match="init_from=DIR is missing: .*has the tokenizer of this"):
        completed(config)


def test_plan_prepare_and_sweeps_take_it_from_there_too(command, tmp_path):
    cfg, _ = model_folder(tmp_path / "one", **UNTIED)
    other, _ = model_folder(tmp_path / "two", **GPT2)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    source = f"--config.data.source=sft:{tmp_path}/rows.jsonl"
    argv = (CONFIG, f"--config.init_from={tmp_path}/two", source, "--config.batch_size=8")
    code, out, err = command(prepare.main, *argv)
    assert code == 0 and json.loads(out)["vocab_size"] == VOCAB, err
    code, out, err = command(plan.main, *argv)
    assert code == 0, err
    assert json.loads(out)["parameters"] == 2 * (12 * 32**2 + 13 * 32) + 2 * 32 + (VOCAB + 64) * 32
    code, _, err = command(plan.main, *argv, "--config.model.embed_dim=64")
    assert code == 2 and "model.embed_dim: 32 there, 64 here" in err, err
    config = load_file(CONFIG.partition("=")[2])
    for name, model in (("one", cfg), ("two", other)):
        choice = {"init_from": str(tmp_path / name), "model.max_seq_len": 32}
        found = apply_choice(config, choice).model
        assert found == dataclasses.replace(model, max_seq_len=32)


@pytest.mark.parity
def test_the_export_opens_in_transformers_and_answers(command, tmp_path):
    """A Llama of theirs with a BPE of theirs, fine-tuned on alpaca's rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet)
    fast.train_from_iterator([CORPUS], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=names[0], eos_token=names[1]
    ).save_pretrained(tmp_path / "hf")
    sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, vocab_size=512)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=131_072)
    ids = dict(bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(tmp_path / "hf")
    code, _, err = fine_tune(command, tmp_path, tmp_path / "hf", "--config.compute.dtype=float32")
    assert code == 0 and losses(tmp_path / "w")[-1] < 1.5 < losses(tmp_path / "w")[0], err
    run_export(command, tmp_path / "w", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 512 and tokenizer.eos_token_id == 1
    turns = [{"role": "user", "content": "Greet\nClara"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "User: Greet\nClara\nAssistant:", "what was trained on"
    asked = torch.tensor([[1, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    answer = model.generate(asked, max_new_tokens=8, do_sample=False)[0, asked.shape[1] :]
    answer = tokenizer.decode(answer, skip_special_tokens=True)
    argv = (f"--workdir={tmp_path}/w", f"--prompt={text}", "--temperature=0", "--max_new_tokens=8")
    code, out, err = command(sample.main, *argv)
    assert code == 0 and answer.startswith(" Hello") and out.strip() == text + answer, err
