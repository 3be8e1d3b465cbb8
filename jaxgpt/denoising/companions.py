"""What a run on corrupted text takes from its objective besides the function."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config import Config
from jaxgpt.config.objectives import SPECIAL_TOKENS, with_special_tokens
from jaxgpt.data.chunks import Chunks
from jaxgpt.data.pipeline import Stream, training_stream
from jaxgpt.data.prepare import Prepared
from jaxgpt.data.shards import Split
from jaxgpt.data.show import Example
from jaxgpt.denoising.evaluation import SEED, Restoration, pseudo_perplexity
from jaxgpt.denoising.masked import Masking
from jaxgpt.denoising.middle import Middle
from jaxgpt.denoising.objective import HEAD, make_head, masked_step, most_masked
from jaxgpt.denoising.pairs import Documents, Frame, PairChunks
from jaxgpt.denoising.rows import (
    Around,
    Corrupted,
    MaskedRows,
    MiddleRows,
    NumberedStream,
    PairRows,
    PrefixRows,
    Rows,
    SpanRows,
    Windows,
)
from jaxgpt.denoising.spans import Lengths, longest
from jaxgpt.denoising.words import words_of
from jaxgpt.inference.fill_mask import Masked, encode_masked, fill_masks, shown_token
from jaxgpt.inference.trained import Trained
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.companions import INT32, Companions, NoSample
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.objectives.text import Asked, Measure, batch_sharding, open_split
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.base import FIRST, ROLES
from jaxgpt.tokenizer.roles import SENTINEL, role_id, sentinels

SENTENCE_ENDS = (b".", b"!", b"?", b"\n")
USUAL_SENTINELS = 100  # T5's
SHOWN = 5  # tokens for a mask, in samples
PSEUDO_WINDOWS = 8  # of which `evaluate` masks every token, without --limit
Arrays = dict[str, tuple[tuple[int, ...], np.dtype]]
Step = Callable[[dict, dict], dict]  # (parameters, batch) -> figures of each row


class Task(abc.ABC):
    """What is an objective's own: its rows, what is evaluated, a head. The base is that of a
    decoder's objective on chunks of running text."""

    def check(self, config: Config) -> None:
        """Raises `BadInput` if the objective's fields do not go with the model's or the data's."""
        return

    @abc.abstractmethod
    def rows(self, config: Config, tokenizer: Tokenizer) -> Rows:
        """Returns how rows are made. Raises `BadInput` if the tokenizer lacks a special token."""

    def sources(self, config: Config, split: Split, rows: Rows) -> Stream:
        """Returns the stream of the chunks that rows are made of."""
        model = dataclasses.replace(config.model, max_seq_len=rows.chunk_len)
        return training_stream(split, dataclasses.replace(config, model=model))

    def windows(self, split: Split, rows: Rows) -> Chunks:
        """Returns the chunks of a split that evaluation reads."""
        return Windows(split.tokens, rows.chunk_len)

    def arrays(self, config: Config) -> Arrays:
        """Returns the arrays of a batch, as `Companions.batch_arrays`."""
        names = ("inputs", "targets", *(("segments", "positions") if config.data.pack else ()))
        return dict.fromkeys(names, ((config.model.max_seq_len,), INT32))

    def step(self, spec: ModelSpec, config: Config) -> Step:
        """Returns what computes a batch's figures: see `Restoration`."""
        nats = make_eval_step(spec)
        return lambda params, batch: {"loss": nats(params, batch).sum(axis=1)}

    def prompt(self, words: list[str], tokenizer: Tokenizer) -> str:
        """Returns a prompt for the trained model, made of some words."""
        return " ".join(words)

    def head(self, config: Config, spec: ModelSpec) -> dict:
        """Returns what is trained beside the model, by the objective's argument."""
        return {}

    def further(self, trained: Trained, restore: Restoration, limit: int) -> Callable[[dict], dict]:
        """Returns what `evaluate` measures of parameters besides, on `limit` windows (0: its own
        choice)."""
        return lambda params: {}


