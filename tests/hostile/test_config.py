"""Hostile configs: flags, config files and config.json, by table and by fuzzing."""

import json

import hypothesis
import pytest
from absl import flags
from etils import epath
from hypothesis import strategies as st

from jaxgpt.cli.flags import config_of, define_config_flag, parse
from jaxgpt.config import Config
from jaxgpt.config.schema import fields_of, get_field, leaves_of, set_field
from jaxgpt.config.stored import from_stored, read_config, to_json
from jaxgpt.config.validate import validate
from jaxgpt.system.errors import BadInput
from tests.hostile.conftest import FUZZ, Case, mutated, name_of, refused

FILE = "from jaxgpt.config import *\ndef get_config():\n    c = Config()\n    {}\n    return c\n"


def main(argv: list[str]) -> None:
    """Every command's way to its config, without what the command then does with it."""
    values = flags.FlagValues()
    define_config_flag(values, argv)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("show", None, "a number", flag_values=values)
    config_of(parse(values, argv, "doc"))


NO_TEXT = ["\0", "\udcff", "a\ud800b", "\udc80" * 300]
WRONG = {
    int: ["", " ", "x", "nan", "inf", "1.5", "1e30", "true", "é", "--", "1,2", "\udcff"]
    + ["9" * 5000, "-" + "9" * 5000, str(2**63), str(-(2**63))],
    float: ["", "x", "nan", "inf", "-inf", "-NaN", "1e39", "-1e39", "1e400", "true", "9" * 5000]
    + ["0x1p3", "1,5", "é", "\udcff"],
    bool: ["", " ", "2", "nan", "perhaps", "None", "[]", "é", *NO_TEXT],
    str: NO_TEXT,
}
NO_CHOICE = ["nonsense", " ", "None", "1e30", "auto,xla", "é", "x" * 5000]


def wrong_values(path: str) -> list[Case]:
    """A field with every value that it cannot have."""
    field = leaves_of()[path]
    wrong = WRONG[field.type] + (NO_CHOICE if "choices" in field.metadata else [])
    return [
        Case(f"{path}={value[:20]!a}", ["--config=c.py", f"--config.{path}={value}"], exits=(2,))
        for value in wrong
    ]


# Beyond what a machine can hold or count: they hung, or ended in a traceback, one by one.
BEYOND = """
num_steps=2147483648 num_steps=100000000000000000000 num_epochs=1e7 seed=-1 seed=4294967296
seed=18446744073709551616 batch_size=0 batch_size=-8 batch_size=2147483648 grad_accum=0
grad_accum=3 log_every=0 log_every=-1 eval_every=-1 eval_batches=-1 sample_every=-1
checkpoint_every=-1 keep_checkpoints=0 keep_every=-1 max_bad_steps=0 max_rollbacks=-1
early_stop=-1 num_epochs=-1 model.vocab_size=1000000000000000 model.vocab_size=-1
model.num_layers=1000000000000 model.num_layers=0 model.head_dim=1099511627776 model.head_dim=-1
model.num_heads=0 model.num_heads=7 model.num_heads=100000 model.num_kv_heads=5
model.num_kv_heads=-1 model.embed_dim=0 model.embed_dim=1000000000 model.embed_dim=1000003
model.mlp_dim=1000000000 model.mlp_dim=-1 model.max_seq_len=0 model.max_seq_len=1000000000
model.window=1000000000000000000000000000000 model.window=-1 model.full_attention_every=5
model.dropout=1 model.dropout=-0.1 model.norm_eps=0 model.rope_theta=1 model.rope_factor=0.5
model.rope_original_len=0 model.rope_scaling=llama3 model.logit_softcap=-1 lora.rank=-1
lora.rank=1000000 lora.alpha=0 model.mup_base_width=-1 model.mup_base_width=10000000
optim.warmup_steps=-1 optim.warmup_steps=1000000000000 optim.learning_rate=0
optim.learning_rate=-1 optim.b1=1 optim.b2=1.5 optim.eps=0 optim.eps=1 optim.weight_decay=-1
optim.clip_norm=-1 optim.z_loss=-1 optim.ema_decay=1 optim.final_lr_ratio=-1
optim.decay_fraction=0 optim.decay_fraction=1 data.validation_fraction=0
data.validation_fraction=1 data.validation_fraction=-1 data.chat_template=chatml mesh.data=0
mesh.data=-2 mesh.fsdp=-1 mesh.tensor=5 mesh.tensor=2147483647 mesh.data=7 sample.temperature=-1
sample.top_k=3000000000 sample.top_k=-1 sample.max_new_tokens=-1 sample.max_new_tokens=100000000
""".split()
# Together too large, each within its bounds.
TOGETHER = [
    ["model.num_layers=10000", "model.embed_dim=1048576"],
    ["model.vocab_size=16777216", "model.embed_dim=1048576", "model.mlp_dim=4194304"],
    ["model.head_dim=65536", "model.num_heads=65536", "model.num_layers=1000"],
    ["lora.rank=2", "lora.targets=everything"],
    ["model.dropout=0.1", "compute.attention=splash"],
    ["model.position=rope", "model.head_dim=3"],
    ["model.position=sinusoidal", "model.embed_dim=3", "model.num_heads=3"],
    ["optim.name=adafactor", "optim.moment_dtype=bfloat16"],
    ["optim.name=sgd", "model.mup_base_width=64"],
]
BOUNDS = [
    *(Case(one, ["--config=c.py", f"--config.{one}"], exits=(2,)) for one in BEYOND),
    *(
        Case(",".join(some), ["--config=c.py", *(f"--config.{one}" for one in some)], exits=(2,))
        for some in TOGETHER
    ),
]

