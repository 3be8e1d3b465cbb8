"""Folders and files of other people's models, damaged or made to harm: refused, and quickly."""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxgpt import convert
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.safetensors import SafetensorsFile
from jaxgpt.interchange.tf_checkpoint import TfCheckpoint
from jaxgpt.interchange.tokenizers import read_tokenizer
from jaxgpt.interchange.torch_file import TorchFile
from jaxgpt.interchange.weights import read_params
from jaxgpt.jobs import convert as convert_job
from jaxgpt.system.files import scratch_for
from tests.golden.openai_gpt2 import FOLDER as OPENAI
from tests.hostile.conftest import FUZZ, Case, in_time, mutated, name_of, refused
from tests.interchange.test_import_export import (
    LLAMA,
    abstract_params,
    model_folder,
    pickled,
    pickled_text,
    rewrite_weights,
    state,
    tensor,
    torch_file,
    write_vocab,
)

SMALL = dict(max_seq_len=8, num_layers=1, num_heads=2, embed_dim=8)
NONE = "no such field"
NUMBERS = [NONE, None, "x", -1, 0, 1.5, True, [], {}, 10**8, 2**31, 2**62, 10**30, "\\ud800"]
EPSILONS = ["x", None, -1, 0, 1, [], {}, True, float("nan"), float("inf"), 10**400]
FIELDS = {
    "gpt2": {
        **{name: NUMBERS for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        "n_positions": ["x", -1, 0, 1.5, True, [], 10**8, 10**30],
        "n_inner": ["x", -1, 1.5, [], {}, 10**8, 10**30],
        "layer_norm_epsilon": EPSILONS,
        "activation_function": [None, 1, [], {}, "mish"],
        "tie_word_embeddings": [None, 1, "x", []],
        "model_type": [NONE, None, 1, [], {}, "bert", "x" * 10**6],
        "scale_attn_weights": [False, None, "x", []],
    },
    "llama": {
        **{name: NUMBERS for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")},
        **{name: NUMBERS for name in ("vocab_size", "intermediate_size")},
        "max_position_embeddings": [NONE, None, "x", -1, 0, 1.5, True, 10**30],
        "num_key_value_heads": ["x", -1, 1.5, [], 3, 10**8],
        "head_dim": ["x", -1, 1.5, [], 3, 10**8],
        "rms_norm_eps": EPSILONS,
        "layer_types": [1, "x", {}, [1], [[]], ["sliding_attention"]],
        "rope_parameters": [1, "x", [1], {"rope_type": 1}, {"rope_type": "yarn"}]
        + [{"rope_theta": bad} for bad in ("x", None, [], -1, 0, 10**400)]
        + [{"rope_type": "linear", "factor": bad} for bad in ("x", None, -1, 0, 10**400)],
        "hidden_act": ["gelu", 1, None],
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Whole folders of each kind, by name; copy one before changing it."""
    root = tmp_path_factory.mktemp("whole")
    model_folder(root / "gpt2", **SMALL)
    model_folder(root / "llama", **(SMALL | LLAMA), tie_embeddings=False)
    model_folder(root / "torch", **SMALL)
    whole = SafetensorsFile(root / "torch/model.safetensors")
    arrays = {name: whole.read(name) for name in whole.shapes}
    torch_file(root / "torch/pytorch_model.bin", arrays)
    (root / "torch/model.safetensors").unlink()
    shutil.copytree(OPENAI, root / "openai")
    write_vocab(root / "openai", ("encoder.json", "vocab.bpe"))
    for folder in root.iterdir():
        imported(folder)
    return root


ABSTRACT = {}  # by model: tracing one takes longer than reading it


def imported(folder) -> None:
    """What `convert import` reads of a folder."""
    opened = open_folder(folder)
    read_tokenizer(folder)
    if repr(opened.model) not in ABSTRACT:
        ABSTRACT[repr(opened.model)] = abstract_params(opened.model)
    read_params(opened, ABSTRACT[repr(opened.model)])


def changed(folders, tmp_path, kind: str, files: dict):
    """A copy of the whole folder of `kind` in which `files` stand instead."""
    folder = tmp_path / "hf"
    shutil.copytree(folders / kind, folder)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, fields in FIELDS.items() for field in fields]
)
def test_config_fields(folders, tmp_path, kind, field):
    config = json.loads((folders / kind / "config.json").read_text())
    folder = changed(folders, tmp_path, kind, {})
    for value in FIELDS[kind][field]:
        edited = {name: old for name, old in config.items() if name != field}
        text = json.dumps(edited if value == NONE else edited | {field: value})
        (folder / "config.json").write_text(text)
        with in_time():
            assert refused(imported, folder), f"{field}={value!r} was taken"


WHOLE = {
    "empty": b"",
    "blank": b" \n",
    "list": b"[]",
    "null": b"null",
    "number": b"1",
    "string": b'"x"',
    "latin": b'{"a": "\xe9"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "half": b'{"a": ',
    "NUL": b"\0" * 100,
    "deep list": b"[" * 10**6,
    "deep object": b'{"a":' * 10**5,
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
    "surrogate": b'{"model_type": "\\ud800"}',
    "empty object": b"{}",
}
JSON_FILES = [
    ("gpt2", "config.json", {}),
    ("gpt2", "vocab.json", {}),
    ("gpt2", "tokenizer.json", {"vocab.json": None}),
    ("gpt2", "model.safetensors.index.json", {"model.safetensors": None}),
    ("torch", "pytorch_model.bin.index.json", {"pytorch_model.bin": None}),
    ("openai", "hparams.json", {}),
    ("openai", "encoder.json", {}),
]


@pytest.mark.parametrize("content", WHOLE)
@pytest.mark.parametrize(("kind", "name", "others"), JSON_FILES, ids=[row[1] for row in JSON_FILES])
def test_json_files(folders, tmp_path, kind, name, others, content):
    folder = changed(folders, tmp_path, kind, {name: WHOLE[content]} | others)
    with in_time():
        assert refused(imported, folder)


VOCABULARIES = {
    "list for a piece": {"a": [0], "<|endoftext|>": 1},
    "not from 0": {"a": 1, "<|endoftext|>": 2},
    "float": {"a": 0.5, "<|endoftext|>": 1},
    "twice": {"a": 0, "b": 0, "<|endoftext|>": 1},
    "huge": {"a": 10**30, "<|endoftext|>": 1},
    "without end-of-text": {"a": 0},
    "other bytes only": {"<|endoftext|>": 0},
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies(folders, tmp_path, name):
    """A vocabulary is either refused or one whose every text can be encoded."""
    files = {"vocab.json": json.dumps(VOCABULARIES[name]).encode()}
    folder = changed(folders, tmp_path, "gpt2", files)
    if not refused(read_tokenizer, folder):
        tokenizer = read_tokenizer(folder)
        assert tokenizer.encode("naïve text\n").max(initial=0) < tokenizer.vocab_size


MERGES = [b"a\n", b"a b c\n", b"nope nope\n", b"\xff\n", b"\xc3\xa9", b"#version: 0.2\n\0 \0\n"]


@pytest.mark.parametrize("merges", MERGES)
def test_merges(folders, tmp_path, merges):
    assert refused(read_tokenizer, changed(folders, tmp_path, "gpt2", {"merges.txt": merges}))


def header(entries, data: bytes = b"", length: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape=(1,), offsets=(0, 4), dtype="F32", **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


SAFETENSORS = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "no header": b"\0" * 8,
    "longer than the file": header({}, length=2**63),
    "list": header([]),
    "nested list": header(b"[" * 10**6),
    "nested object": header(b'{"a":' * 10**5),
    "nested in an entry": header({"a": entry(x=json.loads("[" * 400 + "]" * 400))}, b"abcd"),
    "nested shape": header({"a": entry([[1]])}, b"abcd"),
    "float shape": header({"a": entry([1.0])}, b"abcd"),
    "bool shape": header({"a": entry([True])}, b"abcd"),
    "string shape": header({"a": entry("1")}, b"abcd"),
    "negative shape": header({"a": entry([-1])}, b"abcd"),
    "two negatives": header({"a": entry([-1, -1])}, b"abcd"),
    "huge shape": header({"a": entry([2**62, 4])}, b"abcd"),
    "huger shape": header({"a": entry([10**30])}, b"abcd"),
    "many axes": header({"a": entry([1] * 70)}, b"abcd"),
    "float offsets": header({"a": entry(offsets=[0.0, 4.0])}, b"abcd"),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}, b"abcd"),
    "one offset": header({"a": entry(offsets=[4])}, b"abcd"),
    "three offsets": header({"a": entry(offsets=[0, 4, 4])}, b"abcd"),
    "backwards": header({"a": entry(offsets=[4, 0])}, b"abcd"),
    "negative offsets": header({"a": entry(offsets=[-4, 0])}, b"abcd"),
    "beyond": header({"a": entry(offsets=[4, 8])}, b"abcd"),
    "overlap": header({"a": entry(), "b": entry()}, b"abcd"),
    "half overlap": header({"a": entry(), "b": entry(offsets=[2, 6])}, b"abcdef"),
    "hole": header({"a": entry(), "b": entry(offsets=[8, 12])}, b"abcdefghijkl"),
    "rest": header({"a": entry()}, b"abcdefgh"),
    "same name twice": header(
        f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry(offsets=(4, 8)))}}}'.encode(),
        b"abcdefgh",
    ),
    "dtype": header({"a": entry(dtype="F99")}, b"abcd"),
    "float8": header({"a": entry((4,), dtype="F8_E4M3")}, b"abcd"),
    "dtype list": header({"a": entry(dtype=["F32"])}, b"abcd"),
    "entry null": header({"a": None}, b"abcd"),
    "surrogate name": header({"\ud800": entry()}, b"abcd"),
    "NaN": header(b'{"a": NaN}', b"abcd"),
    "metadata": header({"__metadata__": 3}),
    "not UTF-8": header(b'{"\xff": 1}'),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_headers(tmp_path, name):
    (tmp_path / "x").write_bytes(SAFETENSORS[name])
    with in_time():
        assert refused(SafetensorsFile, tmp_path / "x")


def edited_weights(folders, tmp_path, edit, dtype="<f4"):
    """A folder whose tensors `edit(arrays)` changed; all are written as `dtype`."""
    folder = changed(folders, tmp_path, "gpt2", {})
    rewrite_weights(folder, edit, dtype)
    return folder


WPE = "transformer.wpe.weight"
WEIGHTS = {
    "NaN": (lambda a: a[WPE].__setitem__((3, 3), np.nan), "<f4", "wpe.weight holds NaN or"),
    "infinite": (lambda a: a[WPE].__setitem__((3, 3), -np.inf), "<f4", "holds NaN or infinite"),
    "beyond float32": (lambda a: a[WPE].__setitem__((3, 3), 1e300), "<f8", "holds NaN or infinite"),
    "float16 infinite": (lambda a: a[WPE].__setitem__((0, 0), np.inf), "<f2", "holds NaN or"),
    "int32": (lambda a: None, "<i4", "holds int32, no weights"),
    "int64": (lambda a: None, "<i8", "holds int64, no weights"),
    "bool": (lambda a: None, "?", "holds bool, no weights"),
    "prefixed twice": (lambda a: a.update({"wpe.weight": a[WPE]}), "<f4", "wpe.weight twice"),
    "one number": (lambda a: a.update({WPE: a[WPE][0, :1]}), "<f4", "has shape (1,)"),
    "no rows": (lambda a: a.update({WPE: a[WPE][:0]}), "<f4", "wpe.weight has shape (0, 8)"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(folders, tmp_path, name):
    edit, dtype, says = WEIGHTS[name]
    with pytest.raises(convert.BadInput) as e:
        imported(edited_weights(folders, tmp_path, edit, dtype))
    assert says in str(e.value)


LAUGHS = (
    b"N"
    + b"\x85q\x00"
    + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
)
PICKLES = {
    "empty": b"",
    "cut": state(*tensor())[:-9],
    "no state": pickle.dumps([1, 2]),
    "a string": pickle.dumps("x"),
    "number for a tensor": state(pickled(3)),
    "a list": state(pickle.dumps([[]])[2:-1]),
    "number for a name": state(*tensor(), name=pickled(7)),
    "tuple for a name": state(*tensor(), name=b")"),
    "nested tuples": state(LAUGHS),
    "nested tuples for a name": state(*tensor(), name=LAUGHS),
    "nested reference": state(LAUGHS + b"Q"),
    "nested key": state(*tensor()).replace(b"X\x01\x00\x00\x000", LAUGHS),
    "nested size": state(*[LAUGHS if i == 3 else part for i, part in enumerate(tensor())]),
    "call of a dtype": state(b"ctorch\nFloatStorage\n)R"),
    "os.system": state(b"cposix\nsystem\n(X\x04\x00\x00\x00truetR"),
    "builtins.eval": state(b"cbuiltins\neval\n(X\x01\x00\x00\x001tR"),
    "dotted name": b"\x80\x04}(\x8c\x01a\x8c\x05torch\x8c\x0bTensor.mean\x93u.",
    "extension registry": state(b"\x82\x01"),
    "new object": state(b"ccollections\nOrderedDict\n)\x81"),
    "negative size": state(*tensor(size=(-4,))),
    "negative stride": state(*tensor(stride=(-1,))),
    "negative offset": state(*tensor(offset=-1)),
    "text for a size": state(*tensor(size=("x",))),
    "float size": state(*tensor(size=(4.0,))),
    "bool size": state(*tensor(size=(True,))),
    "huge size": state(*tensor(size=(2**70,))),
    "broadcast": state(*tensor(size=(10**9, 4), stride=(0, 1))),
    "beyond": state(*tensor(size=(5,))),
    "stride beyond": state(*tensor(stride=(2,))),
    "offset beyond": state(*tensor(offset=1)),
    "empty beyond": state(*tensor(size=(0,), offset=9)),
    "fewer strides": state(*tensor(stride=())),
    "many axes": state(*tensor(size=(1,) * 70, stride=(1,) * 70)),
    "no such storage": state(*tensor(key="7")),
    "odd key": state(*tensor(key="../0")),
    "huge count": state(*tensor(count=2**70)),
    "negative count": state(*tensor(count=-1)),
    "text count": state(*tensor(count="4")),
    "other type's size": state(*tensor(storage=b"DoubleStorage")),
    "unknown storage": state(*tensor(storage=b"ComplexFloatStorage")),
    "endless mark": b"\x80\x02" + b"(" * 10**5 + b".",
    "memo of nothing": state(b"h\x07"),
    "long number": b"\x80\x02}(X\x01\x00\x00\x00a\x8b\xff\xff\xff\x7fu.",
    "protocol": b"\x80\xff}.",
}


def zipped(file, index: bytes, data: bytes = b"\0" * 16, how=zipfile.ZIP_STORED, **more: bytes):
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("archive/data.pkl", index)
        archive.writestr("archive/data/0", data)
        for name, raw in more.items():
            archive.writestr(f"archive/{name}", raw)


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path, name):
    zipped(tmp_path / "x", state(*tensor()))
    assert TorchFile(tmp_path / "x").read("a").tolist() == [0, 0, 0, 0]
    zipped(tmp_path / "x", PICKLES[name])
    with in_time():
        assert refused(TorchFile, tmp_path / "x")


def test_zips(tmp_path):
    good, file = state(*tensor()), tmp_path / "x"
    for make in (
        lambda: zipped(file, good, how=zipfile.ZIP_DEFLATED),
        lambda: zipped(file, good, b"\0" * 10**7, how=zipfile.ZIP_DEFLATED),
        lambda: zipped(file, good, byteorder=b"big"),
        lambda: zipped(file, good, data=b"\0" * 15),
        lambda: zipped(file, good, **{"more/data.pkl": good}),
        lambda: zipfile.ZipFile(file, "w").close(),
        lambda: file.write_bytes(b"PK\5\6" + b"\xff" * 18),
        lambda: file.write_bytes(pickle.dumps({"a": 1})),
        lambda: (file.unlink(), file.mkdir()),
    ):
        make()
        with in_time():
            assert refused(TorchFile, file)


def test_a_damaged_storage_is_named(folders, tmp_path):
    """The zip's checksum tells, when the tensor is read."""
    folder = changed(folders, tmp_path, "torch", {})
    file = folder / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    raw[raw.index(b"archive/data/0") + 40] ^= 1
    file.write_bytes(raw)
    with pytest.raises(convert.BadInput, match="cannot be read: Bad CRC-32"):
        imported(folder)


def test_tensors_that_share_bytes(folders, tmp_path):
    """Many tensors of one storage would need more memory than the file has bytes."""
    folder = changed(folders, tmp_path, "torch", {})
    one = b"".join(tensor(count=4000, size=(4000,)))
    index = state(*(pickled_text(f"t{i}") + one for i in range(500)), name=b"")
    zipped(folder / "pytorch_model.bin", index, b"\0" * 16000)
    with pytest.raises(convert.BadInput, match="its tensors overlap"):
        imported(folder)


IMPORT = ["import", "--from={}", "--workdir={}/w"]
COMMANDS = [
    Case("no folder", ["import", "--from={}/none", "--workdir={}/w"], says="is not a folder"),
    Case("a file", ["import", "--from={}/f", "--workdir={}/w"], {"f": "x"}, "is not a folder"),
    Case("empty", IMPORT, {"x": ""}, "holds neither config.json"),
    Case("no weights", IMPORT, {"config.json": '{"model_type": "gpt2"}'}, "holds no weights"),
    Case(
        "a folder for a file",
        IMPORT,
        {"config.json/x": "", "model.safetensors/x": ""},
        "neither config.json",
    ),
    Case(
        "a link to nowhere",
        IMPORT,
        {"config.json": lambda path: path.symlink_to("nowhere")},
        "neither config.json",
    ),
    Case("a loop of links", IMPORT, {"config.json": lambda path: path.symlink_to(path)}, ""),
    Case("no workdir", ["export", "--workdir={}/w", "--to={}/to"], says="holds no run"),
    Case("long name", ["import", "--from={}/" + "x" * 300, "--workdir={}/w"]),
    Case("unknown dtype", ["export", "--workdir={}/w", "--to={}/to", "--dtype=int8"], says="int8"),
]


@pytest.mark.parametrize("case", COMMANDS, ids=name_of)
def test_commands(holds, case):
    assert holds(convert.main, case)[0] == 2


def test_a_refused_import_leaves_nothing(holds, folders, tmp_path):
    """The last check, the values', comes when the workdir is half made."""
    folder = edited_weights(folders, tmp_path, WEIGHTS["NaN"][0])
    argv = ["import", f"--from={folder}", "--workdir={}/w"]
    holds(convert.main, Case("NaN", argv, says="tensor wpe.weight holds NaN"))
    assert not (tmp_path / "case/w").exists()


@pytest.mark.parametrize("size", [0, 1000, 3000, 10000])
def test_a_disk_that_fills_during_import(holds, folders, size):
    """No file may grow beyond `size` bytes: nothing is left, and the same command goes on later."""
    case = Case("full", ["import", f"--from={folders}/gpt2", "--workdir={}/w"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        code, _, err = holds(convert.main, case._replace(says="write"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "File too large" in err
    assert holds(convert.main, case._replace(says="imported"))[0] == 0


def test_a_signal_during_import_leaves_nothing(command, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_job, "read_params", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    argv = ("import", f"--from={folders}/gpt2", f"--workdir={tmp_path}/out/w")
    assert command(convert.main, *argv)[0] == 128 + signal.SIGTERM
    assert not list((tmp_path / "out").iterdir())


def test_leftovers_of_a_killed_import_are_removed(holds, folders, tmp_path):
    def left(path):
        name = scratch_for(path).name.split(".")
        name[-3] = "999999999"  # a process that has ended
        half = path.with_name(".".join(name))
        half.mkdir(parents=True)
        (half / "x").write_text("x")
        return half

    (tmp_path / "case").mkdir()
    half = left(tmp_path / "case/w")
    argv = ["import", f"--from={folders}/gpt2", "--workdir={}/w"]
    assert holds(convert.main, Case("after a kill", argv))[0] == 0
    assert not half.exists() and (tmp_path / "case/w/config.json").exists()


def fuzzed(*valid: bytes, examples: int = 150):
    """A test that runs for damaged copies of `valid`."""

    def decorate(test):
        given = hypothesis.given(raw=mutated(*valid))(test)
        return hypothesis.settings(FUZZ, max_examples=examples)(given)

    return decorate


@fuzzed(
    header(
        {"a": entry(), "b": entry((2, 2), (4, 20)), "__metadata__": {"format": "pt"}}, b"\0" * 20
    )
)
def test_fuzzed_safetensors(tmp_path, raw):
    file = tmp_path / "x"
    file.write_bytes(raw)
    if not refused(SafetensorsFile, file):
        opened = SafetensorsFile(file)
        for name, shape in opened.shapes.items():
            assert opened.read(name).shape == shape


@fuzzed(state(*tensor()), state(*tensor(size=(2, 2), stride=(2, 1))), PICKLES["nested tuples"])
def test_fuzzed_pickles(tmp_path, raw):
    file = tmp_path / "x"
    zipped(file, raw)
    if not refused(TorchFile, file):
        opened = TorchFile(file)
        for name, shape in opened.shapes.items():
            assert opened.read(name).shape == shape


def a_zip() -> bytes:
    file = io.BytesIO()
    zipped(file, state(*tensor()))
    return file.getvalue()


@fuzzed(a_zip())
def test_fuzzed_torch_files(folders, tmp_path, raw):
    folder = tmp_path / "torch"
    if not folder.exists():
        shutil.copytree(folders / "torch", folder)
    (folder / "pytorch_model.bin").write_bytes(raw)
    assert refused(imported, folder)


INDEX = (OPENAI / "model.ckpt.index").read_bytes()


@fuzzed(INDEX)
def test_fuzzed_tensorflow_index(folders, tmp_path, raw):
    folder = tmp_path / "tf"
    if not folder.exists():
        folder.mkdir()
        data = "model.ckpt.data-00000-of-00001"
        os.symlink(OPENAI / data, folder / data)
    (folder / "model.ckpt.index").write_bytes(raw)
    if not refused(TfCheckpoint, folder):
        opened = TfCheckpoint(folder)
        for name, shape in opened.shapes.items():
            assert opened.read(name).shape == shape


CONFIG = {
    "model_type": "gpt2",
    **dict(vocab_size=257, n_positions=8, n_embd=8, n_layer=1, n_head=2),
    **dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, eos_token_id=256),
}


@fuzzed(json.dumps(CONFIG).encode())
def test_fuzzed_configs(folders, tmp_path, raw):
    folder = tmp_path / "gpt2"
    if not folder.exists():
        shutil.copytree(folders / "gpt2", folder)
    (folder / "config.json").write_bytes(raw)
    if not refused(open_folder, folder):
        assert open_folder(folder).model.embed_dim == 8


TOKENIZERS = {
    "vocab.json": b'{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}',
    "merges.txt": b"#version: 0.2\na b\n",
    "tokenizer.json": json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "model": {"type": "BPE", "vocab": {"a": 0, "<|endoftext|>": 1}, "merges": []},
        }
    ).encode(),
    "config.json": b'{"model_type": "gpt2", "eos_token_id": 1}',
}


@hypothesis.settings(FUZZ, max_examples=300)
@hypothesis.given(data=st.data())
def test_fuzzed_tokenizers(tmp_path, data):
    name = data.draw(st.sampled_from(sorted(TOKENIZERS)))
    for file, content in TOKENIZERS.items():
        (tmp_path / file).write_bytes(content)
    if name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(data.draw(mutated(TOKENIZERS[name])))
    if not refused(read_tokenizer, tmp_path):
        tokenizer = read_tokenizer(tmp_path)
        assert tokenizer.encode("ab a").max(initial=0) < tokenizer.vocab_size
        tokenizer.decode([0, 1])
