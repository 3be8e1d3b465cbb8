"""Hostile names of files and folders, and models that no machine holds, through the commands."""

import os

import pytest

from jaxgpt import checkpoint, convert, evaluate, plan, prepare, report, sample, sweep, train
from tests.hostile.conftest import Case, name_of

FILES = {
    "c.py": """
from jaxgpt.config import *
def get_config():
    return Config(model=ModelConfig(max_seq_len=16, num_layers=1, num_heads=2, embed_dim=16),
                  data=DataConfig(source="text:text.txt"))
""",
    "text.txt": "some text\n" * 50,
    "file": "no folder",
    "nowhere": lambda path: path.symlink_to("none"),
    "loop": lambda path: path.symlink_to("loop"),
    "back/back": lambda path: path.symlink_to(path.parent, target_is_directory=True),
}
LONG, DEEP = "x" * 300, "/".join("y" * 200 for _ in range(30))
WORKDIRS = {
    "a long name": (LONG, "File name too long"),
    "a long path": (DEEP, "File name too long"),
    "below a file": ("file/w", "is a file, not a folder"),
    "a link to nothing": ("nowhere", "is a link to"),
    "below a link to nothing": ("nowhere/w", "is a link to"),
    "a link to itself": ("loop", "is a link to"),
    "not UTF-8": ("w\udcff", "is not UTF-8"),
    "NUL": ("w\0", "holds a NUL"),
}
OVERRIDES = {
    "~nouser": ("data.source=text:~nouser/*", "cannot be listed"),
    "no such user's tokenizer": ("data.tokenizer=hf:~nouser/x", "~nouser"),
    "no such user's vocabulary": ("data.tokenizer=gpt2:~nouser", "~nouser"),
    "no such user's pieces": ("data.tokenizer=sentencepiece:~nouser/a.model", "~nouser"),
    "no such user's cache": ("data.cache_dir=~nouser/cache", "~nouser"),
    "no such user's shards": ("data.source=shards:~nouser/shards", "~nouser"),
    "a long source": (f"data.source=text:{LONG}", "no file matches"),
    "a long path of a source": (f"data.source=text:{DEEP}", "data source text:y"),
    "a long tokenizer": (f"data.tokenizer=hf:{LONG}", ""),
    "a long cache": (f"data.cache_dir={LONG}", "File name too long"),
    "long shards": (f"data.source=shards:{LONG}", ""),
    "a cache in a file": ("data.cache_dir=file", "cannot be made"),
    "a cache in a link to nothing": ("data.cache_dir=nowhere", "cannot be made"),
    "a start from a long name": (f"init_from={LONG}", ""),
    "a start from nothing": ("init_from=nowhere", "neither a workdir"),
}
TRAIN = [
    *(
        Case(f"{n} as workdir", ["--config=c.py", f"--workdir={w}"], FILES, says, (2,))
        for n, (w, says) in WORKDIRS.items()
    ),
    *(
        Case(n, ["--config=c.py", "--workdir=w", f"--config.{o}"], FILES, says, (2,))
        for n, (o, says) in OVERRIDES.items()
    ),
    *(
        Case(
            f"too large: {o}",
            ["--config=c.py", "--workdir=w", *(f"--config.{one}" for one in o.split())],
            FILES,
            "the model does not fit",
            (2,),
        )
        for o in (
            "model.num_layers=10000 model.embed_dim=16384",
            "model.vocab_size=16777216 model.embed_dim=1048576",
            "model.max_seq_len=16777216 model.embed_dim=1048576",
        )
    ),
]


@pytest.mark.parametrize("case", TRAIN, ids=name_of)
def test_train(case, holds):
    holds(train.main, case)


@pytest.mark.parametrize("name", WORKDIRS)
@pytest.mark.parametrize(
    "command_", [evaluate, sample, report, checkpoint], ids=lambda m: m.__name__
)
def test_commands_that_read_a_workdir(command_, name, holds):
    words = ["list"] if command_ is checkpoint else []
    holds(command_.main, Case(name, [*words, f"--workdir={WORKDIRS[name][0]}"], FILES, exits=(2,)))


OTHERS = [
    (prepare, Case("show 1e30", ["--config=c.py", "--show=1e30"], FILES, "--show", (2,))),
    (prepare, Case("show a huge batch", ["--config=c.py", f"--show={2**63}"], FILES, "", (2,))),
    (prepare, Case("show before the first", ["--config=c.py", "--show=-1"], FILES, "", (2,))),
    (
        prepare,
        Case(
            "against no user", ["--config=c.py", "--against=text:~nouser/*"], FILES, "~nouser", (2,)
        ),
    ),
    (
        prepare,
        Case("out with a long name", ["--config=c.py", f"--out={LONG}"], FILES, "too long", (2,)),
    ),
    (prepare, Case("out below a file", ["--config=c.py", "--out=file/x"], FILES, "", (2,))),
    (
        convert,
        Case(
            "import from no user",
            ["import", "--from=~nouser/x", "--workdir=w"],
            FILES,
            "~nouser",
            (2,),
        ),
    ),
    (
        convert,
        Case(
            "import from a long name", ["import", f"--from={LONG}", "--workdir=w"], FILES, "", (2,)
        ),
    ),
    (
        convert,
        Case(
            "export to no user", ["export", "--workdir=w", "--to=~nouser/x"], FILES, "~nouser", (2,)
        ),
    ),
    (plan, Case("topology of a novel", ["--config=c.py", f"--topology={LONG}"], FILES, "", (2,))),
    (plan, Case("price in nan", ["--config=c.py", "--price=nan"], FILES, "--price", (2,))),
    (plan, Case("price in inf", ["--config=c.py", "--price=inf"], FILES, "--price", (2,))),
    *(
        (
            sweep,
            Case(
                f"sweep in {n}",
                ["--config=c.py", "--grid=seed=1", f"--workdir={w}"],
                FILES,
                "",
                (2,),
            ),
        )
        for n, (w, _) in WORKDIRS.items()
    ),
    (
        sweep,
        Case("jobs", ["--config=c.py", "--grid=seed=1", f"--jobs={2**63}"], FILES, "--jobs", (2,)),
    ),
    (
        sweep,
        Case("grid of digits", ["--config=c.py", "--grid=seed=" + "9" * 5000], FILES, "", (2,)),
    ),
    (
        sweep,
        Case(
            "grid of everything",
            [
                "--config=c.py",
                "--grid="
                + ";".join(
                    f"{f}={','.join(map(str, range(1, 60)))}"
                    for f in ("seed", "num_steps", "log_every", "eval_every")
                ),
            ],
            FILES,
            "12117361 runs",
            (2,),
        ),
    ),
]


@pytest.mark.parametrize(("module", "case"), OTHERS, ids=lambda v: getattr(v, "name", ""))
def test_others(module, case, holds):
    holds(module.main, case)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(holds, tmp_path):
    (tmp_path / "case/closed").mkdir(parents=True)
    (tmp_path / "case/closed").chmod(0o500)
    holds(
        train.main, Case("", ["--config=c.py", "--workdir=closed/w"], FILES, "no permission", (2,))
    )
