"""The plan command: for this machine's devices, and for slices of TPUs without one."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxgpt import plan
from jaxgpt.cli.flags import load_file
from jaxgpt.config import Config
from jaxgpt.config.validate import validate
from jaxgpt.parameters.flops import flops_per_token
from jaxgpt.planning import estimate, hardware, topology
from jaxgpt.planning.hardware import TPUS, Chip, gpu_chip, local_chip
from jaxgpt.planning.search import changed, cheapest_that_fits, meshes, products, search, smaller
from jaxgpt.system.errors import BadInput
from tests.conftest import ROOT

KEYS = set(
    "topology devices parameters fits bytes_per_device largest flops_per_step"
    " compiled_flops_per_step collectives roofline_seconds bound_by compile_seconds".split()
)
CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        batch_size=16, grad_accum=2,
        model=ModelConfig(max_seq_len=32, num_layers=3, num_heads=4, embed_dim=64),
        data=DataConfig(tokenizer="byte"), mesh=MeshConfig(data=4, fsdp=-1),
    )
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return f"--config={tmp_path}/c.py"


def test_the_devices_here(command, file):
    code, out, err = command(plan.main, file)
    assert code == 0, err
    found = json.loads(out)
    assert set(found) >= KEYS and found["devices"] == 8 and found["fits"]
    memory, cfg = found["bytes_per_device"], validate(load_file(file.split("=")[1])).model
    cfg.vocab_size = 257
    assert found["flops_per_step"] == 16 * 32 * flops_per_token(cfg)
    assert memory["limit"] is None and found["roofline_seconds"] is None
    assert memory["total"] >= memory["arguments"] + memory["temporaries"]
    # parameters, two moments: split over fsdp=2, but for vectors
    assert 12 * found["parameters"] // 2 < memory["arguments"] < 12 * found["parameters"]
    sizes = [array["bytes"] for array in found["largest"]]
    assert len(sizes) == 10 and sizes == sorted(sizes, reverse=True)
    axes = {row["axis"] for row in found["collectives"]}
    assert "fsdp" in axes and axes <= {"data", "fsdp", "data+fsdp"}
    assert "parameters" in err and "network" in err


def test_bad_input(command, file):
    for flags, message in (
        (["--topology=v9:2"], "not GENERATION:SHAPE"),
        (["--topology=v5e"], "not GENERATION:SHAPE"),
        (["--topology=h200:0x8"], "h200:2x8"),
        (["--topology=h200:2x2x2"], "h200:2x8"),
        (["--price=-1"], "--price=-1"),
        (["--slices=2"], "--slices=2 needs a --topology of TPUs"),
        (["--slices=2", "--topology=h200:8"], "written h200:2x8"),
        (["--slices=0"], "--slices=0 must be at least 1"),
        (["--slice_bandwidth=9"], "--slice_bandwidth=9.0 needs several --slices"),
        (["--slices=2", "--topology=v5e:2x2", "--slice_bandwidth=-1"], "a number of GB/s"),
        (["--search"], "give --topology"),
        (["--config.data.tokenizer=char"], "set model.vocab_size"),
        (["--config.mesh.data=3"], "devices"),
    ):
        code, out, err = command(plan.main, file, *flags)
        assert code == 2 and out == "" and message in err and "Traceback" not in err, err


def fake(fits):
    recompute = {"none": 0, "dots": 0.5, "full": 1, "offload": 1}

    def plan_of(config: Config) -> dict:
        seconds = {"compute": config.grad_accum + recompute[config.compute.remat], "memory": 0.1}
        return {
            "fits": fits(config),
            "roofline_seconds": seconds,
            "bound_by": "compute",
            "bytes_per_device": {"total": 1},
        }

    return plan_of


def test_the_cheapest_change_that_fits():
    config = changed(Config(), {"batch_size": 16, "mesh.data": 2})
    assert cheapest_that_fits(config, fake(lambda c: c.compute.remat != "none"))[0] == {
        "compute.remat": "dots"
    }
    assert cheapest_that_fits(config, fake(lambda c: c.grad_accum > 1))[0] == {"grad_accum": 2}
    both = cheapest_that_fits(config, fake(lambda c: c.grad_accum > 2))
    assert both[0] == {"compute.remat": "full", "grad_accum": 4}
    assert cheapest_that_fits(config, fake(lambda c: False)) is None
    assert config.grad_accum == 1 and config.compute.remat == "none", "the config stays as it is"
    offloaded = changed(config, {"compute.remat": "offload"})
    found = cheapest_that_fits(offloaded, fake(lambda c: c.grad_accum > 2))
    assert found[0] == {"compute.remat": "offload", "grad_accum": 4}
    spread = [change for change in smaller(config) if change.get("mesh.fsdp")]
    assert spread[0] == {"mesh.data": 1, "mesh.fsdp": -1}


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("least", [7, 11])
def test_where_nothing_fits_the_nearest_is_named(command, file, monkeypatch, search, least):
    """Of devices of 10 GiB, where a step needs `least` and 1 for each row of the microbatch."""

    def plan_of(config, devices, chip):
        total = least + config.batch_size // config.grad_accum - (config.compute.remat == "full")
        return {
            "devices": 1,
            "slices": 1,
            "parameters": 1,
            "active_parameters": 1,
            "attention": "xla",
            "mesh": {"data": 1},
            "tokens_per_step": 8,
            "largest": [],
            "collectives": [],
            "compiled_flops_per_step": None,
            "fits": total <= 10,
            "over_by": (total - 10) * 2**30,
            "bytes_per_device": {"arguments": 1, "temporaries": 1, "limit": 10 * 2**30}
            | {"total": total * 2**30},
            "roofline_seconds": {"compute": 1.0},
            "bound_by": "compute",
            "compile_seconds": 0.0,
        }

    monkeypatch.setattr(estimate, "make_plan", plan_of)
    monkeypatch.setattr(hardware, "devices_of", lambda topology, slices: ([None], TPUS["v5e"]))
    monkeypatch.setattr(hardware, "use_compilers_alone", lambda: None)
    flags = ["--topology=v5e:1x1", "--config.batch_size=4", "--config.grad_accum=1"]
    flags += ["--config.mesh.data=1", "--config.mesh.fsdp=1"] + ["--search"] * search
    code, out, err = command(plan.main, file, *flags)
    found = json.loads(out.splitlines()[-1])
    assert not found["fits"] and "fits      NO" not in err.splitlines()[-1]
    if least == 7:
        assert code == 0 and "nearest" not in found and "nothing   that was tried" not in err
        return
    assert code == 1 and found.get("suggestion") is None and not found.get("search")
    assert found["nearest"]["change"] == {"compute.remat": "full", "grad_accum": 4}
    assert "nothing   that was tried fits; the nearest is --config.grad_accum=4" in err
    assert "(11.00 GiB" in err and "1.00 too many" in err


def test_the_devices_here_are_known_by_their_kind(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert local_chip("TPU v5 lite", None) == TPUS["v5e"]
    assert local_chip("TPU v6 lite", None) == TPUS["v6e"]
    assert local_chip("TPU v5", 7) == dataclasses.replace(TPUS["v5p"], hbm=7)
    assert local_chip("NVIDIA H100 80GB HBM3", None) == gpu_chip("h100")
    assert local_chip("NVIDIA H100 PCIe", None) is None  # half as fast: not the one described
    assert local_chip("cpu", None) is None


def test_a_gpu_s_memory_is_jax_s_share_of_it(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    half = gpu_chip("h200").hbm
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert gpu_chip("h200").hbm == half * 3 // 2 and half == 139 * 2**30 // 2
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(BadInput, match="MEM_FRACTION=most"):
        gpu_chip("h200")


def test_the_network_s_time():
    """By hand: a torus sends along each axis at once; hosts and slices share all their devices'
    network cards."""
    torus = [SimpleNamespace(coords=(x, y, 0)) for x in range(4) for y in range(4)]
    chip = Chip(1.0, 1.0, network=100.0, hbm=1, between=10.0)
    assert chip.seconds(600.0, torus[:4]) == 6.0 and chip.seconds(600.0, torus) == 3.0
    both = [SimpleNamespace(coords=(x, 0, 0), slice_index=s) for s in (0, 1) for x in range(4)]
    assert chip.seconds(600.0, both[:4]) == 6.0 and chip.seconds(600.0, both[4:]) == 6.0
    assert chip.seconds(600.0, both) == 15.0 and chip.seconds(600.0, both[::4]) == 60.0
    chip = dataclasses.replace(chip, joins="process_index")
    hosts = [SimpleNamespace(process_index=host) for host in (0, 0, 0, 0, 1, 1, 1, 1)]
    assert chip.seconds(600.0, hosts[:4]) == 6.0
    assert chip.seconds(600.0, hosts) == 15.0  # 4 cards of 10 a host
    assert chip.seconds(600.0, hosts[::4]) == 60.0  # 1 card a host


def test_the_search_ranks_what_fits(capsys):
    config = changed(Config(), {"batch_size": 16})
    plan_of = fake(
        lambda c: c.batch_size <= 64 and (c.grad_accum >= 2 or c.compute.remat == "full")
    )
    found, lines = search(config, 8, plan_of), capsys.readouterr().err.splitlines()
    batch = [row["change"].get("batch_size", 16) for row in found]
    each = [row["seconds"] / size for row, size in zip(found, batch, strict=True)]
    assert each == sorted(each) and batch[:2] == [64, 32] and batch[2:] == [16] * (len(found) - 2)
    assert {row["change"]["mesh.tensor"] for row in found} >= {1, 2}
    tried = [row["change"] for row in found]
    assert len(tried) == len({str(change) for change in tried})
    best = found[2]["change"]
    assert found[2]["seconds"] == 2 and (best["grad_accum"], best["compute.remat"]) in (
        (1, "full"),
        (2, "none"),
    )
    assert found[0]["change"] == best | {"batch_size": 64}
    assert sum("bound by" in line for line in lines) == len(found)
    assert any("batch_size=128: does not fit" in line for line in lines)


def test_the_search_tries_every_axis_that_the_model_admits():
    """Few meshes; of a mixture of long sequences all axes, and products of the fastest two."""
    model = {"model.num_experts": 8, "model.expert_dim": 64, "model.max_seq_len": 2**15}
    config = changed(Config(), model | {"batch_size": 64, "model.num_layers": 16})
    found = meshes(config, 64)
    sizes = {axis: {mesh[axis] for mesh in found} - {1} for axis in found[0]}
    assert sizes["mesh.expert"] == {2, 4, 8}, "eight experts"
    assert sizes["mesh.context"] == {2, 4, 8, 16} and sizes["mesh.tensor"] == {2, 4}
    assert len(found) < 20 and len({str(mesh) for mesh in found}) == len(found)
    assert all(math.prod(mesh.values()) == 64 for mesh in found)
    rows = [{"change": mesh} for mesh in found if mesh["mesh.expert"] == 8]
    rows += [{"change": mesh} for mesh in found if mesh["mesh.context"] == 2]
    (product,) = products(config, rows)
    assert product == rows[0]["change"] | {"mesh.context": 2, "mesh.fsdp": 4}
    dense = changed(Config(), {"batch_size": 64})
    assert all(mesh["mesh.expert"] == mesh["mesh.context"] == 1 for mesh in meshes(dense, 64))
    assert {mesh["mesh.data"] % 2 for mesh in meshes(dense, 64, slices=2)[1:]} == {0}


def planned(args: str, xla_flags: str = "") -> tuple[dict, str]:
    """The command as a user runs it, in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"XLA_FLAGS": xla_flags}
    argv = [sys.executable, "-m", "jaxgpt.plan", *args.split()]
    found = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout), found.stderr


