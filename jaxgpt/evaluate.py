"""Measure the loss of a run, or its score on a task:

    python -m jaxgpt.evaluate --workdir=DIR [--step=N] [--data=SOURCE] [--split=validation]

Prints loss (nats/token), perplexity and bits per byte over a whole split, as JSON on the last line
of stdout; of a mixture, for each source too. --data=SOURCE takes the whole of SOURCE as the split.
--stride=N lets windows overlap, so that each token is predicted from more context.

--all_steps evaluates every checkpoint, one line of JSON each. --watch also evaluates new ones
as they appear, until the run ends (after num_steps, early or diverged): an evaluation job beside a
training job. A run that was killed has not ended; --watch waits for it to resume.

--task=NAME:GLOB answers a task's rows instead: sentiment, entailment (accuracy and confusion
matrix), questions (exact match and F1), hellaswag, arc (accuracy, and by character), lambada
(accuracy and perplexity of the last word). --lm_eval=TASK,TASK runs tasks of EleutherAI's harness
(`pip install -e '.[lm-eval]'`) by name, or by a task's .yaml file, on --limit rows each.

Of a run on labelled rows it prints what its objective is judged by, on --limit rows; the targets of
seq2seq are written greedily, or by a search of --num_beams=K with --length_penalty=P.
"""

import json

from absl import flags

from jaxgpt.checkpointing.choice import check_run, define_step
from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.evaluation.benchmarks import BENCHMARKS, read_items
from jaxgpt.inference.requests import BeamSettings
from jaxgpt.processes.flags import define_flags
from jaxgpt.system.errors import BadInput, did_you_mean
from jaxgpt.text.files import list_files
from jaxgpt.text.tasks import TASKS, read_examples

KNOWN_TASKS = (*TASKS, *BENCHMARKS)


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    define_step(values)
    flags.DEFINE_bool("all_steps", False, "every checkpoint", flag_values=values)
    flags.DEFINE_bool("watch", False, "every checkpoint, also new ones", flag_values=values)
    flags.DEFINE_float("watch_every", 10.0, "seconds between two checks", flag_values=values)
    flags.DEFINE_string("data", "", "another source, evaluated whole", flag_values=values)
    flags.DEFINE_string("split", "validation", "validation or train", flag_values=values)
    flags.DEFINE_integer("stride", 0, "tokens between windows; 0 = no overlap", flag_values=values)
    flags.DEFINE_string("task", "", "NAME:GLOB, see above", flag_values=values)
    flags.DEFINE_string("lm_eval", "", "tasks of lm-eval, comma-separated", flag_values=values)
    rows = "rows at most: of an lm-eval task, of labelled rows, of the pseudo-perplexity"
    flags.DEFINE_integer("limit", None, rows, flag_values=values)
    beams = "width of the beam search that writes a seq2seq's targets; 0 = greedy"
    flags.DEFINE_integer("num_beams", 0, beams, flag_values=values)
    flags.DEFINE_float("length_penalty", 1.0, "of --num_beams; larger: longer", flag_values=values)
    define_flags(values)
    parse(values, argv, __doc__)
    check_flags(values)
    rows = task_rows(values.task) if values.task else []
    if not values.watch:  # which waits for them
        check_run(values.workdir, values.step)
    # JAX is imported from here on: what is wrong with the flags is said at once
    import jax

    from jaxgpt.evaluation.results import add_result
    from jaxgpt.jobs.evaluate import evaluate
    from jaxgpt.processes import hosts

    hosts.join(values)
    with hosts.peers_watched():
        for row in evaluate(values, rows):
            if jax.process_index() == 0:
                print(json.dumps(row), flush=True)
                on = values.task or values.lm_eval or row["split"]
                add_result(values.workdir, row, on, values.stride, values.limit)


def check_flags(values: flags.FlagValues) -> None:
    """Raises `BadInput` for a flag that is missing, out of range or excluded by another."""
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    if values.split not in ("validation", "train"):
        raise BadInput(f"--split={values.split} is unknown; choose validation or train")
    if values.stride < 0:
        raise BadInput(f"--stride={values.stride} must be at least 0")
    BeamSettings(values.num_beams, values.length_penalty).check()
    if values.num_beams and (values.task or values.lm_eval):
        raise BadInput("--num_beams writes the targets of objective=seq2seq, not a task's answers")
    if values.watch_every <= 0:
        raise BadInput(f"--watch_every={values.watch_every} must be above 0")
    given = [name for name in ("step", "all_steps", "watch") if values[name].value]
    if len(given) > 1:
        raise BadInput(f"--{given[0]} and --{given[1]} do not go together")
    if values.watch and values.coordinator:
        raise BadInput("--watch is for one process: several would see a checkpoint at other times")


def task_rows(spec: str) -> list:
    """Returns the rows of NAME:GLOB. Raises `BadInput` if the task is unknown, a file is missing,
    or a row is malformed."""
    name, _, pattern = spec.partition(":")
    if name not in KNOWN_TASKS:
        near = did_you_mean(name, KNOWN_TASKS)
        raise BadInput(
            f"--task={spec} is unknown: choose {', '.join(KNOWN_TASKS)}, as NAME:GLOB{near}"
        )
    if not pattern:
        raise BadInput(f"--task={name} needs a file of its rows: --task={name}:FILE.jsonl")
    files = list_files(spec, pattern)
    rows = read_items(name, files) if name in BENCHMARKS else list(read_examples(name, files))
    if not rows:
        raise BadInput(f"--task={spec} holds no example")
    return rows


if __name__ == "__main__":
    run(main)
