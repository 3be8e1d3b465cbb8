"""Sample from a run: python -m jaxgpt.sample --workdir=DIR --prompt=TEXT [--temperature=0.8 ...]

Stdout is the prompt and its continuation, nothing else; several samples are separated by a line
`---`. A sample ends at end-of-text, in front of a --stop string or after --max_new_tokens.

--prompt_file=F.jsonl continues every row's `prompt` instead, and prints the row with `text`,
`finish_reason`, `tokens` and `logprobs` (the model's own, of each token generated) as one line of
JSON; the row's own max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed and
stop win over the flags. --interactive continues what you type, line by line. --num_beams=K searches
the likeliest continuation instead of drawing.
"""

import dataclasses
import json
import sys

import jax
from absl import flags

from jaxgpt.checkpointing.choice import define_step
from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.inference.beam import beam_search
from jaxgpt.inference.complete import (
    MOST,
    Continuation,
    Request,
    check_range,
    check_stops,
    complete,
    completed,
    request_of,
)
from jaxgpt.inference.decode import Decoder, check_length, prompt_tokens
from jaxgpt.inference.samplers import Sampling
from jaxgpt.inference.trained import Trained, open_trained
from jaxgpt.system.console import say
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.text.files import list_files
from jaxgpt.text.formats import json_rows

MOST_SAMPLES = 1024  # side by side
TOGETHER = 8  # prompts of a file that are continued side by side
STREAMED = 4  # tokens between two looks where somebody is watching


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    define_step(values)
    flags.DEFINE_string("prompt", "", "text to continue", flag_values=values)
    flags.DEFINE_string("prompt_file", "", "rows of JSON with a prompt each", flag_values=values)
    flags.DEFINE_bool("interactive", False, "continue what is typed", flag_values=values)
    flags.DEFINE_bool("stream", False, "print text as it comes", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 200, "at most so many tokens", flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "0 = greedy", flag_values=values)
    flags.DEFINE_integer("top_k", 40, "only the k likeliest tokens; 0 = all", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "only the likeliest of this mass", flag_values=values)
    flags.DEFINE_float("min_p", 0.0, "only this share of the best's odds", flag_values=values)
    flags.DEFINE_float(
        "repetition_penalty", 1.0, "above 1: what was said is less likely", flag_values=values
    )
    flags.DEFINE_multi_string("stop", [], "end in front of this; repeatable", flag_values=values)
    flags.DEFINE_integer("num_samples", 1, "how many", flag_values=values)
    flags.DEFINE_integer("num_beams", 0, "width of a beam search; 0 = draw", flag_values=values)
    flags.DEFINE_integer("seed", 0, "same seed, same samples", flag_values=values)
    parse(values, argv, __doc__)
    request = check_flags(values)
    rows = read_rows(values.prompt_file, request) if values.prompt_file else []
    trained = open_trained(values.workdir, values.step)
    with jax.set_mesh(trained.mesh):
        decoder = trained.decoder()
        if values.interactive:
            interact(decoder, trained, request)
        elif values.prompt_file:
            continue_rows(decoder, trained, rows, values.num_samples)
        elif values.num_beams:
            search(decoder, trained, request, values)
        else:
            numbered = [dataclasses.replace(request, number=n) for n in range(values.num_samples)]
            (show_stream if values.stream else show)(decoder, trained, numbered)


def check_flags(values: flags.FlagValues) -> Request:
    """Returns what the flags ask for.

    Raises:
      BadInput: for a flag out of range, or flags that do not go together.
    """
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    ways = ("prompt", "prompt_file", "interactive")
    if len(given := [f"--{name}" for name in ways if values[name].value]) > 1:
        raise BadInput(f"{' and '.join(given)} do not go together; choose one")
    for name, least, most in (
        ("max_new_tokens", 1, MOST),
        ("num_samples", 1, MOST_SAMPLES),
        ("seed", 0, MOST),
        ("num_beams", 0, MOST_SAMPLES),
    ):
        check_range(f"--{name}", values[name].value, least, most)
    if values.num_beams and (values.stream or values.interactive or values.prompt_file):
        raise BadInput("--num_beams goes with --prompt alone: a search has no text until its end")
    if values.num_beams and values.num_samples > values.num_beams:
        raise BadInput(
            f"--num_samples={values.num_samples} are more than --num_beams={values.num_beams}"
        )
    if "" in values.stop:
        raise BadInput("--stop must not be empty")
    check_stops(values.stop, "--stop")
    sampling = Sampling(
        values.temperature, values.top_k, values.top_p, values.min_p, values.repetition_penalty
    )
    sampling.check()
    return Request(
        values.prompt, values.max_new_tokens, sampling, values.seed, stop=tuple(values.stop)
    )


