"""Which layers of a model are mixtures of experts, and checks of mixtures across fields."""

from jaxgpt.config.schema import Config, ModelConfig
from jaxgpt.system.errors import BadInput

ATTENTION_TARGETS = {"query", "key", "value", "out"}
OF_MIXTURES = ("mlp/router/", "mlp/experts/", "mlp/shared/")  # the paths of a layer's arrays


def layers_with(path: str, model: ModelConfig) -> tuple[int, ...]:
    """Returns the layers that have the array at `path` below `blocks`: the rows of its stack."""
    every, mixtures = tuple(range(model.num_layers)), model.mixture_layers
    if not path.startswith("mlp/") or not mixtures:
        return every
    if path.startswith(OF_MIXTURES):
        return tuple(mixtures)
    return tuple(i for i in every if i not in mixtures)


def check_experts(config: Config, model: ModelConfig) -> None:
    """Raises `BadInput` where `model.num_experts` does not fit the rest of the run."""
    experts, chosen = model.num_experts, model.experts_per_token
    every, dense, layers = model.expert_every, model.first_dense_layers, model.num_layers
    if not experts:
        if (every, dense) != (1, 0):
            raise BadInput(
                f"model.expert_every={every} and model.first_dense_layers={dense} need a mixture"
                " (model.num_experts)"
            )
        return
    if dense >= layers or (layers - dense) % every:
        raise BadInput(
            f"model.expert_every={every} must divide the {layers - dense} layers that"
            f" model.num_layers={layers} has after model.first_dense_layers={dense}"
        )
    if chosen > experts:
        raise BadInput(
            f"model.experts_per_token={chosen} is more than model.num_experts={experts}; a token"
            " goes to each expert at most once"
        )
    if model.kind == "encoder_decoder":
        raise BadInput(
            f"model.num_experts={experts} with model.kind=encoder_decoder: mixtures are decoders or"
            " encoders"
        )
    shrink, fake = config.shrink, config.compute.fake_quantise
    if shrink.weights != "float" or shrink.sparsity or shrink.ranks or fake != "none":
        raise BadInput(
            f"model.num_experts={experts}: experts are not quantised, pruned or factorised; leave"
            " out compute.fake_quantise, shrink.weights, shrink.sparsity and shrink.ranks"
        )
    others = set(config.lora.targets.split(",")) - ATTENTION_TARGETS
    if config.lora.rank and others:
        raise BadInput(
            f"lora.targets={config.lora.targets!r} with model.num_experts={experts}: experts have"
            f" no additions; choose from {', '.join(sorted(ATTENTION_TARGETS))}"
        )


def check_expert_axis(config: Config, mesh: dict[str, int]) -> None:
    """Raises `BadInput` where `mesh.expert` has no experts to split, or does not divide them, or
    `mesh.tensor` an expert, or `mesh.context` the sequences of which full experts drop tokens."""
    model = config.model
    if mesh["expert"] > 1 and not model.num_experts:
        raise BadInput(
            f"mesh.expert={mesh['expert']} needs a mixture (model.num_experts); a dense model is"
            " split by mesh.fsdp"
        )
    if mesh["context"] > 1 and model.num_experts and model.expert_capacity:
        raise BadInput(
            f"mesh.context={mesh['context']} with model.expert_capacity={model.expert_capacity}:"
            " what an expert has room for is counted along whole sequences; set the capacity to 0,"
            " which drops no token"
        )
    for axis, name, size in (
        ("expert", "model.num_experts", model.num_experts),
        ("tensor", "model.expert_dim", model.expert_dim if model.num_experts else 0),
    ):
        if size % mesh[axis]:
            raise BadInput(
                f"{name} = {size} cannot be divided over mesh.{axis}={mesh[axis]} devices"
            )


def check_matmul(config: Config) -> None:
    """Raises `BadInput` where `compute.matmul` does not fit the rest of the run."""
    compute, experts = config.compute, config.model.num_experts
    if compute.matmul == "plain":
        return
    for field, value, is_wrong, why in (
        (
            "compute.dtype",
            compute.dtype,
            compute.dtype == "float16",
            "its loss scale and the scales of 8 bits would work against each other; set bfloat16",
        ),
        (
            "compute.fake_quantise",
            compute.fake_quantise,
            compute.fake_quantise != "none",
            "weights would be rounded twice; leave one of them out",
        ),
        (
            "shrink.weights",
            config.shrink.weights,
            config.shrink.weights != "float",
            "weights in few bits are multiplied as floats; set compute.matmul=plain",
        ),
        (
            "model.num_experts",
            experts,
            experts,
            "experts' grouped products have no 8 bits; set compute.matmul=plain",
        ),
    ):
        if is_wrong:
            raise BadInput(f"compute.matmul={compute.matmul!r} with {field}={value!r}: {why}")
