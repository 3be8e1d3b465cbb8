"""Tiny vocabularies in the files that BERT, RoBERTa and T5 folders hold."""

import io
import json
import string
from pathlib import Path

import sentencepiece
from tokenizers import pre_tokenizers

from tests.conftest import CORPUS

BERT_WORDS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
BERT_WORDS += [*(f"##{c}" for c in string.ascii_lowercase), "the", "##ing", ",", ".", "é", "京"]


def write_bert(folder: Path) -> None:
    """WordPieces of single letters and a few words, as `vocab.txt`."""
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n", "utf-8")


def write_roberta(folder: Path) -> None:
    """Bytes and three merges, RoBERTa's and BART's special tokens around them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "Ġt", "he", "Ġthe", "<mask>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n", "utf-8")


def write_t5(folder: Path) -> None:
    """A unigram model of the licence's text, trained as T5's was."""
    model, lines = io.BytesIO(), [line[:1000] for line in CORPUS.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=300,
        model_type="unigram",
        **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2),
    )
    (folder / "spiece.model").write_bytes(model.getvalue())


WRITE = {"bert": write_bert, "roberta": write_roberta, "t5": write_t5, "bart": write_roberta}
CONFIG = {  # what their config.json says of tokens
    "bert": {"pad_token_id": 0},
    "roberta": {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
    "t5": {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    "bart": {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    | {"decoder_start_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": 2},
}


def tokenizer_folder(folder: Path, family: str) -> Path:
    """Returns `folder`, with a vocabulary and the config fields that name its tokens."""
    folder.mkdir(exist_ok=True)
    WRITE[family](folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family} | CONFIG[family]))
    return folder
