"""The flags of a run of several processes."""

from absl import flags

from jaxgpt.system.errors import BadInput


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags that say which process of how many this is."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes of this run", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)
    flags.DEFINE_integer(
        "join_timeout", 300, "seconds to wait for the other processes", flag_values=values
    )


def check_flags(values: flags.FlagValues) -> dict:
    """Returns what `jax.distributed.initialize` wants to know of these flags, nothing if they are
    not given. Raises `BadInput` if they do not go together."""
    coordinator, count, index = values.coordinator, values.num_processes, values.process_id
    if not coordinator:
        if (count, index) != (None, None):
            raise BadInput("--num_processes and --process_id need --coordinator=HOST:PORT")
        return {}
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BadInput(f"--coordinator={coordinator} is not HOST:PORT")
    if count is None or index is None:
        raise BadInput("--coordinator needs --num_processes=N and --process_id=I")
    if not 0 <= index < count:
        raise BadInput(
            f"--process_id={index} is not one of 0 .. {count - 1} (--num_processes={count})"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }
