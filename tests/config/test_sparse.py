"""Which patterns of attention fit a run: refused in one line, before JAX is imported."""

import subprocess
import sys

import pytest

from jaxgpt.config import Config
from jaxgpt.config.schema import SPARSE, set_field
from jaxgpt.config.sparse import SPLASH
from jaxgpt.config.validate import validate
from jaxgpt.ops.sparse.patterns import PATTERNS, Pattern, patterns_of
from jaxgpt.system.errors import BadInput
from tests.conftest import ROOT


def config_with(fields: str) -> Config:
    """A checked config; fields are the model's, or named in full."""
    config = Config()
    for name, _, value in (field.partition("=") for field in fields.split()):
        value = int(value) if value.isdigit() else {"true": True}.get(value, value)
        set_field(config, name if "." in name else f"model.{name}", value)
    return validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            "attention_pattern=axial sparse_block=100",
            "rows of model.sparse_block=100 do not divide",
        ),
        ("attention_pattern=axial sparse_block=100", "model.max_seq_len=1024; choose 64"),
        ("attention_pattern=strided sparse_block=2000", "model.sparse_block=2000 is more than"),
        (
            "attention_pattern=longformer global_tokens=1025",
            "model.global_tokens=1025 is more than",
        ),
        ("attention_pattern=longformer dilation=9", "model.dilation=9 is more than"),
        (
            "attention_pattern=bigbird random_blocks=9",
            "model.random_blocks=9 is more than the 8 blocks",
        ),
        ("attention_pattern=strided window=64", "set model.window=0"),
        ("attention_pattern=lsh num_kv_heads=4", "set model.num_kv_heads=12"),
        ("attention_pattern=lsh lora.rank=4 lora.targets=query,key", "no key projection"),
        ("attention_pattern=bigbird compute.attention=cudnn", "set compute.attention=auto"),
        ("attention_pattern=axial compute.attention=splash", "no blocks to skip"),
        ("attention_pattern=longformer dilation=2 compute.attention=splash", "no blocks to skip"),
        ("attention_pattern=axial data.pack=true", "set data.pack=false"),
        (
            "attention_pattern=longformer data.pack=true",
            "set model.global_tokens=0 or data.pack=false",
        ),
    ],
)
def test_what_does_not_fit_a_pattern_is_refused(fields, message):
    with pytest.raises(BadInput, match=r"^model\.[^\n]*$") as refused:
        config_with(fields)
    assert message in str(refused.value)


def test_dropout_is_refused_where_there_is_none():
    config = config_with("attention_pattern=strided")
    config.model.dropout = 0.1
    validate(config)
    config.model.attention_pattern = "lsh"
    with pytest.raises(BadInput, match=r"set model\.dropout=0"):
        validate(config)


def test_patterns_that_fit():
    for fields in (
        "attention_pattern=axial sparse_block=64",
        "attention_pattern=longformer compute.attention=splash",
        "attention_pattern=longformer global_tokens=0 data.pack=true",
        "attention_pattern=strided data.pack=true",
        "attention_pattern=lsh data.pack=true",
    ):
        config_with(fields)


def test_the_names_of_patterns_agree():
    assert tuple(PATTERNS) == SPARSE
    skipped = [name for name in SPARSE if _skips(config_with(f"attention_pattern={name}").model)]
    assert tuple(skipped) == SPLASH


def _skips(model) -> bool:
    pattern = patterns_of(model)[True]
    return isinstance(pattern, Pattern) and pattern.in_blocks


def test_a_pattern_is_refused_before_jax_is_imported():
    run = (
        "import sys; from jaxgpt.config import *; from jaxgpt.config.validate import validate\n"
        "try: validate(Config(model=ModelConfig(attention_pattern='axial', sparse_block=100)))\n"
        "except Exception as e: print('jax' in sys.modules, e)"
    )
    out = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.startswith("False model.attention_pattern=axial"), out
