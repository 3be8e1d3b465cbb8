"""The fields of a run: plain dataclasses, with every derived size as a property."""

import dataclasses
from typing import Any

from jaxgpt.config.fields import Axis, axis, changes, choice, may_change, needs, number

VOCAB_MULTIPLE = 128  # TPU lane width; also divisible by any usual tensor axis
IGNORE = -1  # the target of a position that has none
SPARSE = ("longformer", "strided", "axial", "bigbird", "lsh")  # attention that is not full


@dataclasses.dataclass
class ModelConfig:
    """Architecture. The defaults are GPT-2 124M (OpenAI 2019, table 2) but for the vocabulary.

    In a config file a field may be None: it is then taken from `init_from` before anything else.
    """

    vocab_size: int = changes("domain", number(0, 0, 2**24))  # 0 = the tokenizer's
    max_seq_len: int = changes("domain", number(1024, 1, 2**24))
    num_layers: int = number(12, 1, 10_000)
    num_heads: int = number(12, 1, 2**16)
    num_kv_heads: int = number(0, 0, 2**16)  # 0 = num_heads; fewer: grouped-query attention
    head_dim: int = number(0, 0, 2**16)  # 0 = embed_dim / num_heads
    embed_dim: int = number(768, 1, 2**20)
    # 0 = 4 * embed_dim
    mlp_dim: int = needs("has_dense_layers", True, field=number(0, 0, 2**22))
    norm: str = choice("layernorm", "rmsnorm")
    norm_eps: float = number(1e-5, 0, 1, "()")
    norm_position: str = choice("pre", "post")
    position: str = choice("learned", "sinusoidal", "rope", "none", "relative")
    rope_theta: float = needs("position", "rope", field=number(10_000.0, 1, opened="("))
    # For contexts beyond rope_original_len
    rope_scaling: str = needs("position", "rope", field=choice("none", "linear", "llama3", "yarn"))
    rope_factor: float = needs("rope_scaling", "linear", "llama3", "yarn", field=number(1.0, 1))
    rope_original_len: int = needs("rope_scaling", "llama3", "yarn", field=number(8192, 1))
    # Of yarn (arXiv:2309.00071): pairs that turn more often within rope_original_len stay, those
    # that turn less often are divided by rope_factor
    rope_beta_fast: float = needs("rope_scaling", "yarn", field=number(32.0, 0, opened="("))
    rope_beta_slow: float = needs("rope_scaling", "yarn", field=number(1.0, 0, opened="("))
    # What queries and keys are multiplied by; 0 = 0.1 ln(rope_factor) + 1
    rope_attention_factor: float = needs("rope_scaling", "yarn", field=number(0.0, 0))
    activation: str = choice(
        "gelu_tanh", "gelu", "relu", "leaky_relu", "relu2", "silu", "swiglu", "geglu"
    )
    bias: bool = True  # of every projection and layer norm
    # Of query, key and value, also without `bias`
    qkv_bias: bool = changes("parameters", needs("bias", False, field=False))
    tie_embeddings: bool = changes("parameters", True)
    scale_embeddings: bool = False  # multiply token embeddings by sqrt(embed_dim)
    qk_norm: bool = False  # normalise queries and keys per head
    window: int = number(0, 0)  # attend to the last so many tokens; 0 = all
    # With a window: every so many-th layer attends to all; 0 = none
    full_attention_every: int = number(0, 0)
    # Which keys a query sees: see `ops.sparse.patterns`
    attention_pattern: str = choice("full", *SPARSE)
    # Tokens: the window, the stride, a row, a block or a chunk, in the order of `attention_pattern`
    sparse_block: int = needs("attention_pattern", *SPARSE, field=number(128, 1, 2**24))
    dilation: int = needs(
        "attention_pattern", "longformer", field=number(1, 1, 2**24)
    )  # of the window
    # The first tokens, which every token sees, and which see all later ones that they may
    global_tokens: int = needs(
        "attention_pattern", "longformer", "bigbird", field=number(1, 0, 2**24)
    )
    random_blocks: int = needs("attention_pattern", "bigbird", field=number(2, 0, 2**10))
    hash_rounds: int = needs("attention_pattern", "lsh", field=number(2, 1, 2**6))
    logit_softcap: float = number(0.0, 0)  # c * tanh(logits / c); 0 = off
    # muP: the embed_dim at which the learning rate was tuned; 0 = off
    mup_base_width: int = number(0, 0, 2**20)
    dropout: float = changes("training", number(0.0, 0, 1, ")"))
    # What a token sees: those before it, all, or those before it and an encoder's of another text
    kind: str = choice("decoder", "encoder", "encoder_decoder")
    # Of an encoder-decoder: the encoder's layers (0 = num_layers, which are the decoder's), and the
    # tokens it reads (0 = max_seq_len)
    encoder_layers: int = needs("kind", "encoder_decoder", field=number(0, 0, 10_000))
    max_source_len: int = changes(
        "domain", needs("kind", "encoder_decoder", field=number(0, 0, 2**24))
    )
    type_vocab_size: int = number(0, 0, 2**16)  # embeddings for parts of a text (BERT); 0 = none
    embedding_norm: bool = False  # normalise the embeddings (BERT, BART)
    head_transform: bool = False  # projection, activation and norm before the logits (BERT)
    head_bias: bool = False  # of the logits
    # T5's (arXiv:1910.10683, section 2.1): scores get a learned bias by distance
    relative_buckets: int = needs("position", "relative", field=number(32, 4, 2**16))
    # From this distance on it is the same
    relative_max_distance: int = needs("position", "relative", field=number(128, 2, 2**20))
    scale_attention: bool = True  # divide scores by sqrt(head_dim); T5 does not
    scale_logits: bool = False  # divide logits by sqrt(embed_dim) (T5 with tied embeddings)
    num_experts: int = number(0, 0, 2**16)  # 0 = dense; the fields below are of mixtures alone
    # Every so many-th layer is a mixture, but for the first so many: the others are dense
    expert_every: int = number(1, 1, 10_000)
    first_dense_layers: int = number(0, 0, 10_000)
    experts_per_token: int = number(2, 1, 2**16)
    expert_dim: int = number(0, 0, 2**22)  # hidden width of one expert; 0 = mlp_dim
    shared_experts: int = number(0, 0, 2**16)  # so many more that every token goes through
    router: str = choice("softmax_topk", "sigmoid_topk")
    normalize_gates: bool = True  # the weights of a token's experts add up to gate_scale
    gate_scale: float = number(1.0, 0, opened="(")
    # An expert takes so many times the mean of each sequence and drops the rest; 0 = drops none
    expert_capacity: float = number(0.0, 0)
    # Weights of the balance loss (Switch, arXiv:2101.03961) and of the router's squared logsumexp
    balance_loss: float = changes("training", number(0.01, 0))
    router_z_loss: float = changes("training", number(0.0, 0))
    # What a step adds to the bias of an expert with too few tokens (arXiv:2408.15664)
    router_bias_rate: float = changes(
        "training", needs("router", "sigmoid_topk", field=number(1e-3, 0))
    )

    def with_sizes(self) -> "ModelConfig":
        """Returns a copy in which no derived size is 0 any more (but for the vocabulary)."""
        two_stacks = self.kind == "encoder_decoder"
        return dataclasses.replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim or 4 * self.embed_dim,
            encoder_layers=self.encoder_layers or two_stacks * self.num_layers,
            max_source_len=self.max_source_len or two_stacks * self.max_seq_len,
            expert_dim=self.expert_dim
            or bool(self.num_experts) * (self.mlp_dim or 4 * self.embed_dim),
        )

    @property
    def mixture_layers(self) -> range:
        """The layers whose feed-forward is a mixture, counted from 0: with `expert_every=2` 1, 3,
        5, ... that are not among `first_dense_layers`."""
        every, dense = self.expert_every, self.first_dense_layers
        first = -(-(dense + 1) // every) * every - 1
        return range(first, self.num_layers, every) if self.num_experts else range(0)

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer is no mixture."""
        return len(self.mixture_layers) < self.num_layers

    @property
    def width_ratio(self) -> float:
        """muP's width multiplier: embed_dim over the base width, 1 without muP."""
        return self.embed_dim / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclasses.dataclass
class ComputeConfig:
    """How the model is computed; none of it changes what the parameters mean."""

    dtype: str = choice("float32", "bfloat16", "float16")  # on one CPU bfloat16 is for products
    param_dtype: str = choice("float32", "bfloat16")  # of parameters and optimizer state
    attention: str = may_change(choice("auto", "xla", "cudnn", "splash"))
    remat: str = may_change(choice("none", "dots", "full", "offload"))
    # One compiled layer in a loop, or each its own; auto: by platform and depth
    scan_layers: str = may_change(choice("auto", "true", "false"))
    # Weights are read as `shrink` will store them (int4 in groups of `shrink.group`, 0: of 32)
    fake_quantise: str = choice("none", "int8", "int4")
    # Of mesh.pipeline: parts of a batch, and how often they pass all stages: `config.pipeline`
    pipeline_microbatches: int = may_change(number(0, 0, 2**16))
    pipeline_rounds: int = may_change(number(0, 0, 2**16))
    matmul: str = choice("plain", "int8", "fp8")  # of projections: `parameters.low_precision`
    # Rows that a device of mesh.expert sends to each other at once, over their mean
    expert_buffer: float = may_change(number(1.25, 0, 2**16, "("))
    # In which gradients are summed over mesh.data, which goes over slices of TPUs: bfloat16 sends
    # half as much; "" = their own
    slice_gradient_dtype: str = choice("", "bfloat16")
    # Over mesh.context: keys and values go around, or are gathered; auto: by their size
    context_attention: str = may_change(choice("auto", "ring", "all_gather"))


@dataclasses.dataclass
class LoraConfig:
    """Low-rank additions that are trained instead of the weights (arXiv:2106.09685)."""

    rank: int = number(0, 0, 2**16)  # 0 = off
    alpha: float = number(16.0, 0, opened="(")  # the additions are scaled by alpha / rank
    targets: str = "query,value"  # of query, key, value, out, up, gate, down
    dora: bool = False  # learn each output's magnitude apart (arXiv:2402.09353)


@dataclasses.dataclass
class ShrinkConfig:
    """What `shrink` made of the model, and pruning while training."""

    weights: str = choice("float", "int8", "int4", "nf4")
    group: int = number(0, 0, 2**16)  # inputs that share a scale; 0 = all of an output's
    keep: str = ""  # what stays float: lora's targets, head (with the embeddings), positions
    done: str = ""  # the methods, in order: "heads:0.25 svd:64 int8"
    ranks: str = ""  # projections that are two factors of a lower rank: "query=64,up=96"
    # The rank of the tensor train that stands for the embeddings (and the head); 0 = tables
    tensor_train: int = number(0, 0, 2**16)
    # Weights of projections that are 0 stay so; auto: where those of init_from were pruned
    zeros: str = choice("auto", "keep", "free")
    # Pruning while training: the share of each projection's weights that are 0 at the end
    sparsity: float = number(0.0, 0, 1, ")")
    prune_from: int = number(1, 1)  # the first step that prunes
    prune_to: int = number(0, 0)  # the step at which `sparsity` is reached; 0 = 0.8 * num_steps
    prune_every: int = number(100, 1)


@dataclasses.dataclass
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "builtin"
    tokenizer: str = "byte"  # "" = that of init_from
    validation_source: str = ""
    validation_fraction: float = 0.05
    field: str = "text"  # of a jsonl line, a parquet table, a TFDS example
    data_dir: str = ""  # of TFDS; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    clean: str = ""  # steps in this order: html,unicode,quality,exact_dedup,near_dedup,pii
    pack: bool = False  # whole documents in each chunk, instead of chunks of one stream
    # What makes text of the turns of sft: rows; chatml needs its special tokens
    chat_template: str = choice("plain", "chatml", "alpaca")
    # Names of further ids, comma-separated; <extra_id_0..99> are a hundred. Objectives add theirs
    special_tokens: str = ""
    shuffle: bool = True
    cache_dir: str = ""  # "" = $JAXGPT_CACHE, else ~/.cache/jaxgpt


@dataclasses.dataclass
class OptimConfig:
    """The update and its schedule. The defaults follow GPT-3 (arXiv:2005.14165, appendix B)."""

    name: str = choice("adamw", "muon", "lion", "adafactor", "sgd")
    learning_rate: float = number(6e-4, 0, opened="(")
    schedule: str = choice("cosine", "wsd", "linear", "constant", "rsqrt")
    warmup_steps: int = number(100, 0)
    # The same as a share of num_steps, which it follows; 0 = warmup_steps says it
    warmup_fraction: float = number(0.0, 0, 1, ")")
    final_lr_ratio: float = number(0.1, 0)
    decay_fraction: float = number(
        0.2, 0, 1, "()"
    )  # of wsd: the share of the steps in its final descent
    weight_decay: float = number(0.1, 0)
    b1: float = number(0.9, 0, 1, ")")  # also sgd's momentum and muon's
    b2: float = number(0.95, 0, 1, ")")
    eps: float = number(1e-8, 0, 1, "()")
    moment_dtype: str = choice(
        "", "float32", "bfloat16"
    )  # of the first moment (momentum): bfloat16 halves it; "" = param_dtype
    clip_norm: float = number(1.0, 0)  # 0 = no clipping
    z_loss: float = number(
        0.0, 0
    )  # weight of logsumexp(logits)**2 (PaLM, arXiv:2204.02311, section 5)
    # The share of a target that is spread over the vocabulary (arXiv:1512.00567, section 7)
    label_smoothing: float = number(0.0, 0, 1, ")")
    ema_decay: float = number(
        0.0, 0, 1, ")"
    )  # evaluate and sample an exponential average of the weights; 0 = off
    freeze: str = ""  # patterns of paths that stay as they are: "tokens,blocks/mlp"
    lr_multipliers: str = ""  # by path, first match: "tokens=0.1,blocks/.*norm=2"


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) = whatever is left."""

    data: int = axis(-1, batch=True)
    fsdp: int = axis(1, "embed", batch=True)  # data parallelism whose parameters are split too
    tensor: int = axis(1, "heads", "kv_heads", "mlp", "vocab")
    expert: int = axis(1, "experts", "embed", batch=True)
    context: int = axis(1, "seq", "embed")
    pipeline: int = axis(1, "layers", "embed", batch=True)
    # Split positions between the layers over `tensor`
    sequence_activations: bool = may_change(False)


MESH_AXES: dict[str, Axis] = {
    field.name: field.metadata["axis"]
    for field in dataclasses.fields(MeshConfig)
    if "axis" in field.metadata
}
# The axes that split every large parameter, and those whose devices hold equal ones
SHARDING = tuple(name for name, axis in MESH_AXES.items() if "embed" in axis.logical)
REPLICAS = tuple(name for name, axis in MESH_AXES.items() if not axis.logical)
# Replicas first, and the others the other way round: see `parallel.lookup`
BATCH_AXES = REPLICAS + tuple(name for name in reversed(SHARDING) if MESH_AXES[name].batch)


@dataclasses.dataclass
class SampleConfig:
    """The samples taken while training."""

    prompt: str = ""  # "" = start from end-of-text
    max_new_tokens: int = number(128, 0, 2**24)
    temperature: float = number(0.8, 0)
    top_k: int = number(40, 0)


@dataclasses.dataclass
class DistillConfig:
    """What a student learns from a teacher: see `distillation.objective`."""

    # A workdir or a Hugging Face folder; a resumed run may find it elsewhere, but not another one
    teacher: str = may_change("")
    temperature: float = number(2.0, 0, opened="(")  # both models' logits are divided by it
    alpha: float = number(0.5, 0, 1)  # weight of the teacher's part; that of the data's is the rest
    # forward: KL(teacher || student), reverse: KL(student || teacher)
    divergence: str = choice("forward", "reverse")
    hidden_weight: float = number(0.0, 0)  # of the distance between hidden states; 0 = off
    hidden_layers: str = ""  # of which: "" the last, "uniform" or pairs: see `distillation.layers`
    # So many of the teacher's likeliest tokens are computed once, onto the disk; 0 = off
    top_k: int = number(0, 0, 2**16)


@dataclasses.dataclass
class MaskedLmConfig:
    """Which tokens an encoder has to guess (BERT, arXiv:1810.04805, section 3.1)."""

    rate: float = number(0.15, 0, 1, "()")  # the share of the tokens that are to be guessed
    mask_share: float = number(0.8, 0, 1)  # of those: replaced by [MASK]
    random_share: float = number(0.1, 0, 1)  # replaced by a random token; the rest stay
    whole_words: bool = False  # all tokens of a word or none


@dataclasses.dataclass
class SpanCorruptionConfig:
    """Which spans a sentinel stands for (T5, arXiv:1910.10683, section 3.1.4)."""

    density: float = number(0.15, 0, 1, "()")  # the share of the tokens that are in spans
    mean_length: float = number(3.0, 1)  # of a span


@dataclasses.dataclass
class FillInTheMiddleConfig:
    """How many documents are turned (arXiv:2207.14255)."""

    rate: float = number(0.5, 0, 1)  # the share of the documents; the others stay as they are
    spm_rate: float = number(0.5, 0, 1)  # of those: the suffix in front of the prefix


@dataclasses.dataclass
class Seq2SeqConfig:
    """The fields of a row."""

    source_field: str = "source"
    target_field: str = "target"
    prompt: str = ""  # stands in front of every source: "translate English to German: "


@dataclasses.dataclass
class ClassificationConfig:
    """The fields of a row, and the head."""

    text_field: str = "text"
    pair_field: str = ""  # of a second text; "" = there is none
    label_field: str = "label"
    labels: str = ""  # names, comma-separated; "" = those of the training part, sorted
    # The state that stands for the text; auto: the first of an encoder, else the last
    pooling: str = choice("auto", "first", "last", "mean")
    class_weights: str = ""  # of the loss: "balanced", or a number for each label; "" = equal


@dataclasses.dataclass
class TokenClassificationConfig:
    """The fields of a row: two lists of one length."""

    words_field: str = "words"
    labels_field: str = "labels"
    labels: str = ""  # as for classification
    class_weights: str = ""


@dataclasses.dataclass
class SpanQaConfig:
    """The fields of a row, as SQuAD has them (arXiv:1606.05250)."""

    question_field: str = "question"
    context_field: str = "context"
    answers_field: str = "answers"


@dataclasses.dataclass
class ObjectivesConfig:
    """What each objective needs, by its name."""

    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    masked_lm: MaskedLmConfig = dataclasses.field(default_factory=MaskedLmConfig)
    masked_lm_nsp: MaskedLmConfig = dataclasses.field(default_factory=MaskedLmConfig)
    span_corruption: SpanCorruptionConfig = dataclasses.field(default_factory=SpanCorruptionConfig)
    fill_in_the_middle: FillInTheMiddleConfig = dataclasses.field(
        default_factory=FillInTheMiddleConfig
    )
    seq2seq: Seq2SeqConfig = dataclasses.field(default_factory=Seq2SeqConfig)
    classification: ClassificationConfig = dataclasses.field(default_factory=ClassificationConfig)
    token_classification: TokenClassificationConfig = dataclasses.field(
        default_factory=TokenClassificationConfig
    )
    span_qa: SpanQaConfig = dataclasses.field(default_factory=SpanQaConfig)


@dataclasses.dataclass
class Config:
    """A whole run. `batch_size` counts sequences per optimizer step over all devices."""

    seed: int = number(0, 0, 2**32 - 1)  # JAX keys take the lower 32 bits: 2**32 would be 0 again
    num_steps: int = may_change(number(1000, 1))
    # Passes over the training part; > 0 sets num_steps
    num_epochs: float = may_change(number(0.0, 0, 1e6))
    # What training minimises: see `training.objectives`
    objective: str = choice(
        *("causal_lm", "masked_lm", "masked_lm_nsp", "span_corruption", "prefix_lm"),
        *("fill_in_the_middle", "distill"),
        *("seq2seq", "classification", "token_classification", "span_qa"),
    )
    init_from: str = ""  # a workdir or a Hugging Face folder to start from
    init_fresh: str = ""  # patterns of paths that are not taken from there: "head"
    # The layers taken from there, where the model has fewer: every_second, or 0,2,5; "" = all
    init_layers: str = ""
    # End after so many validations without a better loss; 0 = never
    early_stop: int = may_change(number(0, 0))
    batch_size: int = number(8, 1)
    grad_accum: int = may_change(number(1, 1))
    log_every: int = may_change(number(10, 1))
    max_bad_steps: int = may_change(number(10, 1))  # non-finite ones in a row before a rollback
    max_rollbacks: int = may_change(number(3, 0))
    eval_every: int = may_change(number(100, 0))
    eval_batches: int = number(0, 0)  # of batch_size windows each; 0 = the whole split
    sample_every: int = may_change(number(0, 0))  # 0 = only at the end
    checkpoint_every: int = may_change(number(100, 0))
    # The newest; the best and every `keep_every`-th stay besides
    keep_checkpoints: int = may_change(number(3, 1))
    keep_every: int = may_change(number(0, 0))
    track: str = may_change("")  # wandb, mlflow or both: experiment trackers that get the rows too
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    shrink: ShrinkConfig = dataclasses.field(default_factory=ShrinkConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    objectives: ObjectivesConfig = dataclasses.field(default_factory=ObjectivesConfig)


def fields_of(config) -> dict[str, type]:
    """Returns `{"model.num_layers": int, ...}` for every leaf field, in order."""
    return {path: field.type for path, field in leaves_of(type(config)).items()}


def leaves_of(kind: type = Config) -> dict[str, dataclasses.Field]:
    """Returns `{"model.num_layers": its dataclasses.Field, ...}` for every leaf field, in order."""
    leaves = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            leaves |= {f"{field.name}.{k}": leaf for k, leaf in leaves_of(field.type).items()}
        else:
            leaves[field.name] = field
    return leaves


def get_field(config, path: str):
    """Returns the value at a dotted path, for example `model.num_layers`."""
    for part in path.split("."):
        config = getattr(config, part)
    return config


def set_field(config, path: str, value) -> None:
    """Sets the value at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(get_field(config, parent) if parent else config, name, value)


