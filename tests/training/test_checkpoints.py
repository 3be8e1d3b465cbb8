"""A checkpoint holds the state of its step, whatever happens while it is being written."""

import jax
import numpy as np
import pytest

from jaxgpt.checkpointing import checkpoints as module
from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.system.errors import BadInput
from jaxgpt.training.setup import make_training
from tests.conftest import mesh_of, random_batch, tiny_config


def test_saving_is_not_disturbed_by_the_next_steps(tmp_path):
    """The state is donated to the next step while its bytes are still on their way to disk."""
    config = tiny_config(embed_dim=256, num_layers=4)
    with jax.set_mesh(mesh := mesh_of(config)):
        training = make_training(config, mesh)
        state, step = jax.jit(training.init)(), training.compile_step()
        checkpoints = Checkpoints(tmp_path, keep=2)
        host = random_batch(config)
        batch = {n: jax.device_put(a, training.batch_sharding) for n, a in host.items()}
        saved = {}
        for k in range(1, 7):
            state, _ = step(state, batch)
            if k in (2, 4):
                saved[k] = jax.tree.map(np.array, state)
                checkpoints.save(k, state, {"tokens": k})
        checkpoints.close()
        reader = Checkpoints(tmp_path, read_only=True)
        for k, want in saved.items():
            got, meta = reader.restore(k, training.abstract_state())
            jax.tree.map(np.testing.assert_array_equal, got, want)
            assert meta == reader.meta(k) == {"tokens": k}
            params = reader.restore_params(k, training.abstract_state().params)
            jax.tree.map(np.testing.assert_array_equal, params, want.params)
        assert reader.pick(None) == 4 and reader.pick(2) == 2
        with pytest.raises(BadInput, match=r"holds no checkpoint 3, only \[2, 4\]"):
            reader.pick(3)


def test_where_nothing_can_be_renamed_the_manifest_comes_before_the_commit_file(
    tmp_path, monkeypatch
):
    """On object stores a save writes into its final folder and ends with a commit file."""
    monkeypatch.setattr(module, "is_object_store", lambda path: True)
    checkpoints = Checkpoints(tmp_path, keep=2)
    written, write = [], module.write_manifest

    def observed(folder):
        written.append((folder.name, (folder / "commit_success.txt").exists()))
        write(folder)

    monkeypatch.setattr(module, "write_manifest", observed)
    state = {"a": jax.numpy.arange(3.0)}
    for step in (1, 2):
        checkpoints.save(step, state, {"tokens": step})
    checkpoints.close()
    assert written == [("1", False), ("2", False)]
    (tmp_path / "checkpoints/2/commit_success.txt").unlink()  # as if killed before it was written
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.whole() == [1]
    again = Checkpoints(tmp_path, keep=2)
    assert again.newest_whole() == 1
    again.save(2, state, {"tokens": 2})
    again.close()
    assert Checkpoints(tmp_path, read_only=True).whole() == [1, 2]
