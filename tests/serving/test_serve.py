"""The server as its users see it: OpenAI's own client, a crowd, bad requests, a shutdown."""

import asyncio
import html
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

from jaxgpt import serve
from jaxgpt.data.show import saved_example
from tests.conftest import CORPUS, PATIENCE, wait_until, xla_flags
from tests.processes.forks import Python
from tests.processes.processes import finish

CONFIG = """
from jaxgpt.config import *
def get_config():
    return Config(
        num_steps=30, batch_size=8, eval_every=0, eval_batches=1, sample_every=0,
        model=ModelConfig(max_seq_len=128, num_layers=2, num_heads=2, embed_dim=32),
        data=DataConfig(source="text:{corpus}/*.txt", validation_fraction=0.25),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
        sample=SampleConfig(max_new_tokens=0),
    )
"""


def start(workdir, *flags: str) -> tuple[Python, str]:
    """Starts a server; returns it and its address once it answers."""
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    process = Python("-m", "jaxgpt.serve", f"--workdir={workdir}", "--port=0", *flags, env=env)
    for line in process.stderr:
        if line.startswith("serving "):
            return process, line.split(" at ")[1].split()[0].rstrip("/")
    raise AssertionError(f"no server: {process.wait()}")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    (folder / "corpus").mkdir()
    for i in range(4):
        (folder / "corpus" / f"{i}.txt").write_text(CORPUS[i * 2500 : (i + 1) * 2500])
    (folder / "c.py").write_text(CONFIG.format(corpus=folder / "corpus"))
    env = os.environ | {"JAXGPT_CACHE": str(folder / "cache")}
    argv = [f"--config={folder}/c.py", f"--workdir={folder}/run"]
    codes, _, errors = finish([Python("-m", "jaxgpt.train", *argv, env=env)])
    assert codes == [0], errors
    return folder / "run"


@pytest.fixture(scope="module")
def server(workdir):
    process, address = start(workdir, "--slots=8", "--max_waiting=100")
    yield address
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 143


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def raw(address: str, body: bytes, path="/v1/completions", method="POST") -> tuple[int, dict]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read() or b"{}")


def test_openais_client_completes_streams_and_lists(client, workdir):
    assert [model.id for model in client.models.list()] == ["run"]
    assert client.models.retrieve("run").id == "run"
    asked = dict(model="run", prompt="The licence", max_tokens=24, seed=3, temperature=0.9)
    whole = client.completions.create(**asked)
    assert whole.object == "text_completion" and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24 and whole.usage.prompt_tokens == 11
    pieces = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text
    assert len(pieces) > 5 and pieces[-1].usage.completion_tokens == 24
    other = client.completions.create(**asked | {"seed": 4})
    assert other.choices[0].text != whole.choices[0].text


def test_it_says_what_sample_says(client, workdir, command):
    from jaxgpt import sample

    greedy = client.completions.create(
        model="run", prompt="The licence", max_tokens=40, temperature=0
    )
    code, out, err = command(
        sample.main,
        f"--workdir={workdir}",
        "--prompt=The licence",
        "--max_new_tokens=40",
        "--temperature=0",
    )
    assert code == 0 and out == f"The licence{greedy.choices[0].text}\n", err


def test_its_page_starts_with_the_run_s_own_text(server, workdir):
    prompt = saved_example(workdir / "tokenizer").prompt
    assert len(prompt.split()) == 3 and prompt in CORPUS
    with urllib.request.urlopen(server, timeout=PATIENCE) as answer:
        assert f">\n{html.escape(prompt)}</textarea>" in answer.read().decode()


