"""Tokenizers out of and into model folders."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.interchange.sentencepiece import fast_tokenizer
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import parse_json
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.gpt2 import END_OF_TEXT, Gpt2Tokenizer
from jaxgpt.tokenizer.hf import HfTokenizer
from jaxgpt.tokenizer.sentencepiece import MODEL_FILE
from jaxgpt.tokenizer.special import SpecialTokens

TOKENIZER = {"model?": dict | None, "pre_tokenizer?": dict | None, "added_tokens?": list | None}


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
        found = parse_json(file.read_bytes(), TOKENIZER)
    except (OSError, ValueError) as e:
        raise BadInput(f"{file} cannot be read as a tokenizer: {e}") from e
    splitter, added = found.get("pre_tokenizer") or {}, found.get("added_tokens") or []
    return (
        (found.get("model") or {}).get("type") == "BPE"
        and found.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
        and all(isinstance(t, dict) and t.get("content") == END_OF_TEXT for t in added)
    )


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int, template: str) -> str:
    """Writes what `AutoTokenizer` reads, and a SentencePiece model itself beside it.

    Returns '', or what to know about the result. `template` is a chat template (Jinja), '' for
    none.
    """
    base = tokenizer.base if isinstance(tokenizer, SpecialTokens) else tokenizer
    if base.kind in ("gpt2", "sentencepiece"):
        base.save(folder)
    fast, end = _fast(base)
    if fast is None:
        return (
            "tokenizer its SentencePiece model cannot be a tokenizer.json: transformers would split"
            f" text differently; load {MODEL_FILE} there with sentencepiece"
        )
    if isinstance(tokenizer, SpecialTokens):
        fast.add_special_tokens([AddedToken(n, normalized=False) for n in tokenizer.names])
    fast.encode_special_tokens = False
    fast.save(str(folder / "tokenizer.json"))
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
    return ""


def _fast(base: Tokenizer) -> tuple[FastTokenizer | None, str]:
    """Returns the same tokenizer for the `tokenizers` library (None if it can be none) and its
    end-of-text's name."""
    if base.kind == "sentencepiece":
        end = base.processor.id_to_piece(base.end_of_text)
        if fast := fast_tokenizer(base):
            fast.add_special_tokens([AddedToken(end, normalized=False)])
        return fast, end
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
