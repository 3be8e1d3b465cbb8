"""Train a GPT:

    python -m jaxgpt.train --config=configs/tiny.py [--workdir=DIR] [--config.FIELD=VALUE ...]

Prepares the data if that is not done yet, trains, evaluates, samples and checkpoints into the
workdir (default: runs/<config file's name>). Run the same command again to resume.

--verify_resume=K trains nothing to keep: it kills a run of 2K steps of this config in the middle,
resumes it and compares every number with a run that was not killed.
"""

import json
import os
from pathlib import Path

from absl import flags
from etils import epath

from jaxgpt.cli.flags import config_of, config_path, define_config_flag, parse
from jaxgpt.cli.run import run
from jaxgpt.metrics.trackers import check_trackers
from jaxgpt.processes.flags import check_flags, define_flags
from jaxgpt.system.errors import BadInput
from jaxgpt.system.stores import check_store_writable, is_object_store


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    define_config_flag(values, argv)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("verify_resume", 0, "prove resume over K steps", flag_values=values)
    define_flags(values)
    parse(values, argv, __doc__)
    workdir = epath.Path(values.workdir or f"runs/{Path(config_path(argv)).stem}")
    config = config_of(values, workdir)
    check_flags(values)
    check_writable(workdir)
    check_trackers(config.track, workdir)
    if not (workdir / "checkpoints").exists():  # a run that is there may have its text in the cache
        from jaxgpt.labelled.prepare import check_source

        check_source(config)
    # JAX is imported from here on: what is wrong with the flags is said at once
    from jaxgpt.jobs.train import train
    from jaxgpt.processes import hosts
    from jaxgpt.training.verify_resume import verify_resume

    if not values["verify_resume"].using_default_value:
        print(json.dumps(verify_resume(argv, values.verify_resume)))
        return 0
    hosts.join(values)
    with hosts.peers_watched():
        return train(workdir, config)


def check_writable(workdir: epath.Path) -> None:
    """Raises `BadInput` if `workdir` can be neither used nor made; makes nothing yet."""
    if is_object_store(workdir):
        return check_store_writable(workdir)
    there = Path(workdir).absolute()
    while not there.exists():
        if there.is_symlink():
            raise BadInput(
                f"workdir {workdir} cannot be used: {there} is a link to {os.readlink(there)},"
                " which does not exist"
            )
        there = there.parent
    if not there.is_dir():
        raise BadInput(f"workdir {workdir} cannot be made: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"workdir {workdir} cannot be written: no permission in {there}")


if __name__ == "__main__":
    run(main)