@pytest.mark.tpu_compile
def test_another_process_may_use_libtpu():
    """Here it is this one that holds libtpu's lock, or whoever holds it already."""
    with open("/tmp/libtpu_lockfile", "a") as lock:
        with contextlib.suppress(BlockingIOError):
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        code = (
            "from jaxgpt.planning.hardware import *; use_compilers_alone();"
            " print(len(devices_of('v5e:2x4')[0]))"
        )
        argv = [sys.executable, "-c", code]
        found = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert (found.returncode, found.stdout) == (0, "8\n"), found.stderr


@pytest.mark.tpu_compile
def test_gpt2_on_eight_v5e_chips():
    """Data parallel: splash runs its forward once, five all-reduces at most, no all-gather."""
    found, err = planned(
        "--config=configs/small.py --topology=v5e:2x4 --config.batch_size=64"
        " --config.grad_accum=1 --config.model.vocab_size=50257 --config.compute.remat=dots"
        " --price=1.2"
    )
    assert set(found) >= KEYS and found["fits"] and found["parameters"] == 124_439_808
    assert found["attention"] == "splash"
    assert found["bytes_per_device"]["temporaries"] <= 2.5 * 2**30
    assert found["bytes_per_device"]["limit"] == TPUS["v5e"].hbm
    assert {(row["kind"], row["axis"]) for row in found["collectives"]} == {("all-reduce", "data")}
    assert found["collectives"][0]["count"] <= 12 * 2 + 3, (
        "two in the loop over 12 layers, three beside it"
    )
    assert 0.9 < found["compiled_flops_per_step"] / found["flops_per_step"] < 1.3
    assert (
        found["bound_by"] in found["roofline_seconds"] and found["dollars_per_billion_tokens"] > 0
    )
    assert "Source Location" not in err and len(err.splitlines()) < 30, err


