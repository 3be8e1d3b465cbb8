"""The server against hostile clients: always a JSON answer of the right class, and others get
theirs."""

import asyncio
import json
import math
import time

import hypothesis
import jax
import jax.numpy as jnp
import pytest
import uvicorn
from uvicorn.server import ServerState

from jaxgpt.inference.decode import Decoder
from jaxgpt.model import ModelSpec
from jaxgpt.serving import guard
from jaxgpt.serving.app import MAX_BODY, Completion, make_app
from jaxgpt.serving.batcher import Batcher, Busy
from jaxgpt.serving.connections import connection_class
from jaxgpt.serving.guard import ERROR_DELAY, Guard
from jaxgpt.serving.openai import parse_body
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import make_tokenizer
from tests.conftest import mesh_of, tiny_config
from tests.hostile.conftest import FUZZ, mutated

BYTES = make_tokenizer("byte")
JSON = {"host": "localhost:8000", "content-type": "application/json"}
COMPLETIONS = "/v1/completions"


async def ask(app, body: bytes, headers=JSON, method="POST", path=COMPLETIONS):
    """Returns status, headers and body of the application's answer; the client stays to its end."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin1")) for name, value in headers.items()],
    }
    sent, given = [], [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if given:
            return given.pop()
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, answer


def asked(app, body, **more):
    """Returns status and JSON of an answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, headers, answer = asyncio.run(ask(app, body, **more))
    assert headers["content-type"] == "application/json", answer
    found = json.loads(answer, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (status == 200) == ("error" not in found)
    return status, found


@pytest.fixture(scope="module")
def model():
    """A tiny model whose vocabulary is larger than the tokenizer's."""
    config = tiny_config(vocab_size=300, max_seq_len=64)
    with jax.set_mesh(mesh_of(config)):
        spec = ModelSpec(config, "xla")
        yield spec, jax.jit(spec.init)(jax.random.key(0)), mesh_of(config)


def batcher_of(model, change=lambda p: p) -> Batcher:
    spec, params, mesh = model
    with jax.set_mesh(mesh):
        decoder = Decoder.of(spec, jax.tree.map(change, params), BYTES.vocab_size)
    return Batcher(decoder, mesh, BYTES, slots=4, max_waiting=8)


@pytest.fixture(scope="module")
def batcher(model):
    running = batcher_of(model)
    yield running
    running.close()
    assert running.failure is None


@pytest.fixture(scope="module")
def app(batcher):
    return make_app(batcher, "m", Guard("127.0.0.1"))


MANY = 10**400
BODIES = [
    *(
        (f"{name} of 400 digits", {name: MANY}, 400, f"{name}=inf must be")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
    ),
    *(
        (f"{name} below zero", {name: -MANY}, 400, f"{name}=")
        for name in ("temperature", "top_k", "max_tokens", "seed", "n", "logprobs")
    ),
    *(
        (f"{name} of 400 digits", {name: MANY}, 400, f"{name}=")
        for name in ("top_k", "max_tokens", "seed", "n", "logprobs", "best_of")
    ),
    ("a field that is no text", {"\ud800": 1}, 400, "unknown field '\\ud800'"),
    ("a value that is no text", {"model": "\ud800"}, 404, "no model '\\ud800'"),
    ("a prompt that is no text", {"prompt": "\ud800"}, 400, "not valid text"),
    ("a stop that is no text", {"stop": "\udfff"}, 400, "stop"),
    ("a token of the model's alone", {"prompt": [280]}, 400, "a token is not one of 0 .. 256"),
    ("a token of 400 digits", {"prompt": [MANY]}, 400, "a token is not one of"),
    ("a stop of a million characters", {"stop": "a" * 10**6}, 400, "at most 1000"),
    ("a long field", {"x" * 10**5: 1}, 400, "unknown field"),
    ("deep lists", b"[" * 10**5, 400, "not JSON"),
    ("a deep prompt", b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}", 400, "prompt"),
    ("a deep flag", b'{"stream":' + b"[" * 900 + b"]" * 900 + b"}", 400, "stream="),
    ("deep objects", b'{"n":' + b'{"a":' * 900 + b"1" + b"}" * 901, 400, "n="),
    ("too large", b'"' + b"a" * MAX_BODY + b'"', 413, "more than"),
    ("a long prompt", {"prompt": "a" * 10**6}, 400, "more than the model's context"),
    ("options of another kind", {"stream_options": 1}, 400, "stream_options must be an object"),
    ("an option of another kind", {"stream_options": {"include_usage": 1}}, 400, "include_usage"),
    ("more choices than fit", {"prompt": ["a"] * 13}, 400, "at most 12 choices"),
    ("digits without end", b'{"n": ' + b"9" * 10**5 + b"}", 400, "not JSON"),
    ("not finite", b'{"temperature": -Infinity}', 400, "temperature=-inf"),
]


@pytest.mark.parametrize(
    ("body", "status", "says"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES]
)
def test_bodies_get_a_reason(app, body, status, says):
    began = time.process_time()
    found, answer = asked(app, body)
    assert found == status and says in answer["error"]["message"], answer
    assert len(answer["error"]["message"]) < 400
    assert time.process_time() - began < 5


GOOD = {"prompt": "a", "max_tokens": 2, "temperature": 0, "logprobs": 5, "echo": True}
WHO = [
    # (what, guard, headers, status)
    ("nothing special", Guard("127.0.0.1"), {}, 200),
    ("a form", Guard("127.0.0.1"), {"content-type": "application/x-www-form-urlencoded"}, 415),
    ("plain text", Guard("127.0.0.1"), {"content-type": "text/plain"}, 415),
    ("no type", Guard("127.0.0.1"), {"content-type": ""}, 415),
    ("a charset", Guard("127.0.0.1"), {"content-type": "Application/JSON; charset=utf-8"}, 200),
    ("our own page", Guard("127.0.0.1"), {"origin": "http://localhost:8000"}, 200),
    ("another page", Guard("127.0.0.1"), {"origin": "http://evil.example"}, 403),
    ("another port's page", Guard("127.0.0.1"), {"origin": "http://localhost:9"}, 403),
    ("a file's page", Guard("127.0.0.1"), {"origin": "null"}, 403),
    ("no URL", Guard("127.0.0.1"), {"origin": "http://[x"}, 403),
    (
        "an allowed page",
        Guard("127.0.0.1", ["http://pal.example"]),
        {"origin": "http://pal.example"},
        200,
    ),
    ("any page", Guard("127.0.0.1", ["*"]), {"origin": "http://evil.example"}, 200),
    ("rebound", Guard("127.0.0.1"), {"host": "evil.example:8000"}, 403),
    (
        "rebound, from itself",
        Guard("127.0.0.1"),
        {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
        403,
    ),
    ("no host's name", Guard("127.0.0.1"), {"host": "[::1"}, 403),
    ("an address", Guard("127.0.0.1"), {"host": "192.168.1.4:8000"}, 200),
    ("an IPv6 address", Guard("127.0.0.1"), {"host": "[::1]:8000"}, 200),
    ("the name listened at", Guard("gpu-box"), {"host": "gpu-box:8000"}, 200),
    ("behind a proxy", Guard("127.0.0.1", ["https://llm.example"]), {"host": "llm.example"}, 200),
    ("without the key", Guard("127.0.0.1", key="k"), {}, 401),
    ("a wrong key", Guard("127.0.0.1", key="k"), {"authorization": "Bearer \xe9"}, 401),
    ("the key", Guard("127.0.0.1", key="k"), {"authorization": "Bearer k"}, 200),
]


@pytest.mark.parametrize(
    ("guard", "headers", "status"), [w[1:] for w in WHO], ids=[w[0] for w in WHO]
)
def test_who_may_ask(batcher, guard, headers, status):
    found, answer = asked(make_app(batcher, "m", guard), GOOD, headers=JSON | headers)
    assert found == status, answer


def test_browsers_are_told_who_may_ask(batcher):
    app = make_app(batcher, "m", Guard("127.0.0.1", ["http://pal.example"], "k"))
    before = {"access-control-request-method": "POST"}
    for origin, status in (("http://pal.example", 204), ("http://evil.example", 403)):
        headers = JSON | before | {"origin": origin}
        found, answer, _ = asyncio.run(ask(app, b"", headers, "OPTIONS"))
        assert found == status
        assert (answer.get("access-control-allow-origin") == origin) == (status == 204)
    status, headers, _ = asyncio.run(ask(app, b"{}", JSON | {"origin": "http://pal.example"}))
    assert (status, headers["access-control-allow-origin"]) == (401, "http://pal.example")
    status, _, _ = asyncio.run(ask(app, b"", JSON, "GET", "/healthz"))
    assert status == 200, "the key is for /v1/"


@pytest.mark.parametrize("origin", ["evil", "http://", "http://a/b", "http://a:x", "a.b:80"])
def test_origins_that_are_none(origin):
    with pytest.raises(BadInput, match="--allow_origin"):
        Guard("127.0.0.1", [origin])


def test_a_model_of_no_numbers_is_a_server_error(model):
    """Streamed too: never NaN in JSON. (`serve` refuses such a model at its start.)"""
    broken = batcher_of(model, lambda p: jnp.full_like(p, jnp.nan))
    app = make_app(broken, "m", Guard("127.0.0.1"))
    for body in ({"prompt": "a"}, GOOD, GOOD | {"max_tokens": 0, "prompt": "abc"}):
        status, answer = asked(app, body)
        assert status == 500 and "not numbers" in answer["error"]["message"]
        assert answer["error"]["type"] == "server_error"
        streamed = json.dumps(body | {"stream": True}).encode()
        status, _, events = asyncio.run(ask(app, streamed))
        last = json.loads(events.decode().strip().splitlines()[-1].removeprefix("data: "))
        assert last["error"]["type"] == "server_error" and b"NaN" not in events
    broken.close()


def test_a_client_that_only_makes_errors_leaves_time_for_others(app):
    """It waits for each of its answers; others do not."""

    async def run() -> tuple[int, int]:
        errors = 0

        async def flood():
            nonlocal errors
            while True:
                await ask(app, b"", JSON | {"content-type": "text/plain"})
                errors += 1

        hostile = asyncio.create_task(flood())
        served = 0
        while errors < 3:
            await ask(app, b"", JSON, "GET", "/healthz")
            await asyncio.sleep(0)
            served += 1
        hostile.cancel()
        return served, errors

    began = time.monotonic()
    served, errors = asyncio.run(run())
    assert time.monotonic() - began >= errors * ERROR_DELAY and served > 3 * errors


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_is_woken_only_for_text_that_is_sent(batcher, stream):
    """A request for many texts that are answered whole takes no time of the loop before its end."""
    body = {"prompt": "a", "max_tokens": 20, "seed": 1, "n": 2, "stream": stream}
    spec = batcher.decoder.spec.model

    async def run() -> list[str]:
        completion = Completion(batcher, parse_body(body, "m", BYTES, spec), "m")
        updates = [await completion.updates.get()]
        while sum(finish != "" for _, _, finish, _ in updates) < 2:
            updates.append(await completion.updates.get())
        return [finish for _, _, finish, _ in updates]

    assert ("" in asyncio.run(run())) == stream


def test_a_fault_is_json_too(batcher, monkeypatch):
    monkeypatch.setattr(Batcher, "capacity", property(lambda self: 1 / 0))
    app = make_app(batcher, "m", Guard("127.0.0.1"))
    sent = []

    async def run():
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b""}
        scope["headers"] = [(k.encode(), v.encode()) for k, v in JSON.items()]

        async def receive():
            return {"type": "http.request", "body": b"{}", "more_body": False}

        async def send(message):
            sent.append(message)

        with pytest.raises(ZeroDivisionError):  # for the server's log
            await app(scope, receive, send)

    asyncio.run(run())
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["type"] == "server_error"


@pytest.fixture(scope="module")
def full(batcher):
    """The application with a queue that is always full: it understands, and generates nothing."""

    class Full(Batcher):
        capacity, closing = 99, False

        def __init__(self):
            self.tokenizer, self.decoder = BYTES, batcher.decoder

        def submit(self, wanted, group):
            raise Busy

    return make_app(Full(), "m", Guard("127.0.0.1"))


VALID = [
    json.dumps(GOOD | {"stop": ["x", "y"], "seed": 3, "top_p": 0.5, "n": 2, "user": "u"}).encode(),
    json.dumps({"model": "m", "prompt": [1, 2], "stream": True, "top_k": 4, "min_p": 0.1}).encode(),
    json.dumps({"prompt": ["é", "日"], "stream_options": {"include_usage": True}}).encode(),
]


@hypothesis.settings(FUZZ, max_examples=300)
@hypothesis.given(body=mutated(*VALID))
def test_damaged_bodies_get_a_reason(full, monkeypatch, body):
    monkeypatch.setattr(guard, "ERROR_DELAY", 0)
    status, answer = asked(full, body)
    assert status in (400, 404, 429) and answer["error"]["message"]


async def serving(app, most: int, seconds: float):
    """Starts the server's sockets in this loop; returns the server and its port."""
    config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none")
    config.load()
    state, kind = ServerState(), connection_class(most, seconds)
    server = await asyncio.get_running_loop().create_server(
        lambda: kind(config, state, {}), "127.0.0.1", 0
    )
    return server, server.sockets[0].getsockname()[1]


async def talk(port: int, sent: bytes) -> bytes:
    """Sends and returns all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HALF = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALVES = [b"", b"GET / HT", HALF, HALF + b"Content-Length: 90\r\n\r\n{", GET[:-2]]


def test_half_sent_requests_make_room(app):
    """More of them than connections are allowed: the oldest are cut, a new client is answered."""

    async def run():
        server, port = await serving(app, most=10, seconds=600.0)
        half = [asyncio.create_task(talk(port, HALVES[i % len(HALVES)])) for i in range(40)]
        async with asyncio.timeout(60):
            while sum(one.done() for one in half) < 30:
                await asyncio.sleep(0.01)
        for _ in range(5):  # each cuts one more of the ten that may stay
            assert b'"status": "ok"' in await asyncio.wait_for(talk(port, GET), 60)
        for one in half:
            one.cancel()
        server.close()

    asyncio.run(run())


def test_half_sent_requests_and_silent_connections_expire(app):
    async def run():
        server, port = await serving(app, most=100, seconds=0.5)
        half = [talk(port, sent) for sent in HALVES]
        kept = talk(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        *_, answered = await asyncio.wait_for(asyncio.gather(*half, kept), 60)
        assert b'"status": "ok"' in answered, "and then it was silent"
        server.close()

    asyncio.run(run())


def test_what_is_no_http_gets_json(app):
    async def run():
        server, port = await serving(app, most=10, seconds=5.0)
        for sent in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"A" * 10**5 + b"\r\n"):
            answer = await asyncio.wait_for(talk(port, sent), 60)
            assert answer.startswith(b"HTTP/1.1 400 "), answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        server.close()

    asyncio.run(run())


def test_a_body_that_does_not_come_is_a_408(batcher):
    app = make_app(batcher, "m", Guard("127.0.0.1"), seconds=0.05)

    async def run():
        sent = []
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b""}
        scope["headers"] = [(k.encode(), v.encode()) for k, v in JSON.items()]

        async def send(message):
            sent.append(message)

        await app(scope, asyncio.Event().wait, send)
        return sent

    sent = asyncio.run(run())
    assert sent[0]["status"] == 408 and b"not whole" in sent[1]["body"]


def test_connections_fit_the_limit_of_open_files():
    import resource

    from jaxgpt.serving.connections import most_connections

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        assert 100 < most_connections() < 256 - 32
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_normal_client_beside_hostile_ones(app):
    """Its answers are those that it gets alone."""

    async def run():
        normal = json.dumps(GOOD).encode()
        (alone,) = [(await ask(app, normal))[2]]
        hostile = [json.dumps({"prompt": "a", "n": 4, "max_tokens": 60}).encode(), b"[" * 10**5]
        hostile += [json.dumps({"stop": "a" * 10**6}).encode(), b'"' + b"a" * MAX_BODY + b'"']
        others = [asyncio.create_task(ask(app, body)) for body in hostile * 2]
        found = (await ask(app, normal))[2]
        await asyncio.gather(*others)
        choices = [json.loads(answer)["choices"] for answer in (alone, found)]
        assert choices[0][0]["text"] == choices[1][0]["text"]
        scores = [c[0]["logprobs"]["token_logprobs"] for c in choices]
        assert all(a == b or math.isclose(a, b, abs_tol=1e-5) for a, b in zip(*scores, strict=True))

    asyncio.run(run())
