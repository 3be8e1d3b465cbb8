"""A training run, from whatever its workdir holds to its end."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import jax
from etils import epath

from jaxgpt.checkpointing.checkpoints import Checkpoints
from jaxgpt.config import Config
from jaxgpt.config.fields import INT32
from jaxgpt.config.stored import check_resume, read_config, to_json
from jaxgpt.data.pipeline import Stream
from jaxgpt.data.prepare import Data, check_shards
from jaxgpt.data.show import Example, in_shell, save_example
from jaxgpt.inference.chat import Chat
from jaxgpt.inference.decode import has_sliding_context
from jaxgpt.inference.generation import encode_request
from jaxgpt.inference.requests import GenerationRequest
from jaxgpt.interchange.init_from import check_model, check_source
from jaxgpt.metrics.progress import duration
from jaxgpt.metrics.rows import Reporter
from jaxgpt.metrics.trackers import Trackers, open_trackers
from jaxgpt.ops.context.sharded import said
from jaxgpt.ops.sparse.kernels import kernel_name
from jaxgpt.optim.groups import split, trainable
from jaxgpt.optim.schedules import warmup_steps
from jaxgpt.parallel.mesh import AXES, make_mesh
from jaxgpt.parameters.flops import count_parameters
from jaxgpt.processes import hosts
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import locked, write_whole
from jaxgpt.system.stores import is_object_store, read_bytes
from jaxgpt.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from jaxgpt.tokenizer.load import fingerprint
from jaxgpt.training.end import forget_end, record_end
from jaxgpt.training.loop import DIVERGED, Loop, restore_or_init
from jaxgpt.training.memory import check_memory
from jaxgpt.training.objectives import companions_of
from jaxgpt.training.setup import Training, make_training, resolve_vocab
from jaxgpt.training.warm_start import check_vocabulary

LONG_WARMUP = 0.2  # the share of a run from which on its warm-up is probably a slip


def train(workdir: epath.Path, config: Config) -> int:
    """Trains the run of `config` in `workdir`, from wherever it is; returns the exit code.

    Everything is checked before anything is written: the config, then the data, then the memory.
    """
    config, changes = adopt(workdir, config)
    companions_of(config.objective).check(config)
    mesh = make_mesh(config)
    if not config.num_epochs and is_finished(workdir, config):
        return 0
    data = companions_of(config.objective).prepare(config)
    config = complete(config, data, workdir)
    if config.num_epochs and is_finished(workdir, config):
        return 0
    run = make_training(config, mesh)
    with jax.set_mesh(mesh):
        check_memory(run.abstract_state(), mesh, run.abstract_companions())
        hosts.check_same(to_json(config), "the config")
        hosts.check_same(data.fingerprint, "the prepared text or tokenizer")
        hosts.check_same(str(run.companions.reference), f"what {config.objective} learns from")
        stream, example = run.companions.stream(config, data), run.companions.example(config, data)
        describe(run, data, stream, workdir)
        evaluate = run.companions.evaluator(run.spec, run.batch_sharding, data)
        sample = run.companions.training_sample(run.spec, data, example)
        with only_trainer(workdir):
            checkpoints = Checkpoints(workdir, config.keep_checkpoints, config.keep_every)
            state, history = restore_or_init(run, data, checkpoints)
            restored = int(state.step)
            if restored >= config.num_steps:  # the newest checkpoint was damaged
                return say_finished(workdir, checkpoints, restored, config)
            write_setup(workdir, config, data, example, is_new=not restored)
            if history.is_out_of_patience(config.early_stop):
                return say_stopped_early(workdir, restored, checkpoints)
            if restored:
                changed = f" with {'; '.join(changes)}" if changes else ""
                say(f"resume    from checkpoint {restored}{changed}")
            hosts.on_first(lambda: forget_end(workdir))
            stream = run.companions.taught(stream, data)
            trackers = trackers_of(config, workdir, bool(restored))
            step = compile_step(run)
            report = Reporter(workdir, restored, jax.process_index() == 0, trackers)
            loop = Loop(run, data, stream, evaluate, sample, step, checkpoints, report, history)
            code = tracked(trackers, partial(loop, state))
            report.close()
            if jax.process_index() == 0:
                conclude(code, loop, workdir, example)
            return code


def complete(config: Config, data: Data, workdir: epath.Path) -> Config:
    """Returns `config` with what follows from the data: `num_steps` of `num_epochs`, the
    vocabulary's size, and the objective's (labels)."""
    if not (workdir / "config.json").exists():
        check_shards(config.data, data)  # runs from before keep the shards' own
        if config.init_from:
            check_vocabulary(config, data.tokenizer)
    companions = companions_of(config.objective)
    companions.check_tokenizer(config, data.tokenizer)
    config = companions.completed(config, data)
    return resolve_vocab(resolve_epochs(config, data), data.tokenizer.vocab_size)


def write_setup(
    workdir: epath.Path, config: Config, data: Data, example: Example, is_new: bool
) -> None:
    """Writes `config.json` and, of a new run, the tokenizer with what serves prompts."""
    if not is_new:
        check_tokenizer(workdir, data)
    elif jax.process_index() == 0:
        save_tokenizer(data.tokenizer, workdir / "tokenizer")
        companions_of(config.objective).save(config, data, workdir / "tokenizer")
        save_example(example, workdir / "tokenizer")
    hosts.on_first(lambda: write_whole(workdir / "config.json", to_json(config)))
    check_shared(workdir)


def trackers_of(config: Config, workdir: epath.Path, is_resumed: bool) -> Trackers:
    """Returns the run's experiment trackers, which only the first process has."""
    opened = [Trackers()]

    def open_() -> None:
        opened[0] = open_trackers(config, workdir, is_resumed)

    hosts.on_first(open_)
    return opened[0]


