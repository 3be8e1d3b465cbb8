"""Parameters, model FLOPs, and how much of the devices' peak they use."""

from jaxgpt.config import ModelConfig
from jaxgpt.ops.activations import GATED
from jaxgpt.ops.sparse.patterns import keys_seen, patterns_of
from jaxgpt.system.trees import leaves_by_path

# Dense bf16 FLOP/s of one device by `device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v3": 123e12 / 2,  # per core, as JAX counts devices there
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # per core, as JAX counts devices there
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


def count_parameters(params: dict, cfg: ModelConfig) -> int:
    """Returns the number of parameters without the vocabulary's padding rows, however they are
    stored: scales do not count (see `parameters.quantised`)."""
    leaves = leaves_by_path(params)
    padding = (cfg.padded_vocab_size - cfg.vocab_size) * cfg.embed_dim
    tables = 1 if cfg.tie_embeddings else 2
    tables = 0 if "tokens/core_0" in leaves else tables
    padding = tables * padding + (cfg.padded_vocab_size - cfg.vocab_size) * cfg.head_bias
    return sum(map(_weights_in, leaves, leaves.values())) - padding


def count_active(params: dict, cfg: ModelConfig) -> int:
    """Returns how many of `count_parameters` a token goes through: its own experts' alone."""
    leaves = leaves_by_path(params)
    experts = sum(leaf.size for path, leaf in leaves.items() if "/mlp/experts/" in path)
    idle = experts * (cfg.num_experts - cfg.experts_per_token) // max(cfg.num_experts, 1)
    return count_parameters(params, cfg) - idle


def _weights_in(path: str, leaf) -> int:
    """Returns how many weights an array stands for; a byte of codes holds two."""
    if path.endswith("/scales"):
        return 0
    return leaf.size * (2 if path.endswith("/values") and leaf.dtype == "uint8" else 1)


def flops_per_token(cfg: ModelConfig, logits: float = 1.0) -> int:
    """Returns model FLOPs per trained token: 6N + 12 L D T (PaLM, arXiv:2204.02311, appendix B).

    N counts the weights that take part in matrix products, the logits' included; the attention
    term counts the full T x T square, as is the custom, but of a sparse pattern the pairs that are
    seen. Recomputation does not count. Of an encoder-decoder the tokens are the decoder's, and what
    its encoder does is shared among them. The share `logits` of the tokens has logits made (see
    `objectives.companions`).
    """
    d, matrices, length = cfg.embed_dim, 3 if cfg.activation in GATED else 2, cfg.max_seq_len
    reading, read = (2 * heads * cfg.head_dim * d for heads in (cfg.num_heads, cfg.num_kv_heads))
    own = read // 2 if cfg.attention_pattern == "lsh" else read  # whose queries are its keys
    layer, mixtures = reading + own + matrices * cfg.mlp_dim * d, len(cfg.mixture_layers)
    # Those experts that a token goes through, and the router
    expert = matrices * (cfg.experts_per_token + cfg.shared_experts) * cfg.expert_dim
    layers = cfg.num_layers * layer
    layers += mixtures * (expert + cfg.num_experts - matrices * cfg.mlp_dim) * d
    square = 12 * cfg.num_heads * cfg.head_dim  # for each pair of positions
    head = logits * (d * cfg.vocab_size + d * d * cfg.head_transform)
    keys = _keys_seen(cfg, length, cfg.kind != "encoder")
    row = length * (6 * (layers + head) + square * cfg.num_layers * keys)
    if cfg.kind == "encoder_decoder":
        sources = cfg.max_source_len
        keys = _keys_seen(cfg, sources, False)
        row += cfg.encoder_layers * sources * (6 * layer + square * keys)
        cross = 6 * (length * reading + sources * read) + square * length * sources
        row += cfg.num_layers * cross
    return int(row // length)


def _keys_seen(cfg: ModelConfig, length: int, causal: bool) -> int:
    pattern = patterns_of(cfg)[causal]
    return round(keys_seen(pattern, length, causal)) if pattern else length


def mfu(flops_per_second: float, device_kind: str, devices: int) -> float | None:
    """Returns the used share of the devices' bf16 peak; None where the peak is unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return peak and flops_per_second / (peak * devices)
