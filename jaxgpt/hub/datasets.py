"""Which files of a dataset on the hub hold which split.

The `configs` in its README.md tell, as for Hugging Face's `datasets`, else the names of files and
folders. The files are read by jaxgpt's own readers, a row at a time: `datasets` would first convert
them into a second cache, and its import brings pandas and more.

    ---
    configs:
    - config_name: en
      data_files:
      - split: train
        path: en/train-*.parquet
    ---
"""

import glob
import hashlib
import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from jaxgpt.hub.client import not_cached, repository, snapshot
from jaxgpt.hub.names import Name, dataset_name
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput, as_bad_input, described
from jaxgpt.system.extras import require
from jaxgpt.system.files import Damaged, read_json, write_whole

README = "README.md"
# Formats that jaxgpt reads, the best first: a dataset may hold its rows in several
FORMATS = (r"\.parquet", r"\.(?:jsonl|ndjson|json)(?:\.gz|\.zst)?", r"\.txt(?:\.gz|\.zst)?")
NOT_ROWS = re.compile(
    r"(?:^|/)(?:[._]|(?:dataset_infos?|state)\.json|(?:requirements|licen[sc]e|readme)\b)", re.I
)
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
CONVERTED = "refs/convert/parquet"  # where the hub keeps copies of datasets in other formats
CONVERTED_FILE = re.compile(r"[^/]+/[^/]+/\d{4}\.parquet")
LISTING = {"commit": str, "files": [str]}
LONGEST_CARD = 1 << 20  # bytes

Splits = dict[str, list[str]]  # files by split


@cache
def dataset_files(argument: str, cache_folder: Path) -> tuple[list[str], list[str]]:
    """Returns the files that `ORG/NAME[/CONFIG][#SPLIT][@REVISION]` names: those of the split, by
    default train, and without #SPLIT those of the validation split, if there is one.

    They are in the hub's cache, downloaded where it lacks them, or in the local folder ORG/NAME;
    `cache_folder` keeps what files there are.

    Raises:
      BadInput: if there is no such dataset, configuration or split, or none in one of `FORMATS`, or
        the hub cannot be reached and the cache lacks a file.
    """
    name = dataset_name(argument)
    if name is None:
        raise BadInput(
            f"hf:{argument} names no dataset of the hub: hf:ORG/NAME[/CONFIG][#SPLIT][@REVISION]"
        )
    folder = _local(name)
    if folder:
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    else:
        name, files = _listing(name, cache_folder)
    readme = None
    if README in files:
        readme = (folder or snapshot(name, "dataset", [README])) / README
    splits = find_splits(name, files, read_configs(readme) if readme else [])
    first = name.split or "train"
    if not splits.get(first):
        raise BadInput(
            f"dataset {name} has no split {first}; name one of its splits, for example"
            f" hf:{name._replace(split=next(iter(splits)), revision='')}"
            f" (it has {', '.join(splits)})"
        )
    train = splits[first]
    validation = [] if name.split else splits.get("validation", [])
    if not folder:
        say(f"hub       dataset {name}: {len(train)} + {len(validation)} files")
        wanted = [glob.escape(file) for file in (*train, *validation)]
        folder = snapshot(name, "dataset", wanted)
    return [str(folder / file) for file in train], [str(folder / file) for file in validation]


def pinned_dataset(name: Name, cache_folder: Path) -> Name:
    """Returns the dataset at the commit that is its revision now; a local folder has none."""
    return name if _local(name) else _listing(name, cache_folder)[0]


def _local(name: Name) -> Path | None:
    folder = Path(name.repo)
    return folder if folder.is_dir() else None


def _listing(name: Name, cache_folder: Path) -> tuple[Name, list[str]]:
    """Returns the dataset at its commit, and all files of that. What the hub says is kept for when
    it cannot be reached: the files that happen to be in its cache may be a part of the data."""
    if name.is_pinned and (kept := _kept(name, cache_folder)):
        return kept
    commit, files, fault = repository(name, "dataset")
    if fault:
        if kept := _kept(name, cache_folder):
            say(f"hub       dataset {kept[0]} is that of the cache: {fault}")
            return kept
        raise not_cached(name, "dataset", fault)
    pinned, files = name.at(commit), sorted(file for file in files if ".." not in file)
    if not name.revision and not _rows_of(files):
        with suppress(BadInput):  # it has no such copy
            pinned, files = _listing(name.at(CONVERTED), cache_folder)
    for each in {name, pinned}:
        text = json.dumps({"commit": pinned.revision, "files": files})
        write_whole(_listing_file(each, cache_folder), text)
    return pinned, files


def _kept(name: Name, cache_folder: Path) -> tuple[Name, list[str]] | None:
    try:
        listing = read_json(_listing_file(name, cache_folder), LISTING)
    except Damaged:
        return None  # it is asked for again
    return name.at(listing["commit"]), listing["files"]


