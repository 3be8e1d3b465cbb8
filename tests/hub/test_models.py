"""Models by their name on the hub: what is downloaded, what is pinned, and without a network."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from huggingface_hub import constants

from jaxgpt import convert, train
from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config.stored import read_config
from jaxgpt.hub import client
from jaxgpt.hub.models import located
from jaxgpt.interchange.folder import open_folder
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import ROOT, mesh_of, tiny_config
from tests.hub.conftest import forget
from tests.interchange.test_import_export import LLAMA, abstract_params, model_folder

ROWS = [{"instruction": "Greet", "input": "Ben", "output": "Hello Ben!"}] * 16


def commit_model(hub, tmp_path, **model) -> str:
    """A repository as they are: beside the safetensors other weights, and code."""
    folder = tmp_path / f"{len(hub.files)}"
    model_folder(folder, **model)
    for file in ("pytorch_model.bin", "modeling.py", "onnx/model.safetensors", "tf_model.h5"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"not to be downloaded")
    return hub.commit("models", "tests/tiny", folder)


def offline(monkeypatch, value=True):
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)


def test_a_model_is_imported_by_its_name(hub, command, tmp_path):
    commit = commit_model(hub, tmp_path)
    abstract = abstract_params(open_folder(tmp_path / "0").model)
    for source, workdir in (("tests/tiny", "w"), (tmp_path / "0", "local")):
        code, _, err = command(convert.main, "import", f"--from={source}", f"--workdir={workdir}")
        assert code == 0 and f" into {workdir}\n" in err, err
        assert err.count("hub       model") == (source == "tests/tiny"), "said once"
    assert hub.downloads() == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    one, two = (Checkpoints(tmp_path / w, read_only=True) for w in ("w", "local"))
    assert one.meta(0)["imported"] == f"tests/tiny@{commit}"
    assert two.meta(0)["imported"] == str(tmp_path / "0")
    with jax.set_mesh(mesh_of(tiny_config())):
        params = [w.restore_params(0, abstract) for w in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_pickles_only_where_there_is_nothing_else(hub, tmp_path):
    folder = tmp_path / "old"
    model_folder(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.commit("models", "tests/old", folder)
    found = located("tests/old")
    assert sorted(os.listdir(found)) == sorted(os.listdir(folder)) and len(os.listdir(found)) == 4


def test_a_tokenizer_comes_without_the_weights(hub, tmp_path):
    commit_model(hub, tmp_path)
    tokenizer = make_tokenizer("gpt2:tests/tiny")
    assert (
        tokenizer.encode("Hi").tolist()
        == make_tokenizer(f"gpt2:{tmp_path}/0").encode("Hi").tolist()
    )
    assert hub.downloads() == {"config.json", "vocab.json", "merges.txt"}


def fine_tune(command, *flags):
    return command(
        *(train.main, f"--config={ROOT}/configs/finetune.py", "--config.init_from=tests/tiny"),
        *("--workdir=w", "--config.data.source=sft:hf:tests/chats", "--config.batch_size=8"),
        *(
            "--config.model.max_seq_len=24",
            "--config.num_epochs=0",
            "--config.sample.max_new_tokens=0",
            *flags,
        ),
    )


@pytest.mark.slow
def test_a_resumed_run_takes_the_same_files(hub, command, tmp_path, monkeypatch):
    """Whatever the hub has meanwhile, and without it."""
    model = commit_model(hub, tmp_path, **LLAMA)
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats/rows.json").write_text(json.dumps(ROWS))
    data = hub.commit("datasets", "tests/chats", tmp_path / "chats")
    code, _, err = fine_tune(command, "--config.num_steps=1")
    assert code == 0, err
    config = read_config(epath.Path("w"))
    assert config.init_from == f"tests/tiny@{model}"
    assert config.data.tokenizer == f"gpt2:tests/tiny@{model}"
    assert config.data.source == f"sft:hf:tests/chats@{data}"
    commit_model(hub, tmp_path, **LLAMA, norm_eps=1e-3)
    (tmp_path / "chats/rows.json").write_text(json.dumps(ROWS[:7]))
    hub.commit("datasets", "tests/chats", tmp_path / "chats")
    count = len(hub.requests)
    for _ in range(2):
        forget()
        code, _, err = fine_tune(command, "--config.num_steps=1")
        assert code == 0 and "finished  w has all 1 of num_steps=1 steps" in err, err
        assert len(hub.requests) == count, "all of it is in the cache"
        offline(monkeypatch)
    offline(monkeypatch, False)
    code, _, err = fine_tune(command, "--config.num_steps=1", "--config.init_from=tests/tiny@main")
    assert code == 2 and f"init_from: tests/tiny@{model} -> tests/tiny@" in err


def test_a_local_folder_wins(hub, tmp_path):
    commit_model(hub, tmp_path)
    (tmp_path / "tests").mkdir()
    model_folder(tmp_path / "tests/tiny")
    assert located("tests/tiny") == "tests/tiny" and not hub.requests
    assert located("tests/none") == "tests/none", "a misspelt one is no name of the hub's either"


def test_without_the_hub_the_cache_serves(hub, tmp_path, monkeypatch, capsys):
    commit_model(hub, tmp_path)
    for prepare in (lambda: offline(monkeypatch), lambda: setattr(hub, "is_down", True)):
        prepare()
        with pytest.raises(BadInput, match="the cache .* does not hold all of its files; .*: "):
            located("tests/tiny")
        hub.is_down = False
        offline(monkeypatch, False)
    folder = located("tests/tiny")
    offline(monkeypatch)
    assert located("tests/tiny") == folder
    offline(monkeypatch, False)
    hub.is_down = True
    forget()
    assert located("tests/tiny") == folder
    assert "hub       model tests/tiny is that of the cache, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "tests/none",
            "tests/none is no folder here, and the hub has no model of that name, or it is",
        ),
        ("tests/tiny@v9", "model tests/tiny has no revision 'v9' on the hub"),
        ("tests/ti..ny", "model tests/ti..ny cannot be had from the hub: HFValidationError"),
    ],
)
def test_what_the_hub_refuses(hub, command, tmp_path, name, message):
    commit_model(hub, tmp_path)
    for argv in (
        (convert.main, "import", f"--from={name}", "--workdir=w"),
        (train.main, f"--config={ROOT}/configs/finetune.py", f"--config.init_from={name}"),
        (train.main, f"--config={ROOT}/configs/tiny.py", f"--config.data.tokenizer=hf:{name}"),
    ):
        code, _, err = command(*argv)
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "w").exists() and not (tmp_path / "runs").exists()


def test_the_extra_that_is_missing_is_named(hub, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = command(convert.main, "import", "--from=tests/tiny", "--workdir=w")
    assert code == 2 and "model tests/tiny of the Hugging Face hub needs huggingface_hub" in err
    assert "pip install -e '.[hub]'" in err


def test_a_hub_that_does_not_answer_is_given_up_soon(hub, monkeypatch):
    monkeypatch.setattr(client, "TIMEOUT", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        began = time.monotonic()
        with pytest.raises(
            BadInput, match=f"{address} cannot be reached .ReadTimeout.*: try again"
        ):
            located("tests/tiny")
        assert time.monotonic() - began < 5


def test_without_a_network_one_line_and_soon(tmp_path):
    """In a process of its own, as the library reads its settings once."""
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    began = time.monotonic()
    argv = ["-m", "jaxgpt.convert", "import", "--from=openai-community/gpt2", "--workdir=w"]
    done = subprocess.run(
        [sys.executable, *argv],
        env=env | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith(
        "error: model openai-community/gpt2 is no folder"
    )
    assert "http://127.0.0.1:9 cannot be reached" in done.stderr
    assert time.monotonic() - began < 30
