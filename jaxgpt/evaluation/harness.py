"""EleutherAI's lm-eval harness over a jaxgpt model (extra [lm-eval])."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxgpt.config.schema import IGNORE
from jaxgpt.inference.complete import Request, completed
from jaxgpt.inference.decode import Decoder
from jaxgpt.inference.samplers import Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.tokenizer import Tokenizer

COLUMNS = 64  # positions whose logits exist at a time


class HarnessModel(TemplateLM):
    """What lm-eval asks of a model. Call under `jax.set_mesh`."""

    def __init__(self, spec: ModelSpec, params: dict, tokenizer: Tokenizer, batch: int):
        super().__init__()
        self.spec, self.params, self.batch = spec.for_decoding(), params, batch
        self.tokenizer, self.decoder = tokenizer, Decoder.of(spec, params, tokenizer.vocab_size)
        self.context = spec.cfg.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The token in front of every document."""
        return self.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kw) -> list[int]:
        """Returns the string's tokens."""
        return self.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence, **kw) -> list[tuple[float, bool]]:
        rows = [(context[-self.context :], continuation) for _, context, continuation in requests]
        return [
            found
            for start in range(0, len(rows), self.batch)
            for found in self._scored(rows[start : start + self.batch])
        ]

    def _scored(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        width = -(-self.context // COLUMNS) * COLUMNS
        inputs = np.zeros((self.batch, width), np.int32)
        targets = np.full((self.batch, width), IGNORE, np.int32)
        for i, (context, continuation) in enumerate(rows):
            whole = [*context, *continuation][-(self.context + 1) :]
            first = max(len(whole) - 1 - len(continuation), 0)
            inputs[i, : len(whole) - 1] = whole[:-1]
            targets[i, first : len(whole) - 1] = whole[1 + first :]
        nats, best = jax.device_get(_score(self.spec, self.params, inputs, targets))
        sums, counted = -nats.astype(np.float64).sum(axis=-1), targets != IGNORE
        return [(float(sums[i]), bool(best[i][counted[i]].all())) for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Returns each document's log-likelihood, every token with as much context as there is."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            rows = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(rows)))
        return found

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Returns each context's continuation up to a stop string; a context too long loses its
        beginning."""
        found = []
        for request in requests:
            context, wanted = request.args
            new = min(int(wanted.get("max_gen_toks", 256)), self.context - 1)
            room = self.context - new
            ids = self.tokenizer.encode(context)[-room:]
            text = self.tokenizer.decode(ids).lstrip("\ufffd")  # of a character cut in two
            while len(self.tokenizer.encode(text)) > room:
                text = text[1:]
            stop = wanted.get("until") or []
            stop = (stop,) if isinstance(stop, str) else tuple(stop)
            warm = float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0
            asked = Request(text, new, Sampling(warm, 0), stop=stop)
            (text,) = completed(self.decoder, self.tokenizer, [asked])
            found.append(text.text)
        return found


@partial(jax.jit, static_argnums=0)
def _score(
    spec: ModelSpec, params: dict, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Returns the nats of each target, 0 where there is none, and whether it is the likeliest."""
    model = spec.bind(params)
    (x, _), table, batch = model.hidden(inputs), model.table(), inputs.shape[0]

    def columns(part):
        x, targets = part
        logits = jax.sharding.reshard(model.logits(x, table), jax.P(None, None, None))
        known = jnp.where(targets == IGNORE, 0, targets)
        picked = jnp.take_along_axis(logits, known[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.where(targets == IGNORE, 0, nats), jnp.argmax(logits, axis=-1) == targets

    parts = (
        x.reshape(batch, -1, COLUMNS, x.shape[-1]).swapaxes(0, 1),
        targets.reshape(batch, -1, COLUMNS).swapaxes(0, 1),
    )
    found = jax.lax.map(columns, parts)
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(batch, -1), found)
