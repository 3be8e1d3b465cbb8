"""Orbax checkpoints of the whole training state under `checkpoints/<step>`."""

import functools
import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies
from orbax.checkpoint.path import atomicity

from jaxgpt.checkpointing.choice import (
    BEST,
    check_checkpoints,
    has_stopped_early,
    loss_in,
    loss_of,
    read_meta,
)
from jaxgpt.checkpointing.manifest import damage, write_manifest
from jaxgpt.checkpointing.s3 import use_s3
from jaxgpt.processes.hosts import is_peer_lost, on_first
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import remove_folder
from jaxgpt.system.stores import absolute, check_store, is_object_store, move_folder
from jaxgpt.system.trees import leaves_by_path

SET_ASIDE = "checkpoints-damaged"


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous and atomic; the newest `keep`, the
    best by validation loss and every `keep_every`-th step are kept, the others deleted.

    Each has `state` (any pytree of arrays), `meta` (a JSON dict: tokens seen, seconds trained, data
    fingerprint, seed, versions, the validation loss if there was one), and a manifest.
    """

    def __init__(self, workdir, keep: int = 1, keep_every: int = 0, read_only: bool = False):
        check_store(workdir)
        self.folder = absolute(workdir) / "checkpoints"
        if read_only:
            check_checkpoints(epath.Path(workdir))
        self.saving: int | None = None  # step of the last save
        self.start_save = self.snapshot = None  # of the save that is running
        self.losses: dict[int, float | None] = {}  # a cache for `loss`
        retention = policies.PreserveAll() if read_only else _Retention(self, keep, keep_every)
        on_written = ocp.AsyncOptions(post_finalization_callback=self._write_manifest)
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=_handlers(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=retention,
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=not read_only,
                async_options=None if read_only else on_written,
                temporary_path_class=_finalization(workdir),
            ),
        )

    def _write_manifest(self) -> None:
        """Called when a checkpoint's files are written, before it gets its final name."""
        if jax.process_index() == 0:
            write_manifest(self._unfinished())

    def _unfinished(self) -> epath.Path:
        """Returns the folder of the running save: on a file system it has a temporary name; on an
        object store it has its final name and lacks Orbax's commit file."""
        final = self.folder / str(self.saving)
        return next(self.folder.glob(f"{self.saving}.orbax-checkpoint-tmp*"), final)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, whole or not, ascending."""
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """Returns the newest checkpoint's step, whole or not."""
        return self.manager.latest_step()

    def damage(self, step: int) -> str:
        """Returns what is wrong with a checkpoint, '' if nothing is."""
        return damage(self.folder / str(step))

    def whole(self) -> list[int]:
        """Returns the steps of the checkpoints that are whole, ascending."""
        return [step for step in self.steps() if not self.damage(step)]

    def loss(self, step: int) -> float | None:
        """Returns the validation loss saved with a checkpoint, None if there is none."""
        if step not in self.losses:
            self.losses[step] = loss_of(self.folder / str(step))
        return self.losses[step]

    def by_loss(self, steps: list[int] | None = None) -> list[int]:
        """Returns those of `steps` (default: all) that have a validation loss, best first, then
        earliest first."""
        steps = self.steps() if steps is None else steps
        with_loss = [step for step in steps if self.loss(step) is not None]
        return sorted(with_loss, key=lambda step: (self.loss(step), step))

    def newest_whole(self) -> int | None:
        """Returns the newest whole checkpoint, after moving damaged ones out of the way.

        Damaged checkpoints that are newer, or whose loss is lower than that of the best whole one,
        are moved to `checkpoints-damaged/`, and one line says what is wrong with each. What a
        killed save left is removed.
        """
        self._wait()
        self.losses.clear()
        newest = on_first(self._find_newest_whole)
        self.losses.clear()  # this process may have read the loss of one that was set aside
        self.manager.reload()
        return newest

    def _find_newest_whole(self) -> int | None:
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
            remove_folder(unfinished)
        newest = self._first_whole(reversed(self.steps()), self._set_aside)
        better = itertools.takewhile(lambda step: step != newest, self.by_loss())
        self._first_whole(better, self._set_aside)
        return newest

    def _first_whole(self, steps: Iterable[int], remedy: Callable[[int], str]) -> int | None:
        """Returns the first whole checkpoint. Of each damaged one before it a line says what is
        wrong, and what `remedy(step)` did about it."""
        for step in steps:
            if not (fault := self.damage(step)):
                return step
            say(f"damaged   checkpoint {step}: {fault}; {remedy(step)}")
        return None

    def _set_aside(self, step: int) -> str:
        aside = self.folder.parent / SET_ASIDE
        target = aside / f"{step}.{len(list(aside.glob(f'{step}.*')))}"
        move_folder(self.folder / str(step), target)
        return f"set aside as {target}"

    def pick(self, step: int | str | None) -> int:
        """Returns the checkpoint that a command uses: `step`, or the best for `step="best"`.

        For None it is the newest whole one, except that of a run that stopped early it is the best,
        and a line says so.

        Raises:
          BadInput: if there is no such checkpoint (the message lists the existing ones), or it is
            damaged.
        """
        steps = self.steps()
        if not steps:
            raise BadInput(f"{self.folder} holds no checkpoint; train first")
        if step == BEST:
            return self._best()
        if step is not None:
            if step not in steps:
                raise BadInput(f"{self.folder} holds no checkpoint {step}, only {steps}")
            if fault := self.damage(step):
                raise BadInput(f"checkpoint {step} in {self.folder} is damaged: {fault}")
            return step
        newest = self._first_whole(reversed(steps), lambda _: "trying the one before")
        if newest is None:
            raise BadInput(f"{self.folder} holds no whole checkpoint, of {steps}")
        if not has_stopped_early(self.meta(newest)):
            return newest
        best = self._best()
        say(
            f"best      using checkpoint {best} with validation loss {self.loss(best):.4f}, as the"
            f" run stopped early; --step={newest} is its newest"
        )
        return best

    def _best(self) -> int:
        best = self._first_whole(self.by_loss(), lambda _: "trying the next best")
        if best is None:
            raise BadInput(
                f"{self.folder} holds no whole checkpoint with a validation loss, of"
                f" {self.steps()}; name one of them"
            )
        return best

    def save(self, step: int, state, meta: dict, loss: float | None = None) -> None:
        """Starts saving; blocks only until the arrays are copied off the devices.

        `loss` is the validation loss at this step, if it is known.

        Raises:
          BadInput: if this or the last save could not be written (disk full, no permission).
        """
        self._wait()
        meta = meta if loss is None else meta | {"validation_loss": loss}
        self.losses[step] = loss_in(meta, step)
        self.snapshot = _snapshot(state, self.snapshot)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(self.snapshot or state), meta=ocp.args.JsonSave(meta)
        )
        self.saving, self.start_save = step, lambda: self.manager.save(step, args=args)
        self._write(self.start_save)

    def _wait(self) -> None:
        self._write(self.manager.wait_until_finished)
        self.start_save = None

    def _save_again(self, why: TimeoutError) -> None:
        """Repeats a save that timed out, if its state is still in memory.

        Orbax measures by the wall clock, so the clock may have jumped or a laptop slept. If the
        state is gone, a later checkpoint has to do.
        """
        say(f"unsaved   checkpoint {self.saving}: {why}")
        self.manager.reload()
        if self.saving not in self.steps():
            remove_folder(self._unfinished())
        if self.snapshot is not None:
            self.start_save()
            self.manager.wait_until_finished()

    def _write(self, write: Callable[[], object]) -> None:
        """Calls `write`; raises `BadInput` for what Orbax raises if it cannot write."""
        try:
            try:
                write()
            except TimeoutError as e:
                if jax.process_count() > 1 or not self.start_save:
                    raise
                self._save_again(e)
        except (OSError, ValueError, RuntimeError, AssertionError) as e:
            if is_peer_lost(e):
                raise
            whole = next((s for s in reversed(self.steps()) if not self.damage(s)), None)
            rest = f"the newest whole one is {whole}" if whole is not None else "there is none yet"
            raise BadInput(
                f"checkpoint {self.saving} cannot be written to {self.folder}: {_reason(e)}; {rest}"
            ) from e

    def restore(self, step: int, abstract_state) -> tuple:
        """Returns (state, meta), laid out as `abstract_state`'s shardings say.

        `abstract_state` comes from `jax.eval_shape`; mesh and dtypes may differ from those saved.

        Raises:
          BadInput: naming the first array that is missing, unknown or of another shape.
        """
        self._wait()
        self._check_arrays(step, abstract_state)
        return self._read(step, concrete(abstract_state)), self.meta(step)

    def _check_arrays(self, step: int, abstract_state) -> None:
        saved, wanted = self.arrays(step), leaves_by_path(abstract_state)
        where = f"checkpoint {step} in {self.folder}"
        for path, leaf in wanted.items():
            if path not in saved:
                raise BadInput(f"{where} has no array {path}: it is of another model or optimizer")
            if tuple(saved[path].shape) != tuple(leaf.shape):
                raise BadInput(
                    f"{where}: array {path} has shape {tuple(saved[path].shape)}, this run's is"
                    f" {tuple(leaf.shape)}"
                )
        if extra := next((path for path in saved if path not in wanted), None):
            raise BadInput(f"{where} has an array {extra}, which this run does not have")

    def arrays(self, step: int) -> dict:
        """Returns the shape and dtype of each saved array by its path, without reading any."""
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            metadata = reader.metadata(self.folder / str(step) / "state")
        return leaves_by_path(metadata.item_metadata.tree)

    def meta(self, step: int) -> dict:
        """Returns what was saved beside the state."""
        return read_meta(self.folder / str(step))

    def restore_params(self, step: int, abstract_params: dict, average: bool = False) -> dict:
        """Returns the state's parameters, or their average in float32, without reading the rest."""
        name, item = "ema" if average else "params", concrete(abstract_params)
        if average:
            item = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.float32), item)
        return self._read(step, {name: item}, partial=True)[name]

    def _read(self, step: int, item, partial: bool = False):
        shardings = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=shardings, partial_restore=partial)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self.folder / str(step) / "state", args=args)

    def close(self) -> None:
        """Waits for the last save. Raises `BadInput` if it could not be written."""
        self._wait()
        self.manager.close()


