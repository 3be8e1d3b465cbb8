"""The one exception that means "the user can fix this"."""


class BadInput(Exception):
    """Bad input: the message is one line saying what is wrong, where, and what to do.

    Commands print it as `error: <message>` on stderr and exit with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
