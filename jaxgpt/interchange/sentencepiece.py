"""A SentencePiece model as a tokenizer of Hugging Face's `tokenizers` library.

The model file is a protocol buffer (sentencepiece/src/sentencepiece_model.proto):

    1  pieces      {1: text, 2: score (float), 3: type}
    2  trainer     {3: model type, 1 unigram, 2 BPE}
    3  normalizer  {2: precompiled characters' map, 3: dummy prefix, 4: remove extra spaces}
"""

import struct

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.interchange.protobuf import message
from jaxgpt.tokenizer.sentencepiece import SentencePieceTokenizer

NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4  # a piece's type; the others are never found in a text
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"  # stands for a space in the pieces
NEVER = -1e4  # the score of a byte's or a control piece: its name in a text is plain text
PROBES = (
    *("one line\nand another\n\n", "x = 1\n    return x[0] == 12345\n", "  two  spaces ", ""),
    *("naïve café, 日本語 \U0001f600 \u0301\u2028\t\r\n", "a" * 40 + "=" * 40 + " " * 40, "\0\x07"),
    *("The licence: 'as is', WITHOUT WARRANTIES.", f"{SPACE}{SPACE}x{SPACE}", "\ue000\U0010fffd"),
)


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> FastTokenizer | None:
    """Returns the same tokenizer for the `tokenizers` library; None where it cannot be the same.

    Same means the same ids and text for every probe. Known to differ, for unigram models only: the
    choice between two equally likely ways to cut a run of spaces (rounding decides), and a text
    that spells a byte's piece, `<0x7C>`, in characters that the vocabulary lacks.
    """
    fields: dict[int, list] = {1: [], 2: [b""], 3: [b""]}
    for number, value in message(tokenizer.model):
        fields.setdefault(number, []).append(value)
    pieces = [_piece(raw) for raw in fields[1]]
    trainer, normalizer = dict(message(fields[2][-1])), dict(message(fields[3][-1]))
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        return None
    try:
        fast = FastTokenizer(_bpe(pieces) if kind == BPE else _unigram(pieces))
    except Exception:  # the library raises bare Exception, here for pieces that do not fit
        return None
    dummy_prefix = bool(normalizer.get(3, 1))
    fast.normalizer = normalizers.Sequence(_normalizers(normalizer, dummy_prefix))
    symbols = [text for text, _, type_ in pieces if type_ == USER_DEFINED]
    if symbols:
        splits = [pre_tokenizers.Split(text, "isolated") for text in symbols]
        fast.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * dummy_prefix)
    same = all(_is_same(fast, tokenizer, probe) for probe in PROBES)
    return fast if same else None


def _piece(raw: bytes) -> tuple[str, float, int]:
    fields = dict(message(raw))
    (score,) = struct.unpack("<f", int(fields.get(2, 0)).to_bytes(4, "little"))
    return bytes(fields.get(1, b"")).decode("utf-8"), score, fields.get(3, NORMAL)


def _bpe(pieces: list[tuple[str, float, int]]) -> models.BPE:
    """SentencePiece merges the pair whose union has the best score; here each pair has its rank."""
    normal = {text: score for text, score, type_ in pieces if type_ == NORMAL}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(normal, key=lambda text: -normal[text])
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in normal and text[cut:] in normal
    ]
    return models.BPE(
        vocab={text: i for i, (text, *_) in enumerate(pieces)},
        merges=merges,
        unk_token=next(text for text, _, type_ in pieces if type_ == UNKNOWN),
        byte_fallback=True,
        fuse_unk=True,
    )


def _unigram(pieces: list[tuple[str, float, int]]) -> models.Unigram:
    found = [(text, score if t in (NORMAL, USER_DEFINED) else NEVER) for text, score, t in pieces]
    unknown = next(i for i, (_, _, type_) in enumerate(pieces) if type_ == UNKNOWN)
    return models.Unigram(found, unk_id=unknown, byte_fallback=True)


def _normalizers(spec: dict, dummy_prefix: bool) -> list:
    steps = [normalizers.Precompiled(spec[2])] if spec.get(2) else []
    if spec.get(4, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if dummy_prefix else []
    return [*steps, normalizers.Replace(" ", SPACE)]


def _is_same(fast: FastTokenizer, tokenizer: SentencePieceTokenizer, text: str) -> bool:
    ids = tokenizer.processor.encode(text)
    return fast.encode(text, add_special_tokens=False).ids == ids and (
        fast.decode(ids) == tokenizer.processor.decode(ids)
    )
