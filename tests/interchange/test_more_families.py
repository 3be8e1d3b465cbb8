"""BERT, RoBERTa, T5, T5 1.1 and BART, read from folders, compute what transformers' models do.

Against committed golden files everywhere; live against torch with `-m parity`.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxgpt import convert, sample, train
from jaxgpt.checkpointing.checkpoints import concrete
from jaxgpt.config import Config
from jaxgpt.config.schema import IGNORE
from jaxgpt.config.stored import read_config
from jaxgpt.interchange.folder import open_folder
from jaxgpt.interchange.load import put_like
from jaxgpt.interchange.safetensors import SafetensorsFile, write_safetensors
from jaxgpt.interchange.tokenizers import read_tokenizer
from jaxgpt.interchange.weights import read_params
from jaxgpt.model import ModelSpec
from jaxgpt.objectives.language import token_losses
from jaxgpt.system.trees import leaves_by_path
from jaxgpt.tokenizer import load_tokenizer
from jaxgpt.tokenizer.roles import framed
from tests.conftest import mesh_of, tiny_config
from tests.golden import hf_torch
from tests.interchange.test_import_export import abstract_params, run_export, run_import
from tests.model.test_gpt2_parity import assert_gradients_agree, named
from tests.tokenizer.vocabularies import CONFIG, WRITE

FAMILIES = list(hf_torch.CONFIGS)
LEFT_OVER = {
    "t5": ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
    "bart": ["model.encoder.version", "model.decoder.version"],
}
SOURCES = ["golden", pytest.param("live", marks=pytest.mark.parity)]


def found_of(name: str, source: str) -> dict:
    if source == "live":
        return hf_torch.reference(name, 1)
    return dict(np.load(hf_torch.FOLDER / f"{name}.npz"))


def write_folder(folder, config: dict, arrays: dict) -> None:
    """Writes a model folder as transformers does."""
    folder.mkdir(exist_ok=True)
    shapes = {name: a.shape for name, a in arrays.items()}
    file = folder / "model.safetensors"
    write_safetensors(file, shapes, np.dtype("<f4"), arrays.__getitem__)
    (folder / "config.json").write_text(json.dumps(config))


def model_folder(folder, name: str, found: dict):
    """A model folder of the reference's weights, with a vocabulary, and what older files hold
    besides."""
    family = name.partition("_")[0]
    more = {key: np.ones(2, np.float32) for key in LEFT_OVER.get(family, [])}
    write_folder(folder, json.loads(str(found["config"])), named(found, "weight/") | more)
    WRITE[family](folder)
    config = json.loads((folder / "config.json").read_text()) | CONFIG[family]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def micro_batch(found: dict) -> dict:
    """The reference's batch in our arrays."""
    theirs = named(found, "batch/")
    targets = np.where(theirs["labels"] == hf_torch.IGNORED, IGNORE, theirs["labels"])
    mask = theirs["attention_mask"]
    if "decoder_input_ids" not in theirs:
        arrays = {"inputs": theirs["input_ids"], "segments": mask}
        arrays["types"] = theirs["token_type_ids"]
    else:
        arrays = {"inputs": theirs["decoder_input_ids"], "segments": (targets >= 0).astype("i4")}
        arrays |= {"sources": theirs["input_ids"], "source_segments": mask}
    return {name: jnp.asarray(a) for name, a in (arrays | {"targets": targets}).items()}


