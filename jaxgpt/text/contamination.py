"""How much of an evaluation set occurs in a training corpus, by n-grams of words.

As GPT-3 measured it (arXiv:2005.14165, appendix C): 13-grams of lower-cased words without
punctuation. An evaluation document of 8 to 12 words is looked up as a whole.
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
    documents, compared = 0, []  # (name, n, hashes of its n-grams) of each document long enough
    for name, text in evaluation:
        documents += 1
        n = min(NGRAM, len(word_hashes(text)))
        if n >= SHORTEST:
            compared.append((name, n, np.unique(ngram_hashes(text, n))))
    wanted = {
        n: np.unique(np.concatenate([hashes for _, m, hashes in compared if m == n]))
        for n in {n for _, n, _ in compared}
    }
    in_corpus = {n: np.zeros(len(hashes), bool) for n, hashes in wanted.items()}
    for text in corpus:
        for n, hashes in wanted.items():
            grams = ngram_hashes(text, n)
            index = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
            in_corpus[n][index[hashes[index] == grams]] = True
    shares = [
        (float(np.mean(in_corpus[n][np.searchsorted(wanted[n], hashes)])), name, n)
        for name, n, hashes in compared
    ]
    overlapping = [row for row in shares if row[0] > 0]
    worst = sorted(overlapping, key=lambda row: -row[0])[:10]
    return {
        "documents": documents,
        "compared": len(compared),
        "overlapping": len(overlapping),
        "ngrams": sum(map(len, wanted.values())),
        "found": int(sum(map(np.sum, in_corpus.values()))),
        "worst": [{"where": name, "ngram": n, "share": round(s, 4)} for s, name, n in worst],
    }
