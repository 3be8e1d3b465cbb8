"""How much of an evaluation set stands in a training corpus, by n-grams of words.

As GPT-3 measured it (arXiv:2005.14165, appendix C): 13-grams of lower-cased words without
punctuation. An evaluation document shorter than that is looked up whole, from 8 words on.
"""

from collections.abc import Iterable

import numpy as np

from jaxgpt.text.ngrams import ngram_hashes, word_hashes

NGRAM = 13
SHORTEST = 8


def contamination(evaluation: Iterable[tuple[str, str]], corpus: Iterable[str]) -> dict:
    """Returns `documents`, `compared` (long enough), `overlapping` (any n-gram found in the
    corpus), `ngrams`, `found` and `worst`: the ten documents with the largest share found.

    `evaluation` gives (name, text) pairs.
    """
    names, grams, lengths = [], [], []
    documents = 0
    for name, text in evaluation:
        documents += 1
        n = min(NGRAM, len(word_hashes(text)))
        if n >= SHORTEST:
            names.append((name, n))
            grams.append(np.unique(ngram_hashes(text, n)))
            lengths.append(n)
    wanted = {n: np.unique(np.concatenate(_of(grams, lengths, n))) for n in sorted(set(lengths))}
    found = {n: np.zeros(len(hashes), bool) for n, hashes in wanted.items()}
    for text in corpus:
        for n, hashes in wanted.items():
            places = np.searchsorted(hashes, have := ngram_hashes(text, n))
            inside = places < len(hashes)
            places, have = places[inside], have[inside]
            found[n][places[hashes[places] == have]] = True
    shares = [
        float(np.mean(found[n][np.searchsorted(wanted[n], own)]))
        for own, n in zip(grams, lengths, strict=True)
    ]
    ranked = sorted(zip(shares, names, strict=True), key=lambda pair: -pair[0])
    return {
        "documents": documents,
        "compared": len(names),
        "overlapping": sum(share > 0 for share in shares),
        "ngrams": sum(map(len, wanted.values())),
        "found": int(sum(map(np.sum, found.values()))),
        "worst": [
            {"where": name, "ngram": n, "share": round(share, 4)}
            for share, (name, n) in ranked[:10]
            if share > 0
        ],
    }


def _of(grams: list[np.ndarray], lengths: list[int], n: int) -> list[np.ndarray]:
    return [own for own, length in zip(grams, lengths, strict=True) if length == n]
