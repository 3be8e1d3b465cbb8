"""Evaluate a run: python -m jaxgpt.evaluate --workdir=DIR [--step=N] [--data=SOURCE] [--split=validation]

Prints loss (nats/token), perplexity and bits per byte over a whole split, as JSON on the last
line of stdout. --data=SOURCE takes the whole of SOURCE as the split. --task=NAME:GLOB answers a
task's rows instead (sentiment, entailment: accuracy and confusion matrix; questions: exact match
and F1).
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
from jaxgpt.evaluation.tasks import Choices, classification, questions
from jaxgpt.inference.decode import Decoder, generate, prompt_tokens, until
from jaxgpt.inference.samplers import Sampling
from jaxgpt.inference.trained import Trained, open_trained
from jaxgpt.parallel import hosts
from jaxgpt.text.files import expand
from jaxgpt.text.tasks import TASKS, read_examples
from jaxgpt.training.step import make_eval_step


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default: the newest", flag_values=values)
    flags.DEFINE_string("data", "", "another source, used whole", flag_values=values)
    flags.DEFINE_string("split", "validation", "validation or train", flag_values=values)
    flags.DEFINE_string("task", "", "sentiment|entailment|questions:GLOB", flag_values=values)
    hosts.define_flags(values)
    parse(values, argv, __doc__)
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    if values.split not in ("validation", "train"):
        raise BadInput(f"--split={values.split} is unknown; choose validation or train")
    hosts.join(values)
    with hosts.peers_watched():
        row = evaluate(values)
    if jax.process_index() == 0:
        print(json.dumps(row))


def evaluate(values: flags.FlagValues) -> dict:
    """Returns the figures that the flags ask for."""
    trained = open_trained(values.workdir, values.step)
    if values.task:
        return evaluate_task(trained, values.task)
    split = open_split(trained, values.data, values.split)
    began = time.perf_counter()
    with jax.set_mesh(trained.mesh):
        measure = Perplexity(
            make_eval_step(trained.spec),
            NamedSharding(trained.mesh, trained.spec.rules(None, "batch", "seq")),
            split, trained.config.model.max_seq_len, trained.config.batch_size,
        )  # fmt: skip
        found = measure(trained.params())
    name = values.data or values.split
    say(f"{name} at step {trained.step}: loss {found['loss']:.4f} nats/token, perplexity"
        f" {found['perplexity']:.2f}, {found['bits_per_byte']:.4f} bits/byte")  # fmt: skip
    row = {"step": trained.step, "split": name} | found
    return row | {"seconds": time.perf_counter() - began}


def evaluate_task(trained: Trained, spec: str) -> dict:
    """Returns the figures of a task on all rows of its files.

    Raises:
      BadInput: if the task is unknown, a file is missing, or a row is malformed.
    """
    name, _, pattern = spec.partition(":")
    if name not in TASKS or not pattern:
        raise BadInput(f"--task={spec} is unknown: choose {', '.join(TASKS)}, as NAME:GLOB")
    examples = list(read_examples(name, expand(spec, pattern)))
    if not examples:
        raise BadInput(f"--task={spec} holds no example")
    began, cfg = time.perf_counter(), trained.config
    with jax.set_mesh(trained.mesh):
        params = trained.params()
        if name == "questions":
            found = questions(examples, greedy(trained, params))
        else:
            sharding = NamedSharding(trained.mesh, trained.spec.rules(None, "batch", "seq"))
            choices = Choices(
                make_eval_step(trained.spec), sharding, trained.tokenizer, cfg.model.max_seq_len,
                cfg.batch_size,
            )  # fmt: skip
            found = classification(name, examples, choices, params)
    for label, row in found.get("confusion", {}).items():
        say(f"{label:>16} | " + "  ".join(f"{given} {count}" for given, count in row.items()))
    row = {"step": trained.step, "task": name} | found
    return row | {"seconds": time.perf_counter() - began}


def greedy(trained: Trained, params: dict, most: int = 32):
    """Returns the function that answers a prompt with the likeliest line, of `most` tokens."""
    cfg, tokenizer = trained.config.model, trained.tokenizer
    most = min(most, cfg.max_seq_len - 1)
    decoder, end = Decoder.of(trained.spec, params), tokenizer.end_of_text

    def answer(prompt: str) -> str:
        ids = prompt_tokens(tokenizer, prompt)[-(cfg.max_seq_len - most) :]
        (row,), _ = generate(decoder, [ids], most, Sampling(temperature=0.0), end=end)
        return tokenizer.decode(until(row, end)).split("\n")[0]

    return answer


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
