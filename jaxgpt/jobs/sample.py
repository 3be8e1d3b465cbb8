"""Samples of a trained model, printed: of one prompt, of a file's or of what is typed."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
from absl import flags

from jaxgpt.inference.beam import beam_search
from jaxgpt.inference.chat import Chat, reply
from jaxgpt.inference.decode import CHUNK, Decoder
from jaxgpt.inference.fill_mask import encode_masked, fill_masks, shown_token
from jaxgpt.inference.generation import (
    Continuation,
    encode_prompts,
    encode_request,
    last_of,
    stream_text,
)
from jaxgpt.inference.requests import SLIDE, BeamSettings, GenerationRequest
from jaxgpt.inference.seq2seq import Seq2SeqDecoder, encode_requests, search_targets, stream_targets
from jaxgpt.inference.trained import Trained, open_trained
from jaxgpt.system.console import say
from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.training.objectives import companions_of

BATCH = 8  # prompts of a file that are continued in one batch
STREAM_CHUNK = 4  # tokens generated between two prints of --stream
Rows = list[tuple[dict, GenerationRequest]]  # of a file


def sample(
    values: flags.FlagValues, request: GenerationRequest, rows: Rows, chat: Chat | None
) -> None:
    """Prints what the flags ask for: what the model makes of `request` or of the `rows` of a file;
    with `chat` each line that is typed is a message."""
    trained = open_trained(values.workdir, values.step)
    with jax.set_mesh(trained.mesh):
        if predict := companions_of(trained.config.objective).predictor(trained):
            return print_predictions(predict, values)
        KINDS[trained.spec.model.kind](trained, values, request, rows, chat)


def print_predictions(predict: Callable[[str], Iterable[str]], values: flags.FlagValues) -> None:
    """Prints what a model that writes no text says of --prompt. Raises `BadInput` for a flag that
    asks for text."""
    for name in ("prompt_file", "interactive", "chat", "stream", "num_beams"):
        if values[name].value:
            raise BadInput(f"--{name} is for models that write text; this one takes --prompt alone")
    for line in predict(values.prompt):
        print(line)


@runtime_checkable
class Writer(Protocol):
    """A model that writes text."""

    def check(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises `BadInput` if a request's prompt cannot be read."""

    def stream(
        self, requests: Sequence[GenerationRequest], chunk: int = CHUNK
    ) -> Iterator[tuple[int, str, Continuation]]:
        """Yields (index of the request, the text just added, its continuation); see
        `inference.generation.stream_text`."""

    def search(self, request: GenerationRequest, beams: BeamSettings) -> list[str]:
        """Returns the texts that a beam search finds, best first."""

    def shown(self, request: GenerationRequest, pieces: Iterable[str]) -> Iterator[str]:
        """Yields what is printed of a request and the text generated for it."""


@dataclasses.dataclass(frozen=True)
class Continuer:
    """A decoder, which continues prompts and replies to messages."""

    decoder: Decoder
    tokenizer: Tokenizer

    def check(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises `BadInput` if a request does not fit the context."""
        encode_prompts(self.decoder, self.tokenizer, requests)

    def stream(
        self, requests: Sequence[GenerationRequest], chunk: int = CHUNK
    ) -> Iterator[tuple[int, str, Continuation]]:
        """Yields what `stream_text` yields."""
        return stream_text(self.decoder, self.tokenizer, requests, chunk)

    def search(self, request: GenerationRequest, beams: BeamSettings) -> list[str]:
        """Returns the likeliest continuations."""
        prompt, end = encode_request(self.tokenizer, request), self.tokenizer.end_of_text
        texts = []
        for tokens, score in beam_search(self.decoder, prompt, request.max_new_tokens, beams, end):
            text = Continuation(self.tokenizer, request, prompt)
            text.feed([*tokens.tolist(), end], [score] * (len(tokens) + 1))
            texts.append(text.text)
        return texts

    def shown(self, request: GenerationRequest, pieces: Iterable[str]) -> Iterator[str]:
        """Yields the prompt and its continuation; of a chat the reply."""
        if request.is_chat:
            yield from reply(pieces)
        else:
            yield request.prompt
            yield from pieces


@dataclasses.dataclass(frozen=True)
class Translator:
    """An encoder-decoder, which writes the target of a prompt."""

    decoder: Seq2SeqDecoder
    tokenizer: Tokenizer
    prefix: str  # of every source

    def check(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises `BadInput` if a prompt is longer than the encoder reads."""
        encode_requests(self.decoder, self.tokenizer, self._sources(requests))

    def stream(
        self, requests: Sequence[GenerationRequest], chunk: int = CHUNK
    ) -> Iterator[tuple[int, str, Continuation]]:
        """Yields what `stream_targets` yields."""
        return stream_targets(self.decoder, self.tokenizer, self._sources(requests), chunk)

    def search(self, request: GenerationRequest, beams: BeamSettings) -> list[str]:
        """Returns the likeliest targets."""
        return search_targets(self.decoder, self.tokenizer, self._sources([request])[0], beams)

    def shown(self, request: GenerationRequest, pieces: Iterable[str]) -> Iterator[str]:
        """Yields the target alone."""
        return iter(pieces)

    def _sources(self, requests: Sequence[GenerationRequest]) -> list[GenerationRequest]:
        return [dataclasses.replace(r, prompt=self.prefix + r.prompt) for r in requests]


def continue_prompts(trained: Trained, values, request, rows: Rows, chat: Chat | None) -> None:
    """Prints the continuations that a decoder samples."""
    decoder = trained.decoder(values.beyond_context == SLIDE)
    write(Continuer(decoder, trained.tokenizer), trained, values, request, rows, chat)


def write_targets(trained: Trained, values, request, rows: Rows, chat: Chat | None) -> None:
    """Prints the targets that an encoder-decoder writes."""
    params, config = trained.finite_params(), trained.config
    decoder = Seq2SeqDecoder.of(trained.spec, params, trained.tokenizer)
    prefix = config.objectives.seq2seq.prompt if config.objective == "seq2seq" else ""
    writer = Translator(decoder, trained.tokenizer, prefix)
    write(writer, trained, values, request, rows, chat)


def fill(trained: Trained, values, request, rows: Rows, chat: Chat | None) -> None:
    """Prints an encoder's likeliest tokens for each mask of the prompt, a line each: the token, a
    tab and its probability; the same number for each mask, one mask after the other. Of a file it
    prints the rows with `fillings`: of each mask the pairs of token and probability."""
    tokenizer, context = trained.tokenizer, trained.spec.model.max_seq_len
    requests = [request for _, request in rows] or [request]
    names = [f"row {i + 1}: prompt" for i in range(len(rows))] or ["--prompt"]
    texts = [
        encode_masked(tokenizer, request.prompt, context, name)
        for request, name in zip(requests, names, strict=True)
    ]
    params = trained.finite_params()
    for start in range(0, len(texts), BATCH):
        count = request.sampling.top_k
        found = fill_masks(trained.spec, params, tokenizer, texts[start : start + BATCH], count)
        for i, masks in enumerate(found, start):
            shown = [[(shown_token(tokenizer, t), p) for t, p in mask] for mask in masks]
            if rows:
                print(json.dumps(rows[i][0] | {"fillings": shown}, ensure_ascii=False), flush=True)
            else:
                print("\n".join(f"{token}\t{p:.6g}" for mask in shown for token, p in mask))


KINDS = {"decoder": continue_prompts, "encoder": fill, "encoder_decoder": write_targets}


def write(
    writer: Writer,
    trained: Trained,
    values: flags.FlagValues,
    request: GenerationRequest,
    rows: Rows,
    chat: Chat | None,
) -> None:
    """Prints what the flags ask a model that writes text for."""
    if values.interactive:
        workdir = trained.checkpoints.folder.parent
        say(f"step {trained.step} of {workdir}: type a line to continue, Ctrl-D ends")
        continue_lines(writer, request, chat)
    elif values.prompt_file:
        continue_rows(writer, rows, values.num_samples)
    elif values.num_beams:
        beams = BeamSettings(values.num_beams, values.length_penalty)
        texts = writer.search(request, beams)
        print_samples(writer, request, texts[: values.num_samples])
    elif values.stream:
        print_stream(writer, request, values.num_samples)
    else:
        texts = last_of(writer.stream(sample_requests(request, values.num_samples)))
        print_samples(writer, request, [text.text for text in texts])


def sample_requests(request: GenerationRequest, count: int) -> list[GenerationRequest]:
    """Returns the requests of `count` samples."""
    return [dataclasses.replace(request, sample_index=i) for i in range(count)]


def print_samples(writer: Writer, request: GenerationRequest, texts: list[str]) -> None:
    """Prints each of the texts generated for a request."""
    print("\n---\n".join("".join(writer.shown(request, [text])) for text in texts))


def print_stream(writer: Writer, request: GenerationRequest, num_samples: int) -> None:
    """Prints one sample after the other as it is generated."""
    writer.check([request])  # fails before anything is printed
    for sample in sample_requests(request, num_samples):
        sys.stdout.write("\n---\n" * (sample.sample_index > 0))
        texts = writer.stream([sample], STREAM_CHUNK)
        for piece in writer.shown(request, (text for _, text, _ in texts)):
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")


def continue_lines(writer: Writer, request: GenerationRequest, chat: Chat | None) -> None:
    """Continues each line of standard input, by itself, until the input ends (Ctrl-D)."""
    while True:
        say("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        try:
            prompt = check_text(line.rstrip("\n"), "the line")
            asked = dataclasses.replace(request, prompt=prompt)
            print_stream(writer, chat.ask(asked) if chat else asked, 1)
        except BadInput as e:
            say(f"error: {e}")


def continue_rows(writer: Writer, rows: Rows, num_samples: int) -> None:
    """Prints each row, in order, with its continuation, `num_samples` times."""
    pairs = [
        (row, sample) for row, request in rows for sample in sample_requests(request, num_samples)
    ]
    writer.check([r for _, r in rows])  # fails before any output
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        requests = [request for _, request in batch]
        if start:  # the last batch is filled up: another batch size would be compiled anew
            requests += requests[-1:] * (BATCH - len(batch))
        for (row, request), text in zip(batch, last_of(writer.stream(requests))):
            shown_text = "".join(reply([text.text])) if request.is_chat else text.text
            result = dict(text=shown_text, finish_reason=text.finish_reason)
            result |= dict(tokens=text.tokens, logprobs=text.logprobs)
            print(json.dumps(row | result, ensure_ascii=False), flush=True)
