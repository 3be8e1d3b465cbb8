"""Measure a run's steady state: python -m jaxgpt.benchmark --config=FILE [--steps=20] [--decode]

Trains --steps steps of the config on this machine's devices, from prepared data, and keeps nothing.
Prints where the time goes on stderr and JSON as the last line of stdout. `mfu` is the share of
`matmul_flops_per_second`: the devices' peak where it is known, else the rate of a large matrix
product in compute.dtype, measured here. `first_step_seconds` counts from the command's start.
--decode times generation too: one row, 16 tokens of prompt, up to 200 new ones, fresh weights.
--profile=DIR keeps the profile, for TensorBoard (its profile plugin) and Perfetto.
"""

import json
import time
from pathlib import Path

from absl import flags

from jaxgpt.cli.flags import config_of, define_config_flag, parse
from jaxgpt.cli.run import run
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput

BEGAN = time.perf_counter()


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    define_config_flag(values, argv)
    flags.DEFINE_integer("steps", 20, "steps to time", flag_values=values)
    flags.DEFINE_bool("decode", False, "time generation too", flag_values=values)
    flags.DEFINE_string("profile", "", "folder for the profile", flag_values=values)
    config = config_of(parse(values, argv, __doc__))
    if not 1 <= values.steps <= 10**6:
        raise BadInput(f"--steps={values.steps} must be from 1 to 1000000")
    if values.profile and Path(values.profile).exists() and not Path(values.profile).is_dir():
        raise BadInput(f"--profile={values.profile} is a file, not a folder")
    if values.decode and (kind := config.model.kind) != "decoder":
        raise BadInput(f"--decode times how a decoder continues a text, but model.kind={kind}")
    from jaxgpt.data.prepare import check_data

    check_data(config.data)
    # JAX is imported only now, so that wrong flags are reported at once
    from jaxgpt.jobs.benchmark import benchmark

    figures = benchmark(config, values.steps, values.decode, values.profile, BEGAN)
    for name, share in sorted(figures["time_shares"].items(), key=lambda row: -row[1]):
        say(f"{name:<10}{share:6.1%} of a step, {share * figures['step_seconds'] * 1e3:9.2f} ms")
    print(json.dumps(figures))


if __name__ == "__main__":
    run(main)
