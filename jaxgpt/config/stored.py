"""`config.json`, written and read, and which fields of it a resumed run may change."""

import dataclasses
import json

from etils import epath

from jaxgpt.config.migrate import FORMAT, NewerFormat, format_of, migrated
from jaxgpt.config.schema import Config, fields_of, get_field, leaves_of, set_field
from jaxgpt.config.validate import check_fields, check_model, check_types
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import Damaged, read_json
from jaxgpt.system.stores import check_store

REMEDY = "restore it from a copy, or choose another --workdir"


def to_json(config: Config) -> str:
    """Returns the whole config as JSON text."""
    return json.dumps(as_stored(config), indent=2) + "\n"


def as_stored(config: Config) -> dict:
    """Returns the whole config as JSON's values, with the number of their format."""
    return {"format": FORMAT} | dataclasses.asdict(config)


def methods_done(config: Config) -> str:
    """Returns what made a run's model smaller, in order: what did so to the model that it started
    from (`shrink.done`), then `distill`, or `prune:S`, where its own training did."""
    own = ["distill"] if config.objective == "distill" else []
    own += [f"prune:{config.shrink.sparsity:g}"] if config.shrink.sparsity else []
    return " ".join(filter(None, [config.shrink.done, *own]))


def read_config(workdir: epath.Path) -> Config:
    """Returns the config a workdir was trained with, its derived sizes filled in. Raises `BadInput`
    if `workdir` holds no run, or a config.json that is damaged, describes none, or is of a newer
    version."""
    check_store(workdir)
    file = workdir / "config.json"
    if not file.exists():
        raise BadInput(f"{workdir} holds no run: config.json is missing; train one first")
    nested = read_json(file, dict, REMEDY)
    try:
        config = from_stored(nested)
        check_fields(config)
        config.model = check_model(config)
    except NewerFormat as e:
        raise BadInput(f"{file}: {e}") from e
    except BadInput as e:
        raise Damaged(file, str(e), REMEDY) from e
    return config


def from_stored(nested: dict) -> Config:
    """Returns the config of what `as_stored` gives, or gave in an earlier version. Raises
    `BadInput` if a field is unknown or ill-typed, or the format is none."""
    config, (number, fields) = Config(), format_of(nested)
    known = fields_of(config)
    for path, value in migrated(_flatten(fields, known), number):
        if path not in known:
            raise BadInput(f"unknown field {path}; was it written by another version?")
        is_whole = known[path] is float and type(value) is int and abs(value) < 2**53
        set_field(config, path, float(value) if is_whole else value)
    check_types(config)
    return config


def check_resume(old: Config, new: Config, workdir) -> list[str]:
    """Returns `field: old -> new` for every allowed change. Raises `BadInput`, naming every field
    that differs and may not."""
    changes = {
        path: f"{path}: {get_field(old, path)} -> {get_field(new, path)}"
        for path in fields_of(new)
        if get_field(old, path) != get_field(new, path)
    }
    may_change = {p for p, field in leaves_of().items() if field.metadata.get("may_change")}
    if refused := [text for path, text in changes.items() if path not in may_change]:
        raise BadInput(
            f"{workdir} holds a run with another config ({'; '.join(refused)});"
            " choose another --workdir or restore these fields"
        )
    return list(changes.values())


def _flatten(nested: dict, known: dict, prefix: str = ""):
    for name, value in nested.items():
        if isinstance(value, dict) and any(path.startswith(f"{prefix}{name}.") for path in known):
            yield from _flatten(value, known, f"{prefix}{name}.")
        else:
            yield prefix + name, value
