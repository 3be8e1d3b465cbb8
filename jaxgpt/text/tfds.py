"""TensorFlow Datasets on disk, read through `tfds.data_source`: ArrayRecord, without TensorFlow."""

import dataclasses
import importlib
import os
from collections.abc import Iterator

from jaxgpt.system.errors import BadInput
from jaxgpt.text.pieces import Piece

HELD_OUT = ("validation", "valid", "dev", "test")  # splits that serve for validation, best first
WAYS_OUT = (
    "set data.data_dir to a folder that holds it in array_record format, or prepare it on a"
    " machine with a network: pip install tensorflow tensorflow-datasets && tfds build {name}"
    " --file_format=array_record"
)


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
    """One split of a prepared dataset. Calling it reads the documents."""

    builder: object
    split: str
    field: str

    def __call__(self) -> Iterator[Piece]:
        name = f"{self.builder.info.full_name}[{self.split}]"
        for row, example in enumerate(self.builder.as_data_source(split=self.split), start=1):
            try:
                text = example[self.field]
                text = text.decode("utf-8") if isinstance(text, bytes) else text
            except UnicodeDecodeError as e:
                raise BadInput(f"{name}, record {row} is not UTF-8: {e}") from e
            if text:
                yield Piece(text, name, row)

    def files(self) -> list[str]:
        """Returns the split's files, whose bytes tell its content."""
        return [os.fspath(file) for file in self.builder.info.splits[self.split].filepaths]


def open_tfds(name: str, field: str, data_dir: str) -> tuple[TfdsSplit, TfdsSplit | None]:
    """Returns (training split, the dataset's own validation split if it has one).

    Raises:
      BadInput: if the dataset is unknown, not on disk, in another file format, or `field` is not
        one of its text features.
    """
    tfds = importlib.import_module("tensorflow_datasets")  # slow to import, and rarely needed
    where = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        on_disk = bool(builder.info.splits) and builder.data_path.exists()
    except tfds.core.registered.DatasetNotFoundError as e:
        raise BadInput(
            f"tfds:{name} is not in {where} and TFDS knows no such dataset;"
            f" {WAYS_OUT.format(name=name)}"
        ) from e
    except Exception as e:  # asking the network, code that needs TensorFlow, a broken folder
        raise BadInput(
            f"tfds:{name} cannot be opened in {where} ({_first_line(e)});"
            f" {WAYS_OUT.format(name=name)}"
        ) from e
    if not on_disk:
        raise BadInput(f"tfds:{name} is not in {where}; {WAYS_OUT.format(name=name)}")
    text_fields = [key for key, kind in builder.info.features.items() if _is_text(tfds, kind)]
    if field not in text_fields:
        raise BadInput(
            f"tfds:{name} has no text feature {field!r}: set data.field to one of"
            f" {', '.join(text_fields) or '(it has none)'}"
        )
    splits = builder.info.splits
    if "train" not in splits:
        raise BadInput(f"tfds:{name} has no split train, only {', '.join(splits)}")
    try:
        builder.as_data_source(split="train")
    except NotImplementedError as e:
        raise BadInput(
            f"tfds:{name} in {where} is not in array_record format; {WAYS_OUT.format(name=name)}"
        ) from e
    held_out = next((split for split in HELD_OUT if split in splits), None)
    return (
        TfdsSplit(builder, "train", field),
        TfdsSplit(builder, held_out, field) if held_out else None,
    )


def _is_text(tfds, feature) -> bool:
    return isinstance(feature, tfds.features.Text)


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:200]}"
