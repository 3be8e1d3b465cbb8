"""GGUF: blocks by hand, and files as ggml's own reader and transformers read them."""

import json

import numpy as np
import pytest

from jaxgpt import convert, shrink
from jaxgpt.config import ModelConfig
from jaxgpt.interchange.gguf import F32, Q4_0, Q8_0, check_gguf, pack, vocabulary_of
from jaxgpt.system.errors import BadInput

FP16 = np.dtype("<f2")


def unpacked(packed) -> np.ndarray:
    """The weights, by what ggml-common.h says of a block."""
    raw = np.frombuffer(packed.data, np.uint8).reshape(-1, {Q4_0: 18, Q8_0: 34}[packed.kind])
    d, codes = raw[:, :2].copy().view(FP16).astype(np.float32), raw[:, 2:]
    if packed.kind == Q8_0:
        codes = codes.copy().view(np.int8).astype(np.float32)
    else:
        codes = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) - 8
    return (d * codes).reshape(packed.lengths[::-1])


@pytest.mark.parametrize(
    "kind, number, low, high", [("int8", Q8_0, -127, 128), ("int4", Q4_0, -8, 8)]
)
def test_blocks(kind, number, low, high):
    rng = np.random.default_rng(0)
    codes = rng.integers(low, high, (3, 64)).astype(np.float32)
    scales = np.repeat(rng.choice([0.5, 0.0078125, 0.0], (3, 2)), 32, axis=1).astype(np.float32)
    packed = pack(codes * scales, scales, kind)
    assert (packed.kind, packed.lengths) == (number, (64, 3))
    np.testing.assert_array_equal(unpacked(packed), codes * scales)
    for w, s in (
        (codes[:, :40], scales[:, :40]),  # no whole block
        (codes, None),
        (codes * 1e-6, np.full_like(codes, 1e-6)),  # a scale that float16 rounds coarsely
        (codes * scales, np.roll(scales, 1, axis=1)),  # two scales in a block
    ):
        packed = pack(w, s, kind)
        assert packed.kind == F32
        np.testing.assert_array_equal(np.frombuffer(packed.data, "<f4").reshape(w.shape), w)


def test_a_vocabulary_is_that_of_byte_level_bpe_or_none():
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    file = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}}
    file["added_tokens"] = [{"id": 3, "content": "<|endoftext|>"}]
    keys = vocabulary_of(file, 3)
    assert keys["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<|endoftext|>"]
    assert keys["tokenizer.ggml.token_type"] == [1, 1, 1, 3]
    assert keys["tokenizer.ggml.merges"] == ["a b"] and keys["tokenizer.ggml.eos_token_id"] == 3
    assert vocabulary_of({"model": {"type": "Unigram"}}, 0) == {"tokenizer.ggml.model": "no_vocab"}


def test_what_has_no_form_is_refused():
    with pytest.raises(BadInput, match="GGUF has no nf4"):
        check_gguf(ModelConfig().with_sizes(), "nf4")
    for field in ({"activation": "gelu"}, {"norm": "rmsnorm"}):
        with pytest.raises(BadInput, match=f"does not support model.{[*field][0]}="):
            check_gguf(ModelConfig(**field).with_sizes(), "int8")


@pytest.mark.parity
@pytest.mark.parametrize("method, number, rtol", [("int8", "Q8_0", 1e-3), ("int4", "Q4_0", 0)])
def test_ggmls_reader_and_transformers_read_the_same_model(
    method, number, rtol, trained_run, command, tmp_path
):
    """int8's float32 scales are rounded to float16, int4's bfloat16 ones are float16's too."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM

    given = f"--workdir={trained_run}", f"--out={tmp_path}/b", f"--method={method}"
    assert command(shrink.main, *given, "--nospeed", "--calibration=0")[0] == 0
    for flags in (["--to=" + str(tmp_path / "hf")], [f"--to={tmp_path}/gguf", "--format=gguf"]):
        code, _, err = command(convert.main, "export", f"--workdir={tmp_path}/b", *flags)
        assert code == 0, err
    file = GGUFReader(tmp_path / "gguf" / "model.gguf")
    tensors = {t.name: t for t in file.tensors}
    kinds = {name: t.tensor_type.name for name, t in tensors.items()}
    small = {name for name, kind in kinds.items() if kind == number}
    assert {name.split(".")[-2] for name in small} == {
        *("token_embd", "attn_qkv", "attn_output", "ffn_up", "ffn_down")
    }
    config = json.loads((tmp_path / "gguf" / "config.json").read_text())
    assert file.fields["gpt2.context_length"].contents() == config["n_positions"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    table = tensors["token_embd.weight"]
    table = dequantize(table.data, table.tensor_type)
    want = theirs.transformer.wte.weight.detach().numpy()
    np.testing.assert_allclose(table, want, rtol=rtol, atol=0)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf",
        gguf_file="model.gguf",
        config=AutoConfig.from_pretrained(tmp_path / "gguf"),
    )
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits, wanted = (m(tokens).logits for m in (read, theirs))
    assert wanted.std() > 0.05
    np.testing.assert_allclose(logits, wanted, atol=1e-6 if rtol == 0 else 5e-3)