class MaskedTask(Task):
    """What the objectives on masked tokens share."""

    def check(self, config: Config) -> None:
        check_shares(config)

    def step(self, spec: ModelSpec, config: Config) -> Step:
        return masked_step(spec, most_masked(config))

    def prompt(self, words: list[str], tokenizer: Tokenizer) -> str:
        return " ".join([*words[:-1], mask_name(tokenizer)])


class MaskedLm(MaskedTask):
    """`masked_lm`."""

    def rows(self, config: Config, tokenizer: Tokenizer) -> Rows:
        around, room = around_of(tokenizer), config.model.max_seq_len
        room -= 0 if config.data.pack else len(around.before) + len(around.after)
        if room < 2:
            raise BadInput(f"model.max_seq_len={config.model.max_seq_len} leaves no room for text")
        return Rows(room, masked_rows(config, tokenizer))

    def further(self, trained: Trained, restore: Restoration, limit: int) -> Callable[[dict], dict]:
        one = dataclasses.replace(restore, step=masked_step(trained.spec, 1))
        rows = masked_rows(trained.config, trained.tokenizer)
        return lambda params: pseudo_perplexity(one, params, rows, limit or PSEUDO_WINDOWS)


class NextSentence(MaskedTask):
    """`masked_lm_nsp`."""

    def check(self, config: Config) -> None:
        super().check(config)
        check_unpacked(config, "its rows are pairs of texts")
        if config.model.type_vocab_size == 1:
            raise BadInput(
                "model.type_vocab_size=1: the two texts of a pair have types 0 and 1; set 2, or 0"
                " for none"
            )

    def rows(self, config: Config, tokenizer: Tokenizer) -> Rows:
        cls, sep = (role_id(tokenizer, "objective=masked_lm_nsp", r) for r in ("cls", "sep"))
        texts = words_of(tokenizer).texts
        is_break = np.array([text.rstrip(b" ").endswith(SENTENCE_ENDS) for text in texts])
        make = PairRows(Frame(cls, sep, is_break), masked_rows(config, tokenizer))
        return Rows(config.model.max_seq_len, make)

    def sources(self, config: Config, split: Split, rows: Rows) -> Stream:
        plain = super().sources(config, split, rows)
        starts, sources = np.asarray(split.starts), []
        for part in split.parts:
            own = starts[(starts >= part.first) & (starts < part.end)] - part.first
            tokens = split.tokens[part.first : part.end]
            sources.append(pair_chunks(tokens, own, rows, part.source))
        return dataclasses.replace(plain, sources=tuple(sources))

    def windows(self, split: Split, rows: Rows) -> Chunks:
        starts = np.asarray(split.starts)
        return pair_chunks(split.tokens, starts, rows, f"the {split.name} part")

    def arrays(self, config: Config) -> Arrays:
        row = (config.model.max_seq_len,), INT32
        names = ("inputs", "targets", "types", "segments")
        return dict.fromkeys(names, row) | {"labels": ((), INT32)}

    def head(self, config: Config, spec: ModelSpec) -> dict:
        key = jax.random.fold_in(jax.random.key(config.seed), 1)  # not the model's
        return {HEAD: make_head(key, spec)}


