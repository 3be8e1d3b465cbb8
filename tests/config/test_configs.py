"""Every file in configs/ describes a run that can be: sizes, checks, and the lowered train step."""

import dataclasses

import jax
import pytest

from jaxgpt.cli.flags import load_file
from jaxgpt.config import Config, MeshConfig
from jaxgpt.config.schema import left_open
from jaxgpt.config.validate import validate
from jaxgpt.interchange.init_from import completed
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.parameters.flops import count_active, count_parameters
from jaxgpt.training.setup import make_training, resolve_vocab
from jaxgpt.training.step import make_train_step
from tests.conftest import ROOT
from tests.interchange.test_import_export import model_folder

FILES = sorted((ROOT / "configs").glob("*.py"))
# Published counts; where a config leaves the vocabulary to its tokenizer, at the size given.
PUBLISHED = {
    "small": (50257, 124_439_808),
    "medium": (50257, 354_823_168),
    "large": (50257, 774_030_080),
    "xl": (50257, 1_557_611_200),
    "modern": (32000, 315_936_768),
    "modern_1b": (128256, 1_235_814_400),
    "modern_8b": (128256, 8_030_261_248),
    "modern_8b_128k": (128256, 8_030_261_248),
    "llama_70b": (128256, 70_553_706_496),
    "mixtral_8x7b": (32000, 46_702_792_704),
    "qwen3_30b_a3b": (151936, 30_532_122_624),
    "vaswani": (37000, 63_082_496),  # table 3 says 65 million
    "bert_base": (30522, 109_514_298),  # BertForMaskedLM: with its head, without the pooler
    "t5_small": (32128, 76_961_152),  # google/t5-v1_1-small
}
ACTIVE = {"mixtral_8x7b": 12.88e9, "qwen3_30b_a3b": 3.35e9}  # published: 12.9 and 3.3 billion


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_it_validates_and_its_train_step_lowers(file, tmp_path):
    config = load_file(str(file))
    if left_open(config):
        model_folder(tmp_path / "hf")
        config.init_from = str(tmp_path / "hf")
    if config.objective == "distill":
        config.objectives.distill.teacher = str(tmp_path / "hf")
    config = resolve_vocab(completed(config), 257)
    config = dataclasses.replace(config, mesh=MeshConfig(1, -1, 1))
    with jax.set_mesh(mesh := make_mesh(config, jax.devices()[:4])):
        training = make_training(config, mesh)
        beside = training.abstract_companions()
        step = make_train_step(training.spec, config, training.companions.specs)
        text = step.lower(training.abstract_state(), training.abstract_batch(), beside).as_text()
    assert "sdy.mesh" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_published_number_of_parameters(name):
    vocab, published = PUBLISHED[name]
    config = validate(load_file(str(ROOT / "configs" / f"{name}.py")))
    config = resolve_vocab(config, vocab)
    with jax.set_mesh(mesh := make_mesh(Config(), jax.devices()[:1])):
        spec = make_training(dataclasses.replace(config, mesh=MeshConfig(1, 1, 1)), mesh).spec
        params = jax.eval_shape(spec.init, jax.random.key(0))
    assert count_parameters(params, spec.model) == published
    assert count_active(params, spec.model) == pytest.approx(ACTIVE.get(name, published), rel=1e-3)


def test_each_docstring_says_what_it_is():
    for file in FILES:
        assert file.read_text().startswith('"""'), file
