"""The teacher of `objective=distill`: found, checked, laid out on the mesh, never trained."""

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from jaxgpt.checkpointing.checkpoints import concrete
from jaxgpt.config import ComputeConfig, Config, LoraConfig, ShrinkConfig
from jaxgpt.config.schema import MESH_AXES
from jaxgpt.config.stored import read_config
from jaxgpt.config.validate import check_divisible
from jaxgpt.data.chunks import Chunks
from jaxgpt.data.pipeline import Stream
from jaxgpt.data.prepare import Prepared, cache_folder
from jaxgpt.distillation.layers import layer_pairs, make_projection
from jaxgpt.distillation.objective import output
from jaxgpt.distillation.records import Records, TaughtChunks, records_folder
from jaxgpt.distillation.top_k import most_likely
from jaxgpt.hub.models import located
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.init_from import check_source, is_workdir, tokenizer_of
from jaxgpt.interchange.load import load_weights, put_like
from jaxgpt.metrics.progress import Bar
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.companions import INT32, Companions
from jaxgpt.objectives.language import hidden
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import locked
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.tokenizer import Tokenizer, make_tokenizer
from jaxgpt.tokenizer.compare import difference
from jaxgpt.tokenizer.load import is_trained

FIELD = "objectives.distill.teacher"


def check_teacher(config: Config) -> None:
    """Raises `BadInput` if there is no teacher, or it cannot teach this student; reads no weights.

    A tokenizer that is trained on the corpus is compared once it is there: `check_tokenizer`.
    """
    path = config.objectives.distill.teacher
    check_source(path, FIELD)
    kind, source = config.data.tokenizer, config.data.source
    if tokenizer_of(path) is None:
        say(f"teacher   {path} holds no tokenizer: data.tokenizer={kind} must be the one it knows")
    model, mine = teacher_config(config).model, config.model
    if model.kind != mine.kind:
        raise BadInput(
            f"{FIELD}={path} is an {model.kind.replace('_', '-')}: the teacher of a {mine.kind} is"
            f" a {mine.kind}"
        )
    if model.max_seq_len < mine.max_seq_len:
        raise BadInput(
            f"{FIELD}={path} takes {model.max_seq_len:,} tokens at once, fewer than"
            f" model.max_seq_len={mine.max_seq_len:,}"
        )
    layers = config.objectives.distill.hidden_layers
    layer_pairs(layers, mine.num_layers, model.num_layers)
    if not is_trained(kind) and not source.startswith("shards:"):
        check_tokenizer(config, make_tokenizer(kind, (), config.data.special_tokens))


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Raises `BadInput` if the teacher's tokenizer or vocabulary is not the student's."""
    path, kind = config.objectives.distill.teacher, config.data.tokenizer
    theirs = tokenizer_of(path)
    if theirs is not None and (found := difference(theirs, tokenizer)):
        raise BadInput(
            f"{FIELD}={path} has another tokenizer than data.tokenizer={kind}: {found}; set"
            f' data.tokenizer="" to take the teacher\'s'
        )
    size, mine = teacher_config(config).model.vocab_size, config.model.vocab_size
    if size != (mine or tokenizer.vocab_size):
        raise BadInput(
            f"{FIELD}={path} has a vocabulary of {size:,} tokens, the student of"
            f" {mine or tokenizer.vocab_size:,} (data.tokenizer={kind},"
            f" model.vocab_size={mine}); set model.vocab_size={size}"
        )
    if (k := config.objectives.distill.top_k) >= size:
        raise BadInput(f"objectives.distill.top_k={k} must be less than the {size:,} tokens")


def teacher_config(config: Config) -> Config:
    """Returns the teacher's own config, on the run's mesh and batches, with nothing random."""
    path = located(config.objectives.distill.teacher)
    if is_workdir(path):
        theirs = read_config(epath.Path(path))
    else:
        folder = open_folder(Path(path))
        dtype = "bfloat16" if folder.is_bfloat16 else "float32"
        compute = ComputeConfig(dtype=dtype, param_dtype=dtype)
        theirs = Config(model=folder.model, compute=compute)
    return dataclasses.replace(
        theirs,
        model=dataclasses.replace(theirs.model, dropout=0.0),
        compute=dataclasses.replace(
            theirs.compute, attention="auto", remat="none", fake_quantise="none"
        ),
        lora=LoraConfig(),  # these three are part of the weights that `load_weights` gives
        shrink=ShrinkConfig(),
        mesh=config.mesh,
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
    )


@dataclasses.dataclass(frozen=True)
class Teacher(Companions):
    """What `distill` needs beside the student."""

    check = staticmethod(check_teacher)
    check_tokenizer = staticmethod(check_tokenizer)

    @cached_property
    def spec(self) -> ModelSpec:
        """The teacher's model, in its own dtype and sharding. Raises `BadInput` if the mesh does
        not divide it."""
        config = teacher_config(self.config)
        try:
            check_divisible(config, {name: self.mesh.shape[name] for name in MESH_AXES})
        except BadInput as e:
            raise BadInput(f"{FIELD}={self.path}: {e}") from e
        return self.make_spec(config, self.mesh)

    @property
    def path(self) -> str:
        """Where the teacher is."""
        return self.config.objectives.distill.teacher

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """The models that the step takes beside the trained one, by name."""
        return {} if self.config.objectives.distill.top_k else {"teacher": self.spec}

    def batch_arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns those of running text, with `top_k` also the teacher's at each position."""
        arrays, k = super().batch_arrays(), self.config.objectives.distill.top_k
        shape = (self.config.model.max_seq_len, k)
        more = {"teacher_ids": (shape, INT32), "teacher_logs": (shape, np.dtype("float32"))}
        return arrays | (more if k else {})

    def own_parameters(self, spec: ModelSpec) -> dict:
        """Returns what is trained beside the model `spec`, by the objective's argument."""
        if not self.config.objectives.distill.hidden_weight:
            return {}
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)  # not the model's
        ours, theirs = spec.model, self.spec.model
        layers = self.config.objectives.distill.hidden_layers
        pairs = layer_pairs(layers, ours.num_layers, theirs.num_layers)
        shape = (*[len(pairs)] * bool(pairs), ours.embed_dim, theirs.embed_dim)
        dtype = self.config.compute.param_dtype
        return {"projection": make_projection(key, shape, dtype, spec.rules)}

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The parameters by path, on the host."""
        return load_weights(self.path, rounded=True)[0]

    @cached_property
    def reference(self) -> dict[str, str]:
        """What a checkpoint says about the teacher: where it was, and a hash of its model and
        weights."""
        return {"teacher": self.path, "fingerprint": self._fingerprint(self.weights)}

    def _fingerprint(self, weights: dict[str, np.ndarray]) -> str:
        model = dataclasses.asdict(self.spec.model)
        digest = hashlib.blake2b(json.dumps(model, sort_keys=True).encode(), digest_size=16)
        for path, array in sorted(weights.items()):
            digest.update(f"{path} {array.shape} {array.dtype}\n".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8))
        return digest.hexdigest()

    def check_reference(self, saved: dict, step: int) -> None:
        """Raises `BadInput` if checkpoint `step` was trained with another teacher."""
        known = saved.get("fingerprint")
        # Earlier versions hashed the weights before `compute.fake_quantise` rounds them
        if known != self.reference["fingerprint"] and known != self._fingerprint(
            load_weights(self.path)[0]
        ):
            raise BadInput(
                f"{FIELD}={self.path} is not the teacher of checkpoint {step}, which was"
                f" {saved.get('teacher')} (fingerprint {saved.get('fingerprint')}, here"
                f" {self.reference['fingerprint']}); name that one, or choose another --workdir"
            )

    def params(self) -> dict:
        """Returns the parameters on the mesh; call it under `jax.set_mesh`."""
        wanted = concrete(jax.eval_shape(self.spec.init, jax.random.key(0)))
        placed = {p: self._placed(p, leaf) for p, leaf in leaves_by_path(wanted).items()}
        return unflatten_dict(placed, sep="/")

    def _placed(self, path: str, leaf) -> jax.Array:
        value = np.asarray(self.weights[path])
        if value.shape != leaf.shape:
            raise BadInput(f"{FIELD}={self.path}: {path} has shape {value.shape}, not {leaf.shape}")
        return put_like(value, leaf)

    def opened(self) -> dict[str, dict]:
        """Returns the parameters of `specs`, on the mesh; the host's copy is dropped."""
        assert self.reference  # kept without the weights
        opened = {name: self.params() for name in self.specs}
        vars(self).pop("weights", None)
        return opened

    def taught(self, stream: Stream, data: Prepared) -> Stream:
        """Returns the stream, whose chunks bring the teacher's most likely tokens with `top_k`;
        what is not on disk yet is computed first."""
        cfg = self.config.objectives.distill
        if not cfg.top_k:
            return stream
        if jax.process_count() > 1:
            raise BadInput("objectives.distill.top_k works with one process; set it to 0")
        meta = {
            "format": 1,
            "teacher": self.reference["fingerprint"],
            "data": data.fingerprint,
            "seq_len": stream.sources[0].seq_len,
            "pack": self.config.data.pack,
            "dtype": teacher_config(self.config).compute.dtype,
            "temperature": cfg.temperature,
            "top_k": cfg.top_k,
        }
        folder = records_folder(cache_folder(self.config.data), meta)
        waiting = f"teacher   waiting for another process that is writing {folder}"
        with locked(folder / "lock", lambda: say(waiting)):
            taught = [self._complete(folder, stream, i) for i in range(len(stream.sources))]
        return dataclasses.replace(stream, sources=tuple(taught))

    def _complete(self, folder: Path, stream: Stream, number: int) -> TaughtChunks:
        """Returns a source's chunks with their records, all that the run reads made."""
        source, size = stream.sources[number], self.spec.model.vocab_size
        top_k, wanted = self.config.objectives.distill.top_k, self._wanted(stream, number)
        path = folder / f"{number}.records"
        records = Records.open(path, len(source), source.seq_len, top_k, size)
        missing = records.missing(wanted)
        say(
            f"teacher   {len(wanted) - len(missing):,} of {len(wanted):,} chunks have their top"
            f" {top_k} tokens in {path}"
        )
        if len(missing):
            self._make(source, records, missing)
        return TaughtChunks(source, records)

    def _wanted(self, stream: Stream, number: int) -> np.ndarray:
        """Returns the chunks of a source that the run reads, also when it leaves bad batches
        out."""
        config = self.config
        spare = config.max_rollbacks * (config.max_bad_steps + config.log_every)
        count = (config.num_steps + spare) * config.batch_size
        if len(stream.sources) == 1:
            count = min(count, len(stream.sources[0]))  # an epoch has each once
        source, chunk = stream.chunks(np.arange(count))
        return np.unique(chunk[source == number])

    def _make(self, source: Chunks, records: Records, missing: np.ndarray) -> None:
        """Computes the records of `missing` chunks, a microbatch at a time."""
        rows = self.config.batch_size // self.config.grad_accum
        params, spec, cfg = self.params(), self.spec, self.config.objectives.distill

        @jax.jit
        def answer(params, micro):
            teacher = spec.bind(params)
            found = output(teacher, hidden(teacher, micro, None))
            ids, logs = most_likely(found, cfg.top_k, cfg.temperature, spec.rules)
            return jax.sharding.reshard((ids, logs), jax.P())

        sharding = jax.NamedSharding(self.mesh, spec.rules("batch", "seq"))
        with Bar("teacher  ", len(missing), "chunks") as bar:
            for start in range(0, len(missing), rows):
                chunks = missing[start : start + rows]
                padded = np.resize(chunks, rows)  # again from the start: the shape stays the same
                micro = jax.device_put(source.read(padded), sharding)
                ids, logs = jax.device_get(answer(params, micro))
                records.write(chunks, ids[: len(chunks)], logs[: len(chunks)])
                bar.advance(len(chunks))
