"""When training goes wrong: non-finite steps are skipped, runs of them rolled back, spikes named.

A step whose loss or gradient is not finite changes nothing but the step's number. After
`max_bad_steps` of them in a row the run goes back to the newest whole checkpoint and leaves those
batches out; after `max_rollbacks` of that it ends with exit code 3.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.training import loss_scale

SPIKE_DEVIATIONS = 6.0
SPIKE_MARGIN = 0.3  # nats above the usual
USUAL_AFTER = 20  # logged losses before anything counts as unusual
DECAY = 0.95


class Diverged(Exception):
    """Too many bad steps in a row, the last of them `step`."""

    def __init__(self, step: int, in_a_row: int):
        super().__init__(f"{in_a_row} bad steps up to {step}")
        self.step, self.in_a_row = step, in_a_row


def counters() -> dict:
    """Returns the state {"in_a_row", "skipped"} of a run without a bad step."""
    return {"in_a_row": jnp.int32(0), "skipped": jnp.int32(0)}


def count_bad(bad: dict, good) -> dict:
    """Returns the counters one step on."""
    return {
        "in_a_row": jnp.where(good, 0, bad["in_a_row"] + 1),
        "skipped": bad["skipped"] + jnp.where(good, 0, 1),
    }


def judge(scale: dict, bad: dict, good) -> tuple[dict, dict]:
    """Returns the loss scale and the counters one step on.

    With loss scaling an overflow is no fault of the step's while the scale can still fall.
    """
    if not scale:
        return scale, count_bad(bad, good)
    bad = count_bad(bad, good | (scale["scale"] > 1))
    return loss_scale.adjust(scale, good), bad


def update_if(good, update: Callable[..., tuple], old: tuple) -> tuple:
    """Returns `update(*old)` where the step is good, else `old`.

    On a CPU a branch: XLA would otherwise copy the optimizer's moments, as what it writes in their
    place is computed from both. Elsewhere both are computed, so that collectives can overlap.
    """
    if jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu":
        return jax.lax.cond(good, update, lambda *old: old, *old)
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), update(*old), old)


def batch_of(step: int, skips: list[tuple[int, int]]) -> int:
    """Returns which batch (from 0) trains `step` (from 1): step - 1, and past what is left out.

    `skips` are (step, count): from that step on, so many batches are passed over.
    """
    return step - 1 + sum(count for first, count in skips if step >= first)


class Spikes:
    """Watches logged losses for one far above the usual (a running mean and deviation)."""

    def __init__(self):
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def __call__(self, loss: float) -> float | None:
        """Returns the usual loss if `loss` is a spike, else None; spikes do not become usual.

        A loss that is not finite is none, and is left out: its step is counted as skipped.
        """
        if not math.isfinite(loss):
            return None
        usual, deviation = self.mean, math.sqrt(self.variance)
        limit = usual + max(SPIKE_DEVIATIONS * deviation, SPIKE_MARGIN)
        if self.count >= USUAL_AFTER and loss > limit:
            return usual
        weight = max(1 - DECAY, 1 / (self.count + 1))
        self.count += 1
        self.mean += weight * (loss - self.mean)
        self.variance = (1 - weight) * (self.variance + weight * (loss - usual) ** 2)
        return None
