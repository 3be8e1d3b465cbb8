"""TensorFlow Datasets on disk, read through `tfds.data_source`: ArrayRecord, without TensorFlow."""

import importlib
import os
from collections.abc import Iterator
from functools import partial

from jaxgpt.system.errors import BadInput, as_bad_input
from jaxgpt.text.pieces import Documents, Piece

VALIDATION = ("validation", "valid", "dev", "test")  # splits that serve for validation, best first


def open_tfds(name: str, field: str, data_dir: str) -> list[tuple[Documents, list[str]]]:
    """Returns the documents and files of the training split and, if the dataset has one, of its
    validation split. Raises `BadInput` if the dataset is unknown, not on disk, in another file
    format, or `field` is not one of its text features."""
    tfds = importlib.import_module("tensorflow_datasets")  # slow to import, and rarely needed
    where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    advice = (
        "set data.data_dir to a folder that holds it in array_record format, or prepare it on a"
        " machine with a network: pip install tensorflow tensorflow-datasets && tfds build"
        f" {name} --file_format=array_record"
    )

    def cannot_open(e: BaseException) -> str:
        if isinstance(e, tfds.core.registered.DatasetNotFoundError):
            return f"tfds:{name} is not in {where} and TFDS knows no such dataset; {advice}"
        reason = f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}"
        return f"tfds:{name} cannot be opened in {where} ({reason}); {advice}"

    # it asks the network, runs code that needs TensorFlow, or meets a broken folder
    with as_bad_input(cannot_open):
        builder = tfds.builder(name, data_dir=data_dir or None)
        splits, features = builder.info.splits, builder.info.features
        if not splits or not builder.data_path.exists():
            raise BadInput(f"tfds:{name} is not in {where}; {advice}")
    text_fields = [key for key, kind in features.items() if isinstance(kind, tfds.features.Text)]
    if field not in text_fields:
        raise BadInput(
            f"tfds:{name} has no text feature {field!r}: set data.field to one of"
            f" {', '.join(text_fields) or '(it has none)'}"
        )
    if "train" not in splits:
        raise BadInput(f"tfds:{name} has no split train, only {', '.join(splits)}")
    try:
        builder.as_data_source(split="train")
    except NotImplementedError as e:
        raise BadInput(f"tfds:{name} in {where} is not in array_record format; {advice}") from e
    names = ["train", *[split for split in VALIDATION if split in splits][:1]]
    return [
        (partial(_read, builder, split, field), list(map(os.fspath, splits[split].filepaths)))
        for split in names
    ]


def _read(builder, split: str, field: str) -> Iterator[Piece]:
    name = f"{builder.info.full_name}[{split}]"
    for row, example in enumerate(builder.as_data_source(split=split), start=1):
        try:
            text = example[field]
            text = text.decode("utf-8") if isinstance(text, bytes) else text
        except UnicodeDecodeError as e:
            raise BadInput(f"{name}, record {row} is not UTF-8: {e}") from e
        if text:
            yield Piece(text, name, row)
