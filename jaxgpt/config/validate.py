"""Checks across fields, run before any device is touched or any file read."""

import copy
import dataclasses
import difflib
import math
import re
from collections.abc import Collection
from typing import Any

from jaxgpt.config.context import check_context
from jaxgpt.config.experts import check_expert_axis, check_experts, check_matmul
from jaxgpt.config.fields import ANY_FLOAT, ANY_INT
from jaxgpt.config.migrate import RENAMED
from jaxgpt.config.objectives import check_kind, with_special_tokens
from jaxgpt.config.pipeline import check_pipeline_axis
from jaxgpt.config.schema import (
    BATCH_AXES,
    MESH_AXES,
    SHARDING,
    VOCAB_MULTIPLE,
    Config,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    fields_of,
    get_field,
    leaves_of,
    set_field,
)
from jaxgpt.config.sparse import check_sparse
from jaxgpt.system.encoding import check_setting
from jaxgpt.system.errors import BadInput

CHATML_TOKENS = {"<|im_start|>", "<|im_end|>"}
LORA_TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
UNSMOOTHED = ("distill", "classification", "token_classification", "span_qa")
GATED_ACTIVATIONS = ("swiglu", "geglu")
EVERY_SECOND = "every_second"
PRUNED_AT = 0.8  # share of the steps after which `shrink.sparsity` is reached without a `prune_to`
UNIFORM = "uniform"  # of objectives.distill.hidden_layers
TRACKERS = ("wandb", "mlflow")
MOST_PARAMETERS = 10**14  # no machine holds them: a slip of the pen


def validate(config: Config) -> Config:
    """Returns a copy in which integers of float fields are floats, no size that follows from
    others is 0 any more (see `check_model`), and `data.special_tokens` has the objective's. Raises
    `BadInput`, naming fields and values, if `config` is not a possible run."""
    config = copy.deepcopy(config)
    check_fields(config)
    for path, kind in fields_of(config).items():
        if kind is float:
            set_field(config, path, float(get_field(config, path)))
    config.model = check_model(config)
    config.data.special_tokens = with_special_tokens(config)
    _check_batch_and_mesh(config)
    _check_data(config)
    parse_track(config.track)
    _check_warmup(config.optim)
    _check_objective(config)
    _check_shrink(config)
    check_matmul(config)
    _check_start(config)
    _check_distillation(config)
    _check_pruning(config)
    return config


def check_fields(config: Config) -> None:
    """Raises `BadInput` where a field holds another type than it declares or a value that its
    metadata excludes."""
    check_types(config)
    for path, field in leaves_of().items():
        value = get_field(config, path)
        if field.type is str:
            check_setting(value, path)
            allowed = field.metadata.get("choices")
            if allowed and value not in allowed:
                raise BadInput(f"{path}={value!r} is unknown; choose one of {', '.join(allowed)}")
        elif field.type is not bool:
            default = ANY_INT if field.type is int else ANY_FLOAT
            if not (bounds := field.metadata.get("range", default)).holds(value):
                raise BadInput(f"{path}={shown(value)} must be {bounds}")


def check_types(config: Config) -> None:
    """Raises `BadInput` where a field holds another type than it declares, or a name is none."""
    _check_names(config)
    for path, kind in fields_of(config).items():
        value = get_field(config, path)
        if kind is float and type(value) is int:
            continue
        if type(value) is not kind:
            choices = leaves_of()[path].metadata.get("choices", ())
            among = f": one of {', '.join(choices)}" if choices else ""
            raise BadInput(
                f"{path}={shown(value)} has type {type(value).__name__},"
                f" expected {kind.__name__}{among}"
            )


def shown(value: object) -> str:
    """Returns a value for a message; Python refuses to spell out an integer of 4,300 digits."""
    if type(value) is int and value.bit_length() > 256:
        return f"({'-' * (value < 0)}2**{value.bit_length() - 1} or more)"
    return repr(value)[:200]


