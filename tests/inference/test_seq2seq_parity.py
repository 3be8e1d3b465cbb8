"""Against transformers: the targets of T5 and BART, greedy and by beams, token for token."""

import jax
import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.inference.decode import Decoder, sample_keys, tokens_before
from jaxgpt.inference.requests import BeamSettings
from jaxgpt.inference.seq2seq import GREEDY, Seq2SeqDecoder
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from tests.conftest import mesh_of, tiny_config
from tests.golden import hf_torch

pytestmark = pytest.mark.parity
NEW = 14
STARTS = {"t5": (0,), "t5_1_1": (0,), "bart": (2, 0)}  # of targets, the second one forced
PENALTIES = ((0.0, False), (1.0, False), (2.0, True))


@pytest.fixture(params=STARTS)
def both(request, tmp_path):
    """Their model, and our decoder of its saved weights."""
    theirs = hf_torch.make_model(request.param, 4)
    if request.param == "bart":  # so that attention decides
        theirs.final_logits_bias.mul_(0.1)
        for name, p in theirs.named_parameters():
            p.data *= 10 if ".layers." in name and p.ndim == 2 else 1
    theirs.save_pretrained(tmp_path)
    opened = open_folder(tmp_path)
    with jax.set_mesh(mesh_of(tiny_config())):
        spec = ModelSpec(Config(model=opened.model), "xla")
        params = read_params(opened, jax.eval_shape(spec.init, jax.random.key(0)))
        decoder = Decoder.of(spec, params, spec.model.vocab_size)
        yield theirs, Seq2SeqDecoder(decoder, STARTS[request.param], end=-1)


def sources_of(model) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, model.config.vocab_size, n).astype(np.int32) for n in (9, 4, 15, 1)]


def their_targets(model, sources, start, end: int, **how):
    """The targets without the tokens in front, and their scores."""
    import torch

    width = max(map(len, sources))
    ids, mask = np.zeros((2, len(sources), width), np.int64)
    for row, seen, source in zip(ids, mask, sources):
        row[: len(source)], seen[: len(source)] = source, 1
    out = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW + len(start) - 1,
        do_sample=False,
        pad_token_id=1,
        eos_token_id=end,
        decoder_start_token_id=start[0],
        forced_bos_token_id=start[1] if len(start) > 1 else None,
        forced_eos_token_id=None,
        use_cache=False,  # theirs fails for stacks of unequal depth
        return_dict_in_generate=True,
        output_scores=True,
        **how,
    )
    scores = out.sequences_scores.numpy() if "num_beams" in how else None
    return out.sequences.numpy()[:, len(start) :], scores


def test_targets_are_theirs(both):
    theirs, decoder = both
    sources, start = sources_of(theirs), decoder.start
    with jax.set_mesh(mesh_of(tiny_config())):
        keys = sample_keys([(0, 0)] * len(sources))
        chunks = decoder.stream(sources, NEW, [GREEDY] * len(sources), keys)
        greedy = np.concatenate([tokens for tokens, _ in chunks], axis=1)
        want, _ = their_targets(theirs, sources, start, None)
        np.testing.assert_array_equal(greedy, want)
        assert len(np.unique(greedy)) > 2, "not one token over and over"
        ended, ends = 0, (int(greedy[0, 1]), int(greedy[2, -1]))
        for end, (penalty, early) in ((end, case) for end in ends for case in PENALTIES):
            ending = Seq2SeqDecoder(decoder.decoder, start, end)
            found = ending.search(sources, NEW, BeamSettings(3, penalty, early))
            how = dict(num_beams=3, num_return_sequences=3)
            how |= dict(length_penalty=penalty, early_stopping=early)
            want, scores = their_targets(theirs, sources, start, end, **how)
            ours = [pair for texts in found for pair in texts]
            for (tokens, score), row, wanted in zip(ours, want, scores, strict=True):
                np.testing.assert_array_equal(tokens, tokens_before(row, end))
                np.testing.assert_allclose(score, wanted, rtol=1e-4, atol=1e-4)
                ended += len(tokens) < NEW
        assert ended
