"""Try many settings: python -m jaxgpt.sweep --config=F
--grid='optim.learning_rate=1e-4,3e-4;batch_size=16,32'

Trains every combination (or --random=K of them), one after another or --jobs=N at once, each
on a device of its own. With --halving=3 all start short and the best third goes on, anew, with
three times the steps. Prints a table, best first; results.json and results.svg lie in the
workdir. Run the same command again to go on after a kill.
"""

from pathlib import Path

from absl import flags

from jaxgpt.config import BadInput
from jaxgpt.config.cli import parse, run, say
from jaxgpt.config.load import config_of, config_path, define_config_flag
from jaxgpt.sweeps.grid import Choice, applied, choices, parse_grid, rungs
from jaxgpt.sweeps.report import write_results
from jaxgpt.sweeps.runner import run_rung


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    define_config_flag(values, argv)
    flags.DEFINE_string("grid", "", "FIELD=VALUE,VALUE;FIELD=...", flag_values=values)
    flags.DEFINE_integer("random", 0, "so many of the combinations; 0 = all", flag_values=values)
    flags.DEFINE_integer("seed", 0, "which ones --random draws", flag_values=values)
    flags.DEFINE_integer("halving", 0, "keep the best 1/N at a time; 0 = off", flag_values=values)
    flags.DEFINE_integer("jobs", 1, "runs at once, each on its own device", flag_values=values)
    flags.DEFINE_string("workdir", None, "default: runs/sweep-<config>", flag_values=values)
    config = config_of(parse(values, argv, __doc__))
    if values.random < 0 or values.jobs < 1 or values.halving < 0 or values.halving == 1:
        raise BadInput("--random must be at least 0, --jobs at least 1, --halving 0 or at least 2")
    grid = parse_grid(values.grid)
    if "num_steps" in grid and values.halving:
        raise BadInput("--halving sets num_steps itself: take it out of --grid")
    runs = choices(grid, values.random, values.seed)
    for choice in runs:
        applied(config, choice)
    file = config_path(argv)
    folder = Path(values.workdir or f"runs/sweep-{Path(file).stem}")
    command = [f"--config={file}", *(a for a in argv[1:] if a.startswith("--config."))]
    rows = climb(runs, command, folder, config.num_steps, values.jobs, values.halving)
    print(write_results(folder, rows))
    say(f"results   {folder / 'results.json'}, {folder / 'results.svg'}")
    return 0 if any(row["loss"] is not None for row in rows) else 3


def climb(
    runs: list[Choice], command: list[str], folder: Path, num_steps: int, jobs: int, eta: int
) -> list[dict]:
    """Trains rung by rung and returns a row for each run of each rung."""
    rows = []
    for steps, count in rungs(num_steps, len(runs), eta):
        if not runs:
            break  # every run failed
        runs = runs[:count]
        losses = run_rung(runs, command, folder / f"{steps}-steps", steps, jobs)
        found = [
            {"choice": c, "steps": c.get("num_steps", steps), "loss": loss}
            for c, loss in zip(runs, losses, strict=True)
        ]
        rows += found
        good = sorted((r for r in found if r["loss"] is not None), key=lambda r: r["loss"])
        runs = [row["choice"] for row in good]
    return rows


if __name__ == "__main__":
    run(main)
