"""Peak memory of importing GPT-2 124M, above the interpreter's own, against the file's size.

python tests/benchmarks/import_memory.py        (extra [parity] makes the folder)
"""

import json
import tempfile
import threading
import time
from pathlib import Path

import jax
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from jaxgpt.jobs.convert import import_folder
from tests.interchange.test_import_export import write_vocab


def resident() -> int:
    """Returns this process's resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=50257)).save_pretrained(folder)
        write_vocab(folder)
        jax.devices()
        peak = [0]

        def watch():
            while True:
                peak[0] = max(peak[0], resident())
                time.sleep(0.001)

        base, began = resident(), time.perf_counter()
        threading.Thread(target=watch, daemon=True).start()
        import_folder(folder, Path(scratch) / "w")
        size = (folder / "model.safetensors").stat().st_size
        print(
            json.dumps(
                {
                    "file_mib": size / 2**20,
                    "peak_mib_above_base": (peak[0] - base) / 2**20,
                    "ratio": (peak[0] - base) / size,
                    "seconds": time.perf_counter() - began,
                }
            )
        )


if __name__ == "__main__":
    main()
