"""What a family of model folders is: their config fields and tensors, and ours."""

import dataclasses
import math
from collections.abc import Callable, Container

import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.system.errors import BadInput

TABLES = ("positions/kernel", "relative/kernel")  # of rows that are looked up


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of theirs and the parameters of ours that it contains.

    `theirs` may contain {layer}, and {expert} too. Several of ours are concatenated along the
    output axis.
    `transposed`: theirs is [out, in] where ours is [in, out]. `skipped`: so many rows of theirs,
    which nothing looks up, come before ours. `is_row`: theirs has an axis of 1 in front. It is no
    tensor of a model that has the parameter `unless`, or lacks `needs`.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    skipped: int = 0
    is_row: bool = False
    unless: str = ""
    needs: str = ""

    def to_theirs(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Returns their tensor, made of our arrays (of one layer, of one expert)."""
        matrices = [a.reshape(_matrix_shape(p, a.shape)) for p, a in zip(self.ours, arrays)]
        joined = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=-1)
        if self.skipped:
            joined = np.pad(joined, ((self.skipped, 0), (0, 0)))
        joined = joined[None] if self.is_row else joined
        return joined.T if self.transposed else joined

    def shape(self, shapes: list[tuple]) -> tuple:
        """Returns their tensor's shape, from our shapes (of one layer)."""
        matrices = [_matrix_shape(path, shape) for path, shape in zip(self.ours, shapes)]
        joined = (*matrices[0][:-1], sum(shape[-1] for shape in matrices))
        if self.skipped:
            joined = (joined[0] + self.skipped, *joined[1:])
        joined = (1, *joined) if self.is_row else joined
        return joined[::-1] if self.transposed else joined

    def to_ours(self, tensor: np.ndarray, shapes: list[tuple]) -> list[np.ndarray]:
        """Returns our arrays, in `shapes`, from their tensor; the inverse of `to_theirs`."""
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor[0] if self.is_row else tensor[self.skipped :]
        widths = [_matrix_shape(path, shape)[-1] for path, shape in zip(self.ours, shapes)]
        matrices = np.split(tensor, np.cumsum(widths)[:-1], axis=-1)
        return [matrix.reshape(shape) for matrix, shape in zip(matrices, shapes)]


def _matrix_shape(path: str, shape: tuple) -> tuple:
    """Returns a kernel's shape as [in, out], a bias's or scale's as [out], a table's unchanged."""
    if path in ("tokens", "head", "types") or path.endswith(TABLES):
        return shape
    if not path.endswith("/kernel"):
        return (math.prod(shape),)
    inputs = 2 if path.endswith("out/kernel") else 1
    return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of Hugging Face's that jaxgpt can also express.

    `exact` lists the values our fields must have for the two to compute the same, `same` the pairs
    of fields that must be equal; `model_config` and `hf_config` translate the other fields,
    `schema` describes what `model_config` reads (see `system.files.parse_json`), and `adapted`
    changes a config by which tensors there are. Their tensors' names may start with `prefix`, but
    not those that start with one of `outside`.

    Of tensors whose names end with one of `ignored` a model has no need; tensors whose names start
    with one of `skipped` are parts that jaxgpt has no place for, and the user is told. `renamed`
    has ends of names in older files, and `copies` the names under which a tensor may be stored
    instead of its own or again.
    """

    name: str
    architecture: str
    exact: dict[str, tuple]
    rules: tuple[Rule, ...]
    model_config: Callable[[dict], ModelConfig]
    hf_config: Callable[[ModelConfig], dict]
    schema: dict
    prefix: str
    ignored: tuple[str, ...]
    adapted: Callable[[ModelConfig, Container[str]], ModelConfig] = lambda cfg, _: cfg
    same: tuple[tuple[str, str], ...] = ()
    outside: tuple[str, ...] = ("lm_head.",)
    skipped: tuple[str, ...] = ()
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    pad: int | None = None  # the id of padding, where a model's positions depend on it
    equal_heads: bool = False  # no key heads apart, and all heads together as wide as the embedding

    def differences(self, cfg: ModelConfig) -> list[str]:
        """Returns what keeps `cfg` from being of this family: `model.norm='rmsnorm'`, ..."""
        different = [
            f"model.{field}={getattr(cfg, field)!r}"
            for field, allowed in self.exact.items()
            if getattr(cfg, field) not in allowed
        ]
        different += [
            f"model.{one}={getattr(cfg, one)!r} with model.{other}={getattr(cfg, other)!r}"
            for one, other in self.same
            if getattr(cfg, one) != getattr(cfg, other)
        ]
        heads, width = (cfg.num_heads, cfg.num_kv_heads), cfg.num_heads * cfg.head_dim
        if self.equal_heads and (heads[0] != heads[1] or width != cfg.embed_dim):
            different.append(
                f"model.num_heads={heads[0]}, num_kv_heads={heads[1]} of head_dim={cfg.head_dim}"
                f" in embed_dim={cfg.embed_dim}"
            )
        return different

    def rules_of(self, paths) -> list[Rule]:
        """Returns the rules for a model with these parameters: biases and a head are optional.
        Raises `BadInput` if this family has no tensor for a parameter."""
        rules = [
            rule
            for rule in self.rules
            if {*rule.ours, *filter(None, [rule.needs])} <= set(paths) and rule.unless not in paths
        ]
        if missing := set(paths) - {path for rule in rules for path in rule.ours}:
            raise BadInput(f"{self.name} has no tensor for {', '.join(sorted(missing))}")
        return rules

    def own_name(self, stored: str) -> str:
        """Returns the name of a tensor that a file stores as `stored`."""
        name = stored.removeprefix(self.prefix)
        old = next((old for old in self.renamed if name.endswith(old)), "")
        return name.removesuffix(old) + self.renamed[old] if old else name

    def stored_name(self, name: str) -> str:
        """Returns the name under which files store a tensor."""
        return name if name.startswith(self.outside) else self.prefix + name

    @property
    def heads(self) -> set[str]:
        """The names of an output embedding, which a folder may hold though it is the input's."""
        return {rule.theirs for rule in self.rules if rule.ours == ("head",)}


def rules_from(tensors: dict[str, str], transposed: bool) -> tuple[Rule, ...]:
    """Returns the rules of a table from their names to ours; `transposed`: kernels [out, in]."""
    return tuple(
        Rule(
            theirs,
            tuple(ours.split()),
            transposed and ours.endswith("/kernel") and not ours.endswith(TABLES),
        )
        for theirs, ours in tensors.items()
    )


def parts(names: dict[str, str], weight: str, bias: str = "bias") -> dict[str, str]:
    """Returns a table of their weights and biases to ours, from modules to modules; `weight` is
    what ours is called."""
    return {
        f"{theirs}.{one}": f"{ours}/{other}"
        for theirs, ours in names.items()
        for one, other in (("weight", weight), ("bias", bias))
    }


def schema_of(fields: dict[str, str]) -> dict:
    """Returns the types of their config's fields, which are those of ours; null: not given."""
    kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    return {f"{theirs}?": kinds[ours] | None for theirs, ours in fields.items()}


# Of all families, but for what one says otherwise
COMMON = dict(
    kind=("decoder",),
    norm_position=("pre",),
    window=(0,),
    logit_softcap=(0.0,),
    mup_base_width=(0,),
)
COMMON |= dict(scale_embeddings=(False,), scale_attention=(True,), scale_logits=(False,))
COMMON |= dict(type_vocab_size=(0,), embedding_norm=(False,))
COMMON |= dict(head_transform=(False,), head_bias=(False,), attention_pattern=("full",))
COMMON |= dict(num_experts=(0,))


def require(hf: dict, fixed: dict) -> None:
    """Raises `BadInput` if a field of their config has another value than the one in `fixed`."""
    for key, value in fixed.items():
        if key in hf and hf[key] != value:
            raise BadInput(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")


def activation_of(hf: dict, field: str, default: str, known: dict[str, str]) -> str:
    """Returns our name of the activation that `field` of their config names. Raises `BadInput` if
    it is not one of `known`."""
    name = hf.get(field, default)
    if name not in known:
        raise BadInput(f"config.json: {field}={name!r} is not supported")
    return known[name]
