"""Importing a model folder as a workdir, and exporting a workdir as one that is read back."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxgpt.checkpointing.checkpoints import save_weights
from jaxgpt.config import ComputeConfig, Config, DataConfig
from jaxgpt.config.schema import model_differences
from jaxgpt.config.stored import to_json
from jaxgpt.hub.models import located, pinned_model
from jaxgpt.hub.names import map_names
from jaxgpt.inference.trained import open_trained
from jaxgpt.interchange.families import GPT2, family_of
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.gguf import check_gguf, metadata, packed_tensors, vocabulary_of, write_gguf
from jaxgpt.interchange.load import as_floats
from jaxgpt.interchange.tokenizers import read_tokenizer, write_tokenizer
from jaxgpt.interchange.weights import read_params, write_params
from jaxgpt.model import ModelSpec
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.parameters.flops import count_parameters
from jaxgpt.parameters.weights import as_read, scales_in
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import read_json, whole_folder
from jaxgpt.text.chat import saved_template
from jaxgpt.tokenizer import save_tokenizer

# of logits: float32 is written without loss, the other dtypes are rounded once
LARGEST_DIFFERENCE = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.5}
PROBE_TOKENS = 64


def import_folder(source: Path, workdir: Path) -> None:
    """Writes the model in `source`, a folder or a name on the hub, as a new workdir. Raises
    `BadInput` if it cannot be read (see `located` and `open_folder`), or `workdir` is not empty."""
    name = map_names("init_from", str(source), pinned_model)
    path = Path(located(name))
    folder = open_folder(path)
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size > folder.model.vocab_size:
        raise BadInput(
            f"the tokenizer in {source} has {tokenizer.vocab_size} tokens, the model only"
            f" {folder.model.vocab_size}"
        )
    dtype = "bfloat16" if folder.is_bfloat16 else "float32"
    data = DataConfig(tokenizer=f"{tokenizer.kind}:{(workdir / 'tokenizer').absolute()}")
    config = Config(model=folder.model, compute=ComputeConfig(param_dtype=dtype), data=data)
    with jax.set_mesh(make_mesh(config, jax.devices()[:1])):
        abstract = jax.eval_shape(ModelSpec(config, "xla").init, jax.random.key(0))
    with whole_folder(workdir, "--workdir") as scratch:
        params = read_params(folder, abstract)
        save_tokenizer(tokenizer, scratch / "tokenizer")
        (scratch / "config.json").write_text(to_json(config))
        meta = {"tokens": 0, "seconds": 0.0, "data_fingerprint": "", "imported": name}
        save_weights(scratch, params, meta)
    say(
        f"imported  {count_parameters(params, config.model):,} parameters of {folder.family.name}"
        f" from {name} into {workdir}\n"
        f"next      python -m jaxgpt.sample --workdir={workdir} --prompt='Once upon a time'\n"
        f"          python -m jaxgpt.train --config=FILE --config.init_from={workdir}"
    )


def export_folder(workdir: str, step: int | str | None, target: Path, dtype: str) -> None:
    """Writes the checkpoint as a Hugging Face folder. Raises `BadInput` if no architecture of
    theirs matches the model, if `target` is not empty, or if the folder as written gives other
    logits."""
    trained = open_trained(workdir, step)
    cfg = trained.config.model
    family = family_of(cfg)
    with whole_folder(target, "--to") as scratch:
        with jax.set_mesh(trained.mesh):
            config, params = as_read(trained.config, trained.params(), "float32")
            bare, params = as_floats(config, params)
            write_params(scratch / "model.safetensors", family, params, cfg, dtype)
        end = trained.tokenizer.end_of_text
        ids = {"bos_token_id": end, "eos_token_id": end}
        hf = {"architectures": [family.architecture]} | family.hf_config(cfg) | ids
        (scratch / "config.json").write_text(json.dumps(hf | {"dtype": dtype}, indent=2))
        (scratch / "generation_config.json").write_text(json.dumps(ids, indent=2))
        template = saved_template(epath.Path(workdir) / "tokenizer")
        note = write_tokenizer(trained.tokenizer, scratch, cfg.max_seq_len, template)
        check_export(scratch, trained.mesh, bare, params, dtype)
    say(f"exported  step {trained.step} of {workdir} as {family.architecture} into {target}")
    if note:
        say(note)


def export_gguf(workdir: str, step: int | str | None, target: Path) -> None:
    """Writes the checkpoint as `target/model.gguf`, with the config and tokenizer that transformers
    takes beside it. Raises `BadInput` if GGUF has no form of the model, or `target` is not
    empty."""
    trained = open_trained(workdir, step)
    cfg, kind = trained.config.model, trained.config.shrink.weights
    check_gguf(cfg, kind)
    with whole_folder(target, "--to") as scratch:
        with jax.set_mesh(trained.mesh):
            stored = jax.device_get(trained.params())
            config, params = as_read(trained.config, stored, "float32")
            bare, floats = as_floats(config, params)
            wanted = jax.eval_shape(ModelSpec(bare, "xla").init, jax.random.key(0))
            coded = kind != "float" and not trained.config.lora.rank
            scales = scales_in(stored, trained.config.shrink, wanted) if coded else None
        end = trained.tokenizer.end_of_text
        ids = {"bos_token_id": end, "eos_token_id": end}
        hf = {"architectures": [GPT2.architecture]} | GPT2.hf_config(cfg) | ids
        (scratch / "config.json").write_text(json.dumps(hf, indent=2))
        template = saved_template(epath.Path(workdir) / "tokenizer")
        note = write_tokenizer(trained.tokenizer, scratch, cfg.max_seq_len, template)
        file = scratch / "tokenizer.json"
        vocabulary = vocabulary_of(read_json(file) if file.exists() else {}, end)
        tensors = dict(packed_tensors(floats, scales, cfg, kind))
        kind = kind if coded else "float"
        write_gguf(scratch / "model.gguf", metadata(cfg, kind, vocabulary), tensors)
        size = (scratch / "model.gguf").stat().st_size
    say(f"exported  step {trained.step} of {workdir} into {target}/model.gguf, {size:,} bytes")
    if "tokenizer.ggml.tokens" not in vocabulary:
        say("          it holds no vocabulary: GGUF's is that of byte-level BPE; give it token ids")
    if note:
        say(note)


def check_export(folder: Path, mesh: Mesh, config: Config, params: dict, dtype: str) -> None:
    """Reads an exported folder and compares its logits with those of `params`, the parameters of
    `config`. Raises `BadInput` if
    they differ by more than rounding to `dtype` explains."""
    written = open_folder(folder)
    with jax.set_mesh(mesh):
        compute = dataclasses.replace(config.compute, dtype="float32")
        plain = dataclasses.replace(config, compute=compute)
        expected = _probe(ModelSpec(plain, "xla").for_decoding(), params)
        if differing := model_differences(written.model, plain.model, "domain", "parameters"):
            raise BadInput(f"the export does not read back: {', '.join(differing)} differ; refused")
        spec = ModelSpec(Config(model=written.model), "xla").for_decoding()
        abstract = jax.eval_shape(spec.init, jax.random.key(0))
        logits = _probe(spec, read_params(written, abstract))
    difference = float(np.max(np.abs(expected - logits)))
    if not difference <= LARGEST_DIFFERENCE[dtype]:
        raise BadInput(
            f"the export does not read back: logits differ by up to {difference:.3g}; refused"
        )
    say(f"checked   the written folder gives the same logits, within {difference:.1e}")


def _probe(spec: ModelSpec, params: dict) -> np.ndarray:
    """Returns the logits of a fixed row of tokens, without the vocabulary's padding."""
    length = min(PROBE_TOKENS, spec.model.max_seq_len)
    tokens = np.random.default_rng(0).integers(0, spec.model.vocab_size, (1, length))
    logits = jax.jit(lambda p, t: spec.bind(p)(t))(params, tokens.astype(np.int32))
    return np.asarray(logits)[..., : spec.model.vocab_size]
