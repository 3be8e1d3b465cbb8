"""Configs from the command line and from `config.json`, and the resume rules between them."""

import copy
import dataclasses
import json
import re
import runpy
import signal
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import config_flags

from jaxgpt.config.errors import BadInput, described
from jaxgpt.config.files import Damaged, parse_json, read_json
from jaxgpt.config.schema import Config, MeshConfig, fields_of, get_field, set_field
from jaxgpt.config.stores import check_store
from jaxgpt.config.validate import check_fields, check_known, check_model, check_types, validate

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
REMEDY = "restore it from a copy, or choose another --workdir"


def define_config_flag(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines `--config=FILE` and its `--config.a.b=value` overrides on `values`.

    Raises:
      BadInput: if an override names no field; the message suggests the nearest.
    """
    known = fields_of(Config())
    for arg in argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            check_known(match[1], known, "--config.")
    try:
        config_flags.DEFINE_config_dataclass(
            "config",
            Config(),
            "config file, for example configs/tiny.py; --config.FIELD=VALUE sets any field",
            flag_values=values,
            sys_argv=argv,
            parse_fn=load_file,
        )
    except (flags.Error, ValueError) as e:  # --flagfile is read here
        raise BadInput(described(e)) from e


def config_of(values: flags.FlagValues) -> Config:
    """Returns the parsed, overridden, checked config, its derived sizes filled in.

    Raises:
      BadInput: if `--config` was not given, or see `validate`.
    """
    config = given_config(values)
    config.model = config.model.with_sizes()
    return config


def given_config(values: flags.FlagValues) -> Config:
    """Returns the parsed, overridden, checked config as it was given: a size that is to be derived
    is still 0."""
    if values["config"].using_default_value:
        raise BadInput("--config=FILE is required, for example --config=configs/tiny.py")
    return checked(copy.deepcopy(values.config))


def checked(config: Config) -> Config:
    """Returns `config` itself, with integers in float fields turned into floats.

    Raises:
      BadInput: see `validate`.
    """
    check_fields(config)
    for path, kind in fields_of(config).items():
        if kind is float:
            set_field(config, path, float(get_field(config, path)))
    validate(config)
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
    except (Exception, SystemExit) as e:  # the user's program: whatever it raises is bad input
        if isinstance(e, SystemExit) and e.code == 128 + signal.SIGTERM:
            raise  # somebody stopped us
        raise BadInput(f"config file {path}: get_config() failed: {described(e)}") from e
    if not isinstance(config, Config):
        raise BadInput(
            f"config file {path}: get_config() must return a jaxgpt.config.Config,"
            f" not {type(config).__name__}"
        )
    return config


def wrong_value(message: str) -> str:
    """Turns absl's words for an ill-typed `--config.` value into the contract's line."""
    match = re.match(r"flag --(config\.[\w.]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message
    path, value = match[1], match[2][:100]
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
        return _from_nested(parse_json(text.encode(errors="surrogatepass"), dict))
    except (ValueError, BadInput) as e:
        raise BadInput(f"{where}: {e}") from e


def read_config(workdir: epath.Path) -> Config:
    """Returns the config a workdir was trained with.

    Raises:
      BadInput: if `workdir` holds no run, or a config.json that is damaged or describes none.
    """
    check_store(workdir)
    file = workdir / "config.json"
    if not file.exists():
        raise BadInput(f"{workdir} holds no run: config.json is missing; train one first")
    nested = read_json(file, dict, REMEDY)
    try:
        config = _from_nested(nested)
        check_fields(config)
        check_model(config)
    except BadInput as e:
        raise Damaged(file, str(e), REMEDY) from e
    return config


def _from_nested(nested: dict) -> Config:
    """Returns the config of `dataclasses.asdict`'s nested fields.

    Raises:
      BadInput: if a field is unknown or ill-typed.
    """
    config = Config()
    known = fields_of(config)
    for path, value in _flatten(nested, known):
        if path not in known:
            raise BadInput(f"unknown field {path}; was it written by another version?")
        is_whole = known[path] is float and type(value) is int and abs(value) < 2**53
        set_field(config, path, float(value) if is_whole else value)
    check_types(config)
    return config


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


def _flatten(nested: dict, known: dict, prefix: str = ""):
    for name, value in nested.items():
        if isinstance(value, dict) and any(path.startswith(f"{prefix}{name}.") for path in known):
            yield from _flatten(value, known, f"{prefix}{name}.")
        else:
            yield prefix + name, value