@pytest.mark.tpu_compile
def test_what_does_not_fit_is_an_answer():
    found, err = planned(
        "--config=configs/small.py --topology=v5e:2x4 --config.batch_size=512 --config.grad_accum=1"
    )
    assert not found["fits"] and found["over_by"] > 2**30
    assert found["suggestion"]["fits"] and found["suggestion"]["change"], err
    assert "fits      NO" in err and "try       --config." in err


def rows_of(found: dict) -> dict[str, dict]:
    return {row["kind"]: row for row in found["collectives"]}


@pytest.mark.tpu_compile
def test_fsdp_gathers_each_weight_twice_and_scatters_its_gradient():
    """On 4 x 4 chips, where a sum over all of `fsdp` at once would be an all-reduce."""
    found, _ = planned(
        "--config=configs/modern_1b.py --topology=v5e:4x4 --config.batch_size=16"
        " --config.grad_accum=1 --config.model.max_seq_len=2048 --config.model.num_layers=8"
    )
    rows, parameters = rows_of(found), found["parameters"]
    assert {row["axis"] for row in found["collectives"]} == {"fsdp"}
    whole = 2 * parameters  # bytes in bfloat16
    ways = ("all-gather", "collective-permute")  # small ones may go as a chain of permutes
    given = sum(rows[way]["bytes"] for way in ways if way in rows)
    assert 2.3 * whole < given < 2.6 * whole, "once forward, once backward, in two phases: 1 + 1/4"
    assert 1.2 * whole < rows["reduce-scatter"]["bytes"] < 1.35 * whole, "two phases"
    assert rows["all-reduce"]["bytes"] < 0.001 * whole


