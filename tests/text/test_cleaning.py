"""What each cleaning step changes and drops."""

import random
import re

import pytest

from jaxgpt.system.errors import BadInput
from jaxgpt.text.cleaning import (
    Report,
    clean_documents,
    clean_unicode,
    html_to_text,
    make_steps,
    mask_addresses,
)
from jaxgpt.text.contamination import contamination
from jaxgpt.text.formats import read_builtin
from jaxgpt.text.ngrams import ngram_hashes
from jaxgpt.text.pieces import Piece
from jaxgpt.text.quality import quality_fault
from tests.conftest import CORPUS

PROSE = (
    "The ship left the harbour before dawn, and nobody on the quay had time to wave. It was the"
    " third week of the voyage that brought the storm. Sailors who had been to the south before"
    " said that they have never seen waves like these, and the captain believed them. With every"
    " hour the water rose; by noon it had reached the lower deck. What saved us was an old pump"
    " that the cook kept in his pantry."
)


def cleaned(texts, spec):
    report = Report()
    pieces = [Piece(text, f"f{i}") for i, text in enumerate(texts)]
    kept = [piece.text for piece in clean_documents(pieces, make_steps(spec), report)]
    return kept, {rule: entry["documents"] for rule, entry in report.dropped.items()}


def test_html():
    page = (
        "<!DOCTYPE html><html><head><title>T</title><script>var x</script></head><body><nav>"
        "<a href=/>Home</a></nav><p>Fish &amp; chips.</p><p>Second.</p></body></html>"
    )
    assert html_to_text(page) == "Fish & chips.\n\nSecond."
    assert html_to_text("a < b and c > d") == "a < b and c > d"
    assert cleaned(["<html><script>x</script></html>"], "html") == ([], {"html": 1})


def test_unicode():
    assert clean_unicode("\ufeffe\u0301\r\nx\x00\ty\x85") == "é\nx\ty"


def test_addresses():
    text = "mail a.b+c@x-y.co.uk or 8.8.8.8, not 127.0.0.1, 12:30:45, 1.2.3.999 or 2606:4700::1111."
    assert mask_addresses(text) == (
        "mail email@example.com or 192.0.2.1, not 127.0.0.1, 12:30:45, 1.2.3.999 or 2001:db8::1."
    )
    assert mask_addresses(text).counts == {"email": 1, "ip": 2}
    assert type(mask_addresses("to email@example.com or 192.0.2.1")) is str, "nothing was replaced"
    assert mask_addresses("std::vector, ::1 and version 1.2.3.4.5") == (
        "std::vector, ::1 and version 1.2.3.4.5"
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (PROSE, ""),
        (" ".join(PROSE.split()[:49]), "word_count"),
        ("an ox is to be of " * 20, "word_length"),
        (PROSE.replace(" the ", " # "), "symbols"),
        (PROSE + " 12345 67890" * 12, "letters"),
        (
            PROSE.replace("the", "tne")
            .replace("The", "tne")
            .replace(" to ", " tu ")
            .replace(" of ", " uf ")
            .replace(" and ", " und ")
            .replace("that", "thet")
            .replace(" have ", " hove ")
            .replace("With", "Wath"),
            "stop_words",
        ),
        ("\n".join("- " + part for part in PROSE.split(". ")) + ".\n- It was so. ", "bullets"),
        ("\n".join(part + "..." for part in PROSE.split(". ")), "ellipses"),
        (PROSE + " Lorem ipsum dolor sit amet.", "lorem_ipsum"),
        (PROSE.replace(".", ",").replace("!", ","), "sentences"),
        ("\n".join([*PROSE.split(". "), *["Read more. Click here."] * 4]), "repeated_lines"),
        (PROSE + "\n\n" + PROSE, "repeated_lines"),
        (PROSE + " over the sea" * 20, "top_2gram"),
        (PROSE + " " + PROSE[:160], "repeated_5grams"),
    ],
)
def test_each_quality_rule(text, fault):
    assert quality_fault(text) == fault


def test_dropped_documents_are_counted_and_shown():
    report = Report()
    pieces = [Piece("short", f"f{i}", i) for i in range(5)]
    assert not list(clean_documents(pieces, make_steps("quality"), report))
    entry = report.dropped["quality.word_count"]
    assert entry["documents"] == 5
    assert entry["examples"][1:] == [{"where": f"f{i}:{i}", "text": "short"} for i in (1, 2)]


