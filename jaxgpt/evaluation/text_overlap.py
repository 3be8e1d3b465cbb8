"""Generated texts against reference texts (extra [metrics])."""

from collections.abc import Sequence

from jaxgpt.system.extras import require

ROUGE = ("rouge1", "rouge2", "rougeL")


def check_installed() -> None:
    """Raises `BadInput`, saying what to install, if a library of `overlap_scores` is missing."""
    require("sacrebleu", "metrics", "BLEU and chrF")
    require("rouge_score.rouge_scorer", "metrics", "ROUGE")


def overlap_scores(
    predicted: Sequence[str], references: Sequence[str]
) -> dict[str, float | int | str]:
    """Returns `examples`, `exact_match` (0 to 1), `bleu` and `chrf` (0 to 100, over the whole set),
    `rouge1`, `rouge2` and `rougeL` (0 to 1, means of each text's F1).

    BLEU and chrF2 are sacrebleu's with its default settings (13a tokens, case counts; `bleu_by`
    holds its signature); ROUGE is Google's `rouge-score` with stemming, which ignores case and
    sees only a-z and 0-9. Raises `BadInput` if a library is missing.
    """
    check_installed()
    count, mean = len(predicted), 1 / max(len(predicted), 1)
    equal = sum(text == wanted for text, wanted in zip(predicted, references, strict=True))
    return (
        {"examples": count, "exact_match": equal * mean}
        | bleu_scores(predicted, references)
        | rouge_scores(predicted, references)
    )


def bleu_scores(
    predicted: Sequence[str], references: Sequence[str]
) -> dict[str, float | int | str]:
    """Returns `bleu`, `chrf` and `bleu_by` of `overlap_scores`."""
    metrics = require("sacrebleu", "metrics", "BLEU and chrF").metrics
    bleu, chrf = metrics.BLEU(), metrics.CHRF()
    if not predicted:
        return {"bleu": 0.0, "chrf": 0.0, "bleu_by": ""}
    texts, wanted = list(predicted), [list(references)]
    return {
        "bleu": bleu.corpus_score(texts, wanted).score,
        "chrf": chrf.corpus_score(texts, wanted).score,
        "bleu_by": str(bleu.get_signature()),
    }


def rouge_scores(predicted: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns `rouge1`, `rouge2` and `rougeL` of `overlap_scores`."""
    module = require("rouge_score.rouge_scorer", "metrics", "ROUGE")
    scorer, totals = module.RougeScorer(ROUGE, use_stemmer=True), dict.fromkeys(ROUGE, 0.0)
    for text, wanted in zip(predicted, references, strict=True):
        for name, score in scorer.score(wanted, text).items():
            totals[name] += score.fmeasure
    return {name: total / max(len(predicted), 1) for name, total in totals.items()}
