"""Orbax checkpoints of the whole training state under `checkpoints/<step>`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies
from orbax.checkpoint.path import atomicity

from jaxgpt.checkpointing.choice import BEST, has_stopped_early, loss_in, loss_of, read_meta
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
    """The checkpoints of one workdir. Saving is asynchronous and atomic; the newest `keep`, the one
    of the least validation loss and every `keep_every`-th step stay.

    Each holds `state` (any pytree of arrays), `meta` (a JSON dict: tokens seen, seconds trained,
    data fingerprint, seed, versions), the validation loss if there was one, and a manifest.
    """

    def __init__(self, workdir, keep: int = 1, keep_every: int = 0, read_only: bool = False):
        check_store(workdir)
        self.folder = absolute(workdir) / "checkpoints"
        if read_only and not self.folder.exists():
            raise BadInput(f"{workdir} has no checkpoints; train first")
        self.saving: int | None = None
        self.again = self.snapshot = None  # of the save under way
        self.losses: dict[int, float | None] = {}  # of each step, as far as they were asked for
        sealed = ocp.AsyncOptions(post_finalization_callback=self._seal)
        self.manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=_handlers(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.PreserveAll()
                if read_only
                else _Kept(keep, keep_every, self.loss),
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=not read_only,
                async_options=None if read_only else sealed,
                temporary_path_class=_way_to_finish(workdir),
            ),
        )

    def _seal(self) -> None:
        """Writes the manifest of a checkpoint whose files are written; it does not count yet."""
        if jax.process_index() == 0:
            write_manifest(self._unfinished())

    def _unfinished(self) -> epath.Path:
        """Returns the folder of the save under way: on a file system it has a temporary name; on an
        object store it has its final name and lacks Orbax's commit file."""
        named = self.folder / str(self.saving)
        return next(self.folder.glob(f"{self.saving}.orbax-checkpoint-tmp*"), named)

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

    def by_loss(self) -> list[int]:
        """Returns the steps of the checkpoints that have a validation loss, best first."""
        return _by_loss(self.steps(), self.loss)

    def newest_whole(self) -> int | None:
        """Returns the newest checkpoint that is whole; damaged ones before it are set aside, and
        so are those that seem better than the best whole one. What a kill left of a save is
        removed.

        They move to `checkpoints-damaged/`, each with a line that says what is wrong.
        """
        self._wait()
        self.losses.clear()
        found = on_first(self._find_whole)
        self.losses.clear()  # another process may have read what is set aside now
        self.manager.reload()
        return found

    def _find_whole(self) -> int | None:
        for half in self.folder.glob("*.orbax-checkpoint-tmp*"):
            remove_folder(half)
        newest = self._first_whole(reversed(self.steps()))
        for step in self.by_loss():  # what was set aside has no loss any more
            if step == newest or self._first_whole([step]) == step:
                break
        return newest

    def _first_whole(self, steps) -> int | None:
        for step in steps:
            if not (fault := self.damage(step)):
                return step
            aside = self.folder.parent / SET_ASIDE
            number = len(list(aside.glob(f"{step}.*")))
            move_folder(self.folder / str(step), aside / f"{step}.{number}")
            say(f"damaged   checkpoint {step}: {fault}; set aside as {aside}/{step}.{number}")
        return None

    def pick(self, step: int | str | None) -> int:
        """Returns `step`, the best one's where it is "best", else the newest whole one's; of a run
        that stopped early that is the best one's too, with a line that says so.

        Raises:
          BadInput: if there is no such checkpoint (the message lists those there are), or the one
            that is asked for is damaged.
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
        newest = self._whole_of(reversed(steps), "trying the one before")
        if newest is None:
            raise BadInput(f"{self.folder} holds no checkpoint that is whole, of {steps}")
        if not has_stopped_early(self.meta(newest)):
            return newest
        best = self._best()
        say(
            f"best      using checkpoint {best}, of validation loss {self.loss(best):.4f}, as the"
            f" run stopped early; --step={newest} is its newest"
        )
        return best

    def _best(self) -> int:
        if (best := self._whole_of(self.by_loss(), "trying the next best")) is None:
            raise BadInput(
                f"{self.folder} holds no whole checkpoint with a validation loss, of"
                f" {self.steps()}; name one of them"
            )
        return best

    def _whole_of(self, steps, otherwise: str) -> int | None:
        for step in steps:
            if not (fault := self.damage(step)):
                return step
            say(f"damaged   checkpoint {step}: {fault}; {otherwise}")
        return None

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
        self.saving = step
        self.again = lambda: self.manager.save(step, args=args)
        self._guarded(self.again)

    def _wait(self) -> None:
        self._guarded(self.manager.wait_until_finished)
        self.again = None

    def _retry(self, why: TimeoutError) -> None:
        """Saves once more, where the state is still there, after a timeout.

        Orbax counts by the wall clock, so that one comes of a clock that jumps or a laptop that
        slept. Where the state is gone, later checkpoints hold what this one would have.
        """
        say(f"unsaved   checkpoint {self.saving}: {why}")
        self.manager.reload()
        if self.saving not in self.steps():
            remove_folder(self._unfinished())
        if self.snapshot is not None:
            self.again()
            self.manager.wait_until_finished()

    def _guarded(self, act) -> None:
        try:
            try:
                act()
            except TimeoutError as e:
                if jax.process_count() > 1 or not self.again:
                    raise
                self._retry(e)
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
          BadInput: naming the first array that has another shape or is not there.
        """
        self._wait()
        self._compare(step, abstract_state)
        item = concrete(abstract_state)
        placed = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(item, restore_args=placed))
        return self.manager.restore(step, args=args).state, self.meta(step)

    def _compare(self, step: int, abstract_state) -> None:
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
            raise BadInput(f"{where} has an array {extra}, which this run has not")

    def arrays(self, step: int) -> dict:
        """Returns the shape and dtype of each saved array by its path, reading none of them."""
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.metadata(self.folder / str(step) / "state")
        return leaves_by_path(found.item_metadata.tree)

    def meta(self, step: int) -> dict:
        """Returns what was saved beside the state."""
        return read_meta(self.folder / str(step))

    def restore_params(self, step: int, abstract_params: dict, average: bool = False) -> dict:
        """Returns the state's parameters, or their average in float32, without reading the rest."""
        name, item = "params", concrete(abstract_params)
        if average:
            name = "ema"
            item = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.float32), item)
        item = {name: item}
        args = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            path = self.folder / str(step) / "state"
            return reader.restore(path, args=args)[name]

    def close(self) -> None:
        """Waits until the last save is whole.

        Raises:
          BadInput: if it could not be written.
        """
        self._wait()
        self.manager.close()


