"""Generate text:

    python -m jaxgpt.sample --workdir=DIR --prompt=TEXT [--temperature=0.8 ...]

Stdout is the prompt and its continuation, nothing else; several samples are separated by a line
`---`. A sample ends at end-of-text, in front of a --stop string or after --max_new_tokens.

--prompt_file=F.jsonl continues every row's `prompt` instead, and prints the row with `text`,
`finish_reason`, `tokens` and `logprobs` (the model's own, of each token generated) as one line of
JSON; the row's own max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed and
stop override the flags. --interactive continues what you type, line by line. --num_beams=K searches
for the likeliest continuation instead of sampling; --length_penalty=P ranks what it finds by
log-probability / (number of tokens) ** P.

--suffix=TEXT asks for the text between the prompt and it, of a model trained with
objective=fill_in_the_middle.

An encoder fills in the prompt's masks: --prompt='The capital of [MASK] is Paris.' prints the
--top_k likeliest tokens, each with a tab and its probability, of one mask after the other. An
encoder-decoder reads the prompt as its source and prints the target alone.

--chat takes each prompt as a user's message, puts it into the template that the run was trained
with, and prints the reply alone. A row may then have `messages` in place of a prompt.
"""

import dataclasses

from absl import flags
from etils import epath

from jaxgpt.checkpointing.choice import check_run, define_step
from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.config.stored import read_config
from jaxgpt.inference.chat import Chat, open_chat
from jaxgpt.inference.requests import (
    MAX_UINT32,
    REFUSE,
    SLIDE,
    BeamSettings,
    GenerationRequest,
    Sampling,
    check_range,
    check_stops,
    parse_request,
)
from jaxgpt.system.errors import BadInput
from jaxgpt.text.chat import chat_messages
from jaxgpt.text.files import list_files
from jaxgpt.text.formats import json_rows

DOES = {
    "encoder": "fills in the masks of a prompt",
    "encoder_decoder": "writes the target of a prompt",
}
USELESS = {  # flags, by the kind of the model
    "decoder": (),
    "encoder": ("interactive", "chat", "stream", "suffix", "stop", "num_beams"),
    "encoder_decoder": ("chat", "suffix"),
}
MAX_SAMPLES = 1024  # of one prompt, which are generated in one batch


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    define_step(values)
    flags.DEFINE_string("prompt", "", "text to continue", flag_values=values)
    flags.DEFINE_string("suffix", "", "text that is to follow", flag_values=values)
    flags.DEFINE_string("prompt_file", "", "rows of JSON with a prompt each", flag_values=values)
    flags.DEFINE_bool("interactive", False, "continue what is typed", flag_values=values)
    flags.DEFINE_bool("chat", False, "prompts are messages to reply to", flag_values=values)
    flags.DEFINE_string("system", "", "system message of each --chat", flag_values=values)
    flags.DEFINE_bool("stream", False, "print text as it is generated", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 200, "most tokens of a sample", flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "0 = greedy", flag_values=values)
    flags.DEFINE_integer("top_k", 40, "only the k likeliest tokens; 0 = all", flag_values=values)
    flags.DEFINE_float(
        "top_p", 1.0, "only the likeliest up to this probability", flag_values=values
    )
    flags.DEFINE_float("min_p", 0.0, "lowest share of the best's probability", flag_values=values)
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1: fewer repeats", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "end in front of this; repeatable", flag_values=values)
    flags.DEFINE_integer("num_samples", 1, "how many", flag_values=values)
    flags.DEFINE_integer("num_beams", 0, "width of a beam search; 0 = sample", flag_values=values)
    flags.DEFINE_float("length_penalty", 1.0, "of --num_beams; larger: longer", flag_values=values)
    flags.DEFINE_enum(
        "beyond_context",
        REFUSE,
        [REFUSE, SLIDE],
        "texts longer than the context; slide: go on from its last half, read anew",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "same seed, same samples", flag_values=values)
    parse(values, argv, __doc__)
    request = read_flags(values)
    chat = open_chat(values.workdir, values.system) if values.chat else None
    rows = read_rows(values.prompt_file, request, chat) if values.prompt_file else []
    if chat and values.prompt:
        request = chat.ask(request)
    check_run(values.workdir, values.step)
    check_kind(read_config(epath.Path(values.workdir)).model.kind, values)
    # JAX is imported from here on: what is wrong with the flags is said at once
    from jaxgpt.jobs.sample import sample

    sample(values, request, rows, chat)


