"""Libraries for accelerators that a machine lacks write nothing; those that it has, everything."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from jaxgpt.system import accelerators
from tests.conftest import config_flag

TPU, NETWORK_CARD, DISK = ("0x1ae0", "0x120000"), ("0x1ae0", "0x020000"), ("0x1ae0", "0x010802")
OTHERS = ("0x8086", "0x120000")


@pytest.mark.parametrize(
    "files, bus, asked_for, left_out",
    [
        ([], [], "", {"libtpu", "cuda"}),
        ([], [NETWORK_CARD, DISK, OTHERS], "cpu", {"libtpu", "cuda"}),
        (["accel0"], [], "", {"cuda"}),
        (["vfio/0"], [], "", {"cuda"}),
        (["vfio/vfio"], [], "", {"libtpu", "cuda"}),  # of any machine that runs virtual ones
        ([], [OTHERS, TPU], "", {"cuda"}),  # a container without the TPU's file: an error to see
        ([], [], "tpu,cpu", {"cuda"}),
        (["nvidia0"], [], "", {"libtpu"}),
        ([], [], "cuda", {"libtpu"}),
    ],
)
def test_what_is_left_out(files, bus, asked_for, left_out, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev" / name).touch()
    for number, (vendor, kind) in enumerate(bus):
        (tmp_path / f"pci/{number}").mkdir(parents=True)
        (tmp_path / f"pci/{number}/vendor").write_text(vendor + "\n")
        (tmp_path / f"pci/{number}/class").write_text(kind + "\n")
    for table in ("TPU_FILES", "NVIDIA_FILES"):
        moved = tuple(f"{tmp_path}{file}" for file in getattr(accelerators, table))
        monkeypatch.setattr(accelerators, table, moved)
    monkeypatch.setattr(accelerators, "PCI", str(tmp_path / "pci"))
    monkeypatch.setenv("JAX_PLATFORMS", asked_for)
    filtered = []
    monkeypatch.setattr(
        accelerators, "getLogger", lambda name: type("", (), {"addFilter": filtered.append})
    )
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "libtpu", raising=False)
        accelerators.leave_out_absent()
        found = {"libtpu"} if sys.modules.get("libtpu", ...) is None else set()
        accelerators.allow_absent()
        assert sys.modules.get("libtpu", ...) is not None
        sys.modules.pop("libtpu", None)
    assert found | ({"cuda"} if filtered else set()) == left_out


def test_a_run_without_accelerators_says_nothing_of_them(tmp_path):
    """With the libtpu and the CUDA plugin that are installed, or stand-ins that write."""
    loud = "import sys\nsys.stderr.write('libtpu is loaded\\n')\n"
    (tmp_path / "libtpu.py").write_text(loud + "get_library_path = lambda: '/nowhere'\n")
    (tmp_path / "jax_plugins/xla_cuda99").mkdir(parents=True)
    plugin = "def initialize():\n    raise RuntimeError('no CUDA here')\n"
    (tmp_path / "jax_plugins/xla_cuda99/__init__.py").write_text(plugin)
    fields = (
        "batch_size=8, model=ModelConfig(max_seq_len=8, num_layers=1, num_heads=1, embed_dim=8)"
    )
    fields += ", data=DataConfig(tokenizer='byte')"
    argv = [sys.executable, "-m", "jaxgpt.plan", config_flag(tmp_path, fields)]
    ours = ("JAX_PLATFORMS", "TPU_LIBRARY_PATH")  # libtpu sets the latter where it is imported
    env = {k: v for k, v in os.environ.items() if k not in ours}
    stand_ins = f"{tmp_path}:{env.get('PYTHONPATH', '')}"
    for paths in [env.get("PYTHONPATH", "")] * has_libtpu() + [stand_ins]:
        found = subprocess.run(
            argv, env=env | {"PYTHONPATH": paths}, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        kinds = {line.split()[0] for line in found.stderr.splitlines() if line[0] != " "}
        assert kinds <= set("compile devices model memory compute network compiled".split())
        assert json.loads(found.stdout)["topology"] == "cpu"


def has_libtpu() -> bool:
    accelerators.allow_absent()
    return importlib.util.find_spec("libtpu") is not None