SPELLINGS = [
    Case(name, argv, says=says, exits=(2,))
    for name, argv, says in [
        ("no config", [], "--config=FILE is required"),
        ("empty config", ["--config="], "does not exist"),
        ("config without a value", ["--config"], ""),
        ("config is a folder", ["--config={}"], "does not exist"),
        ("config is not there", ["--config=~nouser/c.py"], "does not exist"),
        ("config is a device", ["--config=/dev/null"], "does not exist"),
        ("config with a long name", ["--config=" + "x" * 300 + ".py"], "File name too long"),
        ("config not UTF-8", ["--config=\udcff.py"], "is not UTF-8 (byte 0xff"),
        ("config with NUL", ["--config=c.py\0"], "holds a NUL"),
        ("override of nothing", ["--config=c.py", "--config.=1"], "unknown config field"),
        ("override of a group", ["--config=c.py", "--config.model=1"], "unknown config field"),
        ("override of a method", ["--config=c.py", "--config.model.with_sizes=1"], "unknown"),
        ("override of a dunder", ["--config=c.py", "--config.__class__=1"], "unknown"),
        ("override below a field", ["--config=c.py", "--config.seed.x=1"], "unknown"),
        ("override by index", ["--config=c.py", "--config.model[0]=1"], "unknown"),
        ("override without a value", ["--config=c.py", "--config.seed"], ""),
        ("no- of a number", ["--config=c.py", "--noconfig.seed"], ""),
        (
            "field of bytes",
            ["--config=c.py", "--config.\udcff=1"],
            r"unknown config field --config.\udcff",
        ),
        ("long field", ["--config=c.py", "--config." + "x" * 9000 + "=1"], "unknown config field"),
        ("many dots", ["--config=c.py", "--config." + "." * 500 + "=1"], "unknown config field"),
        ("only dashes", ["--config=c.py", "---"], ""),
        ("nameless flag", ["--config=c.py", "--=3"], ""),
        ("stray word", ["--config=c.py", "seed=1"], "unexpected argument 'seed=1'"),
        ("stray word after --", ["--config=c.py", "--", "x"], "unexpected argument 'x'"),
        ("stray bytes", ["--config=c.py", "\udcfe"], "is not UTF-8 (byte 0xfe at character 0)"),
        ("flag file that is not there", ["--config=c.py", "--flagfile=none"], "none"),
        ("flag file of no text", ["--config=c.py", "--flagfile=/bin/true"], "decode"),
        ("no- with a value", ["--config=c.py", "--noconfig.model.bias=1"], "does not take an arg"),
        ("show 1e30", ["--config=c.py", "--show=1e30"], "--show"),
        ("show 5,000 digits", ["--config=c.py", "--show=" + "9" * 5000], "--show"),
        ("a field's name alone", ["--config=c.py", "--batch_size=4"], "--config.batch_size"),
        ("a nickname", ["--config=c.py", "--config.lr=4"], "--config.optim.learning_rate"),
        ("a word of the name", ["--config=c.py", "--config.layers=4"], "--config.model.num_layers"),
        ("a slip", ["--config=c.py", "--config.model.num_leyers=4"], "--config.model.num_layers"),
        ("workdir not UTF-8", ["--config=c.py", "--workdir=\udcff"], "is not UTF-8"),
    ]
]

