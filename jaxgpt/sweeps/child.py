"""`python -m MODULE` in a process that is killed when its sweep is: if the sweep is run again, two
processes would otherwise train in one workdir.

    python -m jaxgpt.sweeps.child PARENT_PID MODULE ARGUMENTS...
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl: the signal to get when the parent ends; Linux only


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when the process `parent` ends; exits if it has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv.pop(1)))
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