class SpanCorruption(Task):
    """`span_corruption`."""

    def check(self, config: Config) -> None:
        check_unpacked(config, "its rows are chunks of one stream, all of one length")
        lengths, length = span_lengths(config), config.model.max_seq_len
        if lengths.targets > length:
            raise BadInput(
                f"the targets of sources of {lengths.sources} tokens have {lengths.targets}, more"
                f" than model.max_seq_len={length}: set it to {lengths.targets}, or a smaller"
                " model.max_source_len"
            )

    def rows(self, config: Config, tokenizer: Tokenizer) -> Rows:
        lengths, known = span_lengths(config), sentinels(tokenizer)
        if len(known) < lengths.spans:
            names = SENTINEL.format(f"0..{max(lengths.spans, USUAL_SENTINELS) - 1}")
            raise BadInput(
                f"a row has {lengths.spans} spans and the tokenizer {len(known)} sentinels: add"
                f" --config.data.special_tokens='{names}'"
            )
        start, end = tokenizer.role("decoder_start"), tokenizer.role("eos")
        sizes = source_len(config), config.model.max_seq_len
        return Rows(lengths.tokens, SpanRows(lengths, *sizes, np.array(known), start, end))

    def windows(self, split: Split, rows: Rows) -> Chunks:
        return Windows(split.tokens, rows.chunk_len, whole=True)

    def arrays(self, config: Config) -> Arrays:
        row, source = ((config.model.max_seq_len,), INT32), ((source_len(config),), INT32)
        own = dict.fromkeys(("inputs", "targets", "segments"), row)
        return own | dict.fromkeys(("sources", "source_segments"), source)

    def prompt(self, words: list[str], tokenizer: Tokenizer) -> str:
        return " ".join([*words[:1], SENTINEL.format(0), *words[2:]])


class PrefixLm(Task):
    """`prefix_lm`."""

    def rows(self, config: Config, tokenizer: Tokenizer) -> Rows:
        return Rows(config.model.max_seq_len, PrefixRows())

    def arrays(self, config: Config) -> Arrays:
        return super().arrays(config) | {"prefix": ((), INT32)}


class FillInTheMiddle(Task):
    """`fill_in_the_middle`."""

    def rows(self, config: Config, tokenizer: Tokenizer) -> Rows:
        cfg, purpose = config.objectives.fill_in_the_middle, "objective=fill_in_the_middle"
        roles = ("fim_prefix", "fim_suffix", "fim_middle")
        markers = [role_id(tokenizer, purpose, role) for role in roles]
        how = Middle(tokenizer, *markers, cfg.rate, cfg.spm_rate)
        return Rows(config.model.max_seq_len, MiddleRows(how))


TASKS: dict[str, Task] = {
    "masked_lm": MaskedLm(),
    "masked_lm_nsp": NextSentence(),
    "span_corruption": SpanCorruption(),
    "prefix_lm": PrefixLm(),
    "fill_in_the_middle": FillInTheMiddle(),
}