@pytest.mark.tpu_compile
def test_a_mixture_sends_rows_scatters_gradients_and_multiplies_by_few_experts():
    """Two of 16 experts a token, which are on two groups of chips: a product over all experts would
    be six times the model's FLOPs."""
    found, err = planned(
        "--config=configs/qwen3_30b_a3b.py --topology=v5p:2x2x2 --config.batch_size=8"
        " --config.model.num_experts=16 --config.model.experts_per_token=2"
        " --config.model.num_layers=2 --config.model.max_seq_len=512 --config.model.vocab_size=2048"
        " --config.mesh.fsdp=4 --config.mesh.expert=2"
    )
    rows = {(row["kind"], row["axis"]): row["bytes"] for row in found["collectives"]}
    assert rows["ragged-all-to-all", "expert"] > 0
    summed = sum(size for (kind, _), size in rows.items() if kind == "all-reduce")
    assert summed < 0.01 * found["parameters"]
    assert 1.2 < found["compiled_flops_per_step"] / found["flops_per_step"] < 1.8
    idle = 2 * 14 * 3 * 2048 * 768
    assert found["active_parameters"] == found["parameters"] - idle
    assert f"goes through {found['active_parameters']:,}" in err


@pytest.mark.tpu_compile
@pytest.mark.parametrize("split", [False, True])
def test_tensor_parallelism_sums_twice_a_block(split):
    layers = 4
    found, _ = planned(
        "--config=configs/modern_1b.py --topology=v5e:2x4 --config.batch_size=8"
        " --config.grad_accum=1 --config.model.max_seq_len=1024 --config.compute.remat=none"
        f" --config.model.num_layers={layers} --config.mesh.fsdp=1 --config.mesh.tensor=8"
        f" --config.mesh.sequence_activations={str(split).lower()}"
    )
    rows = rows_of(found)
    each = 8 * 1024 * 2048 * 2  # the residual stream, bytes
    assert {row["axis"] for row in found["collectives"]} == {"tensor"}
    sums = rows["all-reduce"]["bytes"] / each
    if split:  # gathers and scatters, two each a block, both ways; gathers once more for weights
        moved = sum(rows[kind]["bytes"] for kind in rows if kind != "all-reduce") / each
        assert sums < 0.1 and 8 * layers <= moved + 8 / 8 * layers and moved < 13 * layers
    else:
        assert set(rows) == {"all-reduce"} and 4 * layers <= sums <= 4 * layers + 2.1


