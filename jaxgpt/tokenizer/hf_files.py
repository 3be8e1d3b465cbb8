"""What model folders hold beside or instead of a tokenizer.json: vocabularies of BERT, RoBERTa and
T5 in files of their own, and which special token serves as what."""

from collections.abc import Container
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from jaxgpt.system.errors import BadInput, as_bad_input
from jaxgpt.system.files import read_json
from jaxgpt.tokenizer.roles import SENTINEL

SETTINGS = "tokenizer_config.json"
ROLE_FILES = ("special_tokens_map.json", SETTINGS)  # {"mask_token": "[MASK]"}, the later one wins
ID_FILES = ("config.json", "generation_config.json")  # {"pad_token_id": 0}
NAMED = ("mask", "cls", "sep", "pad", "bos", "eos")
WITH_ID = ("pad", "bos", "eos", "decoder_start", "forced_bos", "forced_eos")
NO_DECODER_HAS = {"mask", "cls", "decoder_start"}
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
T5_TOKENS = ("<pad>", "</s>", "<unk>")  # the first ids
T5_SENTINELS = 100


def roles_of(folder: Path) -> dict[str, str | int]:
    """Returns the names or ids of what a model folder's files name: a mask, a separator, what a
    decoder starts with. {} for a decoder's folder, of which only end-of-text matters."""
    read = {
        name: read_json(folder / name, dict) if (folder / name).is_file() else {}
        for name in (*ROLE_FILES, *ID_FILES)
    }
    roles: dict[str, str | int] = {}
    for role, name in ((role, name) for name in ROLE_FILES for role in NAMED):
        token = read[name].get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            roles[role] = token
    for role, name in ((role, name) for name in ID_FILES for role in WITH_ID):
        if type(value := read[name].get(f"{role}_token_id")) is int:
            roles[role] = value
    return roles if NO_DECODER_HAS & set(roles) else {}


def built(folder: Path) -> FastTokenizer | None:
    """Returns the tokenizer whose vocabulary the folder holds in other files than a tokenizer.json:
    `vocab.txt`, `spiece.model`, or RoBERTa's `vocab.json` and `merges.txt`; None if in none."""
    for name, build in (("vocab.txt", _bert), ("spiece.model", _t5), ("vocab.json", _roberta)):
        file = folder / name
        if file.is_file():
            with as_bad_input(lambda e, file=file: f"{file} is not a vocabulary: {e}"):
                return build(folder)
    return None


def _bert(folder: Path) -> FastTokenizer:
    """WordPiece (arXiv:1609.08144, 4.1), one piece a line."""
    settings = read_json(folder / SETTINGS, dict) if (folder / SETTINGS).is_file() else {}
    # Not splitlines: a piece may be U+2028, and ids count lines that end with a newline
    lines = (folder / "vocab.txt").read_text("utf-8").removesuffix("\n").split("\n")
    vocab = {line: i for i, line in enumerate(lines)}
    _check(folder / "vocab.txt", vocab, BERT_TOKENS)
    fast = FastTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(prefix="##")
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    fast.add_special_tokens(list(BERT_TOKENS))
    return fast


def _t5(folder: Path) -> FastTokenizer:
    """SentencePiece's unigram model, and 100 sentinels after its pieces, the last id first."""
    model = ModelProto.FromString((folder / "spiece.model").read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    pieces += [(SENTINEL.format(i), 0.0) for i in reversed(range(T5_SENTINELS))]
    _check(folder / "spiece.model", {piece for piece, _ in pieces}, T5_TOKENS)
    fast = FastTokenizer(models.Unigram(pieces, unk_id=T5_TOKENS.index("<unk>")))
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        fast.normalizer = normalizers.Precompiled(charsmap)
    spaces = dict(replacement="\u2581", prepend_scheme="always")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    fast.decoder = decoders.Metaspace(**spaces)
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", T5_TOKENS.index("</s>"))]
    )
    fast.add_special_tokens([*T5_TOKENS, *(SENTINEL.format(i) for i in range(T5_SENTINELS))])
    return fast


def _roberta(folder: Path) -> FastTokenizer:
    """GPT-2's byte-level BPE with other special tokens; BART's too."""
    vocab = read_json(folder / "vocab.json", {str: int})
    _check(folder / "vocab.json", vocab, ROBERTA_TOKENS)
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    fast = FastTokenizer(models.BPE(vocab, [tuple(line.split(" ")) for line in lines]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    ends = [(name, vocab[name]) for name in ("</s>", "<s>")]
    fast.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    fast.add_special_tokens([t for t in ROBERTA_TOKENS if t != "<mask>"])
    fast.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return fast


def _check(file: Path, vocab: Container[str], names: tuple[str, ...]) -> None:
    if missing := [name for name in names if name not in vocab]:
        raise BadInput(f"the vocabulary in {file} lacks {', '.join(missing)}")
