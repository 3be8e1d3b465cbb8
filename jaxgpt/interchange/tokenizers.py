"""Reading the tokenizer of a model folder, and writing one."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.interchange.sentencepiece import fast_tokenizer
from jaxgpt.system.files import read_json
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.gpt2 import BYTES, END_OF_TEXT, Gpt2Tokenizer
from jaxgpt.tokenizer.hf import HfTokenizer
from jaxgpt.tokenizer.hf_files import NAMED
from jaxgpt.tokenizer.sentencepiece import MODEL_FILE
from jaxgpt.tokenizer.special import SpecialTokens

TOKENIZER = {"model?": dict | None, "pre_tokenizer?": dict | None, "added_tokens?": list | None}


def read_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a model folder.

    It is a `Gpt2Tokenizer` where the files are of GPT-2's kind, else an `HfTokenizer`: of a
    tokenizer.json, or of BERT's, RoBERTa's or T5's own files.

    Raises:
      BadInput: if there is no tokenizer, or it cannot be read.
    """
    file, vocab = folder / "tokenizer.json", folder / "vocab.json"
    if file.is_file():
        is_gpt2 = _is_gpt2(file)
    elif vocab.is_file():
        is_gpt2 = "<mask>" not in read_json(vocab, dict)
    else:
        is_gpt2 = not any((folder / name).is_file() for name in ("vocab.txt", "spiece.model"))
    return (Gpt2Tokenizer if is_gpt2 else HfTokenizer).open(folder)


def _is_gpt2(file: Path) -> bool:
    tokenizer = read_json(file, TOKENIZER)
    splitter, added = tokenizer.get("pre_tokenizer") or {}, tokenizer.get("added_tokens") or []
    return (
        (tokenizer.get("model") or {}).get("type") == "BPE"
        and tokenizer.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space")
        and all(isinstance(t, dict) and t.get("content") == END_OF_TEXT for t in added)
    )


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, max_seq_len: int, template: str, model: str = ""
) -> str:
    """Writes the files that `AutoTokenizer` reads, and a SentencePiece model's own file.

    Returns '', or a warning for the user. `template` is a chat template (Jinja), '' for none.
    `model` names the family of a model that is no decoder: special tokens are then named by what
    they serve as.
    """
    base = tokenizer.base if isinstance(tokenizer, SpecialTokens) else tokenizer
    if base.kind in ("gpt2", "sentencepiece"):
        base.save(folder)
    fast, end = _fast(base)
    if fast is None:
        return (
            "tokenizer a tokenizer.json cannot express this SentencePiece model: transformers would"
            f" split text differently; load {MODEL_FILE} with sentencepiece instead"
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
    if model:
        settings |= _roles(tokenizer)
        inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if model == "bert" else [])
        settings["model_input_names"] = inputs
    if template:
        settings["chat_template"] = template
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return ""


def _roles(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the names of special tokens as a tokenizer_config.json has them."""
    names = {i: name for name, i in tokenizer.special.items()}
    roles = {role: names.get(tokenizer.role(role)) for role in NAMED}
    return {f"{role}_token": name for role, name in roles.items() if name is not None}


def _fast(base: Tokenizer) -> tuple[FastTokenizer | None, str]:
    """Returns the same tokenizer for the `tokenizers` library (None if that cannot express it) and
    the text of its end-of-text token."""
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
        vocab = BYTES | {END_OF_TEXT: base.end_of_text}
        fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
    else:  # char: unknown characters become the replacement character
        vocab = {character: i for i, character in enumerate(base.characters)}
        vocab |= {"\N{REPLACEMENT CHARACTER}": base.unknown, END_OF_TEXT: base.end_of_text}
        fast = FastTokenizer(
            models.BPE(vocab=vocab, merges=[], unk_token="\N{REPLACEMENT CHARACTER}")
        )
        fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return fast, END_OF_TEXT