def _listing_file(name: Name, cache_folder: Path) -> Path:
    key = hashlib.sha256(f"{name.repo}@{name.revision}".encode()).hexdigest()[:32]
    folder = cache_folder / "hub"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key}.json"


def read_configs(readme: Path) -> list[dict]:
    """Returns the `configs` in the YAML that a README.md begins with, [] if it has none. Raises
    `BadInput` if they are no list of objects with a name."""
    with as_bad_input(lambda e: f"{readme} cannot be read: {described(e)}"):
        text = readme.read_bytes()[:LONGEST_CARD].decode(errors="replace")
        block = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        card = require("yaml", "hub", "a dataset's README.md").safe_load(block[1]) if block else {}
        configs = card.get("configs", []) if isinstance(card, dict) else []
        if not all(isinstance(entry["config_name"], str) for entry in configs):
            raise ValueError("a config's name is no text")
    return configs


def find_splits(name: Name, files: list[str], configs: list[dict]) -> Splits:
    """Returns the splits of the dataset's configuration, with their files of one format. Raises
    `BadInput` if there is no such configuration, or several and none is named, or no file that can
    be read."""
    if not (rows := _rows_of(files)):
        raise BadInput(
            f"dataset {name} holds no parquet, JSON or text files, and the hub has no copy of it in"
            f" parquet; it has {', '.join(files[:5])}"
        )
    folders = sorted({file.partition("/")[0] for file in rows if CONVERTED_FILE.fullmatch(file)})
    if configs:
        entry = _chosen(name, {entry["config_name"]: entry for entry in configs}, configs)
        with as_bad_input(lambda e: f"dataset {name}: its {README} is not understood: {e!r}"):
            patterns, start = _patterns(entry.get("data_files")), entry.get("data_dir") or ""
            rows = [file for file in rows if file.startswith(start)]
            if patterns:
                return _matching(patterns, rows)
    elif len(folders) > 1 or name.config in folders:  # the hub's copies: CONFIG/SPLIT/0000.parquet
        config = _chosen(name, {folder: folder for folder in folders}, [])
        rows = [file for file in rows if file.startswith(f"{config}/")]
    elif name.config:
        rows = [file for file in rows if file.startswith(f"{name.config}/")]
        if not rows:
            raise BadInput(f"dataset {name} has no configuration {name.config}")
    return _by_name(rows)


def _chosen(name: Name, known: dict, configs: list[dict]):
    """Returns the configuration that is named, else the only one, or the default."""
    default = [entry["config_name"] for entry in configs if entry.get("default") is True]
    wanted = name.config or [*default, *({"default"} & set(known)), *known][0]
    if not name.config and len(known) > 1 and wanted not in (*default, "default"):
        wanted = ""
    if wanted not in known:
        what = f"no configuration {name.config}" if name.config else "several configurations"
        example = name._replace(config=next(iter(known)), revision="")
        raise BadInput(
            f"dataset {name} has {what}: {', '.join(list(known)[:20])}; name one, for example"
            f" hf:{example}"
        )
    return known[wanted]


def _patterns(data_files) -> Splits:
    """Returns patterns by split, from any of the forms that a README may have."""
    if isinstance(data_files, list) and data_files and isinstance(data_files[0], dict):
        pairs = [(entry["split"], entry["path"]) for entry in data_files]
    else:
        pairs = [("train", data_files)] if data_files else []
    listed = [(split, [path] if isinstance(path, str) else path) for split, path in pairs]
    return {split: [path.removeprefix("./") for path in paths] for split, paths in listed}


def _matching(patterns: Splits, files: list[str]) -> Splits:
    splits = {}
    for split, globs in patterns.items():
        regex = re.compile("|".join(map(_regex, globs)))
        if found := [file for file in files if regex.fullmatch(file)]:
            splits[split] = found
    return splits


def _regex(pattern: str) -> str:
    """Returns a glob as a regular expression; `**/` is any folders, or none."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    marks = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        marks.get(part) or (part.replace("[!", "[^") if part[:1] == "[" else re.escape(part))
        for part in parts
    )


def _by_name(files: list[str]) -> Splits:
    """Returns the files by the split that their own names say, else those of their folders; where
    no name says one, all are train."""
    for words_of in (_own_words, _folder_words):
        splits = {
            split: found
            for split, words in SPLITS.items()
            if (found := [file for file in files if words & words_of(file)])
        }
        if splits:
            return splits
    return {"train": files}


def _own_words(file: str) -> set[str]:
    return set(re.split("[^a-z]+", PurePosixPath(file).name.lower()))


def _folder_words(file: str) -> set[str]:
    return set(re.split("[^a-z]+", PurePosixPath(file).parent.as_posix().lower()))


def _rows_of(files: list[str]) -> list[str]:
    """Returns the files of the best format that there is."""
    files = [file for file in files if not NOT_ROWS.search(file)]
    for ending in FORMATS:
        if found := [file for file in files if re.search(f"{ending}$", file, re.I)]:
            return found
    return []
