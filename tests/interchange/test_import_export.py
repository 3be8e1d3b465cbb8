"""Weights come in, go out and come in again without losing a bit; broken folders are refused."""

import json
import pickle
import re
import shutil
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from jaxgpt import convert, evaluate, sample
from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config import Config, ModelConfig
from jaxgpt.config.stored import read_config
from jaxgpt.interchange.families import FAMILIES, family_of
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.init_from import check_source
from jaxgpt.interchange.safetensors import SafetensorsFile, write_safetensors
from jaxgpt.interchange.torch_file import TorchFile
from jaxgpt.interchange.weights import read_params, write_params
from jaxgpt.jobs import convert as convert_job
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.tokenizer.gpt2 import BYTES
from tests.conftest import CORPUS, ROOT, mesh_of, tiny_config
from tests.golden.openai_gpt2 import FOLDER as OPENAI
from tests.golden.openai_gpt2 import variables

VOCAB = 257
LLAMA = dict(norm="rmsnorm", position="rope", activation="swiglu", bias=False, num_kv_heads=2)


def write_vocab(folder, names=("vocab.json", "merges.txt")):
    """GPT-2's vocabulary of bytes alone: no merges."""
    vocab = BYTES | {"<|endoftext|>": 256}
    (folder / names[0]).write_text(json.dumps(vocab))
    (folder / names[1]).write_text("#version: 0.2\n")


def run_import(command, source, workdir) -> None:
    code, out, err = command(convert.main, "import", f"--from={source}", f"--workdir={workdir}")
    assert (code, out) == (0, ""), err


def run_export(command, workdir, target, *flags) -> str:
    """Returns what the command said."""
    argv = (f"--workdir={workdir}", f"--to={target}", *flags)
    code, _, err = command(convert.main, "export", *argv)
    assert code == 0, err
    return err


def abstract_params(cfg: ModelConfig) -> dict:
    """The shapes of a model's parameters on one device."""
    with jax.set_mesh(mesh_of(tiny_config())):
        return jax.eval_shape(ModelSpec(Config(model=cfg), "xla").init, jax.random.key(0))


