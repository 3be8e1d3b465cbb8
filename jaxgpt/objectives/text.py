"""Evaluation of what a model learns from running text: the loss on a whole split."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.data.prepare import cache_folder, prepare, prepare_whole
from jaxgpt.data.shards import Split
from jaxgpt.evaluation.perplexity import Perplexity
from jaxgpt.inference.requests import BeamSettings
from jaxgpt.inference.trained import Trained
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer

Measure = Callable[[dict], dict]  # parameters -> figures


class Asked(NamedTuple):
    """What `evaluate` is to measure: on the whole of `source`, else on the run's own `split`.

    `stride` is that of windows of running text (0: they do not overlap), `limit` the most rows of
    an objective that reads rows (0: its own choice), and `beams` write targets (None: greedily).
    """

    source: str
    split: str
    stride: int = 0
    limit: int = 0
    beams: BeamSettings | None = None

    @property
    def name(self) -> str:
        """What it is called in the figures."""
        return self.source or self.split

    def refuse_beams(self) -> None:
        """Raises `BadInput` if there are any."""
        if self.beams:
            raise BadInput("--num_beams writes the targets of objective=seq2seq; leave it out")


def loss_measure(trained: Trained, source: str, split_name: str, stride: int = 0) -> Measure:
    """Returns the function that evaluates parameters on the whole of `source`, else on the run's
    own split of that name."""
    name, config = source or split_name, trained.config
    split = open_split(trained, source, split_name)
    say_unknown(trained.tokenizer, split, name)
    with jax.set_mesh(trained.mesh):
        eval_step, sharding = make_eval_step(trained.spec), batch_sharding(trained)
    seq_len, batch = config.model.max_seq_len, config.batch_size
    evaluate_split = Perplexity(eval_step, sharding, split, seq_len, batch, stride)

    def measure(params: dict) -> dict:
        figures = evaluate_split(params)
        say(
            f"{name}: loss {figures['loss']:.4f} nats/token,"
            f" perplexity {figures['perplexity']:.2f}, {figures['bits_per_byte']:.4f} bits/byte"
        )
        for source, row in figures.get("sources", {}).items():
            say(
                f"  {source}: loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f},"
                f" {row['tokens']:,} tokens"
            )
        return {"split": name} | figures

    return measure


def say_unknown(tokenizer: Tokenizer, split: Split, name: str) -> None:
    """Says how many characters of a split a character model does not know."""
    base = getattr(tokenizer, "base", tokenizer)  # without its special tokens
    if base.kind != "char":
        return
    if count := np.count_nonzero(split.tokens == base.unknown):
        characters = len(split.tokens) - split.documents
        say(
            f"unknown   {count:,} of {characters:,} characters of {name} are none of the model's"
            f" {len(base.characters):,}: all of them are one token, which it has not learnt"
        )


def batch_sharding(trained: Trained) -> NamedSharding:
    """Returns the sharding of an evaluation's batches."""
    return NamedSharding(trained.mesh, trained.spec.rules(None, "batch", "seq"))


def open_split(trained: Trained, source: str, split: str) -> Split:
    """Returns the tokens to evaluate on: the whole of `source`, else the run's own `split`. Raises
    `BadInput` if the source is unusable, or the run's own text has changed since training."""
    data = trained.config.data
    if source:
        return prepare_whole(source, data, trained.tokenizer, cache_folder(data))
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
