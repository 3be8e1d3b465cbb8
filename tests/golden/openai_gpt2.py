"""A checkpoint as OpenAI's GPT-2 release has it, written by TensorFlow itself.

`python tests/golden/openai_gpt2.py` (pip install tensorflow-cpu) rewrites openai_gpt2/.
"""

import json
import os
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("openai_gpt2")
HPARAMS = {"n_vocab": 257, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 2}


def variables() -> dict[str, np.ndarray]:
    """The values, by OpenAI's names; kernels have the leading 1 of a convolution."""
    dim = HPARAMS["n_embd"]
    shapes = {"wte": (HPARAMS["n_vocab"], dim), "wpe": (HPARAMS["n_ctx"], dim)}
    shapes |= {"ln_f/g": (dim,), "ln_f/b": (dim,)}
    for i in range(HPARAMS["n_layer"]):
        for name, (wide, out) in {
            "attn/c_attn": (dim, 3 * dim),
            "attn/c_proj": (dim, dim),
            "mlp/c_fc": (dim, 4 * dim),
            "mlp/c_proj": (4 * dim, dim),
        }.items():
            shapes |= {f"h{i}/{name}/w": (1, wide, out), f"h{i}/{name}/b": (out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h{i}/{name}/g": (dim,), f"h{i}/{name}/b": (dim,)}
    rng = np.random.default_rng(0)
    return {f"model/{n}": rng.normal(0, 0.3, shapes[n]).astype(np.float32) for n in sorted(shapes)}


def write() -> None:
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()
    for name, value in variables().items():
        tf.Variable(value, name=name)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        tf.train.Saver().save(session, str(FOLDER / "model.ckpt"), write_meta_graph=False)
    (FOLDER / "checkpoint").unlink()  # it names the machine's paths
    (FOLDER / "hparams.json").write_text(json.dumps(HPARAMS))


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    FOLDER.mkdir(exist_ok=True)
    write()
    print(f"wrote {FOLDER}")
