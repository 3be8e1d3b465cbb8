"""Masks: how often, what becomes of the chosen, whole words; and draws that belong to their row."""

import numpy as np
import pytest

from jaxgpt.config.schema import IGNORE
from jaxgpt.denoising.draws import integers, ranks, uniforms
from jaxgpt.denoising.masked import Masking, choose, mask_tokens
from jaxgpt.denoising.words import words_of
from jaxgpt.tokenizer import make_tokenizer
from jaxgpt.tokenizer.base import TrainingText
from tests.conftest import CORPUS

VOCABULARY, MASK, SPECIAL = 1000, 1000, 7  # 7 stands for a special token in the middle
ROWS = np.arange(10_000)
HOW = Masking(MASK, np.setdiff1d(np.arange(VOCABULARY), [SPECIAL]).astype(np.int32))


def near(share: float, nominal: float) -> bool:
    return abs(share - nominal) < 0.01 * nominal


@pytest.fixture(scope="module")
def rows():
    """A million tokens and what masking makes of them, some special, some padding."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (len(ROWS), 113)).astype(np.int32)
    allowed = (tokens != SPECIAL) & (np.arange(113) < 100 + ROWS[:, None] % 14)
    chosen = choose(allowed, HOW.rate, 3, ROWS)
    return tokens, allowed, chosen, mask_tokens(tokens, chosen, HOW, 3, ROWS)


def test_the_share_chosen_and_what_becomes_of_it(rows):
    """Of a million tokens, each within 1% of the nominal share."""
    tokens, allowed, chosen, made = rows
    assert allowed.sum() > 1e6 and not (chosen & ~allowed).any()
    assert near(chosen.sum() / allowed.sum(), 0.15)
    assert chosen.sum(1).max() <= 17 and chosen.sum(1).min() >= 14
    inputs, targets = made["inputs"], made["targets"]
    assert (targets == np.where(chosen, tokens, IGNORE)).all()
    assert (inputs[~chosen] == tokens[~chosen]).all()
    is_mask, stays = inputs[chosen] == MASK, inputs[chosen] == tokens[chosen]
    assert near(is_mask.mean(), 0.8)
    assert near(stays.mean(), 0.1 + 0.1 / len(HOW.ordinary))
    assert near((~is_mask & ~stays).mean(), 0.1 - 0.1 / len(HOW.ordinary))
    drawn = inputs[chosen][~is_mask & ~stays]
    assert SPECIAL not in drawn and len(np.unique(drawn)) == len(HOW.ordinary)
    assert abs(np.mean(drawn) - HOW.ordinary.mean()) < 0.02 * VOCABULARY
    places = chosen[:, :100].mean(0)  # each place as often: a standard deviation is 0.0036
    assert abs(places - 0.15).max() < 0.018


def test_whatever_the_shares(rows):
    """Of every rate and share, also where a row's share is no whole number."""
    tokens, allowed, *_ = rows
    how = HOW._replace(rate=0.3, mask_share=0.5, random_share=0.25)
    chosen = choose(allowed, how.rate, 0, ROWS)
    inputs = mask_tokens(tokens, chosen, how, 0, ROWS)["inputs"]
    assert near(chosen.sum() / allowed.sum(), 0.3)
    assert near((inputs[chosen] == MASK).mean(), 0.5)
    assert near((inputs[chosen] == tokens[chosen]).mean(), 0.25)
    short = choose(np.ones((len(ROWS), 12), bool), 0.3, 0, ROWS)  # 3.6 tokens
    assert near(short.mean(), 0.3) and set(short.sum(1)) == {3, 4}


def test_a_row_is_drawn_alike_in_any_company(rows):
    """By (seed, row) alone: not by the other rows, their number or their order."""
    tokens, allowed, chosen, made = rows
    some = np.array([977, 3, 42])
    alone = choose(allowed[some], HOW.rate, 3, ROWS[some])
    assert (alone == chosen[some]).all()
    again = mask_tokens(tokens[some], alone, HOW, 3, ROWS[some])
    assert all((again[name] == made[name][some]).all() for name in again)
    for seed, number in ((4, ROWS), (3, ROWS + 1)):  # others have as much in common as chance
        both = (choose(allowed, HOW.rate, seed, number) & chosen).sum() / allowed.sum()
        assert abs(both - 0.15**2) < 0.0008