def _check_names(config, prefix: str = "") -> None:
    """A dataclass takes any attribute: one that no field declares would go unnoticed."""
    declared = {field.name: field for field in dataclasses.fields(config)}
    for name in vars(config):
        if name not in declared:
            check_known(prefix + name, fields_of(Config()), where="the config file sets ")
    for name, field in declared.items():
        if dataclasses.is_dataclass(field.type):
            if type(part := getattr(config, name, None)) is not field.type:
                raise BadInput(
                    f"{prefix}{name} must be a {field.type.__name__}, not {type(part).__name__}"
                )
            _check_names(part, f"{prefix}{name}.")


def check_known(path: str, known: Collection[str], prefix: str = "", where: str = "") -> None:
    """Raises `BadInput`, suggesting the nearest, if `path` is not in `known`."""
    if path in known:
        return
    if path in RENAMED:
        link = ", which is now " if where else " is now "
        raise BadInput(f"{where}{prefix}{path}{link}{prefix}{RENAMED[path]}")
    close = (
        [field for field in known if field.startswith(path + ".")]
        or named(path, known)
        or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    )
    hint = f"; did you mean {any_of(close, prefix)}?" if close else ""
    raise BadInput(f"{where}unknown config field {prefix}{path}{hint}")


def named(path: str, known: Collection[str]) -> list[str]:
    """Returns the fields whose own name is `path`'s, in full (`model.batch_size`), by its initials
    (`lr`) or by one of its words (`layers`)."""
    name = path.split(".")[-1]
    words = {field: field.split(".")[-1].split("_") for field in known}
    return (
        [field for field in known if name in ("_".join(words[field]), field.replace(".", "_"))]
        or [field for field in known if "".join(w[:1] for w in words[field]) == name]
        or [field for field in known if name in words[field]]
    )


def any_of(fields: list[str], prefix: str = "") -> str:
    """Returns the first three of `fields` for a question: `lora.rank or ...`."""
    return " or ".join(prefix + field for field in fields[:3])


def check_model(config: Config) -> ModelConfig:
    """Returns the model with its derived sizes filled in. Raises `BadInput` where the sizes and
    parts of the model do not go together."""
    model = config.model
    if not model.head_dim and model.embed_dim % model.num_heads:
        raise BadInput(
            f"model.embed_dim={model.embed_dim} is not divisible by"
            f" model.num_heads={model.num_heads}: heads must have equal width (or set head_dim)"
        )
    _check_kind(model)
    model = model.with_sizes()
    if (count := _parameters(model)) > MOST_PARAMETERS:
        raise BadInput(
            f"the model would have {count:,} parameters: model.vocab_size={model.vocab_size},"
            f" num_layers={model.num_layers}, embed_dim={model.embed_dim},"
            f" num_heads={model.num_heads}, head_dim={model.head_dim}, mlp_dim={model.mlp_dim}"
        )
    if model.num_heads % model.num_kv_heads:
        raise BadInput(
            f"model.num_heads={model.num_heads} is not divisible by"
            f" model.num_kv_heads={model.num_kv_heads}: each key head serves as many query heads"
        )
    if model.position == "rope" and model.head_dim % 2:
        raise BadInput(f"model.position='rope' needs an even head width, not {model.head_dim}")
    if model.position == "sinusoidal" and model.embed_dim % 2:
        raise BadInput(
            f"model.position='sinusoidal' needs an even embed_dim, not {model.embed_dim}"
        )
    if model.rope_scaling != "none" and model.position != "rope":
        raise BadInput(f"model.rope_scaling={model.rope_scaling!r} needs model.position='rope'")
    exact = model.relative_buckets // (4 if model.kind == "encoder" else 2)  # see `model.relative`
    if model.position == "relative" and (
        model.relative_buckets % 2 or model.relative_max_distance <= exact
    ):
        raise BadInput(
            f"model.relative_buckets={model.relative_buckets} must be even, and"
            f" model.relative_max_distance={model.relative_max_distance} above"
            f" {exact}, the distances that have a bucket of their own"
        )
    every = model.full_attention_every
    if every and (not model.window or model.num_layers % every or model.encoder_layers % every):
        raise BadInput(
            f"model.full_attention_every={every} needs a model.window and must divide"
            f" model.num_layers={model.num_layers}"
            + f" and model.encoder_layers={model.encoder_layers}"
            * (model.encoder_layers > 0)
        )
    check_sparse(config, model)
    check_experts(config, model)
    if model.mup_base_width and config.optim.name not in ("adamw", "lion"):
        raise BadInput(
            f"model.mup_base_width with optim.name={config.optim.name!r}: its learning-rate rule"
            " is known for adamw and lion only"
        )
    if config.optim.moment_dtype and config.optim.name == "adafactor":
        raise BadInput("optim.moment_dtype with optim.name='adafactor': it has no first moment")
    targets = config.lora.targets
    if config.lora.rank and set(targets.split(",")) - set(LORA_TARGETS):
        raise BadInput(f"lora.targets={targets!r}: choose from {', '.join(LORA_TARGETS)}")
    attention, needed = config.compute.attention, only_in_xla(config)
    if needed and attention in ("cudnn", "splash"):
        raise BadInput(
            f"{needed} with compute.attention={attention!r}: only 'xla' attention has that; set"
            " compute.attention=auto"
        )
    return model


