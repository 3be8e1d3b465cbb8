"""What a run takes from its objective besides the function: `Companions`, whose methods are those
of a language model of running text. An objective that needs something else has a class of its own,
which overrides them, and a line in `training.objectives.COMPANIONS`.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from jaxgpt.config import Config
from jaxgpt.data.pipeline import Stream, training_stream
from jaxgpt.data.prepare import Data, Prepared, prepare
from jaxgpt.data.show import NO_EXAMPLE, Example, example_prompt
from jaxgpt.evaluation.perplexity import Perplexity
from jaxgpt.inference.trained import Trained
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import make_eval_step
from jaxgpt.objectives.text import Asked, Measure, loss_measure
from jaxgpt.objectives.training_sample import TrainingSample
from jaxgpt.text.chat import save_template
from jaxgpt.tokenizer import Tokenizer

INT32 = np.dtype("int32")


@dataclasses.dataclass(frozen=True)
class NoSample:
    """In the place of `TrainingSample`: no text."""

    prompt: str = ""

    def __call__(self, params: dict, seed: int) -> str:
        return ""


@dataclasses.dataclass(frozen=True)
class Companions:
    """What an objective brings to the run of `config` on `mesh`; `make_spec(config, mesh)` makes
    the spec of a model beside it."""

    config: Config
    mesh: Mesh
    make_spec: Callable[[Config, Mesh], ModelSpec]

    specs = {}  # models that are not trained, by the objective's argument
    reference = {}  # what a checkpoint says about them
    logits = 1.0  # the share of the batch's tokens of which the model makes logits

    @staticmethod
    def check(config: Config) -> None:
        """Raises `BadInput`, before any data is read, if what the objective needs is not there, or
        the config's model cannot learn it."""

    @staticmethod
    def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
        """Raises `BadInput` if the objective does not go with the tokenizer."""

    def check_reference(self, saved: dict, step: int) -> None:
        """Raises `BadInput` if checkpoint `step` was trained beside something else."""

    @staticmethod
    def prepare(config: Config, out: str = "") -> Prepared:
        """Returns the data, made on first use, in the cache or in the folder `out`. What it is
        like, only the other methods know, but for `folder`, `tokenizer`, `fingerprint`, `summary`,
        `counts`, `dropped`, `masked` and `str`."""
        return prepare(config.data, out)

    @staticmethod
    def completed(config: Config, data: Data) -> Config:
        """Returns `config` with those of the objective's fields filled in that follow from the
        data. Raises `BadInput` if the data do not fit the config."""
        return config

    @staticmethod
    def adopted(config: Config, old: Config) -> Config:
        """Returns the `config` of a run that is resumed with the fields that `completed` filled in
        of the `old` one."""
        return config

    @staticmethod
    def stream(config: Config, data: Prepared) -> Stream:
        """Returns the training batches. Raises `BadInput` if there is too little data for one."""
        return training_stream(data.train, config)

    def taught(self, stream: Stream, data: Data) -> Stream:
        """Returns the batches with what is computed for all of them before the first step."""
        return stream

    def batch_arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the arrays of a batch by name: the shape behind [grad_accum, batch], and the
        dtype."""
        packed = ("segments", "positions") if self.config.data.pack else ()
        array = (self.config.model.max_seq_len,), INT32
        return dict.fromkeys(("inputs", "targets", *packed), array)

    def own_parameters(self, spec: ModelSpec) -> dict:
        """Returns what is trained beside the model `spec`, by the objective's argument."""
        return {}

    def opened(self) -> dict[str, dict]:
        """Returns the parameters of `specs`, on the mesh."""
        return {}

    def evaluator(self, spec: ModelSpec, sharding: NamedSharding, data: Prepared) -> Callable:
        """Returns what validates while training: (parameters, windows at most; 0: all) -> figures.
        Of them `loss`, `perplexity`, `bits_per_byte` and all that are floats or None are written.
        `sharding` is that of a batch's array."""
        cfg = self.config
        rows = cfg.batch_size // cfg.grad_accum
        return Perplexity(
            make_eval_step(spec), sharding, data.validation, cfg.model.max_seq_len, rows
        )

    @staticmethod
    def example(config: Config, data: Prepared) -> Example:
        """Returns a prompt for the trained model."""
        return example_prompt(data.validation, data.tokenizer, config.data.chat_template)

    @staticmethod
    def save(config: Config, data: Prepared, folder: epath.Path) -> None:
        """Writes beside the tokenizer in `folder` what commands need of the objective later."""
        if data.train.mask is not None:
            save_template(config.data.chat_template, folder)

    def training_sample(self, spec: ModelSpec, data: Prepared, example: Example) -> TrainingSample:
        """Returns what samples while training: `prompt`, and (parameters, seed) -> text, "" for
        none. Of prompts with responses, without a `sample.prompt`, from the `example`."""
        own = example if data.validation.mask is not None else NO_EXAMPLE
        template = self.config.data.chat_template
        return TrainingSample(spec, data.tokenizer, self.config.sample, own, template)

    @staticmethod
    def predictor(trained: Trained) -> Callable[[str], Iterable[str]] | None:
        """Returns what `sample` prints of a prompt, in lines, where that is no text that the model
        generates; call it under `jax.set_mesh`."""

    @staticmethod
    def trained_parameters(trained: Trained) -> dict:
        """Returns the parameters that `measure` takes; call it under `jax.set_mesh`."""
        return trained.params()

    @staticmethod
    def measure(trained: Trained, asked: Asked) -> Measure:
        """Returns what `evaluate` measures of parameters. Raises `BadInput` if it is asked for what
        the objective has not."""
        asked.refuse_beams()
        return loss_measure(trained, asked.source, asked.split, asked.stride)
