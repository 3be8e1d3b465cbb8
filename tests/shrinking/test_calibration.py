"""The moments that calibration measures, against the model's own forward pass and NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxgpt.inference.trained import open_trained
from jaxgpt.model import ModelSpec
from jaxgpt.shrinking.calibration import input_moments
from jaxgpt.shrinking.source import Source


def mean_outer(x) -> np.ndarray:
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def test_moments_are_of_what_each_product_reads(trained_run):
    trained = open_trained(str(trained_run), None)
    with jax.set_mesh(trained.mesh):
        source = Source(trained)
        *layers, last = input_moments(source, 16)
        windows = np.concatenate([w["inputs"] for w in source.windows(16, 8)])
        forward = jax.jit(lambda p, tokens: source.spec.bind(p).hidden(tokens)[0])
        hidden = forward(trained.params(), windows)
    np.testing.assert_allclose(last["head"], mean_outer(hidden), rtol=1e-4, atol=1e-5)
    sizes = dict(query=32, key=32, value=32, out=32, up=32, down=128)
    assert [{name: len(m) for name, m in layer.items()} for layer in layers] == [sizes, sizes]
    params = source.params
    x = params["tokens"][windows] + params["positions"]["kernel"]
    norm = jax.tree.map(lambda a: a[0], params["blocks"]["attention_norm"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    want = mean_outer(x * norm["scale"] + norm["bias"])
    np.testing.assert_allclose(layers[0]["query"], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layers[0]["value"], layers[0]["query"])


class Packed(Source):
    """A source whose windows hold two documents each."""

    def windows(self, count, batch):
        for window in super().windows(count, batch):
            at = np.broadcast_to(np.arange(window["inputs"].shape[1]), window["inputs"].shape)
            half = at.shape[1] // 2
            yield window | {"segments": np.int32(at >= half), "positions": np.int32(at % half)}


@pytest.mark.parametrize("position", ["learned", "relative"])
def test_documents_packed_into_a_window_do_not_see_each_other(trained_run, position):
    trained = open_trained(str(trained_run), None)
    model = dataclasses.replace(trained.config.model, position=position)
    config = dataclasses.replace(trained.config, model=model)
    with jax.set_mesh(trained.mesh):
        spec = ModelSpec(config, "xla")
        source = Packed(dataclasses.replace(trained, config=config, spec=spec))
        params = jax.device_get(jax.jit(spec.init)(jax.random.key(0)))
        vars(source)["params"] = params = jax.tree.map(lambda a: 4 * a, params)
        *_, last = input_moments(source, 8)
        (window,) = source.windows(8, 8)
        places = {name: window[name] for name in ("positions", "segments")}
        forward = jax.jit(lambda p, ids, where: source.spec.bind(p).hidden(ids, **where)[0])
        hidden = forward(params, window["inputs"], places)
    np.testing.assert_allclose(last["head"], mean_outer(hidden), rtol=1e-4, atol=1e-5)