class OnCorruptedText(Companions):
    """What the objectives of `TASKS` bring to a run."""

    @staticmethod
    def check(config: Config) -> None:
        """Raises `BadInput` if the text or its rows do not fit; says which special tokens the
        tokenizer gets."""
        name = config.objective
        if any(part in config.data.source for part in ("sft:", "task:", "pref:")):
            raise BadInput(
                f"objective={name} learns from running text, not from the prompts and responses of"
                f" data.source={config.data.source}: name text, or set objective=causal_lm"
            )
        TASKS[name].check(config)
        if (added := SPECIAL_TOKENS.get(name)) and with_special_tokens(config):
            say(f"tokens    {added}: objective={name} needs them in the tokenizer")

    @staticmethod
    def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
        """Raises `BadInput` if the tokenizer lacks a special token."""
        TASKS[config.objective].rows(config, tokenizer)

    @staticmethod
    def stream(config: Config, data: Prepared) -> Stream:
        """Returns the training batches."""
        task = TASKS[config.objective]
        rows = task.rows(config, data.tokenizer)
        plain = task.sources(config, data.train, rows)
        sources = tuple(Corrupted(source, rows, config.seed) for source in plain.sources)
        return NumberedStream(**vars(plain) | {"sources": sources})

    @property
    def logits(self) -> float:
        """The share of the tokens of which logits are made: those that may be masked."""
        cfg = self.config
        return most_masked(cfg) / cfg.model.max_seq_len if cfg.model.kind == "encoder" else 1.0

    def batch_arrays(self) -> Arrays:
        """Returns the arrays of a batch by name: the shape behind [grad_accum, batch], and the
        dtype."""
        return TASKS[self.config.objective].arrays(self.config)

    def own_parameters(self, spec: ModelSpec) -> dict:
        """Returns what is trained beside the model, by the objective's argument."""
        return TASKS[self.config.objective].head(self.config, spec)

    def evaluator(self, spec: ModelSpec, sharding: NamedSharding, data: Prepared) -> Restoration:
        """Returns what validates while training."""
        config = self.config
        rows = evaluated(config, data.tokenizer, data.validation, "the validation part")
        step = TASKS[config.objective].step(spec, config)
        return Restoration(step, sharding, rows, config.batch_size // config.grad_accum)

    @staticmethod
    def example(config: Config, data: Prepared) -> Example:
        """Returns a prompt for the trained model."""
        words = Companions.example(config, data).prompt.split(" ")
        return Example(TASKS[config.objective].prompt(words, data.tokenizer), is_chat=False)

    def training_sample(self, spec: ModelSpec, data: Prepared, example: Example) -> Any:
        """Returns what samples while training: an encoder's likeliest tokens for a mask, a
        decoder's continuation, nothing of an encoder-decoder."""
        kind, cfg = self.config.model.kind, self.config.sample
        if kind == "encoder":
            return fillings(spec, data.tokenizer, cfg.prompt, example.prompt)
        if kind == "encoder_decoder":
            return NoSample()
        return super().training_sample(spec, data, example)

    @staticmethod
    def trained_parameters(trained: Trained) -> dict:
        """Returns the model's parameters and those beside it."""
        task, config = TASKS[trained.config.objective], trained.config
        own = jax.eval_shape(lambda: task.head(config, trained.spec))
        return trained.params((lambda: task.head(config, trained.spec)) if own else None)

    @staticmethod
    def measure(trained: Trained, asked: Asked) -> Measure:
        """Returns what `evaluate` measures; of `masked_lm` also the pseudo-perplexity of `limit`
        windows."""
        asked.refuse_beams()
        if asked.stride:
            raise BadInput(f"--stride={asked.stride} is for prediction left to right; leave it out")
        name, config, task = asked.name, trained.config, TASKS[trained.config.objective]
        text = open_split(trained, asked.source, asked.split)
        rows = evaluated(config, trained.tokenizer, text, name)
        with jax.set_mesh(trained.mesh):
            step, sharding = task.step(trained.spec, config), batch_sharding(trained)
            restore = Restoration(step, sharding, rows, config.batch_size)
            further = task.further(trained, restore, asked.limit)

        def measure(params: dict) -> dict:
            figures = restore(params) | {"bytes": text.bytes} | further(params)
            shown = {n: f for n, f in figures.items() if isinstance(f, float)}
            say(f"{name}: " + ", ".join(f"{n} {f:.4f}" for n, f in shown.items()))
            return {"split": name} | figures

        return measure


def evaluated(config: Config, tokenizer: Tokenizer, split: Split, name: str) -> Corrupted:
    """Returns the rows of a split that are evaluated. Raises `BadInput` if there is none."""
    task = TASKS[config.objective]
    rows = task.rows(config, tokenizer)
    windows = task.windows(split, rows)
    if not len(windows):
        raise BadInput(
            f"{name} has {len(split.tokens):,} tokens, too few for one row of {rows.chunk_len:,}:"
            " give more text"
        )
    return Corrupted(windows, rows, SEED)


@dataclasses.dataclass(frozen=True)
class Fillings:
    """An encoder's sample: `(parameters, seed) -> the likeliest tokens for each mask` of a text,
    with their probabilities."""

    spec: ModelSpec
    tokenizer: Tokenizer
    prompt: str
    text: Masked

    def __call__(self, params: dict, seed: int) -> str:
        lines = []
        for found in fill_masks(self.spec, params, self.tokenizer, [self.text], SHOWN)[0]:
            tokens = [f"{shown_token(self.tokenizer, t).strip()} {share:.3f}" for t, share in found]
            lines.append(" | ".join(tokens))
        return "\n".join(["", *lines])


def fillings(spec: ModelSpec, tokenizer: Tokenizer, given: str, own: str) -> Fillings | NoSample:
    """Returns the sample of the prompt that is `given`, else of `own` if it fits the context.

    A prompt without a mask is one for a decoder, as the configs have it: `own` is taken then.
    Raises `BadInput` if the one that is given does not fit.
    """
    context, mask = spec.model.max_seq_len, mask_name(tokenizer)
    if mask not in given and not any(name in given for name in ROLES["mask"]):
        given = ""
    try:
        text = encode_masked(tokenizer, given or own, context, "sample.prompt")
    except BadInput:
        if given:
            raise
        return NoSample()
    return Fillings(spec, tokenizer, given or own, text)


def around_of(tokenizer: Tokenizer) -> Around:
    """Returns the special tokens that an encoder reads around a text."""
    frame = [token for token, _ in tokenizer.frame(False)]
    at = frame.index(FIRST)
    return Around(tuple(frame[:at]), tuple(frame[at + 1 :]))


def mask_name(tokenizer: Tokenizer) -> str:
    """Returns how a prompt names the mask token."""
    return next(n for n, i in tokenizer.special.items() if i == tokenizer.role("mask"))


def masked_rows(config: Config, tokenizer: Tokenizer) -> MaskedRows:
    """Returns what masks rows. Raises `BadInput` if the tokenizer has no mask token."""
    cfg = getattr(config.objectives, config.objective)
    mask = role_id(tokenizer, f"objective={config.objective}", "mask")
    is_special = np.zeros(tokenizer.vocab_size, bool)
    is_special[[tokenizer.end_of_text, *tokenizer.special.values()]] = True
    ordinary = np.nonzero(~is_special)[0].astype(np.int32)
    masking = Masking(mask, ordinary, cfg.rate, cfg.mask_share, cfg.random_share)
    words = words_of(tokenizer) if cfg.whole_words else None
    return MaskedRows(around_of(tokenizer), masking, is_special, words, tokenizer.end_of_text)


def pair_chunks(tokens: np.ndarray, starts: np.ndarray, rows: Rows, name: str) -> PairChunks:
    """Returns the pieces of the documents at `starts` of `tokens`. Raises `BadInput` if they are
    fewer than two: the second text comes from another."""
    documents = Documents.of(starts, len(tokens))
    if len(documents.sizes) < 2:
        raise BadInput(
            f"objective=masked_lm_nsp pairs texts of different documents, and {name} has"
            f" {len(documents.sizes)}: give more documents (text: has one a file), or set"
            " objective=masked_lm"
        )
    return PairChunks(tokens, documents, rows.chunk_len)


def check_shares(config: Config) -> None:
    """Raises `BadInput` where more than all of the masked tokens are replaced."""
    cfg, field = getattr(config.objectives, config.objective), f"objectives.{config.objective}"
    if cfg.mask_share + cfg.random_share > 1:
        raise BadInput(
            f"{field}.mask_share={cfg.mask_share} and {field}.random_share={cfg.random_share} are"
            " more than 1 together"
        )


def check_unpacked(config: Config, why: str) -> None:
    """Raises `BadInput` for `data.pack`."""
    if config.data.pack:
        raise BadInput(f"data.pack=True with objective={config.objective}: {why}; set it to false")


def source_len(config: Config) -> int:
    """Returns how many tokens the encoder reads."""
    return config.model.max_source_len or config.model.max_seq_len


def span_lengths(config: Config) -> Lengths:
    """Returns the lengths of a row that fills the encoder."""
    cfg = config.objectives.span_corruption
    return longest(source_len(config), cfg.density, cfg.mean_length)
