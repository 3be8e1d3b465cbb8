"""Shrinking a workdir: the method, the new workdir, and both measured."""

import itertools
import shlex
from pathlib import Path
from typing import NamedTuple

import jax
from etils import epath

from jaxgpt.checkpointing.checkpoints import save_weights
from jaxgpt.config import Config
from jaxgpt.config.schema import get_field
from jaxgpt.config.stored import methods_done, to_json
from jaxgpt.inference.trained import Trained, open_trained
from jaxgpt.objectives.text import Measure, loss_measure
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
    that it shows too, and whether to measure the `speed` of decoding."""

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
        measure = loss_measure(trained, options.data, "validation")  # refuses before the method
        for path in (path for path in table.beside if not read_rows(epath.Path(path))):
            check_beside(path, options.data)
        with jax.set_mesh(trained.mesh):
            source = Source(trained, options.data)
            config, params = METHODS[name](source, argument, options)
        copy_tokenizer(epath.Path(workdir) / "tokenizer", scratch / "tokenizer")
        (scratch / "config.json").write_text(to_json(config))
        meta = trained.checkpoints.meta(trained.step)
        kept = {key: meta[key] for key in KEPT_META if key in meta}
        save_weights(scratch, params, kept | {"shrunk": f"{workdir} at {trained.step}"})
        before = figures_of(trained, measure)
        after = write_table(scratch, out, trained, before, (table, options.data))
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


def write_table(folder: Path, out: Path, source: Trained, figures: dict, asked: tuple) -> dict:
    """Writes the rows of the original, of what `beside` names and of the new workdir into `folder`,
    which will be `out`; returns the figures of the new one. `figures` are those of the original,
    `source`, and `asked` is (table, data)."""
    table, data = asked
    known = [read_rows(path) for path in (workdir_of(source), *map(epath.Path, table.beside))]
    unknown = [path for path, rows in zip(table.beside, known[1:], strict=True) if not rows]
    models = [source, *(open_trained(path, None) for path in (*unknown, str(folder)))]
    measures = [loss_measure(model, data, "validation") for model in models[1:]]
    measured = [figures, *map(figures_of, models[1:], measures)]
    speeds = decode_speeds(models) if table.speed else [{} for _ in models]
    rows = [_row(*each) for each in zip(models, measured, speeds, strict=True)]
    rows[-1] |= {"workdir": str(out), "method": models[-1].config.shrink.done}
    rows[-1] |= {"command": table.command, "bytes_on_disk": bytes_in(folder / "checkpoints")}
    write_rows(folder, [*(known[0] or rows[:1]), *itertools.chain(*known[1:]), *rows[1:]])
    return measured[-1]


def check_beside(path: str, data: str) -> None:
    """Raises `BadInput` if a workdir without a table cannot be measured."""
    beside = open_trained(path, None)
    if (kind := beside.config.model.kind) != "decoder":
        raise BadInput(f"--beside={path} holds an {kind}: shrink knows decoders only")
    try:
        loss_measure(beside, data, "validation")
    except BadInput as e:
        raise BadInput(f"--beside={path}: {e}") from e


def workdir_of(model: Trained) -> epath.Path:
    """Returns where a model was opened."""
    return model.checkpoints.folder.parent


def _row(model: Trained, figures: dict, speeds: dict) -> dict:
    """Returns the table's row of a workdir that was trained; on disk its weights alone count."""
    method = methods_done(model.config) or "original"
    tuned = model.config.init_from and method == model.config.shrink.done
    return {
        **{"workdir": str(workdir_of(model)), "command": trained_by(model.config)},
        **{"method": f"{method}, trained on" if tuned else method},
        **{"bytes_on_disk": figures["bytes"]},
        **{"resident_bytes": speeds.get("resident_bytes", figures["bytes"])},
        **{"zeros": figures["zeros"], "bits_per_byte": figures["bits_per_byte"]},
        **{f"tokens_per_second_{n}": speeds.get(f"tokens_per_second_{n}") for n in BATCHES},
    }


def trained_by(config: Config) -> str:
    """Returns the flags that made a run's training smaller or shorter than one from nothing, ""
    where there are none."""
    fields = ("init_from", "init_layers", "objective", "objectives.distill.teacher")
    fields += ("shrink.sparsity", "num_steps")
    values = {name: get_field(config, name) for name in fields}
    flags = [f"--config.{n}={v}" for n, v in values.items() if v != get_field(Config(), n)]
    is_plain = not methods_done(config)
    return "" if is_plain else shlex.join(["python", "-m", "jaxgpt.train", "--config=FILE", *flags])


def figures_of(trained: Trained, measure: Measure) -> dict:
    """Returns the `bytes` of a workdir's weights, the share of `zeros` in them, and its
    `bits_per_byte` as `jaxgpt.evaluate` measures it."""
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