def show(decoder: Decoder, trained: Trained, requests: list[Request]) -> None:
    """Prints every sample once all are there."""
    found = completed(decoder, trained.tokenizer, requests)
    texts = [request.prompt + text.text for request, text in zip(requests, found, strict=True)]
    sys.stdout.write("\n---\n".join(texts) + "\n")


def show_stream(decoder: Decoder, trained: Trained, requests: list[Request]) -> None:
    """Prints one sample after the other, as it grows."""
    for request in requests:  # before anything is printed
        length = len(prompt_tokens(trained.tokenizer, request.prompt))
        check_length(length, request.max_new_tokens, decoder.cfg)
    for i, request in enumerate(requests):
        sys.stdout.write("\n---\n" * (i > 0) + request.prompt)
        for _, text, _ in complete(decoder, trained.tokenizer, [request], STREAMED):
            sys.stdout.write(text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def interact(decoder: Decoder, trained: Trained, request: Request) -> None:
    """Continues each line of standard input until it ends (Ctrl-D); lines do not see each other."""
    say(
        f"step {trained.step} of {trained.checkpoints.folder.parent}:"
        " type a line to continue, Ctrl-D ends"
    )
    while True:
        say("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        try:
            line = check_text(line.rstrip("\n"), "the line")
            show_stream(decoder, trained, [dataclasses.replace(request, prompt=line)])
        except BadInput as e:
            say(f"error: {e}")


def read_rows(pattern: str, request: Request) -> list[tuple[dict, Request]]:
    """Returns the rows of the files and what each asks for.

    Raises:
      BadInput: naming file and line.
    """
    found = []
    for file, number, row in json_rows(list_files(f"--prompt_file={pattern}", pattern)):
        where = f"{file}, line {number}"
        if not isinstance(row, dict):
            raise BadInput(f"{where} is not an object")
        found.append((row, request_of(row, request, where)))
    if not found:
        raise BadInput(f"--prompt_file={pattern} holds no prompt")
    return found


def continue_rows(
    decoder: Decoder, trained: Trained, rows: list[tuple[dict, Request]], samples: int
) -> None:
    """Prints each row with its continuation, in order; with several samples, each row so often."""
    for _, request in rows:  # before the first line is printed
        length = len(prompt_tokens(trained.tokenizer, request.prompt))
        check_length(length, request.max_new_tokens, decoder.cfg)
    every = [(row, dataclasses.replace(r, number=n)) for row, r in rows for n in range(samples)]
    for first in range(0, len(every), TOGETHER):
        group = every[first : first + TOGETHER]
        filled = [request for _, request in group] + [group[-1][1]] * (TOGETHER - len(group))
        found = completed(decoder, trained.tokenizer, filled if first else filled[: len(group)])
        for (row, _), text in zip(group, found):
            print(json.dumps(row | described(text), ensure_ascii=False), flush=True)


def described(text: Continuation) -> dict:
    """Returns a continuation as JSON."""
    return {
        "text": text.text,
        "finish_reason": text.finish,
        "tokens": text.tokens,
        "logprobs": text.scores,
    }


def search(decoder: Decoder, trained: Trained, request: Request, values: flags.FlagValues) -> None:
    """Prints the best continuations of a beam search."""
    tokenizer = trained.tokenizer
    prompt = prompt_tokens(tokenizer, request.prompt)
    found = beam_search(
        decoder, prompt, request.max_new_tokens, values.num_beams, tokenizer.end_of_text
    )
    texts = []
    for tokens, score in found[: values.num_samples]:
        text = Continuation(tokenizer, request, prompt)
        text.feed([*tokens.tolist(), tokenizer.end_of_text], [score] * (len(tokens) + 1))
        texts.append(request.prompt + text.text)
    sys.stdout.write("\n---\n".join(texts) + "\n")


if __name__ == "__main__":
    run(main)