def only_in_xla(config: Config) -> str:
    """Returns the setting that only 'xla' attention can compute; "" where there is none."""
    if config.model.dropout:
        return f"model.dropout={config.model.dropout}"
    if config.model.position == "relative":
        return "model.position=relative"
    return "objective=prefix_lm" if config.objective == "prefix_lm" else ""


def _check_kind(model: ModelConfig) -> None:
    """Raises `BadInput` where a field does not go with the kind of model."""
    for name in ("encoder_layers", "max_source_len"):
        if getattr(model, name) and model.kind != "encoder_decoder":
            raise BadInput(
                f"model.{name}={getattr(model, name)} needs model.kind=encoder_decoder, not"
                f" {model.kind}"
            )
    if model.type_vocab_size and model.kind == "encoder_decoder":
        raise BadInput(
            f"model.type_vocab_size={model.type_vocab_size}: an encoder_decoder has no token"
            " types; set it to 0"
        )
    if model.head_transform and model.activation in GATED_ACTIVATIONS:
        raise BadInput(
            f"model.head_transform with model.activation={model.activation}: its activation cannot"
            " be a gated one"
        )


def _parameters(model: ModelConfig) -> int:
    """Returns the number of parameters, but for biases, norms, gates and cross-attention."""
    heads, layers = model.num_heads + model.num_kv_heads, model.num_layers + model.encoder_layers
    mixtures = len(model.mixture_layers)
    mixture = mixtures * (model.num_experts + model.shared_experts) * model.expert_dim
    widths = layers * heads * model.head_dim + mixture + (layers - mixtures) * model.mlp_dim
    return model.embed_dim * (model.vocab_size + 2 * widths)


def _check_batch_and_mesh(config: Config) -> None:
    if config.batch_size % config.grad_accum:
        raise BadInput(
            f"batch_size={config.batch_size} is not divisible by grad_accum={config.grad_accum}"
        )
    sizes = {name: getattr(config.mesh, name) for name in MESH_AXES}
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise BadInput(
                f"mesh.{name}={size} must be a positive number of devices, or -1 for the rest"
            )
    if list(sizes.values()).count(-1) > 1:
        raise BadInput(f"at most one of {', '.join(f'mesh.{name}' for name in sizes)} may be -1")
    check_divisible(config, {name: max(size, 1) for name, size in sizes.items()})


def check_divisible(config: Config, mesh: dict[str, int]) -> None:
    """Raises `BadInput` where a mesh axis of so many devices does not divide what it splits."""
    model = config.model
    microbatch = config.batch_size // config.grad_accum
    if microbatch % (devices := math.prod(mesh[name] for name in BATCH_AXES)):
        product = " x ".join(f"mesh.{name}={mesh[name]}" for name in BATCH_AXES if mesh[name] > 1)
        raise BadInput(
            f"batch_size={config.batch_size} / grad_accum={config.grad_accum} = {microbatch}"
            f" sequences cannot be divided over {product} devices;"
            f" make batch_size a multiple of {config.grad_accum * devices}"
        )
    split = model.max_seq_len, model.max_source_len
    split = split if config.mesh.sequence_activations else (0, 0)
    for axes, name, size in (
        (("tensor",), "model.num_heads", model.num_heads),
        (("tensor",), "model.num_kv_heads", model.num_kv_heads),
        (("tensor",), "model.mlp_dim", model.mlp_dim),
        (SHARDING, "model.embed_dim", model.embed_dim),
        (("tensor",), "the padded vocabulary", VOCAB_MULTIPLE),
        (("tensor",), "model.max_seq_len, as mesh.sequence_activations splits it,", split[0]),
        (("tensor",), "model.max_source_len, as mesh.sequence_activations splits it,", split[1]),
    ):
        if size % (devices := math.prod(mesh[axis] for axis in axes)):
            product = " x ".join(f"mesh.{axis}={mesh[axis]}" for axis in axes if mesh[axis] > 1)
            raise BadInput(
                f"{name} = {size} cannot be divided over {product} devices;"
                f" over {math.gcd(size, devices)} it can"
            )
    check_expert_axis(config, mesh)
    check_context(config, mesh)
    check_pipeline_axis(config, mesh)


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


