"""The exceptions that end a command with one line."""


class BadInput(Exception):
    """Bad input: the message is one line saying what is wrong, where, and what to do.

    Commands print it as `error: <message>` on stderr and exit with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class PeerLost(Exception):
    """Another process of the run has gone; running the command again resumes. Exit code 1."""
