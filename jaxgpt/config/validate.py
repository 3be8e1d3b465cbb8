"""Checks across fields, run before any device is touched or any file read."""

from jaxgpt.config.errors import BadInput
from jaxgpt.config.schema import Config, fields_of, get_field

CHOICES = {
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_position": ("pre", "post"),
    "model.position": ("learned", "sinusoidal", "rope", "none"),
    "model.rope_scaling": ("none", "linear", "llama3"),
    "model.activation": (
        "gelu",
        "gelu_tanh",
        "relu",
        "leaky_relu",
        "relu2",
        "silu",
        "swiglu",
        "geglu",
    ),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "model.remat": ("none", "dots", "full", "offload"),
    "optim.moment_dtype": ("", "float32", "bfloat16"),
    "data.chat_template": ("plain", "chatml"),
    "optim.name": ("adamw", "muon", "lion", "adafactor", "sgd"),
    "optim.schedule": ("cosine", "wsd", "linear", "constant", "rsqrt"),
}
CHATML_TOKENS = {"<|im_start|>", "<|im_end|>"}
AT_LEAST = {
    "num_steps": 1,
    "batch_size": 1,
    "grad_accum": 1,
    "log_every": 1,
    "keep_checkpoints": 1,
    "eval_every": 0,
    "eval_batches": 0,
    "sample_every": 0,
    "checkpoint_every": 0,
    "keep_every": 0,
    "max_bad_steps": 1,
    "max_rollbacks": 0,
    "num_epochs": 0,
    "early_stop": 0,
    "model.lora_rank": 0,
    "model.vocab_size": 0,
    "model.max_seq_len": 1,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.embed_dim": 1,
    "model.mlp_dim": 0,
    "model.num_kv_heads": 0,
    "model.head_dim": 0,
    "model.window": 0,
    "model.full_attention_every": 0,
    "model.logit_softcap": 0,
    "model.mup_base_width": 0,
    "model.rope_factor": 1,
    "model.rope_original_len": 1,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "optim.z_loss": 0,
    "optim.final_lr_ratio": 0,
    "sample.max_new_tokens": 0,
    "sample.temperature": 0,
    "sample.top_k": 0,
    "seed": 0,
}
LORA_TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
OPEN_INTERVALS = {
    "optim.learning_rate": (0, float("inf")),
    "optim.eps": (0, 1),
    "model.norm_eps": (0, 1),
    "model.rope_theta": (1, float("inf")),
    "model.lora_alpha": (0, float("inf")),
    "optim.decay_fraction": (0, 1),
}
HALF_OPEN = {
    "model.dropout": (0, 1),
    "optim.b1": (0, 1),
    "optim.b2": (0, 1),
    "optim.ema_decay": (0, 1),
}


def validate(config: Config) -> None:
    """Raises `BadInput`, naming fields and values, if `config` describes no possible run."""
    check_types(config)
    for path, allowed in CHOICES.items():
        if (value := get_field(config, path)) not in allowed:
            raise BadInput(f"{path}={value!r} is unknown; choose one of {', '.join(allowed)}")
    for path, least in AT_LEAST.items():
        if not (value := get_field(config, path)) >= least:
            raise BadInput(f"{path}={value} must be at least {least}")
    for path, (low, high) in OPEN_INTERVALS.items():
        if not low < (value := get_field(config, path)) < high:
            raise BadInput(f"{path}={value} must lie between {low} and {high}, both excluded")
    for path, (low, high) in HALF_OPEN.items():
        if not low <= (value := get_field(config, path)) < high:
            raise BadInput(f"{path}={value} must be at least {low} and below {high}")
    _check_model(config)
    _check_batch_and_mesh(config)
    _check_data(config)


def check_types(config: Config) -> None:
    """Raises `BadInput` where a field holds another type than it declares."""
    for path, kind in fields_of(config).items():
        value = get_field(config, path)
        if kind is float and type(value) is int:
            continue
        if type(value) is not kind:
            raise BadInput(
                f"{path}={value!r} has type {type(value).__name__}, expected {kind.__name__}"
            )


