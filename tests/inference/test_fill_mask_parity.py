"""Against transformers' `fill-mask`: the fillings of BERT and RoBERTa and their probabilities."""

import jax
import numpy as np
import pytest

from jaxgpt.config import Config
from jaxgpt.inference.fill_mask import encode_masked, fill_masks, shown_token
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.tokenizers import read_tokenizer
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from tests.conftest import mesh_of, tiny_config
from tests.golden import hf_torch
from tests.tokenizer.vocabularies import CONFIG, WRITE

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", hf_torch.ENCODERS)
def test_fillings_are_theirs(name, tmp_path):
    from transformers import AutoTokenizer, pipeline

    WRITE[name](tmp_path)
    theirs = hf_torch.make_model(name, 4)
    theirs.config.update(CONFIG[name])
    theirs.save_pretrained(tmp_path)
    ask = pipeline("fill-mask", theirs, tokenizer=AutoTokenizer.from_pretrained(tmp_path), top_k=20)
    opened, tokenizer = open_folder(tmp_path), read_tokenizer(tmp_path)
    # no spaces in front: RoBERTa's mask takes them away where its folder says so, not by its class
    texts = ["the[MASK] sat", "[MASK] of all[MASK]"]
    with jax.set_mesh(mesh_of(tiny_config())):
        spec = ModelSpec(Config(model=opened.model), "xla")
        params = read_params(opened, jax.eval_shape(spec.init, jax.random.key(0)))
        rows = [encode_masked(tokenizer, text, spec.model.max_seq_len) for text in texts]
        found = fill_masks(spec, params, tokenizer, rows, 5)
    for text, masks in zip(texts, found, strict=True):
        wanted = ask(text.replace("[MASK]", ask.tokenizer.mask_token))
        for filling, best in zip(masks, [wanted] if len(masks) == 1 else wanted, strict=True):
            best = [w for w in best if w["token"] < tokenizer.vocab_size][:5]
            assert [token for token, _ in filling] == [w["token"] for w in best]
            np.testing.assert_allclose(
                [p for _, p in filling], [w["score"] for w in best], atol=1e-4
            )
            for (token, _), w in zip(filling, best):
                text = shown_token(tokenizer, token)
                if not text.startswith("bytes:"):  # theirs is then U+FFFD
                    assert text in (w["token_str"], repr(w["token_str"])[1:-1])
