"""What a run on labelled rows takes from its objective besides the function."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from jaxgpt.config import Config
from jaxgpt.data.mixture import MixtureSchedule
from jaxgpt.data.pipeline import Stream
from jaxgpt.data.show import Example
from jaxgpt.inference.trained import Trained
from jaxgpt.labelled.evaluation import SHOWN, RowEvaluator, decoded_scores, predict
from jaxgpt.labelled.examples import RowTask
from jaxgpt.labelled.heads import make_head, num_outputs
from jaxgpt.labelled.labels import (
    BALANCED,
    balanced_weights,
    format_labels,
    ids_of,
    in_order,
    parse_weights,
)
from jaxgpt.labelled.prepare import (
    PreparedRows,
    check_rows,
    prepare_rows,
    prepare_whole_rows,
    task_of,
)
from jaxgpt.labelled.store import RowSplit
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.companions import Companions, NoSample
from jaxgpt.objectives.text import Asked, Measure, batch_sharding
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.roles import framed

EXAMPLE = 200  # characters of a text that is shown as an example


class OnRows(Companions):
    """`seq2seq`, and with a head `classification`, `token_classification` and `span_qa`."""

    check = staticmethod(check_rows)
    prepare = staticmethod(prepare_rows)

    @staticmethod
    def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
        """Raises `BadInput` if the model has too few token types for pairs of texts."""
        task, size = task_of(config, tokenizer), config.model.type_vocab_size
        if task.has_types and task.reads_pairs and max(framed(tokenizer, [], [])[1]) >= size:
            raise BadInput(
                f"model.type_vocab_size={size}: the tokenizer gives the two texts of a pair types 0"
                " and 1; set 2, or 0 for none"
            )

    @staticmethod
    def completed(config: Config, data: PreparedRows) -> Config:
        """Returns `config` with the labels and their balanced weights; says how much is cut.
        Raises `BadInput` if a label is unknown, or there are fewer than two."""
        task = task_of(config, data.tokenizer)
        if task.labels_in:
            config = _with_labels(config, data)
        for split in (data.train, data.validation):
            say_cut(task, split)
        return config

    @staticmethod
    def adopted(config: Config, old: Config) -> Config:
        """Returns `config` with the labels and balanced weights of the `old` run."""
        config = copy.deepcopy(config)
        cfg, theirs = task_of(config).cfg, task_of(old).cfg
        if task_of(config).labels_in:
            cfg.labels = cfg.labels or theirs.labels
            if cfg.class_weights == BALANCED and theirs.class_weights.startswith(BALANCED):
                cfg.class_weights = theirs.class_weights
        return config

    @staticmethod
    def stream(config: Config, data: PreparedRows) -> Stream:
        """Returns the training batches."""
        task, split = task_of(config, data.tokenizer), data.train
        ids = ids_of(split.labels, task.names) if task.labels_in else np.zeros(0)
        sources = [task.chunks(split, part.first, part.end, ids) for part in split.parts]
        schedule = MixtureSchedule(tuple(part.weight for part in split.parts))
        sizes = config.batch_size, config.grad_accum
        return Stream(tuple(sources), schedule, *sizes, config.seed, config.data.shuffle)

    @property
    def logits(self) -> float:
        """The share of the tokens of which logits are made: none where a head stands for them."""
        return float(self.config.objective == "seq2seq")

    def batch_arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the arrays of a batch by name: the shape behind [grad_accum, batch], and the
        dtype."""
        return task_of(self.config).batch_arrays()

    def own_parameters(self, spec: ModelSpec) -> dict:
        """Returns the head."""
        return head_of(self.config, spec)

    def evaluator(self, spec: ModelSpec, sharding: NamedSharding, data: PreparedRows):
        """Returns what validates while training."""
        rows = self.config.batch_size // self.config.grad_accum
        task = task_of(self.config, data.tokenizer)
        return RowEvaluator(spec, sharding, task, data.validation, rows)

    @staticmethod
    def example(config: Config, data: PreparedRows) -> Example:
        """Returns the beginning of the first text of the validation part."""
        first = next(iter(data.validation.arrays.values()))
        return Example(data.tokenizer.decode(first[0])[:EXAMPLE].strip(), is_chat=False)

    @staticmethod
    def save(config: Config, data: PreparedRows, folder: epath.Path) -> None:
        """Writes nothing: the labels are in config.json."""

    def training_sample(self, spec: ModelSpec, data: PreparedRows, example: Example):
        """Returns what samples nothing: validation says how good the predictions are."""
        return NoSample()

    @staticmethod
    def trained_parameters(trained: Trained) -> dict:
        """Returns the model's parameters and the head's."""
        own = head_of(trained.config, trained.spec)
        return trained.params((lambda: head_of(trained.config, trained.spec)) if own else None)

    @staticmethod
    def predictor(trained: Trained) -> Callable[[str], Iterable[str]] | None:
        """Returns what `sample` prints of a prompt: classes or an answer; see `predict`."""
        config, spec = trained.config, trained.spec
        task = task_of(config, trained.tokenizer)
        if task.name not in SHOWN:
            return None
        params, sharding = OnRows.trained_parameters(trained), batch_sharding(trained)
        return partial(predict, spec, sharding, task, params, config.batch_size)

    @staticmethod
    def measure(trained: Trained, asked: Asked) -> Measure:
        """Returns what `evaluate` measures, of `limit` rows at most (0: all)."""
        task = task_of(trained.config, trained.tokenizer)
        if asked.stride:
            raise BadInput(f"--stride={asked.stride} is for running text; leave it out")
        if task.name != "seq2seq":
            asked.refuse_beams()
        name, limit = asked.name, asked.limit
        rows = open_rows_split(trained, asked.source, asked.split)
        say_cut(task, rows)
        with jax.set_mesh(trained.mesh):
            sharding = batch_sharding(trained)
            evaluate = RowEvaluator(trained.spec, sharding, task, rows, trained.config.batch_size)

        def measure(params: dict) -> dict:
            figures = evaluate(params, limit)
            if task.name == "seq2seq":
                count = min(limit, rows.rows) if limit else rows.rows
                figures |= decoded_scores(trained.spec, task, rows, params, count, asked.beams)
            shown = {n: f for n, f in figures.items() if isinstance(f, float)}
            say(f"{name}: " + ", ".join(f"{n} {f:.4f}" for n, f in shown.items()))
            return {"split": name} | figures

        return measure


