"""The fields of a run: plain dataclasses, with every derived size as a property."""

import dataclasses

VOCAB_MULTIPLE = 128  # TPU lane width; also divisible by any usual tensor axis


@dataclasses.dataclass
class ModelConfig:
    """Architecture. The defaults are GPT-2 124M (OpenAI 2019, table 2) but for the vocabulary."""

    vocab_size: int = 0  # 0 = the tokenizer's
    max_seq_len: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    embed_dim: int = 768
    mlp_dim: int = 0  # 0 = 4 * embed_dim
    dropout: float = 0.0
    dtype: str = "float32"  # of activations and matrix products
    param_dtype: str = "float32"  # of parameters and optimizer state
    attention: str = "auto"
    remat: str = "none"
    scan_layers: bool = True

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer."""
        return self.mlp_dim or 4 * self.embed_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclasses.dataclass
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "builtin"
    tokenizer: str = "byte"
    validation_source: str = ""
    validation_fraction: float = 0.05
    field: str = "text"  # of a jsonl line
    shuffle: bool = True
    cache_dir: str = ""  # "" = $JAXGPT_CACHE, else ~/.cache/jaxgpt


@dataclasses.dataclass
class OptimConfig:
    """AdamW and its schedule. The defaults follow GPT-3 (arXiv:2005.14165, appendix B)."""

    name: str = "adamw"
    learning_rate: float = 6e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # 0 = no clipping
    z_loss: float = 0.0  # weight of logsumexp(logits)**2 (PaLM, arXiv:2204.02311, section 5)


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) = whatever is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class SampleConfig:
    """The samples taken while training."""

    prompt: str = ""  # "" = start from end-of-text
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 40


@dataclasses.dataclass
class Config:
    """A whole run. `batch_size` counts sequences per optimizer step over all devices."""

    seed: int = 0
    num_steps: int = 1000
    batch_size: int = 8
    grad_accum: int = 1
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 0  # 0 = the whole split
    sample_every: int = 0  # 0 = only at the end
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)


def fields_of(config) -> dict[str, type]:
    """Returns `{"model.num_layers": int, ...}` for every leaf field, in order."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{k}": t for k, t in fields_of(value).items()}
        else:
            found[field.name] = field.type
    return found


def get_field(config, path: str):
    """Returns the value at a dotted path, for example `model.num_layers`."""
    for part in path.split("."):
        config = getattr(config, part)
    return config


def set_field(config, path: str, value) -> None:
    """Sets the value at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(get_field(config, parent) if parent else config, name, value)
