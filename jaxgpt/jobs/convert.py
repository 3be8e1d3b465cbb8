"""Importing a model folder as a workdir, and exporting a workdir as one that is read back."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxgpt.checkpointing.checkpoints import save_weights
from jaxgpt.config import ComputeConfig, Config, DataConfig, ModelConfig
from jaxgpt.config.schema import model_differences
from jaxgpt.config.stored import to_json
from jaxgpt.hub.models import located, pinned_model
from jaxgpt.hub.names import map_names
from jaxgpt.inference.trained import open_trained
from jaxgpt.interchange.families import FAMILIES, GPT2, Family, family_of
from jaxgpt.interchange.folder import OBJECTIVES, open_folder, say_skipped
from jaxgpt.interchange.gguf import check_gguf, metadata, packed_tensors, vocabulary_of, write_gguf
from jaxgpt.interchange.load import as_floats
from jaxgpt.interchange.tokenizers import read_tokenizer, write_tokenizer
from jaxgpt.interchange.weights import read_params, write_params
from jaxgpt.model import ModelSpec
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.parameters.flops import count_parameters
from jaxgpt.parameters.weights import as_read, scales_in
from jaxgpt.shrinking.structure import all_heads, with_silent_heads
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import read_json, whole_folder
from jaxgpt.text.chat import saved_template
from jaxgpt.tokenizer import Tokenizer, save_tokenizer
from jaxgpt.tokenizer.hf_files import WITH_ID

# of logits: float32 is written without loss, the other dtypes are rounded once
LARGEST_DIFFERENCE = {"float32": 1e-5, "float16": 0.05, "bfloat16": 0.5}
PROBE_TOKENS = 64


def import_folder(source: Path, workdir: Path) -> None:
    """Writes the model in `source`, a folder or a name on the hub, as a new workdir. Raises
    `BadInput` if it cannot be read (see `located` and `open_folder`), or `workdir` is not empty."""
    name = map_names("init_from", str(source), pinned_model)
    path = Path(located(name))
    folder = open_folder(path)
    say_skipped(folder)
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size > folder.model.vocab_size:
        raise BadInput(
            f"the tokenizer in {source} has {tokenizer.vocab_size} tokens, the model only"
            f" {folder.model.vocab_size}"
        )
    dtype = "bfloat16" if folder.is_bfloat16 else "float32"
    data = DataConfig(tokenizer=f"{tokenizer.kind}:{(workdir / 'tokenizer').absolute()}")
    objective = OBJECTIVES[folder.model.kind]
    compute = ComputeConfig(param_dtype=dtype)
    config = Config(model=folder.model, objective=objective, compute=compute, data=data)
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
        f"next      python -m jaxgpt.sample --workdir={workdir} --prompt='{_prompt(tokenizer)}'\n"
        f"          python -m jaxgpt.train --config=FILE --config.init_from={workdir}"
    )


def _prompt(tokenizer: Tokenizer) -> str:
    """Returns an example for the user: with a mask where the tokenizer has one."""
    names = {i: name for name, i in tokenizer.special.items()}
    mask = names.get(tokenizer.role("mask"))
    return f"Paris is the capital of {mask}." if mask else "Once upon a time"


def export_folder(workdir: str, step: int | str | None, target: Path, dtype: str) -> None:
    """Writes the checkpoint as a Hugging Face folder. Raises `BadInput` if no architecture of
    theirs matches the model, if `target` is not empty, or if the folder as written gives other
    logits."""
    trained = open_trained(workdir, step)
    cfg = _exported(trained.config.model)
    family, added = family_of(cfg), cfg.num_heads - trained.config.model.num_heads
    with whole_folder(target, "--to") as scratch:
        with jax.set_mesh(trained.mesh):
            config, params = as_read(trained.config, trained.params(), "float32")
            bare, params = as_floats(config, params)
            written = with_silent_heads(params, cfg.num_heads) if added else params
            write_params(scratch / "model.safetensors", family, written, cfg, dtype)
        ids = token_ids(trained.tokenizer, family)
        hf = {"architectures": [family.architecture]} | family.hf_config(cfg) | ids
        (scratch / "config.json").write_text(json.dumps(hf | {"dtype": dtype}, indent=2))
        (scratch / "generation_config.json").write_text(json.dumps(ids, indent=2))
        template = saved_template(epath.Path(workdir) / "tokenizer")
        model = "" if cfg.kind == "decoder" else family.name
        note = write_tokenizer(trained.tokenizer, scratch, cfg.max_seq_len, template, model)
        check_export(scratch, trained.mesh, bare, params, dtype, cfg)
    if added:
        say(f"heads     {added} of zeros in each layer: {family.architecture} has {cfg.num_heads}")
    say(f"exported  step {trained.step} of {workdir} as {family.architecture} into {target}")
    if note:
        say(note)


def _exported(cfg: ModelConfig) -> ModelConfig:
    """Returns the model that is written of this one: itself or, where only that is of a family, the
    same with the heads that it lost."""
    fits = any(not family.differences(all_heads(cfg)) for family in FAMILIES.values())
    itself = any(not family.differences(cfg) for family in FAMILIES.values())
    return all_heads(cfg) if fits and not itself else cfg


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


def token_ids(tokenizer: Tokenizer, family: Family) -> dict[str, int]:
    """Returns the fields of a config.json that name tokens. Raises `BadInput` if the family counts
    positions from another id of padding."""
    end = tokenizer.end_of_text
    if "decoder" in family.exact["kind"]:
        return {"bos_token_id": end, "eos_token_id": end}
    ids = {role: tokenizer.role(role) for role in WITH_ID}
    if family.pad is not None and ids["pad"] != family.pad:
        raise BadInput(
            f"{family.name} needs {family.pad} as the id of padding, from which it counts"
            f" positions; that of this tokenizer is {ids['pad']}"
        )
    return {f"{role}_token_id": i for role, i in ids.items() if i is not None}


def check_export(
    folder: Path, mesh: Mesh, config: Config, params: dict, dtype: str, cfg: ModelConfig
) -> None:
    """Reads an exported folder, which holds the model `cfg`, and compares its logits with those of
    `params`, the parameters of `config`. Raises `BadInput` if they differ by more than rounding to
    `dtype` explains."""
    written = open_folder(folder)
    with jax.set_mesh(mesh):
        compute = dataclasses.replace(config.compute, dtype="float32")
        plain = dataclasses.replace(config, compute=compute)
        expected = _probe(ModelSpec(plain, "xla").for_decoding(), params)
        if differing := model_differences(written.model, cfg, "domain", "parameters"):
            raise BadInput(f"the export does not read back: {', '.join(differing)} differ; refused")
        spec = ModelSpec(Config(model=written.model), "xla").for_decoding()
        abstract = jax.eval_shape(spec.init, jax.random.key(0))
        logits = _probe(spec, read_params(written, abstract))
    difference, allowed = float(np.max(np.abs(expected - logits))), LARGEST_DIFFERENCE[dtype]
    if cfg.num_heads != config.model.num_heads:  # sums over more heads round in another order
        allowed += 1e-5 * float(np.max(np.abs(expected)))
    if not difference <= allowed:
        raise BadInput(
            f"the export does not read back: logits differ by up to {difference:.3g}; refused"
        )
    say(f"checked   the written folder gives the same logits, within {difference:.1e}")


def _probe(spec: ModelSpec, params: dict) -> np.ndarray:
    """Returns the logits of a fixed row of tokens, without the vocabulary's padding."""
    cfg, rng = spec.model, np.random.default_rng(0)

    def draw(below: int, longest: int) -> np.ndarray:
        return rng.integers(0, below, (1, min(PROBE_TOKENS, longest))).astype(np.int32)

    tokens, places = draw(cfg.vocab_size, cfg.max_seq_len), {}
    if cfg.kind == "encoder_decoder":
        places["sources"] = draw(cfg.vocab_size, cfg.max_source_len)
    if cfg.type_vocab_size:
        places["types"] = draw(cfg.type_vocab_size, cfg.max_seq_len)
    logits = jax.jit(lambda p, t, places: spec.bind(p)(t, **places))(params, tokens, places)
    return np.asarray(logits)[..., : cfg.vocab_size]
