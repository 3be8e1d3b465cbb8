"""Evaluation of a run's checkpoints: one, all, or each as it appears."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config.stored import read_config
from jaxgpt.evaluation.benchmarks import BENCHMARKS
from jaxgpt.evaluation.multiple_choice import last_words, multiple_choice
from jaxgpt.evaluation.tasks import AnswerScorer, classification, document_start, questions
from jaxgpt.inference.decode import Decoder, generate, tokens_before
from jaxgpt.inference.requests import BeamSettings, Sampling
from jaxgpt.inference.trained import Trained, open_trained
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.objectives.text import Asked, Measure, batch_sharding
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.extras import require
from jaxgpt.training.end import read_end
from jaxgpt.training.objectives import companions_of

MAX_ANSWER = 32  # tokens of the answer to a question


def evaluate(values: flags.FlagValues, rows: list) -> Iterator[dict]:
    """Yields the figures that the flags ask for, of one checkpoint or of several; `rows` are those
    of `--task`."""
    if values.watch:
        wait_for_first(values.workdir, values.watch_every)
    trained = open_trained(values.workdir, values.step)
    companions, parameters = companions_of(trained.config.objective), Trained.params
    for flag in ("lm_eval", "task"):
        if values[flag].value:
            check_continues(trained, flag)
    if values.lm_eval:
        measure = harness_measure(trained, values.lm_eval.split(","), values.limit)
    elif values.task:
        measure = task_measure(trained, values.task.partition(":")[0], rows)
    else:
        parameters = companions.trained_parameters
        limit = values.limit or 0
        beams = BeamSettings(values.num_beams, values.length_penalty) if values.num_beams else None
        asked = Asked(values.data, values.split, values.stride, limit, beams)
        measure = companions.measure(trained, asked)
    steps = [trained.step]
    if values.all_steps:
        steps = trained.checkpoints.whole()
    if values.watch:
        steps = new_checkpoints(trained, values.watch_every)
    for number, step in enumerate(steps, start=1):
        if values.all_steps or values.watch:
            of = f" ({number} of {len(steps)})" if values.all_steps else ""
            say(f"step {step}{of}")
        began = time.perf_counter()
        with jax.set_mesh(trained.mesh):
            figures = measure(parameters(dataclasses.replace(trained, step=step)))
        yield {"step": step} | figures | {"seconds": time.perf_counter() - began}


def check_continues(trained: Trained, flag: str) -> None:
    """Raises `BadInput` if the model does not continue a text, which `--flag` scores."""
    kind = trained.config.model.kind
    if kind != "decoder":
        raise BadInput(
            f"--{flag} scores how a model continues a text, but this one is an"
            f" {kind.replace('_', '-')}: leave it out to measure its own objective"
        )


def wait_for_first(workdir: str, every: float) -> None:
    """Waits until `workdir` holds a run with a checkpoint. Raises `BadInput` if it cannot come to
    hold one: it is a file, is damaged, or its run has ended."""
    folder, announced = epath.Path(workdir), False
    while True:
        ended = read_end(folder)  # read first: the checkpoints of a run that has ended are there
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{workdir} is a file, not a run's folder")
        if (folder / "config.json").exists():
            read_config(folder)
            if (folder / "checkpoints").exists() and Checkpoints(folder, read_only=True).steps():
                return
        if ended:
            raise BadInput(f"the run in {workdir} ended ({ended}) without a checkpoint")
        if not announced:
            say(f"waiting   for the first checkpoint of {workdir}")
        announced = True
        time.sleep(every)


def new_checkpoints(trained: Trained, every: float) -> Iterator[int]:
    """Yields the step of each whole checkpoint as it appears, until the run makes no more: it has
    recorded its end, is at its last step (a kill can fall between that checkpoint and the record),
    or was imported. A checkpoint that the run deletes before its turn is skipped."""
    checkpoints, seen = trained.checkpoints, set()
    folder = checkpoints.folder.parent
    while True:
        end = read_end(folder)  # read first: the run's last checkpoint is then found below
        checkpoints.manager.reload()
        steps = checkpoints.steps()
        ended = bool(end) or 0 in steps or steps[-1] >= read_config(folder).num_steps
        new = [step for step in checkpoints.whole() if step not in seen]
        for step in new:
            seen.add(step)
            if not checkpoints.damage(step):
                yield step
        if ended:
            return
        if not new:
            time.sleep(every)


def task_measure(trained: Trained, name: str, rows: list) -> Measure:
    """Returns the function that evaluates parameters on a task's rows."""
    seq_len, batch = trained.config.model.max_seq_len, trained.config.batch_size
    with jax.set_mesh(trained.mesh):
        eval_step, sharding = make_eval_step(trained.spec), batch_sharding(trained)
    scorer = AnswerScorer(eval_step, sharding, trained.tokenizer, seq_len, batch)

    def measure(params: dict) -> dict:
        if name == "questions":
            figures = questions(rows, greedy_line(trained, params))
        elif name == "lambada":
            figures = last_words(rows, scorer, params, greedy_tokens(trained, params))
        elif name in BENCHMARKS:
            figures = multiple_choice(rows, scorer, params)
        else:
            figures = classification(name, rows, scorer, params)
        for label, row in figures.get("confusion", {}).items():
            say(f"{label:>16} | " + "  ".join(f"{given} {count}" for given, count in row.items()))
        return {"task": name} | figures

    return measure


def harness_measure(trained: Trained, tasks: list[str], limit: int | None) -> Measure:
    """Returns the function that runs tasks of lm-eval: their names, or files of their own (.yaml).
    Raises `BadInput` if lm-eval is not installed; the function does if lm-eval does not know a
    task."""
    lm_eval = require("lm_eval", "lm-eval", "--lm_eval")
    from jaxgpt.evaluation.harness import HarnessModel

    tasks = [str(Path(task).absolute()) if task.endswith(".yaml") else task for task in tasks]

    def measure(params: dict) -> dict:
        batch = trained.config.batch_size
        model = HarnessModel(trained.spec, params, trained.tokenizer, batch)
        try:
            results = lm_eval.simple_evaluate(model, tasks=tasks, limit=limit, log_samples=False)
        except (KeyError, ValueError, OSError) as e:
            raise BadInput(f"--lm_eval: {e}") from e
        return {
            "lm_eval": {
                name: {key: value for key, value in row.items() if isinstance(value, int | float)}
                for name, row in results["results"].items()
            }
        }

    return measure


def greedy_tokens(trained: Trained, params: dict) -> Callable[[np.ndarray, int], np.ndarray]:
    """Returns the function (prompt's tokens, count) -> the next `count` tokens by greedy decoding,
    fewer if the text ends."""
    tokenizer, context = trained.tokenizer, trained.config.model.max_seq_len
    decoder = Decoder.of(trained.spec, params, tokenizer.vocab_size)

    def continue_tokens(prompt: np.ndarray, count: int) -> np.ndarray:
        prompt, end = document_start(tokenizer, prompt, context - count), tokenizer.end_of_text
        (tokens,), _ = generate(decoder, [prompt], count, Sampling(temperature=0.0), end=end)
        return tokens_before(tokens, end)

    return continue_tokens


def greedy_line(trained: Trained, params: dict) -> Callable[[str], str]:
    """Returns the function that answers a prompt with the next line by greedy decoding."""
    tokenizer, continue_tokens = trained.tokenizer, greedy_tokens(trained, params)
    count = min(MAX_ANSWER, trained.config.model.max_seq_len - 1)

    def answer(prompt: str) -> str:
        return tokenizer.decode(continue_tokens(tokenizer.encode(prompt), count)).split("\n")[0]

    return answer