def _finalization(workdir) -> type:
    """Returns how a save becomes final: on a file system the folder is renamed, which is atomic; on
    an object store, where renaming copies file by file, a commit file is written last."""
    if is_object_store(workdir):
        if str(workdir).startswith("s3:"):
            use_s3()
        return atomicity.CommitFileTemporaryPath
    return atomicity.AtomicRenameTemporaryPath


def _reason(e: Exception) -> str:
    """Returns the first line of an error of Orbax, of a long one its end, which has the reason."""
    lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return lines[0] if len(lines[0]) < 300 else f"... {lines[0][-250:]}"


def _snapshot(state, old):
    """Returns a copy of `state`, in the memory of the `old` copy if there is one; None on an
    accelerator, where Orbax copies to the host itself.

    On a CPU Orbax would use the state's own memory until it is written, so that the next step could
    not be donated it: with 1.5 GB that cost 3 s a save (tests/benchmarks/RESULTS.md).
    """
    if jax.local_devices()[0].platform != "cpu":
        return None
    return _copy(state, old)


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copy(state, old):
    return jax.tree.map(jnp.copy, state)


def _handlers() -> dict:
    """Returns handlers that write one uncompressed file per chunk of an array.

    Orbax's default (few files, zstd) took nine times as long to write 1.5 GB of state on two cores,
    needed 0.7 times that in memory, and saved a tenth of the disk (tests/benchmarks/RESULTS.md).
    """
    arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    return {"state": arrays, "meta": ocp.JsonCheckpointHandler()}