# What a config file may do: it is Python, and trusted, but its slips are told in one line.
FILES = [
    Case(f"file: {name}", ["--config=bad.py"], {"bad.py": text}, says, exits=(2,))
    for name, text, says in [
        ("empty", "", "KeyError"),
        ("no UTF-8", b"\xff\xfe\x00", "get_config() failed"),
        ("NUL", b"x = 1\0", "get_config() failed"),
        ("half a line", "def get_config(", "SyntaxError"),
        ("tabs and spaces", "if 1:\n\tx = 1\n        y = 2\n", "TabError"),
        ("deep nesting", "x = " + "(" * 5000 + ")" * 5000, "get_config() failed"),
        ("not a function", "get_config = 3", "TypeError"),
        ("an argument", "def get_config(x): return x", "TypeError"),
        ("None", "def get_config(): pass", "not NoneType"),
        ("a dict", "def get_config(): return {}", "not dict"),
        ("the class", "from jaxgpt.config import *\ndef get_config(): return Config", "not type"),
        ("exit", "import sys\nsys.exit()", "SystemExit"),
        ("exit 0", "import sys\ndef get_config(): sys.exit(0)", "SystemExit"),
        ("exit with words", "def get_config(): raise SystemExit('bye')", "SystemExit: bye"),
        ("recursion", "def get_config(): return get_config()", "RecursionError"),
        ("no memory", "def get_config(): raise MemoryError('all of it')", "MemoryError"),
        ("its own error", "class E(BaseException and Exception): pass\nraise E('no')", "E: no"),
        ("an error of lines", "raise ValueError('a\\nb\\x1b[2J\\ud800')", r"a b\x1b[2J\ud800"),
        ("an error that fails", "class E(Exception):\n  __str__ = None\nraise E()", "E"),
        ("imports nothing", "import no_such_module", "ModuleNotFoundError"),
    ]
]
VALUES = [
    Case(f"value: {line[:60]}", ["--config=c.py"], {"c.py": FILE.format(line)}, says, exits=(2,))
    for line, says in [
        ("c.layers = 3", "or model.num_layers"),
        ("c.model.layers = 3", "or model.num_layers"),
        ("c.optim.lr = 3", "optim.learning_rate"),
        ("c.nonsense = 3", "unknown config field nonsense"),
        ("c.model = None", "model must be a ModelConfig, not NoneType"),
        ("c.model = c.optim", "model must be a ModelConfig, not OptimConfig"),
        ("c.model = {'num_layers': 3}", "not dict"),
        ("del c.model", "model must be a ModelConfig, not NoneType"),
        ("setattr(c, 'a\\nb', 1)", "unknown config field"),
        ("setattr(c, '\\ud800', 1)", "unknown config field"),
        ("c.num_steps = 10**20", "num_steps=100000000000000000000 must be at least 1"),
        ("c.num_steps = 10**5000", "num_steps="),
        ("c.num_steps = -10**5000", "num_steps="),
        ("c.num_steps = 1e3", "num_steps=1000.0 has type float, expected int"),
        ("c.num_steps = True", "num_steps=True has type bool, expected int"),
        ("c.num_steps = '9' * 10**6", "has type str, expected int"),
        ("c.num_steps = None", "has type NoneType"),
        ("c.num_steps = [[[]]]", "has type list"),
        ("c.seed = 2**63", "seed=9223372036854775808"),
        ("c.model.window = 10**30", "model.window"),
        ("c.model.dropout = float('nan')", "model.dropout=nan"),
        ("c.optim.learning_rate = 10**400", "optim.learning_rate"),
        ("c.optim.learning_rate = float('inf')", "optim.learning_rate=inf"),
        ("c.optim.learning_rate = 1j", "has type complex"),
        ("c.optim.b1 = 10**5000", "optim.b1"),
        ("c.data.source = b'builtin'", "has type bytes, expected str"),
        ("c.data.source = '\\0'", "data.source holds a NUL"),
        ("c.sample.prompt = '\\ud800'", "sample.prompt holds half a surrogate pair"),
        ("c.sample.prompt = 'caf\\udce9'", "sample.prompt is not UTF-8 (byte 0xe9"),
        ("c.model.norm = 'x' * 10**6", "model.norm"),
        ("c.model.norm = ['layernorm']", "has type list"),
        ("import numpy; c.seed = numpy.int64(3)", "expected int"),
        ("import numpy; c.optim.eps = numpy.float32(3)", "expected float"),
    ]
]
CASES = [*BOUNDS, *SPELLINGS, *FILES, *VALUES]
PLAIN = {"c.py": FILE.format("pass")}


