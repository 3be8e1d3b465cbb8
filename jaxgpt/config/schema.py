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
    num_kv_heads: int = 0  # 0 = num_heads; fewer: grouped-query attention
    head_dim: int = 0  # 0 = embed_dim / num_heads
    embed_dim: int = 768
    mlp_dim: int = 0  # 0 = 4 * embed_dim
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_position: str = "pre"
    position: str = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"  # for contexts beyond rope_original_len
    rope_factor: float = 1.0
    rope_original_len: int = 8192
    activation: str = "gelu_tanh"
    bias: bool = True  # of every projection and layer norm
    qkv_bias: bool = False  # of query, key and value, also without `bias`
    tie_embeddings: bool = True
    scale_embeddings: bool = False  # multiply token embeddings by sqrt(embed_dim)
    qk_norm: bool = False  # normalise queries and keys per head
    window: int = 0  # attend to the last so many tokens; 0 = all
    full_attention_every: int = 0  # with a window: every so many-th layer attends to all; 0 = none
    logit_softcap: float = 0.0  # c * tanh(logits / c); 0 = off
    mup_base_width: int = 0  # muP: the embed_dim at which the learning rate was tuned; 0 = off
    dropout: float = 0.0
    lora_rank: int = 0  # train low-rank additions to `lora_targets` instead of the weights; 0 = off
    lora_alpha: float = 16.0  # the additions are scaled by lora_alpha / lora_rank
    lora_targets: str = "query,value"  # of query, key, value, out, up, gate, down
    lora_dora: bool = False  # learn each output's magnitude apart (DoRA)
    dtype: str = "float32"  # of activations and matrix products
    param_dtype: str = "float32"  # of parameters and optimizer state
    attention: str = "auto"
    remat: str = "none"
    scan_layers: bool = True

    def with_sizes(self) -> "ModelConfig":
        """Returns a copy in which no derived size is 0 any more (but for the vocabulary)."""
        return dataclasses.replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim or 4 * self.embed_dim,
        )

    @property
    def width_ratio(self) -> float:
        """muP's width multiplier: embed_dim over the base width, 1 without muP."""
        return self.embed_dim / self.mup_base_width if self.mup_base_width else 1.0

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
    field: str = "text"  # of a jsonl line, a parquet table, a TFDS example
    data_dir: str = ""  # of TFDS; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    clean: str = ""  # steps in this order: html,unicode,quality,exact_dedup,near_dedup,pii
    pack: bool = False  # whole documents in each window, instead of windows of one stream
    chat_template: str = "plain"  # of sft: rows with messages; chatml needs its special tokens
    special_tokens: str = ""  # names of further ids, comma-separated
    shuffle: bool = True
    cache_dir: str = ""  # "" = $JAXGPT_CACHE, else ~/.cache/jaxgpt


@dataclasses.dataclass
class OptimConfig:
    """The update and its schedule. The defaults follow GPT-3 (arXiv:2005.14165, appendix B)."""

    name: str = "adamw"
    learning_rate: float = 6e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_lr_ratio: float = 0.1
    decay_fraction: float = 0.2  # of wsd: the share of the steps in its final descent
    weight_decay: float = 0.1
    b1: float = 0.9  # also sgd's momentum and muon's
    b2: float = 0.95
    eps: float = 1e-8
    moment_dtype: str = ""  # of the first moment (momentum): bfloat16 halves it; "" = param_dtype
    clip_norm: float = 1.0  # 0 = no clipping
    z_loss: float = 0.0  # weight of logsumexp(logits)**2 (PaLM, arXiv:2204.02311, section 5)
    ema_decay: float = 0.0  # evaluate and sample an exponential average of the weights; 0 = off
    freeze: str = ""  # patterns of paths that stay as they are: "tokens,blocks/mlp"
    lr_multipliers: str = ""  # by path, first match: "tokens=0.1,blocks/.*norm=2"


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) = whatever is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence_activations: bool = False  # split positions between the layers over `tensor`


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
    num_epochs: float = 0.0  # passes over the training part; > 0 sets num_steps
    init_from: str = ""  # a workdir or a Hugging Face folder to start from
    init_fresh: str = ""  # patterns of paths that are not taken from there: "head"
    early_stop: int = 0  # end after so many validations without a better loss; 0 = never
    batch_size: int = 8
    grad_accum: int = 1
    log_every: int = 10
    max_bad_steps: int = 10  # non-finite ones in a row before a rollback
    max_rollbacks: int = 3
    eval_every: int = 100
    eval_batches: int = 0  # of batch_size windows each; 0 = the whole split
    sample_every: int = 0  # 0 = only at the end
    checkpoint_every: int = 100
    keep_checkpoints: int = 3  # the newest; the best and every `keep_every`-th stay besides
    keep_every: int = 0
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
