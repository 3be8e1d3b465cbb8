"""Tokenizers out of and into model folders."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.config import BadInput
from jaxgpt.config.cli import say
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.gpt2 import END_OF_TEXT, Gpt2Tokenizer
from jaxgpt.tokenizer.hf import HfTokenizer
from jaxgpt.tokenizer.special import SpecialTokens


def read_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a model folder.

    GPT-2's own where the files are GPT-2's, else the folder's tokenizer.json as it is.

    Raises:
      BadInput: if there is none that can be read.
    """
    file = folder / "tokenizer.json"
    if file.is_file() and not _is_gpt2(file):
        return HfTokenizer.open(folder)
    return Gpt2Tokenizer.open(folder)


def _is_gpt2(file: Path) -> bool:
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as e:
        raise BadInput(f"{file} cannot be read as JSON: {e}") from e
    splitter, added = found.get("pre_tokenizer") or {}, found.get("added_tokens") or []
    return (
        (found.get("model") or {}).get("type") == "BPE"
        and found.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
        and {token["content"] for token in added} <= {END_OF_TEXT}
    )


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int, template: str) -> None:
    """Writes what `AutoTokenizer` reads; a SentencePiece model is written as it is, and said so.

    `template` is a chat template (Jinja), '' for none.
    """
    base = tokenizer.base if isinstance(tokenizer, SpecialTokens) else tokenizer
    if base.kind == "sentencepiece":
        base.save(folder)
        say(
            f"tokenizer {folder}/sentencepiece.model goes with it: load it with sentencepiece, as"
            " transformers' own reading of such models splits text differently"
        )
        return
    fast, end = _fast(base)
    if isinstance(tokenizer, SpecialTokens):
        fast.add_special_tokens([AddedToken(n, normalized=False) for n in tokenizer.names])
    fast.encode_special_tokens = False
    fast.save(str(folder / "tokenizer.json"))
    if base.kind == "gpt2":
        base.save(folder)
    settings = {
        "tokenizer_class": "GPT2Tokenizer" if base.kind == "gpt2" else "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "add_prefix_space": False,
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    } | ({"unk_token": end} if base.kind == "gpt2" else {})
    if template:
        settings["chat_template"] = template
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _fast(base: Tokenizer) -> tuple[FastTokenizer, str]:
    """Returns the same tokenizer for the `tokenizers` library and its end-of-text's name."""
    if base.kind == "hf":
        fast = FastTokenizer.from_str(base.text)
        return fast, fast.id_to_token(base.end_of_text)
    if base.kind == "gpt2":
        fast = FastTokenizer.from_str(base.fast.to_str())
    elif base.kind == "byte":
        names = {_byte_name(byte): byte for byte in range(256)}
        fast = FastTokenizer(models.BPE(vocab=names | {END_OF_TEXT: base.end_of_text}, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
    else:  # char: what the vocabulary lacks is the replacement character's id
        vocab = {character: i for i, character in enumerate(base.characters)}
        vocab |= {"\N{REPLACEMENT CHARACTER}": base.unknown, END_OF_TEXT: base.end_of_text}
        fast = FastTokenizer(
            models.BPE(vocab=vocab, merges=[], unk_token="\N{REPLACEMENT CHARACTER}")
        )
        fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return fast, END_OF_TEXT


def _byte_name(byte: int) -> str:
    """The character that stands for a byte in GPT-2's vocabularies (Radford et al. 2019, code)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