def test_draws_are_uniform_and_independent():
    """Over rows, columns, purposes and seeds; also of neighbours, and of rows beyond 2**32."""
    big = np.arange(2**40, 2**40 + 1000)
    draws = [uniforms(*arguments) for arguments in ((0, big, 50), (0, big, 50, 1), (1, big, 50))]
    for block in draws:
        counts = np.histogram(block, 50, (0, 1))[0]
        assert (abs(counts - 1000) < 160).all()  # five standard deviations
        for a, b in ((block[1:], block[:-1]), (block[:, 1:], block[:, :-1])):
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.025
    assert abs(np.corrcoef([block.ravel() for block in draws]) - np.eye(3)).max() < 0.025
    drawn = integers(0, np.arange(60_000), 2, 7)
    assert (abs(np.bincount(drawn)[2:] - 10_000) < 500).all() and drawn.max() == 7
    first = ranks(0, np.arange(60_000), np.ones((60_000, 3), bool)) @ [9, 3, 1]
    assert (abs(np.unique(first, return_counts=True)[1] - 10_000) < 500).all()  # six orders


def words_in(text: str, spec: str) -> list[str]:
    tokenizer = make_tokenizer(spec, [TrainingText(lambda: [CORPUS], len(CORPUS))])
    ids = tokenizer.encode(text)
    starts = words_of(tokenizer).starts(ids)
    return [tokenizer.decode(piece) for piece in np.split(ids, np.nonzero(starts)[0])[1:]]


def test_words_are_runs_of_letters():
    """Whatever the tokenizer: letters, digits and `_` together, with the space in front where that
    is a token's; other characters by themselves."""
    text = "the_b2 = café(x)\n"
    assert words_in(text, "byte") == ["the_b2", " ", "=", " ", "café", "(", "x", ")", "\n"]
    words = words_in(text + "you may reproduce and distribute copies of it", "sentencepiece:400")
    assert words[-6:-2] == [" and", " distribute", " copies", " of"]
    assert words[0] == "the_b2" and "café" in [word.strip() for word in words]


def bert_takes(sizes: list[int], order: list[int], wanted: int) -> set[int]:
    """The words that BERT's create_masked_lm_predictions takes, in this order."""
    taken, filled = set(), 0
    for word in order:
        if filled >= wanted:
            break
        if filled + sizes[word] <= wanted:
            taken.add(word)
            filled += sizes[word]
    return taken


def test_whole_words():
    """A word is chosen whole or not at all, as often as nominal, by BERT's rule."""
    rng = np.random.default_rng(0)
    starts = rng.random((4000, 250)) < 0.6
    allowed = rng.random((4000, 250)) < 0.99
    chosen = choose(allowed, 0.15, 0, ROWS[:4000], starts)
    assert not (chosen & ~allowed).any() and near(chosen.sum() / allowed.sum(), 0.15)
    single = 0
    for row in range(50):
        begins = starts[row] | ~allowed[row] | np.append(False, ~allowed[row, :-1])
        begins[0] = True
        words = np.split(np.arange(250), np.nonzero(begins)[0][1:])
        words = [word for word in words if allowed[row, word].all()]
        assert all(chosen[row, word].all() or not chosen[row, word].any() for word in words)
        taken = [chosen[row, word].any() for word in words]
        sizes, wanted = [len(word) for word in words], int(chosen[row].sum())
        order = np.argsort(~np.array(taken), kind="stable").tolist()
        assert bert_takes(sizes, order, wanted) == set(np.nonzero(taken)[0])
        single += sum(len(word) == 1 for word, is_taken in zip(words, taken) if is_taken)
    assert 0 < single < chosen[:50].sum()


@pytest.mark.parity
def test_as_often_as_the_collator_of_transformers(rows):
    """Its counts of the same tokens, drawn by its own code, are ours within four standard
    deviations."""
    from transformers import BertTokenizer, DataCollatorForLanguageModeling

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {name: i for i, name in enumerate([*names, *(f"w{i}" for i in range(995))])}
    tokenizer = BertTokenizer(vocab=vocab)
    tokens, mask = rows[0].astype(np.int64), vocab["[MASK]"]
    tokens[tokens == mask] = 9
    collator = DataCollatorForLanguageModeling(tokenizer, return_tensors="np", seed=0)
    special = tokens == vocab["[SEP]"]
    inputs, labels = collator.numpy_mask_tokens(tokens.copy(), special)
    theirs = labels != -100
    how = Masking(mask, np.arange(5, 1000, dtype=np.int32))
    ours = choose(~special, how.rate, 0, ROWS)
    made = mask_tokens(tokens, ours, how, 0, ROWS)["inputs"]
    for mine, other in (
        (ours, theirs),
        ((made == mask) & ours, (inputs == mask) & theirs),
        ((made == tokens) & ours, (inputs == tokens) & theirs),
    ):
        mine, other = int(mine.sum()), int(other.sum())
        assert abs(mine - other) < 4 * (mine + other) ** 0.5
