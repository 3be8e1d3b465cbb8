"""Real processes that must agree."""

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from jaxgpt.config.cli import run
from jaxgpt.parallel.hosts import check_same
def main(argv):
    check_same("one corpus", "the config")
    check_same(sys.argv[4], "the prepared text")
run(main)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(("values", "code"), [("aa", 0), ("ab", 2)])
def test_processes_compare_what_they_read(values, code):
    address, count = f"127.0.0.1:{free_port()}", str(len(values))
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, address, count, str(i), value],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for i, value in enumerate(values)
    ]  # fmt: skip
    errors = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [code] * 2, errors
    for error in errors if code else []:
        assert "error: the prepared text of process(es) 1 differs from that of process 0" in error
