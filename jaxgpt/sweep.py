"""Train a config with many settings:

    python -m jaxgpt.sweep --config=FILE --grid='optim.learning_rate=1e-4,3e-4;batch_size=16,32'

Trains every combination (or --random=K of them), one after another or --jobs=N at once, each on
its own device. With --halving=3 all are trained briefly, the best third again with three times the
steps, and so on. Prints a table, best first, and writes results.json and results.svg to the
workdir. After a kill, the same command continues the sweep.
"""

from pathlib import Path

from absl import flags

from jaxgpt.cli.flags import config_path, define_config_flag, given_config, load_file, parse
from jaxgpt.cli.run import run
from jaxgpt.config import Config
from jaxgpt.config.schema import differing
from jaxgpt.config.validate import parse_patterns
from jaxgpt.data.prepare import cache_folder, find_data
from jaxgpt.interchange.init_from import check_model, check_source
from jaxgpt.sweeps.grid import Choice, apply_choice, choices, name_of, parse_grid, rungs
from jaxgpt.sweeps.report import check_results, write_results
from jaxgpt.sweeps.runner import DIVERGED, finished_outcome, flags_of, run_rung
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer.load import vocabulary_size

MOST_JOBS = 1024


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    define_config_flag(values, argv)
    flags.DEFINE_string("grid", "", "FIELD=VALUE,VALUE;FIELD=...", flag_values=values)
    flags.DEFINE_integer("random", 0, "how many combinations to draw; 0 = all", flag_values=values)
    flags.DEFINE_integer("seed", 0, "which ones --random draws", flag_values=values)
    flags.DEFINE_integer(
        "halving", 0, "keep the best 1/N of each rung; 0 = off", flag_values=values
    )
    flags.DEFINE_integer("jobs", 1, "runs at once, each on its own device", flag_values=values)
    flags.DEFINE_string("workdir", None, "default: runs/sweep-<config>", flag_values=values)
    config = given_config(parse(values, argv, __doc__))
    if values.random < 0 or values.halving < 0 or values.halving == 1:
        raise BadInput("--random must be at least 0, --halving 0 or at least 2")
    if not 1 <= values.jobs <= MOST_JOBS:
        raise BadInput(f"--jobs={values.jobs} must be at least 1 and at most {MOST_JOBS}")
    grid = parse_grid(values.grid)
    if values.halving and (config.num_epochs or {"num_steps", "num_epochs"} & set(grid)):
        raise BadInput(
            "--halving sets num_steps itself: take num_steps and num_epochs out of --grid, and set"
            " --config.num_epochs=0"
        )
    runs = choices(grid, values.random, values.seed)
    file = config_path(argv)
    folder = Path(values.workdir or f"runs/sweep-{Path(file).stem}")
    plan = rungs(config.num_steps, len(runs), values.halving)
    check_runs(config, runs, folder, [steps for steps, _ in plan])
    # in whichever way a flag was written (`--noconfig.x`, `-config.x=1`, `--config.x 1`)
    command = [f"--config={file}", *flags_of(differing(config, load_file(file)))]
    rows, codes = run_rungs(config, runs, command, folder, plan, values.jobs)
    print(write_results(folder, rows))
    say(f"results   {folder / 'results.json'}, {folder / 'results.svg'}")
    if failed := [code for code in codes if code]:
        say(f"error: {len(failed)} of {len(codes)} runs failed: their .log files say why")
    return (DIVERGED if set(failed) == {DIVERGED} else 1) if failed else 0


def check_runs(config: Config, runs: list[Choice], folder: Path, steps: list[int]) -> None:
    """Checks every run before the first one starts, without touching a device or a document. Raises
    `BadInput`, naming a combination that is not a possible run, or a workdir of another run."""
    for choice in runs:
        apply_choice(config, choice)
    check_results(folder, runs)
    for choice in runs:
        apply_choice(config, choice, check_inputs)
        for count in steps:
            overrides = {"num_steps": count} | choice
            finished_outcome(
                folder / f"{count}-steps" / name_of(choice), apply_choice(config, overrides)
            )


def check_inputs(config: Config) -> None:
    """Raises `BadInput` where `train` would, before it reads a document or compiles a program."""
    # JAX is imported only now, so that wrong flags are reported at once
    from jaxgpt.optim.groups import parse_multipliers
    from jaxgpt.training.setup import resolve_vocab

    data = config.data
    if not data.source.startswith("shards:"):
        find_data(data, cache_folder(data))
        if data.tokenizer != "char":
            resolve_vocab(config, vocabulary_size(data.tokenizer, data.special_tokens))
    parse_patterns(config.optim.freeze, "optim.freeze")
    parse_patterns(config.init_fresh, "init_fresh")
    parse_multipliers(config.optim.lr_multipliers)
    if config.init_from:
        check_source(config.init_from)
        check_model(config)


def run_rungs(
    config: Config,
    runs: list[Choice],
    command: list[str],
    folder: Path,
    plan: list[tuple[int, int]],
    jobs: int,
) -> tuple[list[dict], list[int]]:
    """Trains rung by rung; returns a row for each run of each rung, and their exit codes."""
    rows, codes = [], []
    for rung, (steps, count) in enumerate(plan):
        if not runs:
            break  # every run failed
        runs = runs[:count]
        outcomes = run_rung(config, runs, command, folder / f"{steps}-steps", steps, jobs)
        for choice, outcome in zip(runs, outcomes, strict=True):
            step = outcome.step or choice.get("num_steps", steps)
            rows.append({"choice": choice, "rung": rung, "steps": step, "loss": outcome.loss})
            codes.append(outcome.code)
        good = [row for row in rows if row["rung"] == rung and row["loss"] is not None]
        runs = [row["choice"] for row in sorted(good, key=lambda row: row["loss"])]
    return rows, codes


if __name__ == "__main__":
    run(main)