def tracked(trackers: Trackers, loop: Callable[[], int]) -> int:
    """Returns the exit code of `loop`, which the trackers are told; 1 for an error."""
    code = 1
    try:
        code = loop()
    finally:
        trackers.close(code)
    return code


def compile_step(run: Training) -> Callable:
    """Returns the compiled train step, and says how long that took."""
    began = time.perf_counter()
    step = run.compile_step()
    say(f"compile   the train step took {duration(time.perf_counter() - began)}")
    return run.beside_companions(step)


def conclude(code: int, loop: Loop, workdir: epath.Path, example: Example) -> None:
    """Records how a run ended, unless a signal stopped it, and says what to do next."""
    if code not in (0, DIVERGED):
        return
    history, last_step = loop.history, loop.checkpoints.latest() or 0
    early = history.is_out_of_patience(loop.config.early_stop)
    reason = "early_stop" if early else "num_steps"
    record_end(workdir, last_step, "diverged" if code == DIVERGED else reason)
    if code == 0:
        step = " --step=best" if better_than(last_step, loop.checkpoints) else ""
        prompt = sample_flags(example, loop.data.tokenizer, loop.config)
        say(
            f"done      {outcome(loop)} in {duration(history.training_seconds())}; everything is in"
            f" {workdir}\n"
            f"next      python -m jaxgpt.sample --workdir={workdir}{step} {prompt}\n"
            f"          python -m jaxgpt.evaluate --workdir={workdir}{step}\n"
            f"          tensorboard --logdir={workdir}/tensorboard"
        )


def sample_flags(example: Example, tokenizer: Tokenizer, config: Config) -> str:
    """Returns the flags with which `sample` continues the example, also in a short context."""
    flags = f"--prompt={in_shell(example.prompt)}"
    request = GenerationRequest(example.prompt)
    if example.is_chat:
        flags = f"--chat {flags}"
        request = Chat(config.data.chat_template).ask(request)
    room = config.model.max_seq_len - len(encode_request(tokenizer, request))
    if room >= request.max_new_tokens or has_sliding_context(config.model):
        return flags
    return f"{flags} --max_new_tokens={room}" if room > 0 else f"{flags} --beyond_context=slide"


def say_stopped_early(workdir: epath.Path, step: int, checkpoints: Checkpoints) -> int:
    """Says that early stopping has ended the run, and records it; returns the exit code."""
    hosts.on_first(lambda: record_end(workdir, step, "early_stop"))
    early = f"{workdir} stopped early after step {step}"
    say(f"finished  {'; '.join([early, *better_than(step, checkpoints)])}")
    return 0


@contextmanager
def only_trainer(workdir: epath.Path) -> Iterator[None]:
    """Holds `workdir` against a second trainer, until this process ends in whatever way; not on an
    object store, which has no locks. Raises `BadInput` if another one trains in it now."""

    def refuse():
        raise BadInput(f"another process trains in {workdir} now; choose another --workdir")

    def lock():
        if not is_object_store(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            until_the_end.enter_context(locked(workdir, refuse))

    with ExitStack() as until_the_end:
        hosts.on_first(lock)
        yield


def outcome(loop: Loop) -> str:
    """Says how a finished run ended."""
    last, num_steps = loop.last_validation, loop.config.num_steps
    if last is None:  # it failed
        return f"no validation loss after {num_steps} steps"
    early = ["stopped early"] if last["step"] != num_steps else []
    notes = early + better_than(last["step"], loop.checkpoints)
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f} nats/token"
    end = f" ({'; '.join(notes)})" if notes else ""
    return f"validation loss {loss} after {last['step']} steps{end}"


def better_than(step: int, checkpoints: Checkpoints) -> list[str]:
    """Says which checkpoint is the best, unless that is the one at `step` or none has a loss."""
    best = next(iter(checkpoints.by_loss()), step)
    if best == step:
        return []
    return [f"the best checkpoint is {best}, loss {checkpoints.loss(best):.4f}: --step=best"]


