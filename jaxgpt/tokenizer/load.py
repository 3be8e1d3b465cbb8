"""From `data.tokenizer`'s string to a tokenizer, and to and from a folder."""

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from jaxgpt.hub.models import located
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, path_of, read_json
from jaxgpt.tokenizer.base import ByteTokenizer, Tokenizer, TrainingText
from jaxgpt.tokenizer.char import CharTokenizer
from jaxgpt.tokenizer.gpt2 import Gpt2Tokenizer
from jaxgpt.tokenizer.hf import HfTokenizer
from jaxgpt.tokenizer.sentencepiece import SentencePieceTokenizer
from jaxgpt.tokenizer.special import SPECIAL_FILE, SpecialTokens, special_names

KINDS = {
    t.kind: t
    for t in (ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Gpt2Tokenizer, HfTokenizer)
}
READERS = {
    "sentencepiece": SentencePieceTokenizer.from_file,
    "gpt2": Gpt2Tokenizer.open,
    "hf": HfTokenizer.open,
}
KIND_FILE = "tokenizer_kind.json"


def is_trained(spec: str) -> bool:
    """Says whether `spec` names a tokenizer that is trained on the corpus."""
    return spec == "char" or _sentencepiece_size(spec) is not None


def _sentencepiece_size(spec: str) -> tuple[str, int] | None:
    """Returns (model type, size) of `sentencepiece:[bpe:|unigram:]N`, else None."""
    match = re.fullmatch(r"sentencepiece:(?:(bpe|unigram):)?(\d{1,9})", spec)
    return match and (match[1] or "bpe", int(match[2]))


def check_spec(spec: str) -> None:
    """Raises `BadInput` for a `data.tokenizer` that names no tokenizer or no file."""
    if not is_trained(spec):
        make_tokenizer(spec)
    elif spec != "char" and _sentencepiece_size(spec)[1] < 300:
        raise BadInput(
            f"data.tokenizer={spec} is too small: 256 pieces are bytes; ask for 300 or more"
        )


def vocabulary_size(spec: str, special_tokens: str = "") -> int:
    """Returns how many ids the tokenizer that `spec` describes will have, without training it.
    Raises `BadInput` for `char`, whose size depends on its corpus."""
    if spec == "char":
        raise BadInput("data.tokenizer=char gets its size from the corpus; set model.vocab_size")
    if size := _sentencepiece_size(spec):
        return size[1] + len(special_names(special_tokens))
    return make_tokenizer(spec, special_tokens=special_tokens).vocab_size


def make_tokenizer(
    spec: str, texts: Sequence[TrainingText] = (), special_tokens: str = ""
) -> Tokenizer:
    """Returns the tokenizer that `spec` describes, trained on `texts` if it says so.

    `special_tokens` (see `special_names`) get ids of their own after the others; those that the
    tokenizer of a workdir has already keep theirs.

    Raises:
      BadInput: if `spec` is unknown, a file is missing or the corpus is too small.
    """
    if special_tokens:
        return add_special_tokens(make_tokenizer(spec, texts), special_names(special_tokens))
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return CharTokenizer.train(texts)
    if size := _sentencepiece_size(spec):
        return SentencePieceTokenizer.train(texts, *size)
    kind, _, path = spec.partition(":")
    if kind in READERS and path:
        path = path_of(located(path, weights=False), "data.tokenizer")
        for folder in (path, path / "tokenizer") if kind == "hf" else ():
            if (folder / KIND_FILE).is_file():  # of a workdir, of any kind
                return load_tokenizer(folder)
        return READERS[kind](path)
    raise BadInput(
        f"data.tokenizer={spec!r} is unknown: choose byte, char, sentencepiece:SIZE,"
        " sentencepiece:unigram:SIZE, sentencepiece:FILE.model, gpt2:DIR or hf:DIR (a"
        " tokenizer.json, or a workdir)"
    )


def add_special_tokens(tokenizer: Tokenizer, names: list[str]) -> Tokenizer:
    """Returns `tokenizer` with those of `names` that it does not have after its own."""
    SpecialTokens(tokenizer, names)  # raises what is wrong with the names
    new = [name for name in names if name.strip() not in tokenizer.special]
    if not new:
        return tokenizer
    if not isinstance(tokenizer, SpecialTokens):
        return SpecialTokens(tokenizer, new)
    return SpecialTokens(tokenizer.base, [*tokenizer.names, *new])


def describes(spec: str, special_tokens: str, tokenizer: Tokenizer) -> bool:
    """Says whether `tokenizer` may have been made from `spec` with `special_tokens`.

    One that is trained is compared by its kind and size alone.
    """
    if not is_trained(spec):
        return fingerprint(make_tokenizer(spec, (), special_tokens)) == fingerprint(tokenizer)
    names = getattr(tokenizer, "names", [])
    if special_names(special_tokens) != names or tokenizer.kind != spec.partition(":")[0]:
        return False
    return spec == "char" or vocabulary_size(spec, special_tokens) == tokenizer.vocab_size


def save_tokenizer(tokenizer: Tokenizer, folder) -> None:
    """Writes `tokenizer` into `folder`; the kind file comes last and completes it."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    kind = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    (folder / KIND_FILE).write_text(json.dumps(kind))


def load_tokenizer(folder) -> Tokenizer:
    """Reads what `save_tokenizer` wrote."""
    folder = epath.Path(folder)
    if not (folder / KIND_FILE).exists():
        raise BadInput(f"{folder} holds no tokenizer")
    saved = read_json(folder / KIND_FILE, {"kind": str, "vocab_size": int})
    if saved["kind"] not in KINDS:
        raise Damaged(folder / KIND_FILE, f"kind {saved['kind']!r} is unknown")
    tokenizer = KINDS[saved["kind"]].open(folder)
    if (folder / SPECIAL_FILE).exists():
        tokenizer = SpecialTokens(tokenizer, read_json(folder / SPECIAL_FILE, [str]))
    if tokenizer.vocab_size != saved["vocab_size"]:
        why = f"it has {tokenizer.vocab_size:,} ids, {KIND_FILE} says {saved['vocab_size']:,}"
        raise Damaged(folder, why)
    return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """Returns a hash of everything the tokenizer's ids depend on (its saved files)."""
    digest = hashlib.blake2b(digest_size=16)
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(tokenizer, scratch)
        for file in sorted(Path(scratch).iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