@pytest.mark.parametrize("path", leaves_of())
def test_a_field_refuses_each_wrong_value_in_one_line(path, holds):
    for case in wrong_values(path):
        holds(main, case._replace(files=PLAIN))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_config_is_refused_in_one_line(case, holds):
    holds(main, case._replace(files=PLAIN | case.files))


def test_there_are_hundreds_of_cases():
    cases = [*CASES, *(case for path in leaves_of() for case in wrong_values(path))]
    assert len(cases) > 800 and len({case.name for case in cases}) == len(cases)


def test_composed_and_decomposed_accents_are_names_like_others(holds):
    for name in ("caf\u00e9.py", "cafe\u0301.py", "\u6771\u4eac.py", " .py"):
        case = Case(name, [f"--config={name}"], {name: FILE.format("pass")}, exits=(0,))
        assert holds(main, case)[0] == 0


@pytest.mark.parametrize("path", ["seed", "num_steps", "optim.learning_rate", "sample.top_k"])
def test_the_bounds_themselves_are_allowed(path):
    bounds = leaves_of()[path].metadata["range"]
    for value in (bounds.high, 1):
        config = Config()
        set_field(config, path, type(get_field(config, path))(value))
        validate(config)


FIELDS = list(fields_of(Config()))
PIECES = [
    "--",
    "-",
    "no",
    "config",
    ".",
    "=",
    "1",
    "true",
    "model",
    "é",
    "\udcff",
    "\0",
    " ",
    "c.py",
]
ARGUMENTS = st.one_of(
    st.builds(
        lambda dash, path, equals, value: f"{dash}config.{path}{equals}{value}",
        st.sampled_from(["--", "-", "--no", ""]),
        st.sampled_from(FIELDS),
        st.sampled_from(["=", "", "==", " "]),
        st.one_of(st.text(max_size=8), st.integers().map(str), st.floats().map(str)),
    ),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
)


@hypothesis.settings(FUZZ, max_examples=200)
@hypothesis.given(args=st.lists(ARGUMENTS, max_size=4))
def test_any_flags_are_taken_or_refused(args, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "fuzzed.py"
    if not file.exists():
        file.write_text(FILE.format("pass"))
    hypothesis.assume(not {"-h", "-help", "--help"} & set(args))
    refused(main, ["command", f"--config={file}", *args])


ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
)


@hypothesis.settings(FUZZ, max_examples=300)
@hypothesis.given(path=st.sampled_from(FIELDS), value=ANY)
def test_any_value_of_any_field_is_taken_or_refused(path, value):
    config = Config()
    set_field(config, path, value)
    if not refused(validate, config):
        config = validate(config)
        assert from_stored(json.loads(to_json(config))) == config, "what is taken can be stored"


@hypothesis.settings(FUZZ, max_examples=300)
@hypothesis.given(raw=mutated(to_json(Config()).encode(), b"{}", b'{"model": {"num_layers": 3}}'))
def test_any_config_json_is_read_or_refused(raw, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.getbasetemp())
    (folder / "config.json").write_bytes(raw)
    refused(read_config, folder)


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "3", '"x"', "", "{", '{"model": null}', '{"model": []}', '{"seed": {}}']
    + ['{"seed": "0"}', '{"seed": 1e999}', '{"seed": 1.0}', '{"optim": {"b1": null}}']
    + ['{"model": {"embed_dim": -1}}', '{"model": {"embed_dim": 7}}', '{"num_steps": NaN}']
    + ['{"data": {"source": "\\ud800"}}', '{"model": {"norm": "x"}}', '{"optim": {"b1": 1e39}}']
    + ['{"seed": ' + "9" * 5000 + "}", "[" * 100_000, '{"optim": {"b1": ' + "9" * 400 + "}}"],
)
def test_an_edited_config_json_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config.json is damaged: .*choose another --workdir"):
        read_config(epath.Path(tmp_path))


def test_a_config_json_that_is_no_text_or_no_file(tmp_path):
    (tmp_path / "config.json").write_bytes(json.dumps({"seed": 3}).encode("utf-16"))
    with pytest.raises(BadInput, match="config.json is damaged: it is not UTF-8"):
        read_config(epath.Path(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BadInput, match="config.json is damaged: it is not a file"):
        read_config(epath.Path(tmp_path))
