"""List, show or verify the checkpoints of a run:

    python -m jaxgpt.checkpoint list --workdir=DIR
    python -m jaxgpt.checkpoint show --workdir=DIR [--step=N|best]
    python -m jaxgpt.checkpoint verify --workdir=DIR [--step=N|best]

`list` prints a row per checkpoint; `show` prints the metadata, shapes and dtypes of one; `verify`
compares every file with its checksum and exits with 2 if one differs. The last line is JSON.
"""

from absl import flags
from etils import epath

from jaxgpt.checkpointing.choice import BEST, check_checkpoints, define_step
from jaxgpt.cli.flags import parse_action
from jaxgpt.cli.run import run
from jaxgpt.system.errors import BadInput


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
    define_step(values, "see above")
    action = parse_action(values, argv, ("list", "show", "verify"), __doc__)
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    check_checkpoints(epath.Path(values.workdir))
    # JAX is imported from here on: what is wrong with the flags is said at once
    from jaxgpt.checkpointing.checkpoints import Checkpoints
    from jaxgpt.jobs.checkpoint import ACTIONS

    checkpoints = Checkpoints(values.workdir, read_only=True)
    step = checkpoints.pick(BEST) if values.step == BEST else values.step
    ACTIONS[action](checkpoints, step)


if __name__ == "__main__":
    run(main)
