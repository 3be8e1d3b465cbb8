"""Configs from the command line and from `config.json`, and the resume rules between them."""

import copy
import dataclasses
import difflib
import json
import re
import runpy
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import config_flags

from jaxgpt.config.errors import BadInput
from jaxgpt.config.schema import Config, MeshConfig, fields_of, get_field, set_field
from jaxgpt.config.stores import check_store
from jaxgpt.config.validate import check_types, validate

# What a rerun may change (the contract's resume rules).
MAY_CHANGE = {
    "num_steps",
    "num_epochs",
    "early_stop",
    "log_every",
    "eval_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "max_bad_steps",
    "max_rollbacks",
    "grad_accum",
    "model.attention",
    "model.remat",
    "model.scan_layers",
    *(f"mesh.{field}" for field in fields_of(MeshConfig())),
}


def define_config_flag(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines `--config=FILE` and its `--config.a.b=value` overrides on `values`.

    Raises:
      BadInput: if an override names no field; the message suggests the nearest.
    """
    known = fields_of(Config())
    for arg in argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            check_known(match[1], known, "--config.")
    config_flags.DEFINE_config_dataclass(
        "config",
        Config(),
        "config file, for example configs/tiny.py; any field can be set with --config.FIELD=VALUE",
        flag_values=values,
        sys_argv=argv,
        parse_fn=load_file,
    )


def config_of(values: flags.FlagValues) -> Config:
    """Returns the parsed, overridden, checked config.

    Raises:
      BadInput: if `--config` was not given, or see `validate`.
    """
    if values["config"].using_default_value:
        raise BadInput("--config=FILE is required, for example --config=configs/tiny.py")
    config = copy.deepcopy(values.config)
    for path, kind in fields_of(config).items():
        if kind is float and type(value := get_field(config, path)) is int:
            set_field(config, path, float(value))
    validate(config)
    config.model = config.model.with_sizes()
    return config


def config_path(argv: list[str]) -> str:
    """Returns the last `--config`'s file as given."""
    found = ""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            found = value if equals else following
    return found


def load_file(path: str) -> Config:
    """Returns `get_config()` of a Python file.

    Raises:
      BadInput: if there is no such file or function, it fails, or it returns something else.
    """
    if not Path(path).is_file():
        raise BadInput(f"config file {path} does not exist; see configs/ for examples")
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as e:  # the file is the user's program: whatever it raises is bad input
        raise BadInput(f"config file {path}: get_config() failed: {type(e).__name__}: {e}") from e
    if not isinstance(config, Config):
        raise BadInput(
            f"config file {path}: get_config() must return a jaxgpt.config.Config,"
            f" not {type(config).__name__}"
        )
    return config


def check_known(path: str, known: dict, prefix: str = "") -> None:
    """Raises `BadInput`, suggesting the nearest, if `path` is not in `known`."""
    if path in known:
        return
    inside = [name for name in known if name.startswith(path + ".")]
    close = inside or [name for name in known if name.split(".")[-1] == path.split(".")[-1]]
    close = close or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    hint = f"; did you mean {prefix}{close[0]}?" if close else ""
    raise BadInput(f"unknown config field {prefix}{path}{hint}")


def wrong_value(message: str) -> str:
    """Turns absl's words for an ill-typed `--config.` value into the contract's line."""
    match = re.match(r"flag --(config\.[\w.]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message
    path, value = match[1], match[2]
    kind = fields_of(Config()).get(path.removeprefix("config."), str).__name__
    return f"--{path}={value} is not a valid value: expected {kind}"


def to_json(config: Config) -> str:
    """Returns the whole config as JSON text; `from_json` reads it back unchanged."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """Reads what `to_json` wrote.

    Raises:
      BadInput: if it is not JSON, or a field is unknown or ill-typed.
    """
    try:
        nested = json.loads(text)
    except json.JSONDecodeError as e:
        raise BadInput(f"{where} is not valid JSON: {e}") from e
    config = Config()
    known = fields_of(config)
    for path, value in _flatten(nested):
        if path not in known:
            raise BadInput(f"{where}: unknown field {path}; was it written by another version?")
        set_field(config, path, float(value) if known[path] is float else value)
    check_types(config)
    return config


def read_config(workdir: epath.Path) -> Config:
    """Returns the config a workdir was trained with.

    Raises:
      BadInput: if `workdir` holds no run.
    """
    check_store(workdir)
    file = workdir / "config.json"
    if not file.exists():
        raise BadInput(f"{workdir} holds no run: config.json is missing; train one first")
    return from_json(file.read_text(), str(file))


def check_resume(old: Config, new: Config, workdir) -> list[str]:
    """Returns `field: old -> new` for every allowed change.

    Raises:
      BadInput: naming every field that differs and may not.
    """
    changes = {
        path: f"{path}: {get_field(old, path)} -> {get_field(new, path)}"
        for path in fields_of(new)
        if get_field(old, path) != get_field(new, path)
    }
    if refused := [text for path, text in changes.items() if path not in MAY_CHANGE]:
        raise BadInput(
            f"{workdir} holds a run with another config ({'; '.join(refused)});"
            " choose another --workdir or restore these fields"
        )
    return list(changes.values())


def _flatten(nested: dict, prefix: str = ""):
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
