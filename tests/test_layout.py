"""The shape of the repository: imports run one way, files and folders stay small."""

import ast
import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxgpt"
ROOMS = [
    "system",
    "config",
    "hub",
    "processes",
    "metrics",
    "tokenizer",
    "text",
    "parallel",
    "ops",
    "parameters",
    "model",
    "data",
    "optim",
    "checkpointing",
    "interchange",
    "cli",
    "inference",
    "serving",
    "evaluation",
    "reports",
    "objectives",
    "distillation",
    "denoising",
    "labelled",
    "training",
    "shrinking",
    "sweeps",
    "planning",
    "jobs",
]


def imported_rooms(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgpt."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxgpt":
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("jaxgpt.")}
    return names


def test_a_room_imports_only_rooms_above_it():
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(
        ROOMS
    )
    for number, room in enumerate(ROOMS):
        for file in (PACKAGE / room).rglob("*.py"):
            below = imported_rooms(file) - set(ROOMS[: number + 1])
            assert not below, f"{file.relative_to(ROOT)} imports {below} from below"


def test_files_and_folders_are_small():
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 500, f"{file} is too long"
    for folder in {file.parent for file in PACKAGE.rglob("*.py")}:
        count = len(list(folder.glob("*.py")))
        assert count <= (20 if folder == PACKAGE else 12), f"{folder} holds {count} files"


def test_everything_public_has_a_docstring():
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), f"{file} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if node.name != "main":  # the module's docstring is its help
                    assert ast.get_docstring(node), f"{file}: {node.name} has no docstring"


def test_the_base_installation_stays_lean():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    base = setup["options"]["install_requires"].split("\n")[1:]
    # the thirteenth is safetensors: its own library parses a format that strangers' files come in
    assert len(base) <= 13
    assert not any(name in ("torch", "tensorflow", "transformers") for name in base)


def test_extras_are_spelled_as_the_metadata_does():
    """With `-` for `_` (PEP 685): pip before 23.3 passes over any other spelling with a warning."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    known = {name.replace("_", "-") for name in setup["options.extras_require"]}
    files = [*ROOT.glob("*/**/README.md"), ROOT / "README.md", ROOT / ".ci" / "run"]
    files += PACKAGE.rglob("*.py")
    lists = [found for f in files for found in re.findall(r"\.\[([\w,-]+)\]'", f.read_text())]
    named = {extra for found in lists for extra in found.split(",")}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                if isinstance(node.args[1], ast.Constant):
                    named.add(node.args[1].value)
    assert {"lm-eval", "plan", "data", "serve", "test"} <= named <= known, named - known