def differing(config: Config, from_: Config) -> dict[str, Any]:
    """Returns `{"model.num_layers": value in config, ...}` of the fields in which two differ."""
    values = {path: get_field(config, path) for path in fields_of(config)}
    return {path: value for path, value in values.items() if value != get_field(from_, path)}


def left_open(config: Config) -> list[str]:
    """Returns the paths of the fields that are to be as `init_from` has them: those of the model
    that are None (see `presets.from_init`), and a tokenizer that is ""."""
    parts = type(getattr(config, "model", None)), type(getattr(config, "data", None))
    if parts != (ModelConfig, DataConfig):
        return []  # `validate` refuses it
    fields = (f"model.{field.name}" for field in dataclasses.fields(ModelConfig))
    paths = [path for path in fields if get_field(config, path) is None]
    return paths + ["data.tokenizer"] * (config.data.tokenizer == "")


def model_differences(one: ModelConfig, other: ModelConfig, *also: str) -> list[str]:
    """Returns the fields by which two models, their sizes filled in, are different functions of
    their parameters; with `also`, those too that make a difference of that kind (see `changes`)."""

    def has_effect(field: dataclasses.Field, model: ModelConfig) -> bool:
        name, values = field.metadata.get("needs", (field.name, None))
        return values is None or getattr(model, name) in values

    return [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.metadata.get("changes", "function") in ("function", *also)
        and getattr(one, field.name) != getattr(other, field.name)
        and (has_effect(field, one) or has_effect(field, other))
    ]
