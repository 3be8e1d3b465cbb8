"""Decoding of encoder-decoders: with a cache as without, many at once as one by one, and the
commands."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from jaxgpt import evaluate, sample, serve
from jaxgpt.checkpointing.checkpoints import save_weights
from jaxgpt.config.stored import to_json
from jaxgpt.evaluation.results import read_results
from jaxgpt.inference.decode import sample_keys
from jaxgpt.inference.requests import BeamSettings, Sampling
from jaxgpt.inference.seq2seq import GREEDY, Seq2SeqDecoder, decode_batch, encode_source
from jaxgpt.labelled import evaluation
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import make_tokenizer, save_tokenizer
from jaxgpt.tokenizer.base import ByteTokenizer
from tests.conftest import mesh_of, tiny_config

T5 = dict(position="relative", norm="rmsnorm", bias=False, scale_attention=False)
BART = dict(position="learned", embedding_norm=True, head_bias=True, norm_position="post")
TEXTS = ["abc", "hello, world", "", "the same", "x" * 15]
BYTES = make_tokenizer("byte")


class Forced(ByteTokenizer):
    """Its targets start with 1, then with 2, and end with end-of-text, as BART's do."""

    roles = {"decoder_start": 1, "forced_bos": 2}


def model_of(**model):
    config = tiny_config(
        **(dict(kind="encoder_decoder", vocab_size=257, max_seq_len=12, max_source_len=16) | model)
    )
    spec = ModelSpec(config, "xla")
    with jax.set_mesh(mesh_of(config)):
        params = jax.tree.map(lambda p: 6 * p, jax.jit(spec.init)(jax.random.key(1)))
    return config, spec, params


def full_forward(spec, params):
    """Returns (source, a target's tokens so far) -> log-probabilities of the next, no cache."""
    forward = jax.jit(
        lambda t, s, g: spec.for_decoding().bind(params)(t, sources=s, source_segments=g)
    )

    def next_of(source, tokens):
        target, sources, segments = np.zeros((1, 16)), np.zeros((1, 16)), np.zeros((1, 16))
        target[0, : len(tokens)] = tokens
        sources[0, : len(source)], segments[0, : len(source)] = source, 1
        logits = forward(*(a.astype(np.int32) for a in (target, sources, segments)))
        return np.asarray(jax.nn.log_softmax(logits[0, len(tokens) - 1]), np.float64)

    return next_of


def plain_beams(next_of, source, start, width, new, end):
    """Beam search over whole texts, with the rules of `inference.beam` for a penalty of 1."""
    beams, done = [((), 0.0)], []
    for length in range(1, new + 1):
        grown = [
            ((*tokens, token), total + score)
            for tokens, total in beams
            for token, score in enumerate(next_of(source, [*start, *tokens])[:257])
        ]
        grown = sorted(grown, key=lambda pair: -pair[1])[: 2 * width]
        ended = [pair for pair in grown[:width] if pair[0][-1] == end or length == new]
        done = sorted(done + [(t, s / length) for t, s in ended], key=lambda pair: -pair[1])[:width]
        beams = [pair for pair in grown if pair[0][-1] != end][:width]
        if len(done) == width and beams[0][1] / length <= done[-1][1]:
            break
    return done


@pytest.mark.parametrize(
    "kind", [T5, pytest.param(BART, marks=pytest.mark.slow)], ids=["T5", "BART"]
)
def test_cached_targets_are_those_of_whole_forward_passes(kind):
    """For sources of unequal length in one batch."""
    config, spec, params = model_of(**kind)
    tokenizer = Forced() if kind is BART else BYTES
    with jax.set_mesh(mesh_of(config)):
        decoder = Seq2SeqDecoder.of(spec, params, tokenizer)
        assert (decoder.start, decoder.end) == (((1, 2) if kind is BART else (256,)), 256)
        sources = [encode_source(tokenizer, text) for text in TEXTS]
        next_of, new = full_forward(spec, params), decoder.room
        assert new == 12 - len(decoder.start) + 1
        chunks = decoder.stream(sources[:3], new, [GREEDY] * 3, sample_keys([(0, 0)] * 3))
        columns = [np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True)]
        for source, found, logprobs in zip(sources, *columns):
            tokens = [*decoder.start]
            for token, logprob in zip(found.tolist(), logprobs):
                scores = next_of(source, tokens)
                assert token == scores.argmax()
                np.testing.assert_allclose(logprob, scores[token], atol=1e-3)
                tokens.append(token)
        framing = {1, 2, 256} if kind is BART else {256}
        texts = decode_batch(decoder, tokenizer, sources, batch=3)  # the second is filled up
        for source, text in zip(sources, texts, strict=True):
            tokens = [*decoder.start]
            while len(tokens) < 13 and (tokens[-1] != 256 or len(tokens) == 1):
                tokens.append(int(next_of(source, tokens).argmax()))
            assert text == tokenizer.decode([t for t in tokens if t not in framing])
        with pytest.raises(BadInput, match="17 tokens, more than the encoder reads .*len=16"):
            decode_batch(decoder, tokenizer, [np.zeros(17)])


