"""Evaluate a run: python -m jaxgpt.evaluate --workdir=DIR [--step=N] [--data=SOURCE] [--split=validation]

Prints loss (nats/token), perplexity and bits per byte over a whole split, as JSON on the last
line of stdout. --data=SOURCE takes the whole of SOURCE as the split.
"""

import json
import time

import jax
from absl import flags
from jax.sharding import NamedSharding

from jaxgpt.config import BadInput
from jaxgpt.config.cli import parse, run, say
from jaxgpt.data.prepare import cache_folder, prepare, prepare_whole
from jaxgpt.evaluation.perplexity import Perplexity
from jaxgpt.inference.trained import Trained, open_trained
from jaxgpt.training.step import make_eval_step


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default: the newest", flag_values=values)
    flags.DEFINE_string("data", "", "another source, used whole", flag_values=values)
    flags.DEFINE_string("split", "validation", "validation or train", flag_values=values)
    parse(values, argv, __doc__)
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    if values.split not in ("validation", "train"):
        raise BadInput(f"--split={values.split} is unknown; choose validation or train")
    trained = open_trained(values.workdir, values.step)
    split = open_split(trained, values.data, values.split)
    began = time.perf_counter()
    with jax.set_mesh(trained.mesh):
        evaluate = Perplexity(
            make_eval_step(trained.spec),
            NamedSharding(trained.mesh, trained.spec.rules(None, "batch", "seq")),
            split, trained.config.model.max_seq_len, trained.config.batch_size,
        )  # fmt: skip
        found = evaluate(trained.params())
    name = values.data or values.split
    say(f"{name} at step {trained.step}: loss {found['loss']:.4f} nats/token, perplexity"
        f" {found['perplexity']:.2f}, {found['bits_per_byte']:.4f} bits/byte")  # fmt: skip
    row = {"step": trained.step, "split": name} | found
    print(json.dumps(row | {"seconds": time.perf_counter() - began}))


def open_split(trained: Trained, source: str, split: str):
    """Returns the tokens to evaluate on.

    Raises:
      BadInput: if the source is unusable, or the run's own text is no longer what it was.
    """
    data = trained.config.data
    if source:
        cache = cache_folder(data)
        return prepare_whole(source, data, trained.tokenizer, cache)
    meta = trained.checkpoints.meta(trained.step)
    if "imported" in meta:
        raise BadInput("imported weights have no text of their own; name some with --data=SOURCE")
    prepared = prepare(data)
    if prepared.fingerprint != meta["data_fingerprint"]:
        raise BadInput(
            f"the text or tokenizer of data.source={data.source} has changed since training;"
            " name what to evaluate on with --data=SOURCE"
        )
    return prepared.train if split == "train" else prepared.validation


if __name__ == "__main__":
    run(main)