def _check_objective(config: Config) -> None:
    objective, smoothing = config.objective, config.optim.label_smoothing
    check_kind(config)
    if smoothing and config.model.logit_softcap:
        raise BadInput(
            f"optim.label_smoothing={smoothing} with"
            f" model.logit_softcap={config.model.logit_softcap}: their mean is not computed without"
            " whole logits; set one of them to 0"
        )
    if smoothing and objective in UNSMOOTHED:
        raise BadInput(
            f"optim.label_smoothing={smoothing}: objective={objective} does not smooth its targets;"
            " set it to 0"
        )
    head = [name for name in ("head_bias", "head_transform") if getattr(config.model, name)]
    if head and objective == "distill":
        raise BadInput(f"model.{head[0]} with objective=distill: a student has none; leave it out")


def _check_warmup(optim: OptimConfig) -> None:
    if optim.warmup_fraction and optim.warmup_steps not in (0, OptimConfig.warmup_steps):
        raise BadInput(
            f"optim.warmup_steps={optim.warmup_steps} and"
            f" optim.warmup_fraction={optim.warmup_fraction} are both given: set one of them to 0"
        )


def _check_start(config: Config) -> None:
    if config.init_layers and not config.init_from:
        raise BadInput(
            f"init_layers={config.init_layers} needs init_from, the model whose layers these are"
        )
    if config.init_layers and config.model.kind == "encoder_decoder":
        raise BadInput(f"init_layers={config.init_layers}: not of an encoder_decoder's two stacks")
    if config.init_layers not in ("", EVERY_SECOND):
        parse_layers(config.init_layers)


def _check_distillation(config: Config) -> None:
    cfg, field = config.objectives.distill, "objectives.distill"
    if config.objective != "distill":
        if cfg.teacher:
            raise BadInput(f"{field}.teacher={cfg.teacher} needs objective=distill")
        return
    if not cfg.teacher:
        raise BadInput(
            f"objective=distill needs a teacher: --config.{field}.teacher=DIR, a workdir or a"
            " Hugging Face folder"
        )
    if cfg.top_k and cfg.hidden_weight:
        raise BadInput(
            f"{field}.hidden_weight={cfg.hidden_weight} with {field}.top_k={cfg.top_k}: the"
            " teacher's hidden states are not kept on disk; set one of them to 0"
        )
    _check_hidden_layers(cfg)


def _check_hidden_layers(cfg: DistillConfig) -> None:
    text, field = cfg.hidden_layers, "objectives.distill.hidden_layers"
    if text and not cfg.hidden_weight:
        raise BadInput(f"{field}={text} needs objectives.distill.hidden_weight above 0")
    if text in ("", UNIFORM):
        return
    pairs = [pair.split(":") for pair in text.split(",")]
    numbers = [[int(n) for n in pair if n.isdecimal() and len(n) < 6] for pair in pairs]
    ours = [ns[0] for pair, ns in zip(pairs, numbers, strict=True) if len(pair) == len(ns) == 2]
    if len(ours) < len(pairs) or ours != sorted(set(ours)):
        raise BadInput(
            f"{field}={text!r} must be {UNIFORM}, or pairs of the student's and the teacher's"
            " layers from 0, like 0:1,1:3, the student's ascending"
        )


