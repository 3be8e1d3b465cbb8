"""`jaxgpt.benchmark`: the figures of the contract, and where the time goes."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jaxgpt.jobs.benchmark import _shares
from jaxgpt.planning.profile import _own_durations, part_of
from jaxgpt.planning.program import Program

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        batch_size=8,
        model=ModelConfig(max_seq_len=64, num_layers=2, num_heads=2, embed_dim=32),
        data=DataConfig(source="text:{0}/*.txt", cache_dir="{0}/cache"),
    )
"""
CONTRACT = (
    *("step_seconds", "tokens_per_second", "mfu", "matmul_flops_per_second", "peak_memory_bytes"),
    *("compile_seconds", "first_step_seconds", "decode_tokens_per_second"),
)
HLO = """HloModule m

%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8] parameter(0)
  ROOT %d = f32[8,8] dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  %f = f32[8,8] fusion(%x), kind=kOutput, calls=%fused
  %g = f32[8,8] dot(%f, %f), metadata={op_name="jit(f)/transpose(jvp(attention))/dot_general"}
  %h = f32[8,8] add(%g, %g), metadata={op_name="jit(f)/optimizer/add"}
  %l = f32[8,8] add(%h, %h), metadata={op_name="jit(f)/jvp(loss)/reduce"}
  ROOT %a = f32[8,8] add(%l, %l), metadata={op_name="jit(f)/jvp()/add"}
}
"""


def test_the_figures_of_the_contract(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG.format(tmp_path))
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.\n" * 500)
    command = [
        *(sys.executable, "-m", "jaxgpt.benchmark", f"--config={tmp_path}/c.py", "--steps=3"),
        *("--decode", f"--profile={tmp_path}/profile"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert tuple(figures)[: len(CONTRACT)] == CONTRACT
    assert all(figures[name] > 0 for name in CONTRACT)
    assert figures["mfu"] < 1 and figures["compile_seconds"] < figures["first_step_seconds"]
    assert figures["tokens_per_second"] == pytest.approx(8 * 64 / figures["step_seconds"])
    shares = figures["time_shares"]
    assert set(shares) == {"matmul", "attention", "loss", "optimizer", "other", "input", "python"}
    assert sum(shares.values()) == pytest.approx(1)
    for name in ("matmul", "attention", "loss", "optimizer", "other"):
        assert shares[name] > 0.001, shares
    (trace,) = Path(tmp_path / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]
    assert list(Path(tmp_path / "profile/plugins/profile").rglob("*.xplane.pb"))  # TensorBoard's


def test_an_instruction_belongs_to_the_scope_it_was_traced_in():
    program = Program(HLO)
    parts = {i.name: part_of(i, program) for i in program.computations[program.entry].values()}
    parts.pop("x")
    assert parts == {"f": "matmul", "g": "attention", "h": "optimizer", "l": "loss", "a": "other"}


def test_the_shares_add_up_to_one_even_where_the_profile_names_nothing():
    seconds = {"all": 2.0, "input": 0.2, "python": 0.4}
    found = _shares(seconds, Counter(matmul=3.0, loss=1.0))
    assert found["matmul"] == pytest.approx(0.525) and found["loss"] == pytest.approx(0.175)
    assert sum(found.values()) == pytest.approx(1) and found["other"] == 0
    found = _shares(seconds, Counter())
    assert found["other"] == pytest.approx(0.7) and sum(found.values()) == pytest.approx(1)


def test_time_inside_another_event_counts_once():
    events = [(0.0, 100.0, "a"), (10.0, 30.0, "b"), (12.0, 20.0, "c"), (40.0, 60.0, "b")]
    assert _own_durations(events) == [("a", 60), ("b", 12), ("c", 8), ("b", 20)]
