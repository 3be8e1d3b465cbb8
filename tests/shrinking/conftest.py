"""A run to be shrunk."""

import pytest
from etils import epath

from jaxgpt.config.validate import changed
from jaxgpt.jobs.train import train
from tests.conftest import CORPUS, tiny_config


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A workdir with a few steps on the licence: tied embeddings, learned positions."""
    folder = tmp_path_factory.mktemp("shrinking")
    (folder / "corpus.txt").write_text(CORPUS)
    data = f"text:{folder}/corpus.txt"
    config = changed(
        tiny_config(vocab_size=0),
        {
            "data.source": data,
            "data.cache_dir": str(folder / "cache"),
            "num_steps": 30,
            "eval_every": 0,
            "checkpoint_every": 0,
            "sample.max_new_tokens": 0,
            "mesh.data": -1,
        },
    )
    assert train(epath.Path(folder / "w"), config) == 0
    return folder / "w"
