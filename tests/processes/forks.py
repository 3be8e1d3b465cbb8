"""Python processes forked from one that has imported jaxgpt, which takes seconds.

`Python("-m", "jaxgpt.train", *flags)` stands for `subprocess.Popen([sys.executable, "-m",
"jaxgpt.train", *flags])`: a process with its own arguments, environment, working folder, files and
signals, which runs the module as `__main__` and ends as an interpreter does. A test of what the
imports do, or of hashes that differ between processes, needs a fresh interpreter instead.
"""

import functools
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types

# JAX reads these when it is imported, and XLA_FLAGS when its backend starts.
JAX_OPTIONS = {
    "JAX_COMPILATION_CACHE_DIR": str,
    "JAX_ENABLE_COMPILATION_CACHE": lambda text: text == "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": float,
}


class Python:
    """A forked process, with the interface of `subprocess.Popen(..., text=True)`.

    `stdout` and `stderr` are pipes by default; files and `subprocess.DEVNULL` are taken too.
    `file_size` limits the files that it writes, in bytes.
    """

    def __init__(
        self,
        *args: str,
        env: dict[str, str] | None = None,
        cwd: str | os.PathLike | None = None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        file_size: int | None = None,
    ):
        self.args, self.returncode = args, None
        self.status, status = os.pipe()
        ours, theirs = [], []
        for file in (stdin, stdout, stderr):
            if file == subprocess.PIPE:
                read, write = os.pipe()
                ours.append(os.fdopen(read, encoding="utf-8"))
            elif file == subprocess.DEVNULL:
                write = os.open(os.devnull, os.O_RDWR)
                ours.append(None)
            else:
                write = os.dup(file.fileno())
                ours.append(None)
            theirs.append(write)
        _, self.stdout, self.stderr = ours
        request = {
            "args": list(map(str, args)),
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or os.getcwd()),
            "file_size": file_size,
        }
        socket.send_fds(_server(), [json.dumps(request).encode()], [*theirs, status])
        for fd in (*theirs, status):
            os.close(fd)
        self.pid = self._read()

    def _read(self) -> int:
        """Returns the next number that the process's parent writes: its id, then its exit code."""
        text = os.read(self.status, 8)
        assert len(text) == 8, "the process that forks has ended"
        return int.from_bytes(text, "little", signed=True)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._read()
            os.close(self.status)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Waits for the end, and kills the process after `timeout`; returns stdout and stderr."""
        pipes, texts = (self.stdout, self.stderr), [None, None]

        def read(i: int) -> None:
            with pipes[i]:
                texts[i] = pipes[i].read()

        threads = [threading.Thread(target=read, args=(i,)) for i in (0, 1) if pipes[i]]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
        for thread in threads:
            thread.join()
        return tuple(texts)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> socket.socket:
    """Returns the connection to the process that forks; it ends when this process does."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        command = [sys.executable, "-m", "tests.processes.forks", str(there.fileno())]
        subprocess.Popen(command, pass_fds=[there.fileno()])
    return here


def serve(requests: socket.socket) -> dict | None:
    """Forks a process for each request. Returns the request in the new process, else None at the
    end of all requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests and the commands
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:
            return None
        *files, status = fds
        if os.fork() == 0:
            requests.close()
            return json.loads(message) if _watched(files, status) else None
        for fd in (*files, status):
            os.close(fd)


def _watched(files: list[int], status: int) -> bool:
    """Forks again. True in the new process, whose files are in place; False, in its parent, after
    its end: the parent has written its id and its exit code to `status`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        for target, fd in enumerate(files):
            os.dup2(fd, target)
        for fd in (*files, status):
            os.close(fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return True
    for fd in (*files, 0, 1, 2):
        os.close(fd)
    os.write(status, pid.to_bytes(8, "little", signed=True))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, code.to_bytes(8, "little", signed=True))
    os._exit(0)


def run(args: list[str], env: dict[str, str], cwd: str, file_size: int | None) -> None:
    """Runs what `python` would with these arguments, in this process."""
    import jax

    changed = {k for k in env.keys() | os.environ.keys() if env.get(k) != os.environ.get(k)}
    os.environ.clear()
    os.environ.update(env)
    for name in changed:
        if name in JAX_OPTIONS:
            jax.config.update(name.lower(), JAX_OPTIONS[name](env[name]))
        assert name in JAX_OPTIONS or not name.startswith("JAX_"), f"{name} is read by the import"
    os.chdir(cwd)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    kind, what, *sys.argv[1:] = args
    if kind == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = kind
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    import jaxgpt

    for found in pkgutil.iter_modules(jaxgpt.__path__):
        importlib.import_module(f"jaxgpt.{found.name}")
    gc.freeze()  # a collection would touch, and so copy, the pages that the forks share
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = serve(requests)
    if request is not None:
        run(**request)