def adopt(workdir: epath.Path, config: Config) -> tuple[Config, list[str]]:
    """Returns the config to run with in `workdir` and what it changes of the run in there. Raises
    `BadInput` if a run is there whose config differs in what may not change."""
    if not (workdir / "checkpoints").exists() or not (workdir / "config.json").exists():
        if config.init_from:
            check_source(config.init_from)
            check_model(config)
            say(
                f"start     from {config.init_from}, with a context of {config.model.max_seq_len:,}"
                f" and the tokenizer {config.data.tokenizer}"
            )
        return config, []
    if (workdir / "checkpoints" / "0").exists():
        raise BadInput(
            f"{workdir} holds imported weights: start from them in another --workdir, with"
            f" --config.init_from={workdir}"
        )
    old = read_config(workdir)
    config.model.vocab_size = config.model.vocab_size or old.model.vocab_size
    config.shrink.done = old.shrink.done  # a record, which versions kept differently
    config = companions_of(config.objective).adopted(config, old)
    return config, check_resume(old, config, workdir)


def resolve_epochs(config: Config, data: Data) -> Config:
    """Returns `config` with `num_steps` set by `num_epochs`, where that is given."""
    if not config.num_epochs:
        return config
    chunks = sum(map(len, companions_of(config.objective).stream(config, data).sources))
    steps = max(1, round(config.num_epochs * chunks / config.batch_size))
    if steps > INT32:
        raise BadInput(f"num_epochs={config.num_epochs} is {steps:,} steps, more than {INT32:,}")
    return dataclasses.replace(config, num_steps=steps)


def is_finished(workdir: epath.Path, config: Config) -> bool:
    """Says, also to the user, whether the run in `workdir` has nothing left to do."""
    if not (workdir / "checkpoints").exists() or not (workdir / "config.json").exists():
        return False
    checkpoints = Checkpoints(workdir, read_only=True)
    done = checkpoints.latest() or 0
    if done < config.num_steps or checkpoints.damage(done):
        return False
    say_finished(workdir, checkpoints, done, config)
    return True


def say_finished(workdir: epath.Path, checkpoints: Checkpoints, done: int, config: Config) -> int:
    """Says that the run has nothing left to do and, where it has done more than `num_steps`, which
    checkpoint is the nearest; returns the exit code."""
    wanted = config.num_steps
    if done == wanted:
        line = f"all {done} of num_steps={wanted} steps; raise --config.num_steps to train on"
    else:
        near = min(checkpoints.steps(), key=lambda step: abs(step - wanted))
        line = (
            f"{done} steps, more than num_steps={wanted}; the nearest checkpoint is {near}"
            f" (--step={near}); a run of {wanted} steps needs another --workdir"
        )
    say(f"finished  {workdir} has {line}")
    return 0


def check_shared(workdir: epath.Path) -> None:
    """Raises `BadInput` if not all processes see the same `workdir`."""
    file = workdir / "config.json"
    seen = read_bytes(file).decode() if file.exists() else "nothing"
    hosts.check_same(seen, f"{workdir}/config.json, in the folder that all hosts must share,")


def check_tokenizer(workdir: epath.Path, data: Data) -> None:
    """Raises `BadInput` if the tokenizer in a resumed workdir is no longer the data's."""
    if fingerprint(load_tokenizer(workdir / "tokenizer")) != fingerprint(data.tokenizer):
        raise BadInput(
            f"{workdir}/tokenizer is not the tokenizer that data.source was prepared with; restore"
            " it, or choose another --workdir"
        )


def trained_share(config: Config, params: dict) -> str:
    """Says how many parameters are trained, where that is not all."""
    mask = trainable(params, config.optim.freeze, config.lora.rank)
    sizes = [leaf.size for leaf in jax.tree.leaves(split(params, mask)[0])]
    every = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (
        ""
        if sum(sizes) == every
        else f" ({sum(sizes):,} of them trained, {sum(sizes) / every:.2%})"
    )


def describe(training: Training, data: Data, stream: Stream, workdir: epath.Path) -> None:
    """Says what runs where."""
    config, devices = training.config, training.mesh.devices
    model = config.model
    params = training.abstract_state().params
    epochs = config.num_steps * config.batch_size / sum(map(len, stream.sources))
    kind = devices.flat[0].device_kind
    shape = " x ".join(f"{axis} {training.mesh.shape[axis]}" for axis in AXES)
    kernel, sizes = training.spec.kernel, training.mesh.shape
    attention = kernel_name(model, kernel) + said(config, sizes, kernel)
    say(
        f"devices   {devices.size} x {kind}, {jax.process_count()} process(es), mesh {shape},"
        f" jax {jax.__version__}\n"
        f"model     {count_parameters(params, model):,} parameters{trained_share(config, params)}:"
        f" {model.num_layers} layers,"
        f" {model.num_heads} heads, width {model.embed_dim}, context {model.max_seq_len};"
        f" {config.compute.dtype}, attention {attention}, remat {config.compute.remat}\n"
        f"data      {data} of {data.tokenizer.vocab_size:,} kinds, from {data.folder}\n"
        f"plan      {config.num_steps:,} steps of {config.batch_size} x {model.max_seq_len} tokens"
        f" ({epochs:.2f} epochs) into {workdir}"
    )
    warmup = warmup_steps(config.optim, config.num_steps)
    if warmup > LONG_WARMUP * config.num_steps:
        say(
            f"warning   the warm-up takes {warmup:,} of {config.num_steps:,} steps; for a twentieth"
            " of them: --config.optim.warmup_steps=0 --config.optim.warmup_fraction=0.05"
        )
