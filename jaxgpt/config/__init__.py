"""A run's description: dataclasses, validation, load and save."""

from jaxgpt.config import presets
from jaxgpt.config.schema import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "SampleConfig",
    "presets",
]
