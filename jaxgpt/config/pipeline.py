"""The schedule of layers in stages over the mesh axis `pipeline`, and when it can be used."""

import math
from typing import NamedTuple

from jaxgpt.config.schema import BATCH_AXES, Config
from jaxgpt.system.errors import BadInput


class Schedule(NamedTuple):
    """A circular schedule (arXiv:2104.04473, section 2.2): `stages` S devices, each with `rounds` V
    runs of consecutive layers, and `microbatches` M that pass all stages in each round.

    At tick t stage s runs item i = t - s, which is microbatch i mod M in round i div M. With S = 2,
    V = 2, M = 2 (item = round and microbatch, "-" idles):

        tick      0   1   2   3   4
        stage 0   0a  0b  1a  1b  -
        stage 1   -   0a  0b  1a  1b
    """

    stages: int
    rounds: int
    microbatches: int

    @property
    def items(self) -> int:
        """How many times each stage works: M * V."""
        return self.rounds * self.microbatches

    @property
    def ticks(self) -> int:
        """How many turns a pass takes: M * V + S - 1."""
        return self.items + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of the ticks in which a stage idles."""
        return (self.stages - 1) / self.ticks


def pattern_length(model) -> int:
    """Returns after how many layers the windows of a model's layers repeat."""
    return model.full_attention_every if model.window and model.full_attention_every else 1


def schedule_of(config: Config, stages: int) -> Schedule:
    """Returns the schedule of so many stages.

    `compute.pipeline_rounds=0` takes the most that there can be: fewer layers at once need less
    memory for gathered weights, and the bubble is smaller. `compute.pipeline_microbatches=0` takes
    as many as stages, the fewest that keep all of them busy.
    """
    compute, model = config.compute, config.model
    most = max(model.num_layers // (stages * pattern_length(model)), 1)
    return Schedule(
        stages, compute.pipeline_rounds or most, compute.pipeline_microbatches or stages
    )


def check_pipeline_axis(config: Config, mesh: dict[str, int]) -> None:
    """Raises `BadInput` where layers or batch cannot be dealt to the stages of `mesh.pipeline`, or
    a part of the model has no pipelined form."""
    stages, model, name = mesh["pipeline"], config.model, f"mesh.pipeline={mesh['pipeline']}"
    if stages == 1:
        return
    unsupported = (
        ("model.kind=encoder_decoder", model.kind == "encoder_decoder"),
        ("model.position=relative", model.position == "relative"),
        (f"model.num_experts={model.num_experts}", model.num_experts),
        (f"lora.rank={config.lora.rank}", config.lora.rank),
        ("objectives.distill.hidden_layers", config.objectives.distill.hidden_layers),
        (f"shrink.weights={config.shrink.weights}", config.shrink.weights != "float"),
        (
            f"compute.fake_quantise={config.compute.fake_quantise}",
            config.compute.fake_quantise != "none",
        ),
    )
    for what, is_set in unsupported:
        if is_set:
            raise BadInput(
                f"{name} with {what}, which cannot run in stages; set mesh.pipeline=1 and use"
                " mesh.fsdp instead"
            )
    schedule, period = schedule_of(config, stages), pattern_length(model)
    if model.num_layers % (parts := stages * schedule.rounds * period):
        pattern = f" x model.full_attention_every={period}" if period > 1 else ""
        raise BadInput(
            f"model.num_layers={model.num_layers} cannot be divided by {name} x"
            f" compute.pipeline_rounds={schedule.rounds}{pattern} = {parts}; make it a multiple of"
            f" {parts}, or choose fewer stages or rounds"
        )
    if schedule.microbatches < stages:
        raise BadInput(
            f"compute.pipeline_microbatches={schedule.microbatches} is less than {name}: stages"
            " would wait for the first microbatch to come back; set it to at least that, or to 0"
        )
    rows = config.batch_size // config.grad_accum
    others = math.prod(mesh[axis] for axis in BATCH_AXES if axis != "pipeline")
    if rows % (schedule.microbatches * others):
        raise BadInput(
            f"batch_size={config.batch_size} / grad_accum={config.grad_accum} = {rows} sequences"
            f" cannot be divided into compute.pipeline_microbatches={schedule.microbatches} over"
            f" {others} devices; make batch_size a multiple of"
            f" {config.grad_accum * math.lcm(schedule.microbatches, stages) * others}"
        )