def random_params(cfg: ModelConfig) -> dict:
    """Every parameter random, norms and biases too; the padding of the vocabulary zero."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        value = rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)
        if path[0].key in ("tokens", "head"):
            value[cfg.vocab_size :] = 0
        return value

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def model_folder(folder, **model):
    """A Hugging Face folder of random weights, written by ourselves."""
    fields = dict(vocab_size=VOCAB, max_seq_len=24, num_layers=2, num_heads=4, embed_dim=32)
    cfg = ModelConfig(**(fields | model)).with_sizes()
    family, params = family_of(cfg), random_params(cfg)
    folder.mkdir()
    write_params(folder / "model.safetensors", family, params, cfg, np.float32)
    (folder / "config.json").write_text(json.dumps(family.hf_config(cfg) | {"eos_token_id": 256}))
    write_vocab(folder)
    return cfg, params


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tie_embeddings": False, "activation": "gelu", "norm_eps": 1e-3},
        LLAMA,
        LLAMA | {"qk_norm": True, "norm_eps": 1e-4, "rope_theta": 5e5},
        LLAMA | {"num_experts": 4, "expert_dim": 12, "mlp_dim": 12, "balance_loss": 0.5},
        LLAMA | {"num_experts": 3, "expert_dim": 12, "qk_norm": True, "first_dense_layers": 1},
        LLAMA
        | {
            "tie_embeddings": False,
            "rope_scaling": "llama3",
            "rope_factor": 8.0,
            "rope_original_len": 16,
        },
    ],
)
def test_round_trip_is_bit_identical(command, tmp_path, model):
    cfg, params = model_folder(tmp_path / "hf", **model)
    run_import(command, tmp_path / "hf", tmp_path / "w")
    assert read_config(epath.Path(tmp_path / "w")).model == cfg
    err = run_export(command, tmp_path / "w", tmp_path / "again")
    assert "gives the same logits, within 0.0e+00" in err, err
    one = SafetensorsFile(tmp_path / "hf/model.safetensors")
    two = SafetensorsFile(tmp_path / "again/model.safetensors")
    assert one.shapes == two.shapes and max(one.shapes.values())[0] == VOCAB, "no padding rows"
    for name in one.shapes:
        np.testing.assert_array_equal(one.read(name), two.read(name))
    for file in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "again" / file).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (256, 256)
    with jax.set_mesh(mesh_of(tiny_config())):
        checkpoints = Checkpoints(tmp_path / "w", read_only=True)
        restored = checkpoints.restore_params(0, abstract_params(cfg))
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_an_imported_workdir_evaluates_and_samples(command, tmp_path):
    model_folder(tmp_path / "hf")
    run_import(command, tmp_path / "hf", tmp_path / "w")
    (tmp_path / "t.txt").write_text(CORPUS[:500])
    argv = (f"--workdir={tmp_path}/w",)
    code, out, err = command(evaluate.main, *argv, f"--data=text:{tmp_path}/t.txt")
    assert code == 0 and json.loads(out)["tokens"] == 500, err
    code, _, err = command(evaluate.main, *argv)
    assert code == 2 and "imported weights have no text of their own" in err
    code, out, err = command(sample.main, *argv, "--prompt=The", "--max_new_tokens=5")
    assert code == 0 and out.startswith("The"), err


def test_bfloat16_stays_and_dtype_can_be_chosen(command, tmp_path):
    cfg, params = model_folder(tmp_path / "hf", **LLAMA)
    params = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params)
    write_params(tmp_path / "hf/model.safetensors", family_of(cfg), params, cfg, ml_dtypes.bfloat16)
    run_import(command, tmp_path / "hf", tmp_path / "w")
    imported = read_config(epath.Path(tmp_path / "w"))
    assert imported.model == cfg and imported.compute.param_dtype == "bfloat16"
    for dtype in ("bfloat16", "float16"):
        run_export(command, tmp_path / "w", tmp_path / dtype, f"--dtype={dtype}")
    one = SafetensorsFile(tmp_path / "hf/model.safetensors")
    two = SafetensorsFile(tmp_path / "bfloat16/model.safetensors")
    for name in one.shapes:
        np.testing.assert_array_equal(one.read(name), two.read(name))


def test_sharded_files(tmp_path):
    cfg, params = model_folder(tmp_path / "hf", tie_embeddings=False)
    whole = SafetensorsFile(tmp_path / "hf/model.safetensors")
    names = sorted(whole.shapes)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        shapes = {name: whole.shapes[name] for name in some}
        write_safetensors(tmp_path / "hf" / file, shapes, np.dtype("<f4"), whole.read)
    (tmp_path / "hf/model.safetensors").unlink()
    index = tmp_path / "hf/model.safetensors.index.json"
    weight_map = {name: file for file, some in parts.items() for name in some}
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = read_params(open_folder(tmp_path / "hf"), params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    for bad in ("../../etc/passwd", "/etc/passwd", "..", "sub/a.safetensors", ".hidden"):
        index.write_text(json.dumps({"weight_map": weight_map | {names[0]: bad}}))
        with pytest.raises(BadInput, match="is not a file beside it; refused"):
            open_folder(tmp_path / "hf")
    index.write_text(json.dumps({"weight_map": {names[0]: "c.safetensors"}}))
    with pytest.raises(BadInput, match="c.safetensors is missing"):
        open_folder(tmp_path / "hf")


def test_openai_release(command, tmp_path):
    """TensorFlow wrote the checkpoint; every variable arrives where it belongs."""
    folder = tmp_path / "117M"
    shutil.copytree(OPENAI, folder)
    write_vocab(folder, ("encoder.json", "vocab.bpe"))
    run_import(command, folder, tmp_path / "w")
    named = variables()
    model = read_config(epath.Path(tmp_path / "w")).model
    ours = leaves_by_path(read_params(open_folder(folder), abstract_params(model)))
    np.testing.assert_array_equal(ours["tokens"][:257], named["model/wte"])
    np.testing.assert_array_equal(ours["positions/kernel"], named["model/wpe"])
    qkv = named["model/h1/attn/c_attn/w"][0]
    for i, name in enumerate(("query", "key", "value")):
        kernel = ours[f"blocks/attention/{name}/kernel"][1].reshape(12, 12)
        np.testing.assert_array_equal(kernel, qkv[:, 12 * i : 12 * (i + 1)])
    down = ours["blocks/mlp/down/kernel"][0]
    np.testing.assert_array_equal(down, named["model/h0/mlp/c_proj/w"][0])
    np.testing.assert_array_equal(ours["final_norm/scale"], named["model/ln_f/g"])
    index = folder / "model.ckpt.index"
    index.write_bytes(index.read_bytes()[:-20])
    with pytest.raises(BadInput, match="TensorFlow checkpoint in .* is damaged"):
        open_folder(folder)


def pickled_text(value: str) -> bytes:
    """The pickle of a string."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(storage=b"FloatStorage", key="0", count=4, offset=0, size=(4,), stride=(1,)) -> tuple:
    """The pickle of one tensor, as torch writes it; sizes and strides may be anything."""
    tuple_of = lambda values: b"(" + b"".join(map(pickled, values)) + b"t"  # noqa: E731
    saved = (
        b"("
        + pickled_text("storage")
        + b"ctorch\n"
        + storage
        + b"\n"
        + pickled_text(key)
        + pickled_text("cpu")
    )
    saved += pickled(count) + b"tQ"
    return (
        *(b"ctorch._utils\n_rebuild_tensor_v2\n(", saved, pickled(offset), tuple_of(size)),
        *(tuple_of(stride), b"\x89Nt", b"R"),
    )


