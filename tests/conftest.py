"""Eight virtual CPU devices, checked array shapes, one compilation cache for the whole run."""

import gc
import math
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # no test asks the real hub


# jaxlib 0.10 compiles in a third of the time where LLVM's IR is made directly; later ones have no
# choice.
QUICK = " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for so many CPU devices, compiled quickly: the same program, less optimised
    code. All devices run collectives in the program's order: with XLA's concurrent scheduler each
    may start another of two independent ones first, and then they wait for each other for ever."""
    return (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        " --xla_cpu_parallel_codegen_split_count=1"
        " --xla_cpu_enable_concurrency_optimized_scheduler=false" + QUICK
    )


os.environ["XLA_FLAGS"] = xla_flags(8)
CACHE = Path(tempfile.gettempdir()) / f"jaxgpt-tests-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("jaxgpt", "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from jaxgpt.cli.run import run  # noqa: E402
from jaxgpt.config import (  # noqa: E402
    ComputeConfig,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
)
from jaxgpt.parallel.mesh import AXES, make_mesh  # noqa: E402

# Tracing makes many objects, few of them garbage: by default a tenth of the time is collections.
gc.set_threshold(50_000, 20, 100)

ROOT = Path(__file__).parent.parent
PATIENCE = 900  # seconds: ends what hangs, and is more than any test takes beside other work
CORPUS = (ROOT / "LICENSE").read_text()  # real English that every checkout has


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker takes neighbouring tests, which share fixtures and programs, until all are taken;
    then it takes over half of what another has left."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's prepared corpora."""
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of four documents of the licence's text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    quarter = len(CORPUS) // 4
    for i in range(4):
        (folder / f"{i}.txt").write_text(CORPUS[i * quarter : (i + 1) * quarter])
    return folder


def config_flag(folder: Path, fields: str = "") -> str:
    """Writes a config file that returns `Config(fields)`; returns the flag that names it."""
    text = f"from jaxgpt.config import *\ndef get_config():\n    return Config({fields})\n"
    (folder / "c.py").write_text(text)
    return f"--config={folder}/c.py"


def wait_until(ready, *processes) -> None:
    """Waits until `ready()`; fails once one of `processes` ends before that, or nothing happens."""
    until = time.monotonic() + PATIENCE
    while not ready():
        ended = [process.communicate() for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < until, ended
        time.sleep(0.01)


def tiny_config(shape=(1, 1, 1), compute=None, lora=None, **model) -> Config:
    """A model small enough to compile in a second, odd enough to catch a swapped axis, its layers
    in a loop: unrolled ones take longer to compile.

    `compute` and `lora` hold fields of these groups; the others are the model's.
    """
    fields = dict(vocab_size=203, max_seq_len=24, num_layers=2, num_heads=4, embed_dim=32)
    return Config(
        num_steps=10,
        batch_size=8,
        model=ModelConfig(**(fields | model)).with_sizes(),
        compute=ComputeConfig(**({"scan_layers": "true"} | (compute or {}))),
        lora=LoraConfig(**(lora or {})),
        data=DataConfig(),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=3),
        mesh=MeshConfig(*shape),
    )


def mesh_of(config: Config):
    """The config's mesh over as many of the eight devices as it needs."""
    size = math.prod(getattr(config.mesh, axis) for axis in AXES)
    return make_mesh(config, jax.devices()[:size])


def random_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A host batch of random tokens, [grad_accum, batch, seq_len]."""
    rng = np.random.default_rng(seed)
    shape = (
        config.grad_accum,
        config.batch_size // config.grad_accum,
        config.model.max_seq_len + 1,
    )
    ids = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    return {"inputs": ids[..., :-1], "targets": ids[..., 1:]}


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command in this process: `command(main, *args) -> (exit code, stdout, stderr)`."""

    def call(main, *args: str):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run(main)
        out = capsys.readouterr()
        return exit_.value.code, out.out, out.err

    return call