def head_of(config: Config, spec: ModelSpec) -> dict:
    """Returns the fresh parameters of the objective's head, by the objective's argument."""
    if config.objective == "seq2seq":
        return {}
    key = jax.random.fold_in(jax.random.key(config.seed), 1)  # not the model's
    return {"classifier": make_head(key, spec, num_outputs(config))}


def _with_labels(config: Config, data: PreparedRows) -> Config:
    config = copy.deepcopy(config)
    task = task_of(config)
    stored, counts = data.train.labels, np.array(data.train.label_counts)
    names = task.names or in_order([name for name, count in zip(stored, counts) if count])
    if len(names) < 2:
        raise BadInput(
            f"all training rows have the label {names[0]!r}; a classifier needs two or more"
        )
    task.cfg.labels = format_labels(names)
    for split in (data.train, data.validation):
        check_labels(split, names, task.flag("labels"), task.labels_in)
    if task.cfg.class_weights == BALANCED:
        ids = ids_of(stored, names)
        seen = ids >= 0
        task.cfg.class_weights = balanced_weights(np.bincount(ids[seen], counts[seen], len(names)))
    parse_weights(task.cfg.class_weights, len(names), task.flag("class_weights"))  # for its errors
    return config


def check_labels(split: RowSplit, names: list[str], field: str, array: str) -> None:
    """Raises `BadInput`, which names the first row, if a label of a split is none of `names`."""
    ids = ids_of(split.labels, names)
    unknown = [i for i, count in enumerate(split.label_counts) if count and ids[i] < 0]
    if not unknown:
        return
    stored = split.arrays[array]
    at = int(np.argmax(np.isin(stored.values, unknown)))
    row, label = int(np.searchsorted(stored.ends, at, side="right")), stored.values[at]
    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise BadInput(
        f"{split.where(row)}: label {split.labels[label]!r} is unknown; known are {known}"
        f" (those of the training part, or of {field})"
    )


def say_cut(task: RowTask, split: RowSplit) -> None:
    """Says in how many rows something is too long for the model and loses its end."""
    length = task.config.model.max_seq_len
    for what, count in task.cut(split).items():
        if count:
            say(
                f"cut       {count:,} of {split.rows:,} {what} of {split.name} lose their end: they"
                f" are longer than the model takes (model.max_seq_len={length})"
            )
    if split.skipped and task.name == "token_classification":
        say(f"skipped   {split.skipped:,} words of {split.name} have no token, so no label either")


def open_rows_split(trained: Trained, source: str, name: str) -> RowSplit:
    """Returns the rows to evaluate on: the whole of `source`, else the run's own split. Raises
    `BadInput` if the source is unusable, or the run's own rows have changed since training."""
    config = trained.config
    if source:
        split = prepare_whole_rows(source, config, trained.tokenizer)
        if (task := task_of(config)).labels_in:
            check_labels(split, task.known_names(), task.flag("labels"), task.labels_in)
        return split
    data = prepare_rows(config)
    if data.fingerprint != trained.checkpoints.meta(trained.step).get("data_fingerprint"):
        raise BadInput(
            f"the rows or tokenizer of data.source={config.data.source} have changed since"
            " training; name what to evaluate on with --data=SOURCE"
        )
    return data.train if name == "train" else data.validation