def pickled(number) -> bytes:
    """The pickle of a value; integers may have any size."""
    if type(number) is int:
        raw = pickle.encode_long(number)
        return b"\x8a" + bytes([len(raw)]) + raw
    return pickle.dumps(number, 2)[2:-1]


def state(*parts: bytes, name: bytes = b"X\x01\x00\x00\x00a") -> bytes:
    """The pickle of a dictionary: a name, its tensor's parts, and perhaps further names."""
    return b"\x80\x02}(" + name + b"".join(parts) + b"u."


def torch_file(path, arrays, evil=b"", cut=0):
    """The zip that torch.save writes, made by hand."""
    parts = []
    with zipfile.ZipFile(path, "w") as archive:
        for key, (name, array) in enumerate(arrays.items()):
            raw = array.tobytes()
            archive.writestr(f"archive/data/{key}", raw[: len(raw) - cut])
            stride = tuple(step // array.itemsize for step in array.strides)
            sizes = dict(count=array.size, size=array.shape, stride=stride)
            parts += [pickled_text(name), *tensor(key=str(key), **sizes)]
        archive.writestr("archive/data.pkl", state(*parts, evil, name=b""))


def test_old_torch_files_run_nothing(command, tmp_path):
    cfg, params = model_folder(tmp_path / "hf")
    whole = SafetensorsFile(tmp_path / "hf/model.safetensors")
    arrays = {name: whole.read(name) for name in whole.shapes}
    (tmp_path / "hf/model.safetensors").unlink()
    file = tmp_path / "hf/pytorch_model.bin"
    torch_file(file, arrays | {"transformer.h.0.attn.bias": np.ones((1, 1, 24, 24), np.float32)})
    found = read_params(open_folder(tmp_path / "hf"), params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    witness = tmp_path / "witness"
    torch_file(
        file,
        arrays,
        pickled_text("x") + b"cposix\nsystem\n(" + pickled_text(f"touch {witness}") + b"tR",
    )
    code, out, err = command(
        convert.main, "import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/w"
    )
    assert code == 2 and "wants to run posix.system" in err and err.count("\n") == 1
    assert not witness.exists() and not (tmp_path / "w").exists()
    torch_file(file, arrays, cut=4)
    with pytest.raises(BadInput, match="missing or cut short"):
        TorchFile(file)
    file.write_bytes(b"not a zip")
    with pytest.raises(BadInput, match="not a zip as torch writes"):
        TorchFile(file)


def rewrite_weights(folder, change, dtype="<f4"):
    """Lets `change(arrays)` edit the folder's tensors; all are written as `dtype`."""
    file = folder / "model.safetensors"
    whole = SafetensorsFile(file)
    arrays = {name: whole.read(name).astype(dtype) for name in whole.shapes}
    change(arrays)
    shapes = {name: a.shape for name, a in arrays.items()}
    write_safetensors(file, shapes, np.dtype(dtype), arrays.__getitem__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("transformer.h.1.ln_1.bias"), "lacks h.1.ln_1.bias"),
        (
            lambda a: a.update({"transformer.h.9.x": np.ones(1)}),
            "has tensors that gpt2 lacks: h.9.x",
        ),
        (
            lambda a: a.update({"transformer.wpe.weight": np.ones((3, 32))}),
            r"tensor wpe.weight has shape \(3, 32\), its config says \(24, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    _, params = model_folder(tmp_path / "hf")
    rewrite_weights(tmp_path / "hf", change)
    with pytest.raises(BadInput, match=message):
        read_params(open_folder(tmp_path / "hf"), params)


def test_damaged_safetensors(tmp_path):
    model_folder(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    raw = file.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    for broken, message in (
        (raw[:-1], "file not fully covered"),
        (raw[:100], "invalid header length"),
        (b"\xff" * 8 + raw[8:], "header too large"),
        (raw[:8] + b"x" * header + raw[8 + header :], "not a safetensors file"),
        (raw.replace(b'"F32"', b'"F99"', 1), "unknown variant `F99`"),
    ):
        file.write_bytes(broken)
        with pytest.raises(BadInput, match=message):
            SafetensorsFile(file)
    file.write_bytes(raw)
    opened = open_folder(tmp_path / "hf")
    file.write_bytes(raw[: 8 + header])  # cut short only now
    with pytest.raises(BadInput, match="tensor wte.weight cannot be read"):
        opened.read("wte.weight")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported; only gpt2, llama"),
        ({"activation_function": "mish"}, "activation_function='mish' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_layer": None}, "lacks or garbles"),
    ],
)
def test_configs_that_are_not_ours(tmp_path, edit, message):
    model_folder(tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(BadInput, match=message):
        read_params(open_folder(tmp_path / "hf"), {})


def test_both_spellings_of_rope(tmp_path):
    """`rope_parameters` of today's transformers; `rope_theta` and `rope_scaling` of before."""
    scaling = dict(rope_scaling="yarn", rope_factor=4.0, rope_original_len=16)
    scaling |= dict(rope_beta_fast=16.0, rope_beta_slow=2.0, rope_attention_factor=1.5)
    cfg, _ = model_folder(tmp_path / "hf", **LLAMA, rope_theta=5e5, **scaling)
    file = tmp_path / "hf/config.json"
    whole = json.loads(file.read_text())
    for spelling in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        others = {"rope_parameters", "rope_theta", "rope_scaling"} - set(spelling)
        file.write_text(json.dumps({k: v for k, v in whole.items() if k not in others}))
        assert open_folder(tmp_path / "hf").model == cfg, spelling
    whole["rope_parameters"] |= {"attention_factor": None, "mscale": 1.0, "mscale_all_dim": 0.5}
    file.write_text(json.dumps(whole))
    found = open_folder(tmp_path / "hf").model.rope_attention_factor
    assert found == pytest.approx(1.0648216253695715), "what transformers makes of them"


def test_bfloat16_is_what_every_tensor_is(tmp_path):
    model_folder(tmp_path / "hf")
    opened = open_folder(tmp_path / "hf")
    (file,) = {id(file): file for file, _ in opened.names.values()}.values()
    assert not opened.is_bfloat16
    file.dtypes = dict.fromkeys(file.dtypes, np.dtype(ml_dtypes.bfloat16))
    assert opened.is_bfloat16
    file.dtypes["transformer.wpe.weight"] = np.dtype("<f4")
    assert not opened.is_bfloat16


def test_what_has_no_counterpart_is_not_exported():
    for model, message in (
        (dict(window=8), "the nearest, gpt2, does not support model.window=8"),
        (LLAMA | dict(bias=True), "nearest, llama, does not support model.bias=True"),
        (LLAMA | dict(activation="geglu"), "model.activation='geglu'"),
    ):
        with pytest.raises(BadInput, match=message):
            family_of(ModelConfig(num_heads=4, embed_dim=32, **model))
    assert list(FAMILIES) == [
        *("gpt2", "llama", "qwen3", "mixtral", "qwen3_moe", "bert", "roberta", "t5", "bart")
    ]


def test_a_wrong_export_is_refused_and_leaves_nothing(command, tmp_path, monkeypatch):
    model_folder(tmp_path / "hf")
    run_import(command, tmp_path / "hf", tmp_path / "w")

    def wrong(file, family, params, cfg, dtype):
        params = params | {"tokens": np.asarray(params["tokens"])[::-1]}
        write_params(file, family, params, cfg, dtype)

    monkeypatch.setattr(convert_job, "write_params", wrong)
    argv = (f"--workdir={tmp_path}/w", f"--to={tmp_path}/out")
    code, _, err = command(convert.main, "export", *argv)
    assert code == 2 and "does not read back: logits differ" in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["hf", "w"]
    for args, message in (
        (("import", f"--from={tmp_path}/none", "--workdir=x"), "is not a folder"),
        (("import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/w"), "exists already"),
        (("export", f"--workdir={tmp_path}/w", f"--to={tmp_path}/hf"), "exists already"),
        (("export", f"--workdir={tmp_path}/w"), "--to=DIR is required"),
        (("turn",), "say what to do"),
    ):
        code, _, err = command(convert.main, *args)
        assert code == 2 and message in err and err.count("\n") == 1
    assert (ROOT / "jaxgpt/convert.py").exists()


@pytest.mark.parametrize(
    "name, says",
    [
        ("gpt2-xl", "did you mean openai-community/gpt2-xl, of the Hugging Face hub?"),
        ("runs/gpt2", "is named OWNER/NAME"),  # a folder of ours, not a name
        ("/models/gpt2", "is named OWNER/NAME"),
    ],
)
def test_a_folder_that_is_not_there_is_said_how_the_hub_names_it(
    command, tmp_path, monkeypatch, name, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    code, _, err = command(convert.main, "import", f"--from={name}", "--workdir=w")
    assert code == 2 and f"{name} is not a folder; " in err and says in err
    with pytest.raises(BadInput, match=re.escape(says)):
        check_source(name)