def _way_to_finish(workdir) -> type:
    """Returns how a save ends: a folder takes its final name, which is atomic on a file system; an
    object store, which copies file by file to rename, gets a commit file at the end."""
    if is_object_store(workdir):
        use_s3()
        return atomicity.CommitFileTemporaryPath
    return atomicity.AtomicRenameTemporaryPath


def _reason(e: Exception) -> str:
    """Returns the first line of an error of Orbax; the end of a long one has the reason."""
    lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return lines[0] if len(lines[0]) < 300 else f"... {lines[0][-250:]}"


def _snapshot(state, old):
    """Returns a copy of `state`, in the memory of the `old` one if there is one; on an accelerator
    None, as there Orbax copies to the host.

    On a CPU it would share the state's memory until it is written, and the next step then moves to
    new memory: of 1.5 GB, that cost 3 s a save (tests/benchmarks/RESULTS.md).
    """
    if jax.local_devices()[0].platform != "cpu":
        return None
    return _copy(state) if old is None else _copy_into(state, old)


@jax.jit
def _copy(state):
    return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copy_into(state, old):
    return jax.tree.map(jnp.copy, state)


def _handlers() -> dict:
    """A file for each chunk of an array, as it is. Orbax's default, few files and zstd, took nine
    times as long to write 1.5 GB of state on two cores, gathered 0.7 times that in memory, and
    saved a tenth of the disk (tests/benchmarks/RESULTS.md)."""
    arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    return {"state": arrays, "meta": ocp.JsonCheckpointHandler()}


class _Kept:
    """Which checkpoints stay: the newest, the best by the losses on disk, and every so many steps.

    Orbax's own policy knows the losses of this process alone, and after reopening a workdir would
    delete the best checkpoint.
    """

    def __init__(self, newest: int, every: int, loss: Callable[[int], float | None]):
        self.newest, self.every, self.loss = newest, every, loss

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.newest :], *_by_loss(steps, self.loss)[:1]}
        return [step in kept or (self.every > 0 and step % self.every == 0) for step in steps]


def _by_loss(steps: list[int], loss: Callable[[int], float | None]) -> list[int]:
    return sorted((s for s in steps if loss(s) is not None), key=lambda s: (loss(s), s))


def save_weights(workdir, params: dict, meta: dict) -> None:
    """Writes parameters alone as checkpoint 0, from host arrays, in little more memory than theirs.

    JAX's CPU arrays may share the memory of arrays that are aligned to 64 bytes.

    Raises:
      BadInput: if they cannot be written.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    place = functools.partial(jax.device_put, device=cpu, may_alias=True)
    state = {"params": jax.tree.map(place, params)}
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

    `eval_shape` gives shardings on an abstract mesh, which name axes but no devices, and none
    to a scalar, which lives on every device.
    """
    mesh = jax.sharding.get_mesh()

    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding else jax.P()
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)
