"""A checkpoint holds the state of its step, whatever happens while it is being written."""

import jax
import numpy as np
import pytest

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config import BadInput
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
