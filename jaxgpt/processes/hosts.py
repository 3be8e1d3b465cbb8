"""Several processes that train as one: how they meet, agree, and notice that one has gone.

JAX's own preemption service is turned off. It listens for SIGTERM too, in a handler that takes the
place of Python's; `Vote` and `signals` do its work for every signal.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxgpt.processes import signals
from jaxgpt.processes.flags import check_flags
from jaxgpt.system.accelerators import has_tpu_files
from jaxgpt.system.console import silence
from jaxgpt.system.errors import BadInput, PeerLost, one_line
from jaxgpt.system.programs import keep_no_programs

HEARTBEAT = 30  # seconds without a sign of life until a process counts as dead
VOTE_LAG = 2  # steps between a vote and its count: by then it is on the host
MOST_BYTES = 2048  # of what one process tells all
LOST = ("gloo", "nccl", "coordination", "heartbeat", "connection", "unavailable", "barrier")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def join(values: flags.FlagValues) -> None:
    """Meets the other processes of the run, where there are any; call it before any other JAX.

    They are those of --coordinator, of a Slurm step with several tasks, or of a TPU slice.

    Raises:
      BadInput: if the flags do not go together, or (ending the process) if not all processes come.
    """
    if process := check_flags(values):
        where = f"the coordinator {values.coordinator}"
    elif all(name in os.environ for name in SLURM) and os.environ.get("SLURM_NTASKS", "1") != "1":
        where = "this Slurm step"
    elif _on_tpu():
        where = "this TPU slice"
    else:
        return
    jax.config.update("jax_enable_preemption_service", False)
    keep_no_programs()  # on GPUs they compile together, and would wait for one that need not
    signals.watch(process.get("process_id", int(os.environ.get("SLURM_PROCID", 0))), _lost_line())
    met = threading.Event()
    threading.Thread(target=_give_up, args=(met, values.join_timeout, where), daemon=True).start()
    try:
        jax.distributed.initialize(
            **process,
            initialization_timeout=values.join_timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except ValueError:  # a TPU that is no part of a slice
        pass
    except RuntimeError as e:
        raise BadInput(f"cannot use {where}: {str(e).splitlines()[0]}") from e
    finally:
        met.set()
    signals.index = jax.process_index()
    if jax.process_index() > 0:
        silence()


def _on_tpu() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return has_tpu_files() and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None


def _give_up(met: threading.Event, seconds: float, where: str) -> None:
    """Ends the process with a line in place of the stack trace with which JAX would abort it."""
    if not met.wait(seconds):
        print(
            f"error: not all processes came to {where} within {seconds} s; start them all with the"
            " same command, each with its own --process_id, and see that the port is open",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)


def _lost_line(why: str = "see above") -> str:
    return (
        "another process of this run has gone (its own output has the reason); run the same command"
        f" on all hosts again to resume ({why.splitlines()[0][:200]})"
    )


@contextlib.contextmanager
def peers_watched() -> Iterator[None]:
    """Turns what a broken connection to another process raises into `PeerLost`."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as e:
        if not is_peer_lost(e):
            raise
        time.sleep(signals.MOMENT)  # a signal that ended the other one may be on its way here
        raise PeerLost(_lost_line(str(e))) from e


def meet() -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("meet")


def is_peer_lost(e: BaseException) -> bool:
    """Says whether an error means that another process has gone."""
    return jax.process_count() > 1 and any(word in str(e).lower() for word in LOST)


def check_same(value: str, what: str) -> None:
    """Raises `BadInput` on every process if `value` differs between any two; `what` names it."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.uint32)
    every = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine))
    if differing := [i for i, other in enumerate(every) if (other != every[0]).any()]:
        raise BadInput(
            f"{what} of process(es) {', '.join(map(str, differing))} differs from that of process"
            " 0; give all hosts the same files and the same command"
        )


def on_first(act: Callable[[], Any]) -> Any:
    """Runs `act` on process 0 alone and returns its result, of JSON's types, on every process.

    Whatever `act` raises reaches all processes at once: none waits for one that has given up.

    Raises:
      BadInput: on every process, if it does on process 0.
      SystemExit: likewise, with the same code.
      PeerLost: on the others, for any other exception, which process 0 itself raises unchanged.
    """
    if jax.process_count() == 1:
        return act()
    message, raised = {}, None
    if jax.process_index() == 0:
        try:
            message = {"result": act()}
            if len(json.dumps(message, ensure_ascii=False).encode()) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes to tell the other processes")
        except BadInput as e:
            message, raised = {"error": str(e)[: MOST_BYTES // 8]}, e
        except SystemExit as e:
            message, raised = {"exit": e.code}, e
        except BaseException as e:
            what = one_line(f"{type(e).__name__}: {e}")[: MOST_BYTES // 8]
            message, raised = {"fault": f"process 0 failed: {what}"}, e
    text = json.dumps(message, ensure_ascii=False).encode(errors="backslashreplace")
    page = np.zeros(MOST_BYTES, np.uint8)
    page[: len(text)] = np.frombuffer(text, np.uint8)
    reply = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(page))).rstrip(b"\0"))
    if raised is not None:
        raise raised
    if "error" in reply:
        raise BadInput(reply["error"])
    if "exit" in reply:
        raise SystemExit(reply["exit"])
    if "fault" in reply:
        raise PeerLost(reply["fault"])
    return reply["result"]


def gather_to_host(array: jax.Array) -> np.ndarray:
    """Returns the whole of an array that may be split over the processes, to each of them."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Vote:
    """Lets a number on any process reach all of them at the same step, never waiting for a step
    that still runs: what is cast at step k is counted at step k + VOTE_LAG.

    With a single process the count is at once.
    """

    def __init__(self, mesh: Mesh):
        self.size = mesh.devices.size
        self.sharding = NamedSharding(mesh, jax.P(mesh.axis_names))
        self.highest = jax.jit(jnp.max)
        self.cast: deque[jax.Array] = deque()

    def __call__(self, mine: int) -> int:
        """Casts `mine`, at least 0, and returns the highest number of a vote ago."""
        if jax.process_count() == 1:
            return mine
        own = np.full(self.size, mine, np.int32)
        votes = jax.make_array_from_callback((self.size,), self.sharding, lambda index: own[index])
        self.cast.append(self.highest(votes))
        return int(self.cast.popleft()) if len(self.cast) > VOTE_LAG else 0
