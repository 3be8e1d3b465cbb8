"""A SentencePiece model as a tokenizer of Hugging Face's `tokenizers` library."""

from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.tokenizer.sentencepiece import SentencePieceTokenizer

NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4  # types of pieces; the others are never matched in a text
SPACE = "\u2581"  # stands for a space in the pieces
NEVER = -1e4  # the score of a byte's or a control piece, which a text's `<0x41>` must not match
PROBES = (
    *("one line\nand another\n\n", "x = 1\n    return x[0] == 12345\n", "  two  spaces ", ""),
    *("naïve café, 日本語 \U0001f600 \u0301\u2028\t\r\n", "a" * 40 + "=" * 40 + " " * 40, "\0\x07"),
    *("The licence: 'as is', WITHOUT WARRANTIES.", f"{SPACE}{SPACE}x{SPACE}", "\ue000\U0010fffd"),
)


def fast_tokenizer(tokenizer: SentencePieceTokenizer) -> FastTokenizer | None:
    """Returns the same tokenizer for the `tokenizers` library; None where it cannot be the same.

    Same means the same ids and text for every probe. They may still differ, for unigram models
    only, where a run of spaces can be split in two equally likely ways (rounding decides), and
    where a text spells a byte's piece, `<0x7C>`, in characters that the vocabulary lacks.
    """
    model = ModelProto.FromString(tokenizer.model)
    builders = {TrainerSpec.BPE: _bpe, TrainerSpec.UNIGRAM: _unigram}
    build = builders.get(model.trainer_spec.model_type)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    if build is None:
        return None
    try:
        fast = FastTokenizer(build(pieces))
    except Exception:  # the library raises bare Exception, here for pieces that do not fit
        return None
    spec = model.normalizer_spec
    fast.normalizer = normalizers.Sequence(_normalizers(spec))
    if symbols := [text for text, _, type_ in pieces if type_ == USER_DEFINED]:
        splits = [pre_tokenizers.Split(text, "isolated") for text in symbols]
        fast.pre_tokenizer = pre_tokenizers.Sequence(splits)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * spec.add_dummy_prefix)
    return fast if all(_agree(fast, tokenizer, probe) for probe in PROBES) else None


def _bpe(pieces: list[tuple[str, float, int]]) -> models.BPE:
    """SentencePiece merges the pair that makes the best-scored piece; here the pairs are ranked."""
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
    scored = [(text, score if t in (NORMAL, USER_DEFINED) else NEVER) for text, score, t in pieces]
    unknown = next(i for i, (_, _, type_) in enumerate(pieces) if type_ == UNKNOWN)
    return models.Unigram(scored, unk_id=unknown, byte_fallback=True)


def _normalizers(spec: NormalizerSpec) -> list:
    charsmap = spec.precompiled_charsmap
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    return [*steps, normalizers.Replace(" ", SPACE)]


def _agree(fast: FastTokenizer, tokenizer: SentencePieceTokenizer, text: str) -> bool:
    ids = tokenizer.processor.encode(text)
    return fast.encode(text, add_special_tokens=False).ids == ids and (
        fast.decode(ids) == tokenizer.processor.decode(ids)
    )
