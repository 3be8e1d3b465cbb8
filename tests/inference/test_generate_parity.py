"""Against transformers' `generate`: the same tokens, for random GPT-2 weights."""

import jax
import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.inference.beam import beam_search
from jaxgpt.inference.decode import Decoder, generate, tokens_before
from jaxgpt.inference.requests import BeamSettings, Sampling
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from tests.conftest import mesh_of, tiny_config
from tests.golden.gpt2_torch import make_model

pytestmark = pytest.mark.parity
SHAPE = dict(vocab_size=517, n_positions=96, n_embd=84, n_layer=3, n_head=7)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Their model, and our decoder of its saved weights; ten times GPT-2's init in the blocks, so
    that attention decides."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = make_model(5, SHAPE)
    for name, p in theirs.named_parameters():
        if ".h." in name and p.ndim == 2:
            p.data *= 10
    theirs.save_pretrained(folder)
    with jax.set_mesh(mesh_of(tiny_config())):
        opened = open_folder(folder)
        spec = ModelSpec(Config(model=opened.model), "xla")
        params = read_params(opened, jax.eval_shape(spec.init, jax.random.key(0)))
        yield theirs, Decoder.of(spec, params, spec.model.vocab_size)


def prompts_of(batch: int) -> list[np.ndarray]:
    rng = np.random.default_rng(batch)
    return [rng.integers(0, 517, n).astype(np.int32) for n in rng.integers(1, 40, batch)]


def their_tokens(
    model, prompts: list[np.ndarray], new: int, end: int | None = None, **how
) -> tuple[np.ndarray, np.ndarray]:
    """The new tokens and the best beams' scores; prompts are padded on the left."""
    import torch

    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, seen, prompt in zip(ids, mask, prompts, strict=True):
        row[width - len(prompt) :], seen[width - len(prompt) :] = prompt, 1
    out = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=end,
        return_dict_in_generate=True,
        output_scores=True,
        **how,
    )
    scores = out.sequences_scores.numpy() if "num_beams" in how else np.zeros(0)
    return out.sequences.numpy()[:, width:], scores


@pytest.mark.parametrize("batch", [1, 8])
def test_greedy_tokens_are_theirs(both, batch):
    theirs, decoder = both
    prompts = prompts_of(batch)
    with jax.set_mesh(mesh_of(tiny_config())):
        found, _ = generate(decoder, prompts, 50, Sampling(0.0))
    want, _ = their_tokens(theirs, prompts, 50)
    np.testing.assert_array_equal(found, want)
    assert len(np.unique(found)) > 8, "not one token over and over"


def test_a_repetition_penalty_is_theirs(both):
    theirs, decoder = both
    prompts = prompts_of(4)
    with jax.set_mesh(mesh_of(tiny_config())):
        found, _ = generate(decoder, prompts, 50, Sampling(0.0, repetition_penalty=1.3))
    want = [their_tokens(theirs, [p], 50, repetition_penalty=1.3)[0][0] for p in prompts]
    np.testing.assert_array_equal(found, want)  # one by one: theirs counts the padding as said


@pytest.mark.parametrize("beams", [2, 5])
def test_beam_search_finds_their_beams(both, beams):
    theirs, decoder = both
    for prompt in prompts_of(3):
        with jax.set_mesh(mesh_of(tiny_config())):
            found = beam_search(decoder, prompt, 20, BeamSettings(beams), end=-1)
        want, scores = their_tokens(
            theirs, [prompt], 20, num_beams=beams, num_return_sequences=beams
        )
        np.testing.assert_array_equal([tokens for tokens, _ in found], want)
        np.testing.assert_allclose([score for _, score in found], scores, atol=1e-4)


@pytest.mark.parametrize(
    ("penalty", "early"), [(0.0, False), (1.0, False), (2.5, False), (-1.0, False), (1.0, True)]
)
def test_finished_beams_leave_the_search_and_are_ranked_as_theirs(both, penalty, early):
    theirs, decoder = both
    prompts, unequal = prompts_of(2), 0
    with jax.set_mesh(mesh_of(tiny_config())):
        tokens, _ = generate(decoder, prompts, 20, Sampling(0.0))
        cases = [(p, int(row[i])) for p, row in zip(prompts, tokens) for i in (1, 3, 5, 9)]
        for prompt, end in cases:
            found = beam_search(decoder, prompt, 20, BeamSettings(4, penalty, early), end)
            how = dict(num_beams=4, num_return_sequences=4)
            how |= dict(length_penalty=penalty, early_stopping=early)
            want, scores = their_tokens(theirs, [prompt], 20, end, **how)
            for (ours, score), row, wanted in zip(found, want, scores, strict=True):
                np.testing.assert_array_equal(ours, tokens_before(row, end))
                np.testing.assert_allclose(score, wanted, rtol=1e-5, atol=1e-4)
            unequal += len({len(ours) for ours, _ in found}) > 1
    assert unequal or penalty > 1, "some beams ended earlier than others"