@pytest.mark.gpu_compile
def test_gpt2_on_described_gpus():
    """Data parallel over two hosts: cuDNN's attention, compiled without a GPU; sums only."""
    found, err = planned(
        "--config=configs/small.py --topology=h200:2x4 --config.batch_size=64"
        " --config.grad_accum=1 --config.model.vocab_size=50257 --price=4"
    )
    assert set(found) >= KEYS and found["fits"] and found["parameters"] == 124_439_808
    assert found["devices"] == 8 and found["attention"] == "cudnn"
    memory = found["bytes_per_device"]
    assert 12 * 124_439_808 <= memory["arguments"] < 12.3 * 124_439_808
    # what 12 layers keep of 8 sequences, in arrays of B T D, in bfloat16
    stream = 12 * 8 * 1024 * 768 * 2
    assert 14 * stream < memory["temporaries"] < 26 * stream
    assert {(row["kind"], row["axis"]) for row in found["collectives"]} == {("all-reduce", "data")}
    # layers' gradients in bfloat16, the table's in bfloat16 (logits) and float32 (lookup)
    summed = 2 * 86e6 + 6 * 50304 * 768
    assert 0.95 * summed < found["collectives"][0]["bytes"] < 1.05 * summed
    assert 0.95 < found["compiled_flops_per_step"] / found["flops_per_step"] < 1.15
    assert (
        found["bound_by"] in found["roofline_seconds"] and found["dollars_per_billion_tokens"] > 0
    )
    assert "cuInit" not in err and len(err.splitlines()) < 30, err


@pytest.mark.gpu_compile
def test_fsdp_on_described_gpus():
    """With the flags of `launch/gpu_host.sh`, which an unknown one among them would end."""
    script = (ROOT / "launch/gpu_host.sh").read_text()
    flags = re.findall(r'^flags\+?="(.*)"$', script, re.M)
    assert len(flags) == 3
    found, _ = planned(
        "--config=configs/modern_1b.py --topology=h100:8 --config.batch_size=8"
        " --config.grad_accum=1 --config.model.max_seq_len=1024 --config.model.num_layers=4"
        " --config.mesh.data=1 --config.mesh.fsdp=8 --config.compute.remat=none",
        "".join(flags),
    )
    rows, whole = rows_of(found), 2 * found["parameters"]
    assert {row["axis"] for row in found["collectives"]} == {"fsdp"}
    assert 1.5 * whole < rows["all-gather"]["bytes"] < 2.1 * whole, "forward and backward"
    assert 0.9 * whole < rows["reduce-scatter"]["bytes"] < 1.1 * whole
    assert rows.get("all-reduce", {"bytes": 0})["bytes"] < 0.01 * whole


def test_every_name_has_a_chip():
    assert set(topology.TPUS) == set(hardware.TPUS) and set(topology.GPUS) == set(hardware.GPUS)