def test_steps_run_in_order_and_only_those_named():
    texts = ["e\u0301a", "éa", "éa"]
    assert cleaned(texts, "unicode,exact_dedup") == (["éa"], {"exact_dedup": 2})
    assert cleaned(texts, "exact_dedup,unicode") == (["éa", "éa"], {"exact_dedup": 1})
    assert cleaned(texts, "") == (texts, {})


def test_near_duplicates_are_found_and_nothing_else():
    """Planted copies with 1% of the words changed, in documents of 200 words and more."""
    chance = random.Random(0)
    texts = [piece.text for piece in read_builtin() if len(piece.text.split()) >= 200]
    originals, _ = cleaned(texts, "near_dedup")
    grams = [set(ngram_hashes(text, 5).tolist()) for text in originals]
    for text in set(texts) - set(originals):  # what the library itself holds twice
        own = set(ngram_hashes(text, 5).tolist())
        assert max(len(own & other) / len(own | other) for other in grams) > 0.6
    originals = originals[:200]
    copies = []
    for text in originals:
        words = re.split(r"(\s+)", text)
        real = [i for i, word in enumerate(words) if word.strip()]
        for i in chance.sample(real, max(1, len(real) // 100)):
            words[i] = f"changed{chance.randrange(10**6)}"
        copies.append("".join(words))
    both, dropped = cleaned(originals + copies, "near_dedup")
    assert dropped["near_dedup"] >= 0.95 * len(copies)
    assert both[: len(originals)] == originals
    assert cleaned(originals + copies, "near_dedup")[0] == both, "the same each time"


def test_half_alike_is_not_a_duplicate():
    """Jaccard 0.54: many such pairs fall into a common band, none may be dropped."""
    texts = []
    for k in range(30):
        words = [f"word{k}x{i}" for i in range(300)]
        texts += [" ".join(words), " ".join(words[:210] + [f"other{k}x{i}" for i in range(90)])]
    assert cleaned(texts, "near_dedup") == (texts, {})


def test_the_similarity_can_be_set():
    words = [f"word{i}" for i in range(400)]
    changed = [w if i % 80 else "other" for i, w in enumerate(words)]  # 5 of 400: Jaccard 0.89
    texts = [" ".join(words), " ".join(changed)]
    assert len(cleaned(texts, "near_dedup")[0]) == 1
    assert len(cleaned(texts, "near_dedup:0.95")[0]) == 2


@pytest.mark.parametrize("spec", ["htm", "pii:3", "near_dedup:x", "near_dedup:0", "near_dedup:1.5"])
def test_bad_steps(spec):
    with pytest.raises(BadInput, match="data.clean"):
        make_steps(spec)


def test_ngrams():
    assert len(ngram_hashes("One, two three!", 2)) == 2
    assert (ngram_hashes("One, two three", 2) == ngram_hashes("one TWO; three", 2)).all()
    assert set(ngram_hashes("a b c", 2)).isdisjoint(ngram_hashes("b a c b", 2))
    assert not len(ngram_hashes("one two", 3))


def test_contamination_finds_what_was_planted():
    chance, vocabulary = random.Random(0), sorted(set(re.findall(r"\w+", CORPUS)))
    texts = [" ".join(chance.choices(vocabulary, k=60)) for _ in range(20)]
    held_out, corpus = texts[:5], texts[5:]
    evaluation = [("tiny", "too short")] + [(f"e{i}", text) for i, text in enumerate(held_out)]
    before = contamination(evaluation, corpus)
    after = contamination(evaluation, [*corpus, "In front. " + held_out[0].upper() + ", behind."])
    half = contamination(evaluation, [" ".join(held_out[1].split()[:36])])
    assert (before["documents"], before["compared"], before["ngrams"]) == (6, 5, 5 * 48)
    assert before["overlapping"] == 0 and before["found"] == 0 and before["worst"] == []
    assert after["worst"] == [{"where": "e0", "ngram": 13, "share": 1.0}]
    assert half["worst"] == [{"where": "e1", "ngram": 13, "share": 0.5}]
    short = [("s", "eight words that are looked for as one")]
    found = contamination(short, ["so: Eight words, that are looked for as one!"])
    assert found["worst"] == [{"where": "s", "ngram": 8, "share": 1.0}]
