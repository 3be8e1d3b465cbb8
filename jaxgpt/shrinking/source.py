"""What a method starts from: a workdir's parameters as floats, and text of its training data."""

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import jax
import numpy as np

from jaxgpt.config import Config, DistillConfig, LoraConfig
from jaxgpt.config.stored import methods_done
from jaxgpt.data.pipeline import training_stream
from jaxgpt.data.prepare import cache_folder, prepare, prepare_whole
from jaxgpt.inference.trained import Trained
from jaxgpt.model import ModelSpec
from jaxgpt.parameters.lora import merge as merge_lora


@dataclasses.dataclass(frozen=True)
class Source:
    """A workdir to be shrunk. Call `params` and the methods under `jax.set_mesh(trained.mesh)`."""

    trained: Trained
    data: str = ""  # where the run has no text of its own

    @property
    def config(self) -> Config:
        """The config of the parameters as they are given: LoRA is merged, no average is kept."""
        config = self.trained.config
        optim = dataclasses.replace(config.optim, ema_decay=0.0)
        return dataclasses.replace(config, optim=optim, lora=LoraConfig())

    @property
    def spec(self) -> ModelSpec:
        """The model of `config` and `params`."""
        return dataclasses.replace(self.trained.spec, config=self.config)

    @cached_property
    def params(self) -> dict:
        """The parameters, on the host."""
        params = merge_lora(self.trained.params(), self.trained.config.lora)
        return jax.tree.map(np.asarray, jax.device_get(params))

    def calibration(self, count: int) -> int:
        """Returns `count`, or 0 where there is no text: neither `data` nor the run's own."""
        meta = self.trained.checkpoints.meta(self.trained.step)
        return count if self.data or "imported" not in meta else 0

    def windows(self, count: int, batch: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields `count` windows of the training text in the order of training, so many in a batch:
        `inputs` and `targets` [rows, T] (packed: `segments` and `positions` too). Raises `BadInput`
        if the text is shorter than a window."""
        data = self.config.data
        if self.data:
            split = prepare_whole(self.data, data, self.trained.tokenizer, cache_folder(data))
        else:
            split = prepare(data).train
        config = dataclasses.replace(self.config, batch_size=batch, grad_accum=1)
        stream = training_stream(split, config)
        for k in range(-(-count // batch)):
            rows = np.arange(min(batch, count - k * batch))
            yield {name: a[0] for name, a in stream.batch(k, rows).items()}


def with_shrink(config: Config, method: str, **fields) -> Config:
    """Returns `config` with these fields of `shrink`, and `method` as the last in `shrink.done`.
    What its training did stands there too, and no longer in the fields of that."""
    mine, done = config.shrink, " ".join(filter(None, [methods_done(config), method]))
    zeros = "keep" if mine.sparsity else mine.zeros
    made = {"done": done, "sparsity": 0.0, "zeros": zeros} | fields
    config = dataclasses.replace(config, shrink=dataclasses.replace(mine, **made))
    if config.objective != "distill":
        return config
    objectives = dataclasses.replace(config.objectives, distill=DistillConfig())
    return dataclasses.replace(config, objective="causal_lm", objectives=objectives)
