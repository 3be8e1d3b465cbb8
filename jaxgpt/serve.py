"""Serve a run: python -m jaxgpt.serve --workdir=DIR [--host=127.0.0.1 --port=8000]

OpenAI's /v1/completions (text in, text out, with streaming), /v1/models, /healthz, and a page to
try it at /. Needs `pip install -e '.[serve]'`. Anyone who can reach the port may use it: put a proxy
with a password in front before binding it to anything but 127.0.0.1.
"""

import asyncio
import socket
from pathlib import Path

import jax
from absl import flags

from jaxgpt.config import BadInput
from jaxgpt.config.cli import parse, run, say
from jaxgpt.config.extras import require
from jaxgpt.inference.decode import Decoder
from jaxgpt.inference.trained import open_trained

GRACE = 4  # seconds that texts under way have to finish once the server is told to end


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default: the newest", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen at", flag_values=values)
    flags.DEFINE_integer("port", 8000, "port; 0 = any free one", flag_values=values)
    flags.DEFINE_string("name", "", "the model's name; default: the workdir's", flag_values=values)
    flags.DEFINE_integer("slots", 8, "texts that grow side by side", flag_values=values)
    flags.DEFINE_integer("max_waiting", 256, "requests that may wait", flag_values=values)
    parse(values, argv, __doc__)
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    for name, least, most in (("slots", 1, 1024), ("max_waiting", 1, 10**6), ("port", 0, 65535)):
        if not least <= values[name].value <= most:
            raise BadInput(f"--{name}={values[name].value} must be from {least} to {most}")
    uvicorn = require("uvicorn", "serve", "jaxgpt.serve")
    require("starlette", "serve", "jaxgpt.serve")
    from jaxgpt.serving.app import make_app
    from jaxgpt.serving.batcher import Batcher

    listening = bind(values.host, values.port)
    trained = open_trained(values.workdir, values.step)
    with jax.set_mesh(trained.mesh):
        decoder = Decoder.of(trained.spec, trained.params(), trained.tokenizer.vocab_size)
    batcher = Batcher(decoder, trained.mesh, trained.tokenizer, values.slots, values.max_waiting)
    say("compile   the programs of the shortest prompts")
    batcher.warm_up()
    host, port = listening.getsockname()[:2]
    name = values.name or Path(values.workdir).resolve().name
    say(f"serving   {name}, step {trained.step}, at http://{host}:{port}/ (Ctrl-C ends)")

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):  # the batcher first: uvicorn waits for its answers
            closing = asyncio.create_task(asyncio.to_thread(batcher.close, GRACE))
            await super().shutdown(sockets)
            await closing

    config = uvicorn.Config(
        make_app(batcher, name), log_level="warning", timeout_graceful_shutdown=3 * GRACE
    )
    Server(config).run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that holds the port, before anything is loaded.

    Raises:
      BadInput: if it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)  # who comes early waits
    except OSError as e:
        raise BadInput(f"cannot listen at {host} port {port}: {e.strerror or e}") from e
    return listening


if __name__ == "__main__":
    run(main)