class _Retention:
    """Keeps the newest checkpoints, the best by the losses on disk, and every so many steps.

    Orbax's own policy knows only the losses of this process, and would delete the best checkpoint
    after a workdir is reopened.
    """

    def __init__(self, checkpoints: Checkpoints, newest: int, every: int):
        self.checkpoints, self.newest, self.every = checkpoints, newest, every

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = self.checkpoints.by_loss(steps)[:1]
        kept = {*sorted(steps)[-self.newest :], *best}
        return [step in kept or (self.every > 0 and step % self.every == 0) for step in steps]


def save_weights(workdir, params: dict, meta: dict) -> None:
    """Writes parameters alone as checkpoint 0, from host arrays, without a copy in memory.

    JAX's CPU arrays can share the memory of NumPy arrays that are aligned to 64 bytes.

    Raises:
      BadInput: if they cannot be written.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    state = {"params": jax.device_put(params, cpu, may_alias=True)}
    folder = absolute(workdir) / "checkpoints"
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2 << 20), state)
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=chunks), meta=ocp.args.JsonSave(meta)
    )
    try:
        manager = ocp.CheckpointManager(
            folder,
            item_handlers=_handlers(),
            options=ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False),
        )
        manager.save(0, args=args)
        manager.close()
        write_manifest(folder / "0")
    except (OSError, ValueError, RuntimeError) as e:
        raise BadInput(f"weights cannot be written to {folder}: {_reason(e)}") from e


def concrete(abstract):
    """Returns `abstract` with each sharding on the current mesh's devices.

    The shardings of `eval_shape` are on an abstract mesh, without devices; scalars, which are on
    every device, have none.
    """
    mesh = jax.sharding.get_mesh()

    def on_mesh(leaf):
        spec = leaf.sharding.spec if leaf.sharding else jax.P()
        return leaf.update(sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(on_mesh, abstract)