def _check_model(config: Config) -> None:
    model, sizes = config.model, config.model.with_sizes()
    if not model.head_dim and model.embed_dim % model.num_heads:
        raise BadInput(
            f"model.embed_dim={model.embed_dim} is not divisible by"
            f" model.num_heads={model.num_heads}: heads must have equal width (or set head_dim)"
        )
    if model.num_heads % sizes.num_kv_heads:
        raise BadInput(
            f"model.num_heads={model.num_heads} is not divisible by"
            f" model.num_kv_heads={model.num_kv_heads}: each key head serves as many query heads"
        )
    if model.position == "rope" and sizes.head_dim % 2:
        raise BadInput(f"model.position='rope' needs an even head width, not {sizes.head_dim}")
    if model.position == "sinusoidal" and model.embed_dim % 2:
        raise BadInput(
            f"model.position='sinusoidal' needs an even embed_dim, not {model.embed_dim}"
        )
    if model.rope_scaling != "none" and model.position != "rope":
        raise BadInput(f"model.rope_scaling={model.rope_scaling!r} needs model.position='rope'")
    every = model.full_attention_every
    if every and (not model.window or model.num_layers % every):
        raise BadInput(
            f"model.full_attention_every={every} needs a model.window and must divide"
            f" model.num_layers={model.num_layers}"
        )
    if model.mup_base_width and config.optim.name not in ("adamw", "lion"):
        raise BadInput(
            f"model.mup_base_width with optim.name={config.optim.name!r}: its learning-rate rule"
            " is known for adamw and lion only"
        )
    if config.optim.moment_dtype and config.optim.name == "adafactor":
        raise BadInput("optim.moment_dtype with optim.name='adafactor': it has no first moment")
    unknown = set(model.lora_targets.split(",")) - set(LORA_TARGETS)
    if model.lora_rank and unknown:
        raise BadInput(
            f"model.lora_targets={model.lora_targets!r}: choose from {', '.join(LORA_TARGETS)}"
        )
    if model.dropout > 0 and model.attention in ("cudnn", "splash"):
        raise BadInput(
            f"model.dropout={model.dropout} with model.attention={model.attention!r}:"
            " only 'xla' attention"
            " has dropout; set model.attention=auto or model.dropout=0"
        )


def _check_batch_and_mesh(config: Config) -> None:
    if config.batch_size % config.grad_accum:
        raise BadInput(
            f"batch_size={config.batch_size} is not divisible by grad_accum={config.grad_accum}"
        )
    mesh = config.mesh
    sizes = {"mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp, "mesh.tensor": mesh.tensor}
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise BadInput(
                f"{name}={size} must be a positive number of devices, or -1 for the rest"
            )
    if list(sizes.values()).count(-1) > 1:
        raise BadInput("at most one of mesh.data, mesh.fsdp, mesh.tensor may be -1")
    check_divisible(config, max(mesh.data, 1), max(mesh.fsdp, 1), max(mesh.tensor, 1))


def check_divisible(config: Config, data: int, fsdp: int, tensor: int) -> None:
    """Raises `BadInput` where a mesh axis does not divide what it splits."""
    model = config.model.with_sizes()
    microbatch = config.batch_size // config.grad_accum
    if microbatch % (data * fsdp):
        raise BadInput(
            f"batch_size={config.batch_size} / grad_accum={config.grad_accum} = {microbatch}"
            f" sequences cannot be divided over mesh.data={data} x mesh.fsdp={fsdp} devices;"
            f" make batch_size a multiple of {config.grad_accum * data * fsdp}"
        )
    for name, size, axis, devices in (
        ("model.num_heads", model.num_heads, "tensor", tensor),
        ("model.num_kv_heads", model.num_kv_heads, "tensor", tensor),
        ("model.mlp_dim", model.mlp_dim, "tensor", tensor),
        ("model.embed_dim", model.embed_dim, "fsdp", fsdp),
        ("the padded vocabulary", 128, "tensor", tensor),
        (
            "model.max_seq_len, as mesh.sequence_activations splits it,",
            model.max_seq_len if config.mesh.sequence_activations else 0,
            "tensor",
            tensor,
        ),
    ):
        if size % devices:
            raise BadInput(f"{name} = {size} cannot be divided over mesh.{axis}={devices} devices")


def _check_data(config: Config) -> None:
    data = config.data
    names = {name.strip() for name in data.special_tokens.split(",")}
    if data.chat_template == "chatml" and not names >= CHATML_TOKENS:
        raise BadInput(
            "data.chat_template=chatml needs"
            f" data.special_tokens='{','.join(sorted(CHATML_TOKENS, reverse=True))}'"
        )
    if not data.validation_source and not 0 < data.validation_fraction < 1:
        raise BadInput(
            f"data.validation_fraction={data.validation_fraction} must lie between 0 and 1"
            " (both excluded), or set data.validation_source"
        )
