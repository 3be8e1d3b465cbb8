"""A run's description: dataclasses, validation, load and save."""

from jaxgpt.config import presets
from jaxgpt.config.schema import (
    ComputeConfig,
    Config,
    DataConfig,
    DistillConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ObjectivesConfig,
    OptimConfig,
    SampleConfig,
    ShrinkConfig,
)

__all__ = [
    "ComputeConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectivesConfig",
    "OptimConfig",
    "SampleConfig",
    "ShrinkConfig",
    "presets",
]