def test_choices_logprobs_echo_stop_and_tokens(client):
    asked = dict(model="run", max_tokens=20, seed=1)
    found = client.completions.create(**asked, prompt=["ab", "cd"], n=2, logprobs=1, echo=True)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text[:2] for choice in found.choices] == ["ab", "ab", "cd", "cd"]
    assert found.choices[0].text != found.choices[1].text
    logprobs = found.choices[0].logprobs
    assert "".join(logprobs.tokens) == found.choices[0].text or "\ufffd" in found.choices[0].text
    assert logprobs.token_logprobs[0] is None and len(logprobs.token_logprobs) == 22
    assert all(score <= 0 for score in logprobs.token_logprobs[1:])
    plain = client.completions.create(**asked, prompt="ab").choices[0].text
    assert client.completions.create(**asked, prompt=[97, 98]).choices[0].text == plain
    cut = client.completions.create(**asked, prompt="ab", stop=[plain[7:9]]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == plain[: plain.find(plain[7:9])]
    streamed = client.completions.create(**asked, prompt="ab", stream=True, logprobs=0)
    scores = [s for piece in streamed for s in (piece.choices[0].logprobs.token_logprobs or [])]
    assert len(scores) == 20
    whole = client.completions.create(**asked, prompt="ab", logprobs=3, echo=True).choices[0]
    streamed = client.completions.create(**asked, prompt="ab", logprobs=3, echo=True, stream=True)
    parts = [piece.choices[0] for piece in streamed]
    assert "".join(part.text for part in parts) == whole.text
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [row for part in parts for row in getattr(part.logprobs, field)]
        assert joined == getattr(whole.logprobs, field)


def test_logprobs_are_openais(client, workdir):
    """Against the plain forward pass: every token of prompt and continuation, with alternatives."""
    import jax
    import numpy as np

    from jaxgpt.inference.trained import open_trained

    prompt = "The licence"
    asked = dict(model="run", prompt=prompt, max_tokens=5, temperature=0, logprobs=5)
    echoed = client.completions.create(**asked, echo=True).choices[0].logprobs
    trained = open_trained(str(workdir), None)
    ids = trained.tokenizer.encode("".join(echoed.tokens))
    assert len(ids) == 16 and echoed.tokens == [chr(i) for i in ids]
    with jax.set_mesh(trained.mesh):
        params = trained.params()
        forward = jax.jit(lambda t: trained.spec.for_decoding().bind(params)(t))
        logp = np.asarray(jax.nn.log_softmax(forward(ids[None]))[0])
    assert echoed.token_logprobs[0] is None and echoed.top_logprobs[0] is None
    assert echoed.text_offset == list(range(16))
    for k in range(1, 16):
        assert echoed.token_logprobs[k] == pytest.approx(logp[k - 1, ids[k]], abs=1e-4)
        best = np.argsort(-logp[k - 1])[:5]
        want = {trained.tokenizer.decode([i]): logp[k - 1, i] for i in best if i < 128}
        top = {name: x for name, x in echoed.top_logprobs[k].items() if "bytes:" not in name}
        top.pop("<|endoftext|>", None)
        assert want.keys() <= top.keys() and len(echoed.top_logprobs[k]) in (5, 6)
        assert all(top[name] == pytest.approx(x, abs=1e-4) for name, x in want.items())
        assert echoed.tokens[k] in top
    alone = client.completions.create(**asked).choices[0].logprobs
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert getattr(alone, field) == getattr(echoed, field)[11:], "offsets count the prompt"
    one = client.completions.create(**asked | {"logprobs": 1}).choices[0].logprobs
    assert all(len(top) == 1 for top in one.top_logprobs), "greedy: the chosen is the best"
    scored = client.completions.create(**asked | {"max_tokens": 0}, echo=True).choices[0]
    assert (scored.text, scored.finish_reason) == (prompt, "length")
    assert scored.logprobs.tokens == list(prompt)
    assert scored.logprobs.token_logprobs == echoed.token_logprobs[:11]
    nothing = client.completions.create(model="run", prompt=prompt, max_tokens=0)
    assert nothing.choices[0].text == "" and nothing.usage.completion_tokens == 0


def test_a_stop_string_cuts_the_logprobs_too(client):
    asked = dict(model="run", prompt="ab", max_tokens=20, seed=1, logprobs=0)
    plain = client.completions.create(**asked).choices[0]
    cut = client.completions.create(**asked, stop=[plain.text[7:9]]).choices[0]
    assert "".join(cut.logprobs.tokens) == cut.text or "\ufffd" in cut.text
    count = len(cut.logprobs.tokens)
    assert cut.logprobs.token_logprobs == plain.logprobs.token_logprobs[:count]


@pytest.mark.parity  # needs the extra [lm-eval]
def test_lm_eval_s_own_client_scores_as_its_harness_does_here(server, workdir):
    import jax
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from jaxgpt.evaluation.harness import HarnessModel
    from jaxgpt.inference.trained import open_trained

    trained = open_trained(str(workdir), None)

    class Client(LocalCompletionsAPI):
        """With the run's tokenizer, as token ids are what it sends."""

        def tok_encode(self, string, **kwargs):
            return trained.tokenizer.encode(string).tolist()

        eot_token_id = prefix_token_id = trained.tokenizer.end_of_text

    theirs = Client(
        base_url=f"{server}/v1/completions",
        model="run",
        tokenizer_backend=None,
        max_length=128,
        batch_size=4,
    )
    theirs.tokenized_requests, theirs.tokenizer = True, trained.tokenizer
    pairs = [("The licence", " shall"), ("", "alone"), ("x", "y"), ("Grant of", " Patent License")]
    pairs += [("a" * 200, " end")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = theirs.loglikelihood(asked, disable_tqdm=True)
    with jax.set_mesh(trained.mesh):
        ours = HarnessModel(trained.spec, trained.params(), trained.tokenizer, 4)
        ours.context = 126  # their client leaves room for the token that it has generated
        want = ours.loglikelihood(asked, disable_tqdm=True)
    for (score, greedy), (expected, as_greedy) in zip(found, want, strict=True):
        assert score == pytest.approx(expected, abs=1e-3) and greedy == as_greedy


BAD = {
    "not JSON": (b"{", 400, "not JSON"),
    "not UTF-8": (b"\xff\xfe", 400, "not JSON"),
    "deep": (b"[" * 100_000, 400, "not JSON"),
    "a list": (b"[]", 400, "must be a JSON object"),
    "oversized": (b" " * (1 << 21), 413, "more than 1048576 bytes"),
    "another model": (b'{"model": "gpt-9"}', 404, "there is no model 'gpt-9'"),
    "unknown field": (b'{"tools": []}', 400, "unknown field 'tools'"),
    "too long": (b'{"prompt": "%s"}' % (b"a" * 500), 400, "more than the model's context of 128"),
    "too many tokens": (b'{"prompt": "a", "max_tokens": 128}', 400, "ask for at most 127 new"),
    "fewer": (b'{"prompt": "a", "max_tokens": -1}', 400, "max_tokens=-1 must be at least 0"),
    "huge tokens": (b'{"prompt": "a", "max_tokens": 1e9}', 400, "max_tokens=1000000000.0 is not"),
    "hot": (b'{"prompt": "a", "temperature": -1}', 400, "temperature=-1.0 must be at least 0"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400, "temperature=nan must be"),
    "infinite": (b'{"prompt": "a", "top_p": 1e999}', 400, "top_p=inf must be"),
    "text number": (b'{"prompt": "a", "top_k": "5"}', 400, "top_k='5' is not of the right type"),
    "bad token": (b'{"prompt": [1, 99999]}', 400, "a token is not one of 0"),
    "negative token": (b'{"prompt": [-1]}', 400, "a token is not one of 0"),
    "mixed prompt": (b'{"prompt": ["a", 3]}', 400, "neither text nor tokens"),
    "empty list": (b'{"prompt": []}', 400, "prompt must be text, tokens, or a list"),
    "object prompt": (b'{"prompt": {}}', 400, "prompt must be text"),
    "many choices": (b'{"prompt": "a", "n": 1000}', 400, "n=1000 must be a whole number"),
    "many prompts": (
        b'{"prompt": %s, "n": 2}' % json.dumps(["a"] * 16).encode(),
        400,
        "more than 16",
    ),
    "best_of": (b'{"prompt": "a", "best_of": 3}', 400, "best_of is not supported"),
    "penalty": (
        b'{"prompt": "a", "presence_penalty": 1}',
        400,
        "presence_penalty is not supported",
    ),
    "stops": (b'{"prompt": "a", "stop": ["1","2","3","4","5"]}', 400, "more than 4 strings"),
    "empty stop": (b'{"prompt": "a", "stop": [""]}', 400, "not empty"),
    "huge seed": (b'{"prompt": "a", "seed": 99999999999999999999}', 400, "seed="),
    "lone surrogate": (b'{"prompt": "\\ud800"}', 400, "not valid text"),
    "stream": (b'{"prompt": "a", "stream": 1}', 400, "stream=1 must be true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_a_reason_and_disturb_nobody(server, name):
    body, status, message = BAD[name]
    found, answer = raw(server, body)
    assert found == status and message in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"
    good = b'{"prompt": "a", "max_tokens": 2, "temperature": 0}'
    assert raw(server, good)[0] == 200


def test_other_paths_and_methods(server):
    assert raw(server, None, "/v1/nothing", "GET")[0] == 404
    assert raw(server, None, "/v1/completions", "GET")[0] == 405
    assert raw(server, None, "/healthz", "GET")[1]["status"] == "ok"
    with urllib.request.urlopen(server, timeout=PATIENCE) as page:
        text = page.read().decode()
    assert "<textarea" in text and "http://" not in text and "https://" not in text


async def crowd(address: str, asks: list[dict], together: int) -> list[str]:
    """The answers of many clients, `together` of them at a time."""
    gate = asyncio.Semaphore(together)
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:

        async def one(ask: dict) -> str:
            async with gate:
                answer = await client.completions.create(model="run", **ask)
                return answer.choices[0].text

        return await asyncio.gather(*map(one, asks))


def asks_of(count: int) -> list[dict]:
    return [
        {
            "prompt": CORPUS[37 * i : 37 * i + 1 + i % 40],
            "max_tokens": 1 + i % 30,
            "seed": i,
            "temperature": (0, 0.7, 1.0)[i % 3],
            "top_p": (1.0, 0.9)[i % 2],
        }
        for i in range(count)
    ]


def test_64_clients_at_once_get_what_each_gets_alone(server):
    asks = asks_of(64)
    alone = asyncio.run(crowd(server, asks, 1))
    together = asyncio.run(crowd(server, asks[::-1], 64))[::-1]
    assert together == alone
    assert len(set(alone)) > 50


def test_a_client_that_leaves_frees_its_slot(server):
    host, port = server.removeprefix("http://").split(":")
    body = b'{"prompt": "a", "max_tokens": 120, "temperature": 1, "stream": true}'
    for _ in range(20):
        with socket.create_connection((host, int(port))) as lost:
            lost.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            lost.recv(100)

    def is_idle() -> bool:
        health = raw(server, None, "/healthz", "GET")[1]
        return (health["active"], health["waiting"]) == (0, 0)

    wait_until(is_idle)


def test_too_many_are_told_to_wait(workdir):
    process, address = start(workdir, "--slots=1", "--max_waiting=2")
    body = b'{"prompt": "a", "max_tokens": 120, "temperature": 1}'
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(raw(address, body)[0])) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) == {200, 429}
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 130


@pytest.mark.parametrize(("number", "wait"), [(signal.SIGTERM, 0.0), (signal.SIGINT, 0.4)])
def test_a_signal_during_the_warm_up_ends_it(workdir, number, wait):
    """While another thread compiles: the interpreter's own end would abort in it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxgpt.serve", f"--workdir={workdir}", "--port=0"],
        env=os.environ | {"XLA_FLAGS": xla_flags(1), "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any(line.startswith("compile ") for line in process.stderr)
    time.sleep(wait)
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == 128 + number
    assert process.stderr.read() == ""


COMPILES_LONG = """
import sys, threading, time
from jaxgpt.cli.run import run
from jaxgpt.serve import main
from jaxgpt.serving.batcher import Batcher

def warm_up(batcher):
    compiling = threading.Thread(target=time.sleep, args=(600,))
    compiling.start()
    print("warming", file=sys.stderr, flush=True)
    compiling.join()

Batcher.warm_up = warm_up
run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_does_not_wait_for_a_thread_that_compiles(workdir, number):
    env = os.environ | {"XLA_FLAGS": xla_flags(1)}
    process = Python("-c", COMPILES_LONG, f"--workdir={workdir}", "--port=0", env=env)
    try:
        assert any(line == "warming\n" for line in process.stderr)
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        assert process.stderr.read() == ""
    finally:
        process.kill()


def test_a_shutdown_under_load_is_clean(workdir):
    process, address = start(workdir, "--slots=2")
    body = b'{"prompt": "a", "max_tokens": 120, "temperature": 1}'
    codes: list[object] = []

    def ask() -> None:
        try:
            codes.append(raw(address, body)[0])
        except OSError:
            codes.append("refused")

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    wait_until(lambda: codes)
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 143
    for thread in threads:
        thread.join()
    assert set(codes) <= {200, 503, "refused"} and len(codes) == 40
    assert codes.count(200) < 25, "those who wait are told at once"
    assert "Traceback" not in process.stderr.read()


def test_flags_and_ports_that_cannot_be(workdir, command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flags, message in (
            ((f"--workdir={workdir}", f"--port={port}"), f"cannot listen at 127.0.0.1 port {port}"),
            (
                (f"--workdir={workdir}", "--host=nowhere.invalid"),
                "cannot listen at nowhere.invalid",
            ),
            ((f"--workdir={workdir}", "--slots=0"), "--slots=0 must be from 1"),
            ((), "--workdir=DIR is required"),
            ((f"--workdir={workdir}-not", "--port=0"), "no run"),
        ):
            code, _, err = command(serve.main, *flags)
            assert code == 2 and message in err, err
