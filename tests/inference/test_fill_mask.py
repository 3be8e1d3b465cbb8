"""Fillings of masks: probabilities against the full forward pass, and the command."""

import json

import jax
import numpy as np
import pytest

from jaxgpt import sample
from jaxgpt.checkpointing.checkpoints import save_weights
from jaxgpt.config.stored import to_json
from jaxgpt.inference.fill_mask import encode_masked, fill_masks, shown_token
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import make_tokenizer, save_tokenizer
from tests.conftest import mesh_of, tiny_config

TOKENIZER = make_tokenizer("byte", special_tokens="[CLS],[SEP],<mask>")
CLS, SEP, MASK = (TOKENIZER.special[name] for name in ("[CLS]", "[SEP]", "<mask>"))
BERT = dict(
    kind="encoder",
    vocab_size=260,
    max_seq_len=40,
    type_vocab_size=2,
    embedding_norm=True,
    head_transform=True,
    head_bias=True,
    norm_position="post",
)


@pytest.fixture(scope="module")
def model():
    config = tiny_config(**BERT)
    spec = ModelSpec(config, "xla")
    with jax.set_mesh(mesh_of(config)):
        yield config, spec, jax.tree.map(lambda p: 6 * p, jax.jit(spec.init)(jax.random.key(1)))


def test_a_mask_may_be_spelled_as_any_model_spells_it():
    for prompt in ("a[MASK]b<mask>", "a<mask>b[MASK]"):
        found = encode_masked(TOKENIZER, prompt, 40)
        assert found.ids.tolist() == [CLS, 97, MASK, 98, MASK, SEP]
        assert found.places.tolist() == [2, 4]
    with pytest.raises(BadInput, match=r"--prompt has no \[MASK\]: the model is an encoder"):
        encode_masked(TOKENIZER, "a b", 40)
    with pytest.raises(BadInput, match="needs the special token .MASK., which the tokenizer lacks"):
        encode_masked(make_tokenizer("byte"), "a[MASK]", 40)
    with pytest.raises(BadInput, match="has 43 tokens, more than the model's context of 40"):
        encode_masked(TOKENIZER, "a" * 40 + "[MASK]", 40)


def test_probabilities_are_those_of_the_whole_forward_pass(model):
    """For texts of unequal length and number of masks in one batch."""
    _, spec, params = model
    texts = [
        encode_masked(TOKENIZER, t, 40)
        for t in ("[MASK]", "the [MASK] of all [MASK]s", "[MASK]" * 9)
    ]
    found = fill_masks(spec, params, TOKENIZER, texts, 5)
    everything = fill_masks(spec, params, TOKENIZER, texts[:1], 0)[0][0]
    assert len(everything) == 260 and sum(p for _, p in everything) == pytest.approx(1, abs=1e-5)
    forward = jax.jit(lambda ids: spec.for_decoding().bind(params)(ids))
    for text, masks in zip(texts, found, strict=True):
        assert len(masks) == len(text.places)
        logits = np.asarray(forward(text.ids[None])[0], np.float64)[:, :260]
        for place, filling in zip(text.places, masks):
            scores = np.exp(logits[place] - logits[place].max())
            scores /= scores.sum()
            best = np.argsort(-scores)[:5]
            assert [token for token, _ in filling] == best.tolist()
            np.testing.assert_allclose([p for _, p in filling], scores[best], atol=1e-5)


def test_tokens_are_shown_on_one_line():
    shown = [shown_token(TOKENIZER, i) for i in (97, 10, 0xE2, SEP)]
    assert shown == ["a", "\\n", "bytes:\\xe2", "[SEP]"]


def test_sample_prints_fillings(model, command, tmp_path):
    config, spec, params = model
    (tmp_path / "config.json").write_text(to_json(config))
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    save_weights(tmp_path, jax.device_get(params), {"tokens": 0, "seconds": 0.0})
    base = f"--workdir={tmp_path}"
    code, out, err = command(sample.main, base, "--prompt=[MASK] is a [MASK]", "--top_k=3")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 6, "every line is a token and its probability, also between two masks"
    groups = [lines[:3], lines[3:]]
    text = encode_masked(TOKENIZER, "[MASK] is a [MASK]", 40)
    for group, masks in zip(groups, fill_masks(spec, params, TOKENIZER, [text], 3)[0]):
        for line, (token, probability) in zip(group, masks, strict=True):
            name, number = line.split("\t")
            assert name == shown_token(TOKENIZER, token)
            assert float(number) == pytest.approx(probability, rel=1e-4)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a<mask>", "id": 3}\n')
    code, out, err = command(sample.main, base, f"--prompt_file={tmp_path}/p.jsonl", "--top_k=2")
    row = json.loads(out)
    assert code == 0 and row["id"] == 3 and len(row["fillings"]) == 1, err
    assert len(row["fillings"][0]) == 2
    for flags, says in (
        (["--prompt=no mask"], "--prompt has no [MASK]"),
        (["--prompt=[MASK]", "--num_beams=2"], "--num_beams is of no use here: the model is an en"),
    ):
        code, out, err = command(sample.main, base, *flags)
        assert (code, out) == (2, "") and err.startswith("error: ") and says in err
