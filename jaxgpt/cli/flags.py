"""A command's flags, `--config=FILE` and `--config.FIELD=VALUE` among them."""

import copy
import re
import runpy
import signal
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import config_flags

from jaxgpt.config.migrate import renamed_in
from jaxgpt.config.schema import Config, fields_of, get_field, left_open
from jaxgpt.config.validate import any_of, check_known, named, validate
from jaxgpt.hub.names import FIELDS, names_in
from jaxgpt.system.encoding import check_setting
from jaxgpt.system.errors import BadInput, described, did_you_mean


def parse(values: flags.FlagValues, argv: list[str], doc: str) -> flags.FlagValues:
    """Parses `argv` into `values`; prints the help and exits 0 on `--help`. Raises `BadInput` for
    an unknown flag, an ill-typed value, a stray positional argument, or bytes that are not UTF-8.
    """
    for arg in argv[1:]:
        check_setting(arg, f"the argument {arg[:100]}")
    if any(arg in ("-h", "-help", "--help") for arg in argv[1:]):
        print(f"{doc.strip()}\n\nflags:\n{_help(values)}")
        raise SystemExit(0)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as e:
        if "config" in values:  # a field without its prefix?
            if fields := named(e.flagname, fields_of(Config())):
                raise BadInput(
                    f"unknown flag --{e.flagname}; did you mean {any_of(fields, '--config.')}?"
                ) from e
        raise BadInput(str(e)) from e
    except (flags.Error, ValueError) as e:  # ValueError: `--noflag=value`, a flagfile of no text
        raise BadInput(wrong_value(str(e))) from e
    if len(rest) > 1:
        raise BadInput(f"unexpected argument {rest[1]!r}: values are given as --flag=value")
    return values


def parse_action(
    values: flags.FlagValues, argv: list[str], actions: tuple[str, ...], doc: str
) -> str:
    """Returns the first argument, one of `actions`, and parses the rest (see `parse`)."""
    action = argv[1] if len(argv) > 1 else ""
    if action in actions:
        argv = [argv[0], *argv[2:]]
    elif not any(arg.endswith(("-h", "-help")) for arg in argv):
        raise BadInput(f"say what to do: {' or '.join(actions)}, then the flags; see --help")
    parse(values, argv, doc)
    return action


def _help(values: flags.FlagValues) -> str:
    lines = []
    for name in sorted(values):
        flag = values[name]
        plain = flag.default in (None, "") or name == "config"
        default = "" if plain else f" (default: {flag.default})"
        lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def define_config_flag(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines `--config=FILE` and its `--config.a.b=value` overrides on `values`. Raises `BadInput`
    if an override names no field; the message suggests the nearest."""
    known = fields_of(Config())
    for arg in argv[1:]:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            check_known(match[1], known, "--config.")
    try:
        config_flags.DEFINE_config_dataclass(
            "config",
            Config(),
            f"a file, or one of {', '.join(named_configs())}; --config.FIELD=VALUE sets any field",
            flag_values=values,
            sys_argv=argv,
            parse_fn=load_file,
        )
    except (flags.Error, ValueError) as e:  # --flagfile is read here
        raise BadInput(described(e)) from e


def config_of(values: flags.FlagValues, workdir: epath.Path | None = None) -> Config:
    """Returns the parsed, overridden, checked config, its derived sizes filled in, and what it
    leaves open as `init_from` has it. Raises `BadInput` if `--config` was not given, or see
    `validate`, `pin` and `completed`."""
    config = given_config(values, workdir)
    if left_open(config) or getattr(config, "init_from", ""):
        from jaxgpt.interchange.init_from import completed  # its libraries take 0.2 s to import

        return completed(config)
    return validate(config)


def given_config(values: flags.FlagValues, workdir: epath.Path | None = None) -> Config:
    """Returns the parsed, overridden config as it was given: a size that is to be derived is still
    0, and what is left to `init_from` None. Names of the hub get their commit, that of the run in
    `workdir` if there is one. Raises `BadInput` if `--config` was not given; see also `validate`
    and `pin`."""
    if values["config"].using_default_value:
        raise BadInput("--config=FILE is required, for example --config=tiny")
    if not left_open(values.config):
        validate(values.config)
    config = copy.deepcopy(values.config)
    if any(names_in(field, get_field(config, field)) for field in FIELDS):
        from jaxgpt.cli.pins import pin  # its libraries take 0.5 s to import

        pin(config, workdir)
    return config


def config_path(argv: list[str]) -> str:
    """Returns the last `--config`'s file as given."""
    path = ""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            path = value if equals else following
    return path


def named_configs() -> dict[str, Path]:
    """Returns the configs that come with jaxgpt, `{"tiny": .../configs/tiny.py, ...}`."""
    package = Path(__file__).parent.parent  # a wheel holds configs/ inside it, a checkout beside it
    folders = (package / "configs", package.parent / "configs")
    folder = next(filter(Path.is_dir, folders), package)
    return {file.stem: file for file in sorted(folder.glob("[!_]*.py"))}


def load_file(path: str) -> Config:
    """Returns `get_config()` of a Python file, or of the config of that name (`tiny`). Raises
    `BadInput` if there is no such file or function, it fails, or it returns something else."""
    if not Path(path).is_file():
        known = named_configs()
        if path not in known:
            near = did_you_mean(Path(path).stem, known) or f"; by name there are {', '.join(known)}"
            raise BadInput(f"config file {path} does not exist{near}")
        path = str(known[path])
    try:
        config = runpy.run_path(path)["get_config"]()
    except (Exception, SystemExit) as e:  # the user's program: whatever it raises is bad input
        if isinstance(e, SystemExit) and e.code == 128 + signal.SIGTERM:
            raise  # somebody stopped us
        why = described(e) + renamed_in(described(e))
        raise BadInput(f"config file {path}: get_config() failed: {why}") from e
    if not isinstance(config, Config):
        raise BadInput(
            f"config file {path}: get_config() must return a jaxgpt.config.Config,"
            f" not {type(config).__name__}"
        )
    return config


def wrong_value(message: str) -> str:
    """Turns absl's words for an ill-typed `--config.` value into our message."""
    match = re.match(r"flag --(config\.[\w.]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message
    path, value = match[1], match[2][:100]
    kind = fields_of(Config()).get(path.removeprefix("config."), str).__name__
    return f"--{path}={value} is not a valid value: expected {kind}"
