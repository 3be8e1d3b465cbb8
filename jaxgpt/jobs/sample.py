"""Samples of a trained model, printed: of one prompt, of a file's or of what is typed."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator

import jax
from absl import flags

from jaxgpt.inference.beam import beam_search
from jaxgpt.inference.chat import Chat, reply
from jaxgpt.inference.decode import Decoder
from jaxgpt.inference.generation import (
    Continuation,
    encode_prompts,
    encode_request,
    generate_text,
    stream_text,
)
from jaxgpt.inference.requests import SLIDE, BeamSettings, GenerationRequest
from jaxgpt.inference.trained import open_trained
from jaxgpt.system.console import say
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer

BATCH = 8  # prompts of a file that are continued in one batch
STREAM_CHUNK = 4  # tokens generated between two prints of --stream


def sample(
    values: flags.FlagValues,
    request: GenerationRequest,
    rows: list[tuple[dict, GenerationRequest]],
    chat: Chat | None,
) -> None:
    """Prints what the flags ask for: continuations of `request` or of the `rows` of a file; with
    `chat` each line that is typed is a message."""
    trained = open_trained(values.workdir, values.step)
    with jax.set_mesh(trained.mesh):
        decoder, tokenizer = trained.decoder(values.beyond_context == SLIDE), trained.tokenizer
        if values.interactive:
            workdir = trained.checkpoints.folder.parent
            say(f"step {trained.step} of {workdir}: type a line to continue, Ctrl-D ends")
            continue_lines(decoder, tokenizer, request, chat)
        elif values.prompt_file:
            continue_rows(decoder, tokenizer, rows, values.num_samples)
        elif values.num_beams:
            beams = BeamSettings(values.num_beams, values.length_penalty)
            texts = search(decoder, tokenizer, request, beams)
            print_samples(request, texts[: values.num_samples])
        elif values.stream:
            print_stream(decoder, tokenizer, request, values.num_samples)
        else:
            texts = generate_text(decoder, tokenizer, sample_requests(request, values.num_samples))
            print_samples(request, [text.text for text in texts])


def sample_requests(request: GenerationRequest, count: int) -> list[GenerationRequest]:
    """Returns the requests of `count` samples."""
    return [dataclasses.replace(request, sample_index=i) for i in range(count)]


def shown(request: GenerationRequest, pieces: Iterable[str]) -> Iterator[str]:
    """Yields what is printed of a continuation: the prompt and its text; of a chat the reply."""
    if request.is_chat:
        yield from reply(pieces)
    else:
        yield request.prompt
        yield from pieces


def print_samples(request: GenerationRequest, texts: list[str]) -> None:
    """Prints each of the continuations of a request."""
    print("\n---\n".join("".join(shown(request, [text])) for text in texts))


def print_stream(
    decoder: Decoder, tokenizer: Tokenizer, request: GenerationRequest, num_samples: int
) -> None:
    """Prints one sample after the other as it is generated."""
    encode_prompts(decoder, tokenizer, [request])  # fails before anything is printed
    for sample in sample_requests(request, num_samples):
        sys.stdout.write("\n---\n" * (sample.sample_index > 0))
        texts = stream_text(decoder, tokenizer, [sample], STREAM_CHUNK)
        for piece in shown(request, (text for _, text, _ in texts)):
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")


def continue_lines(
    decoder: Decoder, tokenizer: Tokenizer, request: GenerationRequest, chat: Chat | None
) -> None:
    """Continues each line of standard input, by itself, until the input ends (Ctrl-D)."""
    while True:
        say("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        try:
            prompt = check_text(line.rstrip("\n"), "the line")
            asked = dataclasses.replace(request, prompt=prompt)
            print_stream(decoder, tokenizer, chat.ask(asked) if chat else asked, 1)
        except BadInput as e:
            say(f"error: {e}")


def continue_rows(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: list[tuple[dict, GenerationRequest]],
    num_samples: int,
) -> None:
    """Prints each row, in order, with its continuation, `num_samples` times."""
    pairs = [
        (row, sample) for row, request in rows for sample in sample_requests(request, num_samples)
    ]
    encode_prompts(decoder, tokenizer, [r for _, r in rows])  # fails before any output
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        requests = [request for _, request in batch]
        if start:  # the last batch is filled up: another batch size would be compiled anew
            requests += requests[-1:] * (BATCH - len(batch))
        for (row, _), text in zip(batch, generate_text(decoder, tokenizer, requests)):
            shown_text = "".join(reply([text.text])) if text.request.is_chat else text.text
            result = dict(text=shown_text, finish_reason=text.finish_reason)
            result |= dict(tokens=text.tokens, logprobs=text.logprobs)
            print(json.dumps(row | result, ensure_ascii=False), flush=True)


def search(
    decoder: Decoder, tokenizer: Tokenizer, request: GenerationRequest, beams: BeamSettings
) -> list[str]:
    """Returns the continuations that a beam search finds, best first."""
    prompt, end = encode_request(tokenizer, request), tokenizer.end_of_text
    texts = []
    for tokens, score in beam_search(decoder, prompt, request.max_new_tokens, beams, end):
        text = Continuation(tokenizer, request, prompt)
        text.feed([*tokens.tolist(), end], [score] * (len(tokens) + 1))
        texts.append(text.text)
    return texts
