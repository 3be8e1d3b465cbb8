"""Against transformers and torch themselves: imported, exported, evaluated, fine-tuned."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxgpt import evaluate, sample, train
from jaxgpt.config import Config
from jaxgpt.config.stored import read_config
from jaxgpt.data.pipeline import training_stream
from jaxgpt.data.prepare import prepare
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.torch_file import TorchFile
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from tests.conftest import CORPUS, mesh_of, tiny_config
from tests.golden.gpt2_torch import ADAMW, make_model
from tests.golden.llama_torch import make_model as make_modern
from tests.interchange.test_import_export import (
    LLAMA,
    abstract_params,
    model_folder,
    run_export,
    run_import,
    write_vocab,
)

pytestmark = pytest.mark.parity
BYTES = dict(vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=4)


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    with jax.set_mesh(mesh_of(tiny_config())):
        opened = open_folder(folder)
        spec = ModelSpec(Config(model=opened.model), "xla")
        params = read_params(opened, jax.eval_shape(spec.init, jax.random.key(0)))
        run = jax.jit(lambda p, t: spec.bind(p)(t))
        return np.asarray(run(params, jnp.asarray(tokens)))[..., : opened.model.vocab_size]


@pytest.mark.parametrize(("layers", "heads", "dim"), [(12, 12, 768), (24, 16, 1024)])
def test_logits_of_the_real_shapes(tmp_path, layers, heads, dim):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=dim)).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 50257, (2, 64))
    with torch.no_grad():
        theirs = model(tokens).logits.numpy()
    ours = our_logits(tmp_path, tokens.numpy().astype(np.int32))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("size", [(36, 20, 1280), (48, 25, 1600)])
def test_the_larger_shapes_have_their_names(size):
    """By abstract evaluation: every tensor of theirs has a place in ours, of the same shape."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from jaxgpt.interchange.families import GPT2
    from jaxgpt.interchange.weights import tensors_of
    from jaxgpt.system.trees import leaves_by_path

    layers, heads, dim = size
    hf = GPT2Config(n_layer=layers, n_head=heads, n_embd=dim)
    with torch.device("meta"):
        model = GPT2LMHeadModel(hf)
    theirs = {n.removeprefix("transformer."): tuple(p.shape) for n, p in model.named_parameters()}
    cfg = GPT2.model_config(hf.to_dict()).with_sizes()
    ours = leaves_by_path(abstract_params(cfg))
    found = {name: tensor.shape for name, tensor in tensors_of(GPT2, ours, cfg).items()}
    assert found == theirs


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_modern_folders_both_ways(command, tmp_path, name):
    import torch
    from transformers import AutoModelForCausalLM

    model = make_modern(name, 1)
    model.save_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 203, (2, 37)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(our_logits(tmp_path / "hf", tokens), theirs, atol=1e-4)
    qk = dict(qk_norm=name == "qwen3")
    model_folder(tmp_path / "ours", **LLAMA, **qk)
    exported = tmp_path / "out"
    run_import(command, tmp_path / "ours", tmp_path / "w")
    run_export(command, tmp_path / "w", exported)
    again = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(again).__name__ == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[name]
    tokens = np.random.default_rng(0).integers(0, 257, (2, 20)).astype(np.int32)
    with torch.no_grad():
        theirs = again(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(our_logits(exported, tokens), theirs, atol=1e-4)


def imported(command, tmp_path, seed=0):
    model = make_model(seed, BYTES)
    model.save_pretrained(tmp_path / "hf")
    write_vocab(tmp_path / "hf")
    run_import(command, tmp_path / "hf", tmp_path / "imported")
    return model


def generated(folder: Path, prompt: str, count: int) -> str:
    """Transformers' greedy text from an exported folder, by its own Auto classes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=count, do_sample=False, pad_token_id=256)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def test_the_exported_folder_writes_the_same_greedy_text(command, tmp_path):
    imported(command, tmp_path)
    run_export(command, tmp_path / "imported", tmp_path / "out")
    argv = ("--prompt=The é", "--max_new_tokens=30", "--temperature=0")
    _, ours, _ = command(sample.main, f"--workdir={tmp_path}/imported", *argv)
    assert ours.rstrip("\n") == generated(tmp_path / "out", "The é", 30).rstrip("\n")


@pytest.mark.parametrize("tokenizer", ["byte", "char", "sentencepiece:400"])
def test_a_run_of_ours_loads_there(command, tmp_path, corpus, tokenizer):
    (tmp_path / "c.py").write_text(
        "from jaxgpt.config import *\ndef get_config():\n"
        "    return Config(num_steps=20, batch_size=8, eval_every=0, checkpoint_every=0,\n"
        "        model=ModelConfig(max_seq_len=64, num_layers=1, num_heads=2, embed_dim=32),\n"
        f"        data=DataConfig(source='text:{corpus}/*.txt', tokenizer='{tokenizer}'),\n"
        "        optim=OptimConfig(learning_rate=1e-2, warmup_steps=5))\n"
    )
    code, _, err = command(train.main, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w")
    assert code == 0, err
    run_export(command, tmp_path / "w", tmp_path / "hf")
    argv = (f"--workdir={tmp_path}/w", "--prompt=Licens", "--max_new_tokens=20", "--temperature=0")
    _, ours, _ = command(sample.main, *argv)
    assert ours.rstrip("\n") == generated(tmp_path / "hf", "Licens", 20).rstrip("\n")
    from transformers import AutoTokenizer

    data = prepare(read_config(epath.Path(tmp_path / "w")).data)
    there = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (CORPUS[:300], "a  b\n\tc"):
        assert there(text)["input_ids"] == data.tokenizer.encode(text).tolist()


def test_evaluate_prints_torch_s_loss(command, tmp_path):
    import torch

    model = imported(command, tmp_path)
    (tmp_path / "t.txt").write_text(CORPUS[:1000])
    _, out, _ = command(
        evaluate.main, f"--workdir={tmp_path}/imported", f"--data=text:{tmp_path}/t.txt"
    )
    ids = torch.tensor([256, *CORPUS[:1000].encode()])
    nats, length = 0.0, BYTES["n_positions"]
    with torch.no_grad():
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            logits = model(window[None, :-1]).logits[0].double()
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    found = json.loads(out)
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), abs=2e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 1000, abs=1e-4)


def test_fine_tuning_gives_torch_s_losses(command, tmp_path, corpus):
    """Twenty steps from imported weights: warm-up, decay on matrices, clipping."""
    import torch

    model = imported(command, tmp_path)
    (tmp_path / "c.py").write_text(
        "from jaxgpt.config import *\ndef get_config():\n"
        "    return Config(num_steps=20, batch_size=4, eval_every=0, log_every=1,\n"
        f"        init_from='{tmp_path}/imported',\n"
        "        model=ModelConfig(max_seq_len=48, num_layers=2, num_heads=4, embed_dim=32),\n"
        f"        data=DataConfig(source='text:{corpus}/*.txt'),\n"
        "        optim=OptimConfig(learning_rate=3e-3, warmup_steps=4, schedule='constant'),\n"
        "        mesh=MeshConfig(data=4, fsdp=1, tensor=2))\n"
    )
    code, _, err = command(train.main, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    ours = [row["loss"] for row in rows if row["split"] == "train"]
    config = read_config(epath.Path(tmp_path / "w"))
    stream = training_stream(prepare(config.data).train, config)
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.1),
        dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer, theirs = torch.optim.AdamW(groups, lr=3e-3, **ADAMW), []
    for k in range(20):
        batch = {n: torch.tensor(a.reshape(4, -1)).long() for n, a in stream.batch(k).items()}
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (k + 1) / 4)
        optimizer.zero_grad()
        logits = model(batch["inputs"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, 257), batch["targets"].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert theirs[-1] < theirs[0] - 0.5


def test_files_that_torch_itself_saved(tmp_path):
    import torch

    model = make_model(3, BYTES)
    model.save_pretrained(tmp_path)
    safe = our_logits(tmp_path, np.arange(20, dtype=np.int32)[None])
    (tmp_path / "model.safetensors").unlink()
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    state["transformer.h.0.mlp.c_fc.weight"] = (
        state["transformer.h.0.mlp.c_fc.weight"].T.contiguous().T
    )  # strides the other way round
    torch.save(state, tmp_path / "pytorch_model.bin")
    old = our_logits(tmp_path, np.arange(20, dtype=np.int32)[None])
    np.testing.assert_array_equal(old, safe)
    torch.save({k: v.to(torch.bfloat16) for k, v in state.items()}, tmp_path / "pytorch_model.bin")
    read = TorchFile(tmp_path / "pytorch_model.bin").read("transformer.wte.weight")
    theirs = state["transformer.wte.weight"].to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(read.astype(np.float32), theirs)


def test_our_safetensors_are_the_library_s(tmp_path):
    from safetensors.numpy import load_file

    from jaxgpt.interchange.safetensors import SafetensorsFile

    model_folder(tmp_path / "hf")
    theirs = load_file(tmp_path / "hf/model.safetensors")
    ours = SafetensorsFile(tmp_path / "hf/model.safetensors")
    assert set(theirs) == set(ours.shapes)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours.read(name), array)