def arrays_of(folder, arrays: dict, spec: ModelSpec) -> dict:
    """Our parameters from arrays by their names, through the importer's rules."""
    config = json.loads((folder / "config.json").read_text())
    write_folder(folder / "other", config, arrays)
    return read_params(open_folder(folder / "other"), jax.eval_shape(spec.init, jax.random.key(0)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("source", SOURCES)
def test_logits_loss_and_gradients(tmp_path, name, source):
    found = found_of(name, source)
    micro = micro_batch(found)
    write_folder(tmp_path, json.loads(str(found["config"])), named(found, "weight/"))
    opened = open_folder(tmp_path)
    spec = ModelSpec(Config(model=opened.model), "xla")
    places = {k: v for k, v in micro.items() if k not in ("inputs", "targets")}

    def loss_of(params):
        model = spec.bind(params)
        losses = token_losses(model, micro, None)[0]
        return jnp.sum(losses) / jnp.sum(micro["targets"] >= 0), model(micro["inputs"], **places)

    with jax.set_mesh(mesh_of(tiny_config())):
        abstract = concrete(jax.eval_shape(spec.init, jax.random.key(0)))
        params = jax.tree.map(put_like, read_params(opened, abstract), abstract)
        (loss, logits), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
        theirs = named(found, "grad/")
        if name == "bart":  # a buffer there: no gradient
            theirs["final_logits_bias"] = np.asarray(grads["head_bias"])[
                None, : opened.model.vocab_size
            ]
        expected = arrays_of(tmp_path, theirs, spec)
    seen = np.asarray(micro["segments"]) > 0
    ours = np.asarray(logits)[..., : opened.model.vocab_size]
    np.testing.assert_allclose(ours[seen], found["logits"][seen], atol=1e-4, rtol=0)
    assert abs(float(loss) - found["loss"]) < 1e-5
    assert_gradients_agree(grads, expected)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("bert", "t5_1_1"))) for n in FAMILIES],
)
def test_out_again_bit_for_bit(command, tmp_path, name):
    """Import, export: every tensor is the same, but for rows of positions that nothing looks up."""
    found = found_of(name, "golden")
    model_folder(tmp_path / "hf", name, found)
    run_import(command, tmp_path / "hf", tmp_path / "w")
    err = run_export(command, tmp_path / "w", tmp_path / "out")
    assert "gives the same logits, within 0.0e+00" in err, err
    theirs, again = named(found, "weight/"), SafetensorsFile(tmp_path / "out/model.safetensors")
    assert set(again.shapes) == set(theirs)
    for tensor, want in theirs.items():
        start = 2 if name in ("roberta", "bart") and "position" in tensor else 0
        got = again.read(tensor)
        assert got.shape == want.shape and not got[:start].any(), tensor
        np.testing.assert_array_equal(got[start:], want[start:], tensor)
    config = json.loads((tmp_path / "out/config.json").read_text())
    ids = {key: value for key, value in CONFIG[name.partition("_")[0]].items()}
    assert ids.items() <= config.items()
    one, two = (load_tokenizer(tmp_path / "w/tokenizer"), read_tokenizer(tmp_path / "out"))
    assert one.roles.items() <= two.roles.items() and one.end_of_text == two.end_of_text
    assert one.encode("the naïve, é").tolist() == two.encode("the naïve, é").tolist()


@pytest.mark.parity
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_is_exported(command, tmp_path, name):
    """With the same logits, and a tokenizer that gives the model what it takes."""
    import torch
    import transformers

    found = found_of(name, "golden")
    folder = model_folder(tmp_path / "hf", name, found)
    run_import(command, folder, tmp_path / "w")
    run_export(command, tmp_path / "w", tmp_path / "out")
    auto = {"bert": "MaskedLM", "roberta": "MaskedLM"}.get(name, "Seq2SeqLM")
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == hf_torch.CONFIGS[name][0]
    with torch.no_grad():
        arrays = {k: torch.tensor(a).long() for k, a in named(found, "batch/").items()}
        logits = model(**arrays).logits.numpy()
        seen = np.asarray(micro_batch(found)["segments"]) > 0
        np.testing.assert_allclose(logits[seen], found["logits"][seen], atol=1e-4, rtol=0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        ours = load_tokenizer(tmp_path / "w/tokenizer")
        encoded = tokenizer(["the naïve, é", "a"], return_tensors="pt", padding=True)
        ids = framed(ours, ours.encode("the naïve, é"))[0]
        assert encoded["input_ids"][0].tolist() == ids
        assert encoded["input_ids"][1, -1].item() == ours.role("pad")
        if max(map(max, encoded["input_ids"].tolist())) < model.config.vocab_size:
            decoder = {} if auto == "MaskedLM" else {"decoder_input_ids": encoded["input_ids"]}
            model(**encoded, **decoder)
    roles = (ours.role("mask"), ours.role("pad"))
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id) == roles