def test_cached_beams_are_those_of_whole_forward_passes(workdir):
    _, spec, params, decoder = workdir
    with jax.set_mesh(mesh_of(spec.config)):
        next_of = full_forward(spec, params)
        sources = [encode_source(BYTES, text) for text in TEXTS[:2]]
        found = decoder.search(sources, 5, BeamSettings(3))
        for source, texts in zip(sources, found, strict=True):
            plain = plain_beams(next_of, source, decoder.start, 3, 5, 256)
            assert [[*t.tolist()] for t, _ in texts] == [[*t] for t, _ in plain]
            np.testing.assert_allclose([s for _, s in texts], [s for _, s in plain], atol=1e-3)
        best = decode_batch(decoder, BYTES, sources, new=5, beams=BeamSettings(3))
        assert best == [BYTES.decode(texts[0][0]) for texts in found]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir of random weights, whose sources have a prompt in front."""
    folder = tmp_path_factory.mktemp("seq2seq")
    config, spec, params = model_of(**T5)
    config.objective, config.objectives.seq2seq.prompt = "seq2seq", "hi, "
    (folder / "config.json").write_text(to_json(config))
    save_tokenizer(BYTES, folder / "tokenizer")
    save_weights(folder, jax.device_get(params), {"tokens": 0, "seconds": 0.0})
    with jax.set_mesh(mesh_of(config)):
        yield folder, spec, params, Seq2SeqDecoder.of(spec, params, BYTES)


def test_sample_prints_the_target_alone(workdir, command):
    folder, spec, _, decoder = workdir
    with jax.set_mesh(mesh_of(spec.config)):
        source = encode_source(BYTES, "hi, you")
        (greedy,) = decode_batch(decoder, BYTES, [source])
        chunks = decoder.stream([source], 12, [Sampling(1.0, 0)], sample_keys([(7, 0)]))
        drawn = np.concatenate([tokens[0] for tokens, _ in chunks], axis=0)
    for flags, expected in (
        (["--temperature=0"], greedy),
        (["--temperature=1", "--top_k=0", "--seed=7"], BYTES.decode(drawn)),
    ):
        code, out, err = command(sample.main, f"--workdir={folder}", "--prompt=you", *flags)
        assert (code, out) == (0, expected + "\n"), err


def test_evaluate_searches_with_the_beams_it_is_given(workdir, command, monkeypatch, tmp_path):
    folder, given = workdir[0], []

    def decode(decoder, tokenizer, sources, beams=None):
        given.append(beams)
        return ["yes"] * len(sources)

    monkeypatch.setattr(evaluation, "decode_batch", decode)
    rows = [{"source": "a", "target": "yes"}, {"source": "b", "target": "no"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = f"--workdir={folder}", f"--data=jsonl:{tmp_path}/rows.jsonl"
    for more in ([], ["--num_beams=3", "--length_penalty=0.5"]):
        code, out, err = command(evaluate.main, *flags, *more)
        assert code == 0 and json.loads(out.splitlines()[-1])["exact_match"] == 0.5, err
    assert given == [None, BeamSettings(3, 0.5)]
    kept = [
        (row.get("num_beams"), row.get("length_penalty"))
        for row in read_results(epath.Path(folder))
    ]
    assert kept == [(None, None), (3, 0.5)]


@pytest.mark.slow
def test_sample_streams_searches_and_reads_files(workdir, command, tmp_path):
    folder, spec, _, decoder = workdir
    with jax.set_mesh(mesh_of(spec.config)):
        source = encode_source(BYTES, "hi, you")
        (greedy,) = decode_batch(decoder, BYTES, [source])
        texts = [BYTES.decode(t) for t, _ in decoder.search([source], 5, BeamSettings(3))[0]]
    base = f"--workdir={folder}", "--prompt=you"
    beams = ["--num_beams=3", "--max_new_tokens=5", "--num_samples=2"]
    for flags, expected in (
        (["--temperature=0", "--stream"], greedy),
        (beams, "\n---\n".join(texts[:2])),
    ):
        code, out, err = command(sample.main, *base, *flags)
        assert (code, out) == (0, expected + "\n"), err
    (tmp_path / "p.jsonl").write_text('{"prompt": "you"}\n{"prompt": "x"}\n')
    file = f"--prompt_file={tmp_path}/p.jsonl"
    code, out, err = command(sample.main, base[0], file, "--temperature=0")
    assert code == 0 and json.loads(out.splitlines()[0])["text"] == greedy, err


@pytest.mark.parametrize(
    ("main", "flags", "says"),
    [
        (sample.main, [f"--prompt={'x' * 40}"], "45 tokens, more than the encoder reads"),
        (sample.main, ["--prompt=x", "--suffix=y"], "--suffix is of no use here: the model is an"),
        (sample.main, ["--prompt=x", "--beyond_context=slide"], "--beyond_context is of no use"),
        (serve.main, ["--port=0"], "the server continues texts, but this model is an encoder-dec"),
        (evaluate.main, ["--lm_eval=arc_easy"], "--lm_eval scores how a model continues a text"),
    ],
)
def test_what_an_encoder_decoder_does_not_do(workdir, command, main, flags, says):
    code, out, err = command(main, f"--workdir={workdir[0]}", *flags)
    assert (code, out) == (2, "") and err.startswith("error: ") and says in err
