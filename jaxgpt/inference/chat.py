"""Chats as prompts: messages in a run's template, and the reply as it is shown. Needs no JAX."""

import dataclasses
from collections.abc import Iterable, Iterator

from etils import epath

from jaxgpt.config.stored import read_config
from jaxgpt.inference.requests import GenerationRequest
from jaxgpt.system.errors import BadInput
from jaxgpt.text.chat import TURNS, Messages, reply_prompt, saved_template


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat template by name, and the system message, if any, of chats that have none."""

    template: str
    system: str = ""

    @property
    def stop(self) -> str:
        """The text that ends a reply, where end-of-text does not."""
        return TURNS[self.template].stop

    def ask(self, request: GenerationRequest, messages: Messages = ()) -> GenerationRequest:
        """Returns `request` for the reply to `messages`, by default to its prompt, which a user
        says; it ends where the template ends a reply."""
        messages = list(messages) or [("user", request.prompt)]
        if self.system and messages[0][0] != "system":
            messages = [("system", self.system), *messages]
        spans = tuple(reply_prompt(messages, self.template))
        prompt = "".join(span.text for span in spans)
        stop = (*request.stop, self.stop)
        return dataclasses.replace(request, prompt=prompt, spans=spans, stop=stop)


def find_chat(workdir: str, system: str = "") -> Chat | None:
    """Returns the chat of the run in `workdir`, None if it has not learnt from prompts with
    responses. Raises `BadInput` if there is no run."""
    folder = epath.Path(workdir)
    template = read_config(folder).data.chat_template
    return Chat(template, system) if saved_template(folder / "tokenizer") else None


def open_chat(workdir: str, system: str = "") -> Chat:
    """Returns what `find_chat` finds. Raises `BadInput` if that is none."""
    if chat := find_chat(workdir, system):
        return chat
    raise BadInput(
        f"{workdir} has no chat template, as it was not trained on prompts with responses"
        " (data.source=sft:FILE); ask without --chat"
    )


def reply(pieces: Iterable[str]) -> Iterator[str]:
    """Yields the pieces of a reply without the space at its start, which some templates have."""
    began = False
    for piece in pieces:
        piece = piece if began else piece.lstrip()
        began = began or bool(piece)
        yield piece