def parse_layers(text: str) -> list[int]:
    """Returns the layers that `init_layers` lists. Raises `BadInput` if it is no ascending list."""
    parts = [part.strip() for part in text.split(",")]
    layers = [int(part) for part in parts if part.isdecimal() and len(part) < 6]
    if len(layers) < len(parts) or layers != sorted(set(layers)):
        raise BadInput(
            f"init_layers={text!r} must be {EVERY_SECOND}, or layers from 0 in ascending order"
            " like 0,2,5"
        )
    return layers


def _check_shrink(config: Config) -> None:
    weights = config.shrink.weights
    if weights != "float" and not config.lora.rank:
        raise BadInput(
            f"shrink.weights={weights!r}: such weights are not trained, only LoRA's additions to"
            " them (lora.rank); `python -m jaxgpt.shrink` makes them of a trained model"
        )
    if (fake := config.compute.fake_quantise) != "none" and (
        weights != "float" or config.lora.rank
    ):
        field = "lora.rank" if config.lora.rank else "shrink.weights"
        raise BadInput(
            f"compute.fake_quantise={fake!r} with {field}={get_field(config, field)!r}: it rounds"
            " weights that are floats and all trained; leave one of them out"
        )
    for field, value in (
        ("lora.dora", config.lora.dora),
        ("optim.ema_decay", config.optim.ema_decay),
    ):
        if weights != "float" and value:
            raise BadInput(f"{field}={value}: not with {weights} weights; leave it out")


def parse_track(track: str) -> list[str]:
    """Returns the names in `track`. Raises `BadInput` if one is no tracker."""
    names = [name.strip() for name in track.split(",") if name.strip()]
    if unknown := sorted(set(names) - set(TRACKERS)):
        raise BadInput(f"track={track!r}: {unknown[0]!r} is none of {', '.join(TRACKERS)}")
    return list(dict.fromkeys(names))


def parse_ranks(text: str) -> dict[str, int]:
    """Returns {projection: rank} of `shrink.ranks`, "query=64,up=96". Raises `BadInput` where that
    is something else."""
    parts = [part for part in text.split(",") if part]
    for part in parts:
        if not re.fullmatch(f"({'|'.join(LORA_TARGETS)})=[1-9][0-9]{{0,6}}", part):
            raise BadInput(f"shrink.ranks: {part!r} is not PROJECTION=RANK, for example up=96")
    return {name: int(rank) for name, _, rank in (part.partition("=") for part in parts)}


def _check_pruning(config: Config) -> None:
    shrink = config.shrink
    if config.lora.rank and (shrink.zeros == "keep" or shrink.sparsity):
        name = "sparsity" if shrink.sparsity else "zeros='keep'"
        raise BadInput(
            f"shrink.{name} with lora.rank={config.lora.rank}: LoRA's additions would fill the"
            " zeros; set lora.rank=0 or shrink.zeros=free"
        )
    if parse_ranks(shrink.ranks) and config.lora.rank:
        raise BadInput(
            f"shrink.ranks={shrink.ranks!r} with lora.rank={config.lora.rank}: the factors are"
            " small and trained themselves; set lora.rank=0"
        )
    if not shrink.sparsity:
        return
    last = shrink.prune_to or round(PRUNED_AT * config.num_steps)
    if not config.num_epochs and not shrink.prune_from < last <= config.num_steps:
        raise BadInput(
            f"shrink.prune_to={last} must lie after shrink.prune_from={shrink.prune_from} and not"
            f" after num_steps={config.num_steps}"
        )
    if config.optim.ema_decay:
        raise BadInput(
            f"shrink.sparsity={shrink.sparsity} with optim.ema_decay={config.optim.ema_decay}: the"
            " average of a weight that is pruned does not become 0; set optim.ema_decay=0"
        )


def parse_patterns(text: str, field: str) -> list[re.Pattern]:
    """Returns comma-separated path patterns. Raises `BadInput`, naming the field and the part that
    is not a pattern."""
    try:
        return [re.compile(part.strip()) for part in text.split(",") if part.strip()]
    except re.error as e:
        raise BadInput(f"{field}={text!r} is not a list of patterns: {e}") from e


def changed(config: Config, values: dict[str, Any]) -> Config:
    """Returns a copy of `config` with the fields at these paths set, checked by `validate`."""
    config = copy.deepcopy(config)
    for path, value in values.items():
        set_field(config, path, value)
    return validate(config)
