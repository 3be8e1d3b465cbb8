"""Shrinking a workdir: the method, the new workdir, and both measured."""

from pathlib import Path
from typing import NamedTuple

import jax
from etils import epath

from jaxgpt.checkpointing.checkpoints import save_weights
from jaxgpt.config.stored import to_json
from jaxgpt.inference.trained import Trained, open_trained
from jaxgpt.objectives.text import loss_measure
from jaxgpt.reports.shrinking import read_rows, write_rows
from jaxgpt.shrinking.measure import BATCHES, bytes_in, decode_speeds, share_of_zeros
from jaxgpt.shrinking.methods import METHODS
from jaxgpt.shrinking.source import Source
from jaxgpt.shrinking.spec import Options
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import whole_folder


class Table(NamedTuple):
    """What `shrink.html` shows besides: the `command` that made the row, the workdirs `beside`
    whose rows are taken over, and whether to measure the `speed` of decoding."""

    command: str = ""
    beside: tuple[str, ...] = ()
    speed: bool = True


KEPT_META = ("tokens", "seconds", "data_fingerprint", "imported")


def shrink(
    workdir: str, out: Path, step: int | str | None, method: tuple, options: Options, table: Table
) -> dict:
    """Writes the shrunk model of `workdir` into the new folder `out`, with the `table` of what it
    costs beside the original; returns the figures of `jaxgpt.shrink`. Raises `BadInput` if the
    method does not apply, or `out` is not empty."""
    name, argument = method
    written = name if argument is None else f"{name}:{argument:g}"
    if name not in METHODS:
        raise BadInput(f"--method={written} is not there yet")
    with whole_folder(out, "--out") as scratch:
        trained = open_trained(workdir, step)
        if (kind := trained.config.model.kind) != "decoder":
            raise BadInput(f"{workdir} holds an {kind}: shrink knows decoders only")
        if experts := trained.config.model.num_experts:
            raise BadInput(
                f"{workdir} holds a mixture (model.num_experts={experts}): shrink knows dense"
                " models only"
            )
        before = figures_of(trained, options.data)
        with jax.set_mesh(trained.mesh):
            source = Source(trained, options.data)
            config, params = METHODS[name](source, argument, options)
        copy_tokenizer(epath.Path(workdir) / "tokenizer", scratch / "tokenizer")
        (scratch / "config.json").write_text(to_json(config))
        meta = trained.checkpoints.meta(trained.step)
        kept = {key: meta[key] for key in KEPT_META if key in meta}
        save_weights(scratch, params, kept | {"shrunk": f"{workdir} at {trained.step}"})
        smaller = open_trained(str(scratch), None)
        after = figures_of(smaller, options.data)
        write_table(scratch, out, (trained, smaller), (before, after), table)
    row = {"method": written}
    for figure in ("bytes", "bits_per_byte"):
        row |= {f"{figure}_before": before[figure], f"{figure}_after": after[figure]}
    say(
        f"shrunk    step {trained.step} of {workdir} by {written} into {out}:"
        f" {before['bytes']:,} -> {after['bytes']:,} bytes of weights,"
        f" {before['bits_per_byte']:.4f} -> {after['bits_per_byte']:.4f} bits/byte\n"
        f"next      python -m jaxgpt.sample --workdir={out} --prompt='...'"
    )
    return row


def write_table(folder: Path, out: Path, models: tuple, figures: tuple, table: Table) -> None:
    """Writes the rows of the original, of what `table.beside` names and of the new workdir into
    `folder`, which will be `out`."""
    original = models[0].checkpoints.folder.parent
    known, speeds = read_rows(original), ({}, {})
    if table.speed:
        speeds = decode_speeds(models)
    names = (original, ""), (out, table.command)
    rows = [
        {
            **{"workdir": str(workdir), "method": model.config.shrink.done or "original"},
            **{"command": command, "bytes_on_disk": figure["bytes"]},
            **{"resident_bytes": speed.get("resident_bytes", figure["bytes"])},
            **{"zeros": figure["zeros"]},
            **{"bits_per_byte": figure["bits_per_byte"]},
            **{f"tokens_per_second_{n}": speed.get(f"tokens_per_second_{n}") for n in BATCHES},
        }
        for (workdir, command), model, figure, speed in zip(
            names, models, figures, speeds, strict=True
        )
    ]
    rows[1]["bytes_on_disk"] = bytes_in(folder / "checkpoints")
    others = [row for path in table.beside for row in read_rows(epath.Path(path))]
    write_rows(folder, [*(known or rows[:1]), *others, rows[1]])


def figures_of(trained: Trained, data: str) -> dict:
    """Returns the `bytes` of a workdir's weights, the share of `zeros` in them, and its
    `bits_per_byte` as `jaxgpt.evaluate` measures it."""
    measure = loss_measure(trained, data, "validation")
    with jax.set_mesh(trained.mesh):
        params = trained.params()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        zeros = share_of_zeros(params)
        return {"bytes": size, "zeros": zeros, "bits_per_byte": measure(params)["bits_per_byte"]}


def copy_tokenizer(source: epath.Path, target: Path) -> None:
    """Copies a workdir's tokenizer, chat template included."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