def read_flags(values: flags.FlagValues) -> GenerationRequest:
    """Returns the request that the flags describe. Raises `BadInput` for a flag out of range, or
    flags that exclude each other."""
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    given = [name for name in ("prompt", "prompt_file", "interactive") if values[name].value]
    if len(given) > 1:
        raise BadInput(f"--{' and --'.join(given)} do not go together; choose one")
    for name, low, high in (
        ("max_new_tokens", 1, MAX_UINT32),
        ("num_samples", 1, MAX_SAMPLES),
        ("seed", 0, MAX_UINT32),
    ):
        check_range(f"--{name}", values[name].value, low, high)
    if values.chat and not given:
        raise BadInput("--chat needs a message: --prompt=TEXT, --prompt_file=F or --interactive")
    if values.suffix and (values.chat or values.beyond_context == SLIDE):
        other = "--chat" if values.chat else "--beyond_context=slide"
        raise BadInput(f"--suffix and {other} do not go together; choose one")
    if values.system and not values.chat:
        raise BadInput("--system goes with --chat")
    if values.num_beams and (values.stream or values.interactive or values.prompt_file):
        raise BadInput("--num_beams goes with --prompt alone: a search has no text until its end")
    if values.num_beams and values.beyond_context == SLIDE:
        raise BadInput("--num_beams and --beyond_context=slide do not go together; choose one")
    if values.num_beams and values.num_samples > values.num_beams:
        raise BadInput(
            f"--num_samples={values.num_samples} are more than --num_beams={values.num_beams}"
        )
    BeamSettings(values.num_beams, values.length_penalty).check()
    if "" in values.stop:
        raise BadInput("--stop must not be empty")
    check_stops(values.stop, "--stop")
    sampling = Sampling(*(values[field.name].value for field in dataclasses.fields(Sampling)))
    sampling.check()
    return GenerationRequest(
        values.prompt,
        values.max_new_tokens,
        sampling,
        values.seed,
        stop=tuple(values.stop),
        suffix=values.suffix,
    )


def check_kind(kind: str, values: flags.FlagValues) -> None:
    """Raises `BadInput` for a flag that a model of this kind has no use for."""
    given = [name for name in USELESS[kind] if values[name].value]
    given += ["beyond_context"] * (kind in DOES and values.beyond_context == SLIDE)
    for name in given:
        raise BadInput(
            f"--{name} is of no use here: the model is an {kind.replace('_', '-')}, which"
            f" {DOES[kind]}"
        )


def read_rows(
    pattern: str, default: GenerationRequest, chat: Chat | None = None
) -> list[tuple[dict, GenerationRequest]]:
    """Returns the rows of the files and the request that each describes. Raises `BadInput`, naming
    file and row, if a row is malformed; or if there is none."""
    rows = []
    for where, _, row in json_rows(list_files(f"--prompt_file={pattern}", pattern)):
        if not isinstance(row, dict):
            raise BadInput(f"{where} is not an object")
        if chat and "messages" in row:
            request = parse_request(row | {"prompt": ""}, default, where)
            request = chat.ask(request, chat_messages(row, where))
        else:
            request = parse_request(row, default, where)
            request = chat.ask(request) if chat else request
        rows.append((row, request))
    if not rows:
        raise BadInput(f"--prompt_file={pattern} holds no prompt")
    return rows


if __name__ == "__main__":
    run(main)