def test_older_names_and_what_has_no_place(command, tmp_path):
    """BERT as its first release and BertForPreTraining store it: gamma and beta, a pooler; a head
    stored twice; and without the head of masked language modelling."""
    found = found_of("bert", "golden")
    folder = model_folder(tmp_path / "hf", "bert", found)
    weights, config = named(found, "weight/"), json.loads((folder / "config.json").read_text())
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): a
        for name, a in weights.items()
    }
    old["bert.pooler.dense.weight"] = np.ones((20, 20), np.float32)
    old["cls.seq_relationship.bias"] = np.ones(2, np.float32)
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
    write_folder(folder, config, old)
    code, _, err = command(convert.main, "import", f"--from={folder}", f"--workdir={tmp_path}/w")
    assert code == 0 and "skipped   cls.seq_relationship.bias, pooler.dense.weight: " in err, err
    opened = open_folder(folder)
    abstract = abstract_params(opened.model)
    params = leaves_by_path(read_params(opened, abstract))
    norm = weights["bert.embeddings.LayerNorm.weight"]
    np.testing.assert_array_equal(params["embedding_norm/scale"], norm)
    bias = weights["cls.predictions.bias"]
    np.testing.assert_array_equal(params["head_bias"][:67], bias)
    assert not params["head_bias"][67:].any()
    bare = {n.removeprefix("bert."): a for n, a in weights.items() if not n.startswith("cls.")}
    write_folder(folder, config, bare)
    model = open_folder(folder).model
    assert not model.head_transform and not model.head_bias
    assert "transform/kernel" not in leaves_by_path(
        read_params(open_folder(folder), abstract_params(model))
    )


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relativ"),
        ("bert", {"hidden_act": "mish"}, "hidden_act='mish' is not supported"),
        ("bert", {"is_decoder": True}, "is_decoder=True is not supported, only False"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id=0 is not supported, only 1"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'gelu'"),
        ("t5", {"feed_forward_proj": "gated-relu"}, "feed_forward_proj='gated-relu' is not"),
        ("t5", {"num_heads": "x"}, "lacks or garbles a field"),
        ("t5", {"num_layers": 99}, "its config says 102 layers, its files hold"),
        ("bart", {"encoder_attention_heads": 2}, "encoder_attention_heads=2 is not decoder_"),
        ("bart", {"normalize_before": True}, "normalize_before=True is not supported"),
        ("bart", {"model_type": "marian"}, "model_type='marian' is not supported; only gpt2"),
    ],
)
def test_variants_that_are_not_ours(command, tmp_path, name, edit, message):
    found = found_of(name, "golden")
    model_folder(tmp_path / "hf", name, found)
    config = json.loads((tmp_path / "hf/config.json").read_text()) | edit
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    argv = ("import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/w")
    code, _, err = command(convert.main, *argv)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "w").exists()


@pytest.mark.parity
@pytest.mark.parametrize("name", hf_torch.ENCODERS)
def test_fillings_have_transformers_s_probabilities(command, tmp_path, name):
    """What `sample` prints for a prompt with two masks."""
    import torch
    import transformers

    folder = model_folder(tmp_path / "hf", name, found_of(name, "golden"))
    run_import(command, folder, tmp_path / "w")
    ours = load_tokenizer(tmp_path / "w/tokenizer")
    mask = next(n for n, i in ours.special.items() if i == ours.role("mask"))
    model = getattr(transformers, hf_torch.CONFIGS[name][0]).from_pretrained(folder).eval()
    text = f"the {mask} b{mask} c"
    ids = framed(ours, ours.encode_with_special(text))[0]
    with torch.no_grad():
        theirs = torch.softmax(model(torch.tensor([ids])).logits[0], -1).numpy()
    places = np.flatnonzero(np.array(ids) == ours.role("mask"))
    argv = (f"--workdir={tmp_path}/w", f"--prompt={text}", "--top_k=7")
    code, out, err = command(sample.main, *argv)
    assert code == 0 and len(places) == 2, err
    found = [line.split("\t")[1] for line in out.splitlines() if "\t" in line]
    best = [-np.sort(-theirs[place][: ours.vocab_size])[:7] for place in places]
    np.testing.assert_allclose(np.array(found, float), np.concatenate(best), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective", "row"),
    [
        ("bert", "classification", {"text": "the {}", "label": "{}"}),
        ("t5", "seq2seq", {"source": "the {}", "target": "{}"}),
    ],
)
def test_fine_tuning_takes_kind_and_architecture(command, tmp_path, name, objective, row):
    folder = model_folder(tmp_path / "hf", name, found_of(name, "golden"))
    rows = [{k: v.format(i % 3) for k, v in row.items()} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = (f"--config.init_from={folder}", f"--config.objective={objective}")
    flags += (f"--config.data.source=jsonl:{tmp_path}/rows.jsonl", "--config.data.pack=false")
    flags += ("--config.data.special_tokens=<new>", "--config.model.max_seq_len=16")
    flags += ("--config.batch_size=8",)
    workdir = f"--workdir={tmp_path}/w"
    code, _, err = command(train.main, "--config=configs/finetune.py", workdir, *flags)
    assert code == 0, err
    config = read_config(epath.Path(tmp_path / "w"))
    theirs = open_folder(folder).model
    assert config.model.kind == theirs.kind and config.model.max_seq_len == 16
    assert (config.model.encoder_layers, config.model.type_vocab_size) == (
        theirs.encoder_layers,
        theirs.type_vocab_size,
    )
    assert config.model.vocab_size == max(theirs.vocab_size, config.model.vocab_size)
    losses = [json.loads(line) for line in open(tmp_path / "w/metrics.jsonl")]
    assert np.isfinite([r["loss"] for r in losses if r["split"] == "train"]).all()
