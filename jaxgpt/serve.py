"""Serve a run over HTTP:

    python -m jaxgpt.serve --workdir=DIR [--host=127.0.0.1 --port=8000]

OpenAI's /v1/completions (with streaming), /v1/models, /healthz, and a page to try it at /. Needs
`pip install -e '.[serve]'`. Everyone who can reach the port may use it, unless there is an
--api_key; web pages of other origins may not, unless --allow_origin names them.
"""

import os
import socket
from functools import partial
from pathlib import Path

from absl import flags
from etils import epath

from jaxgpt.checkpointing.choice import check_run, define_step
from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.config.stored import read_config
from jaxgpt.processes import signals
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.extras import require

REQUEST_TIMEOUT = 20  # seconds that a client has to send its whole request
GRACE = 4  # seconds that unfinished texts have at a shutdown


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    define_step(values)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen at", flag_values=values)
    flags.DEFINE_integer("port", 8000, "port; 0 = any free one", flag_values=values)
    flags.DEFINE_string("name", "", "the model's name; default: the workdir's", flag_values=values)
    flags.DEFINE_integer("slots", 8, "texts that are generated in one batch", flag_values=values)
    flags.DEFINE_integer("max_waiting", 256, "requests that may wait", flag_values=values)
    flags.DEFINE_multi_string(
        "allow_origin", [], "let pages of this origin in; repeatable", flag_values=values
    )
    flags.DEFINE_string(
        "api_key", "", "key that /v1/ requires; default: $JAXGPT_API_KEY", flag_values=values
    )
    parse(values, argv, __doc__)
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    for name, low, high in (("slots", 1, 1024), ("max_waiting", 1, 10**6), ("port", 0, 65535)):
        if not low <= values[name].value <= high:
            raise BadInput(f"--{name}={values[name].value} must be from {low} to {high}")
    for module in ("uvicorn", "starlette"):
        require(module, "serve", "jaxgpt.serve")
    check_run(values.workdir, values.step)
    kind = read_config(epath.Path(values.workdir)).model.kind
    if kind != "decoder":
        raise BadInput(
            f"the server continues texts, but this model is an {kind.replace('_', '-')}: use"
            f" python -m jaxgpt.sample --workdir={values.workdir}"
        )
    # JAX is imported from here on: what is wrong with the flags is said at once
    from jaxgpt.serving.guard import Guard

    key = values.api_key or os.environ.get("JAXGPT_API_KEY", "")
    guard = Guard(values.host, values.allow_origin, key)
    listening = bind(values.host, values.port)
    # nothing is to be saved, and the interpreter's own end would wait for a compilation
    with signals.handled_by(signals.leave):
        serve(values, guard, listening)


def serve(values: flags.FlagValues, guard, listening: socket.socket) -> None:
    """Serves until a signal comes, and ends the process."""
    import jax
    import uvicorn

    from jaxgpt.data.show import saved_example
    from jaxgpt.inference.chat import find_chat
    from jaxgpt.inference.trained import open_trained
    from jaxgpt.serving.app import make_app
    from jaxgpt.serving.batcher import Batcher
    from jaxgpt.serving.connections import Server, connection_class, most_connections

    trained = open_trained(values.workdir, values.step)
    chat = find_chat(values.workdir)
    example = saved_example(epath.Path(values.workdir) / "tokenizer")
    with jax.set_mesh(trained.mesh):
        decoder = trained.decoder()
    batcher = Batcher(decoder, trained.mesh, trained.tokenizer, values.slots, values.max_waiting)
    say("compile   the programs of the shortest prompts")
    batcher.warm_up()
    host, port = listening.getsockname()[:2]
    name = values.name or Path(values.workdir).resolve().name
    say(f"serving   {name}, step {trained.step}, at http://{host}:{port}/ (Ctrl-C ends)")
    config = uvicorn.Config(
        make_app(batcher, name, guard, REQUEST_TIMEOUT, example, chat),
        http=connection_class(most_connections(), REQUEST_TIMEOUT),
        ws="none",
        log_level="error",
        timeout_graceful_shutdown=3 * GRACE,
    )
    server = Server(config, partial(batcher.close, GRACE), batcher.thread.is_alive)
    server.run(sockets=[listening])  # raises a signal again at its end, which `leave` then handles
    if batcher.failure:
        raise batcher.failure


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at the port. It is taken before anything is loaded; clients
    that connect early wait. Raises `BadInput` if the port cannot be taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        raise BadInput(f"cannot listen at {host} port {port}: {e.strerror or e}") from e


if __name__ == "__main__":
    run(main)
