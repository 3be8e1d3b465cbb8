"""What is to be generated: the prompt, how to sample, and where to end. Needs no JAX, so that bad
requests are refused at once."""

import dataclasses
import math
import reprlib
from collections.abc import Sequence

from jaxgpt.system.encoding import check_text
from jaxgpt.system.errors import BadInput
from jaxgpt.text.pieces import Span

MAX_TEMPERATURE = 1e6
MAX_STOP_LENGTH = 1000  # characters
REFUSE, SLIDE = "refuse", "slide"  # what to do with texts longer than the context
MAX_BEAMS, MAX_LENGTH_PENALTY = 1024, 10
MAX_UINT32 = 2**32 - 1  # the largest seed, and the largest max_new_tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token. `temperature` 0 is greedy; top_k=0, top_p=1, min_p=0 and
    repetition_penalty=1 have no effect."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self, prefix: str = "--") -> None:
        """Raises `BadInput`, naming the flag, for a value out of range."""
        for name, is_valid, valid in (
            ("temperature", 0 <= self.temperature <= MAX_TEMPERATURE, "at least 0 and at most 1e6"),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0 and below 2^31"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
        ):
            if not is_valid:
                value = str(getattr(self, name))[:50]
                raise BadInput(f"{prefix}{name}={value} must be {valid}")


@dataclasses.dataclass(frozen=True)
class BeamSettings:
    """A beam search (see `inference.beam`): how many beams, the power of a text's length by which
    its log-probability is divided, and whether to stop as soon as so many texts are finished."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def check(self) -> None:
        """Raises `BadInput`, naming the flag, for a value out of range; no beams are no search."""
        check_range("--num_beams", self.num_beams, 0, MAX_BEAMS)
        penalty, most = self.length_penalty, MAX_LENGTH_PENALTY
        if not abs(penalty) <= most:
            raise BadInput(f"--length_penalty={penalty} must be from -{most} to {most}")
        if penalty != 1 and not self.num_beams:
            raise BadInput("--length_penalty goes with --num_beams: nothing else is ranked")


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue; with a `suffix`, up to that: the text between the two is generated.
    Samples of the same seed differ by their `sample_index`. `spans` are those of a chat's prompt,
    some of them special tokens; `prompt` is then their text."""

    prompt: str
    max_new_tokens: int = 200
    sampling: Sampling = Sampling()
    seed: int = 0
    sample_index: int = 0
    stop: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    suffix: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether it asks for the reply in a chat."""
        return bool(self.spans)


def parse_request(
    row: dict, default: GenerationRequest, where: str, min_new_tokens: int = 1
) -> GenerationRequest:
    """Returns the request that a row of JSON describes: `prompt`, and fields that replace those of
    `default`; other fields are ignored. Raises `BadInput` if a field is missing, ill-typed or out
    of range; the message starts with `where`."""
    sampling_kinds = {field.name: field.type for field in dataclasses.fields(Sampling)}
    kinds = {"prompt": str, "suffix": str, "max_new_tokens": int, "seed": int, "stop": str | list}
    kinds |= {name: kind | int for name, kind in sampling_kinds.items()}
    if "prompt" not in row:
        raise BadInput(f"{where} has no field 'prompt'")
    given = {name: row[name] for name in kinds if name in row}
    for name, value in given.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise BadInput(f"{where}: {name}={reprlib.repr(value)} is not of the right type")
    for name in ("prompt", "suffix"):
        check_text(given.get(name, ""), f"{where}: {name}")
    stop = given.pop("stop", default.stop)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    check_stops(stop, f"{where}: stop")
    numbers = {
        name: _to_float(given.pop(name)) if kind is float else given.pop(name)
        for name, kind in sampling_kinds.items()
        if name in given
    }
    sampling = dataclasses.replace(default.sampling, **numbers)
    sampling.check(f"{where}: ")
    request = dataclasses.replace(default, **given, sampling=sampling, stop=stop)
    check_range(f"{where}: max_new_tokens", request.max_new_tokens, min_new_tokens, MAX_UINT32)
    check_range(f"{where}: seed", request.seed, 0, MAX_UINT32)
    return request


def check_stops(stops: Sequence[object], name: str) -> None:
    """Raises `BadInput`, naming the field, for a stop string that is empty, too long or not
    valid text."""
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise BadInput(f"{name}={reprlib.repr(stops)} must hold strings that are not empty")
        if len(stop) > MAX_STOP_LENGTH:
            raise BadInput(
                f"{name} holds a string of {len(stop)} characters; at most {MAX_STOP_LENGTH}"
            )
        check_text(stop, name)


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises `BadInput`, naming the field, for a number that is not from `low` to `high`."""
    if value < low:
        raise BadInput(f"{name}={reprlib.repr(value)} must be at least {low}")
    if value > high:
        raise BadInput(f"{name}={reprlib.repr(value)} must be from {low} to {high}")


def _to_float(value: int | float) -> float:
    """Returns the number as a float, infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
