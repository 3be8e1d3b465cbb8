"""EleutherAI's lm-eval harness over a jaxgpt model (extra [lm-eval])."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxgpt.inference.decode import Decoder
from jaxgpt.inference.generation import generate_text
from jaxgpt.inference.requests import GenerationRequest, Sampling
from jaxgpt.inference.score import score
from jaxgpt.model import ModelSpec
from jaxgpt.tokenizer import Tokenizer


class HarnessModel(TemplateLM):
    """The model interface that lm-eval calls. Use it under `jax.set_mesh`."""

    def __init__(self, spec: ModelSpec, params: dict, tokenizer: Tokenizer, batch: int):
        super().__init__()
        self.tokenizer, self.batch, self.context = tokenizer, batch, spec.model.max_seq_len
        self.decoder = Decoder.of(spec, params, tokenizer.vocab_size)
        # likelihoods and the likeliest token are over all of the model's ids
        self.scorer = dataclasses.replace(self.decoder, vocab_limit=spec.model.vocab_size)

    @property
    def eot_token_id(self) -> int:
        """The token in front of every document."""
        return self.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kw) -> list[int]:
        """Returns the string's tokens."""
        return self.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence, **kw) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each (_, context, continuation), and whether it is what
        greedy decoding gives; a context too long loses its beginning."""
        results = []
        for start in range(0, len(requests), self.batch):
            group = requests[start : start + self.batch]
            rows = [np.array([*context, *end])[-self.context - 1 :] for _, context, end in group]
            padding = [rows[-1]] * (self.batch - len(rows))  # one batch size is compiled
            for row, (_, _, end), scored in zip(rows, group, score(self.scorer, rows + padding)):
                first = max(len(row) - 1 - len(end), 0)
                logprob = scored.chosen[first:].astype(np.float64).sum()
                is_greedy = (scored.top_ids[first:, 0] == row[first + 1 :]).all()
                results.append((float(logprob), bool(is_greedy)))
        return results

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Returns each document's log-likelihood, every token with as much context as there is."""
        results = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            rows = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(rows)))
        return results

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Returns each context's continuation up to a stop string; a context too long loses its
        beginning."""
        results = []
        for request in requests:
            context, options = request.args
            new = min(int(options.get("max_gen_toks", 256)), self.context - 1)
            room = self.context - new
            ids = self.tokenizer.encode(context)[-room:]
            text = self.tokenizer.decode(ids).lstrip("\ufffd")  # of a character cut in two
            while len(self.tokenizer.encode(text)) > room:
                text = text[1:]
            stop = options.get("until") or []
            stop = (stop,) if isinstance(stop, str) else tuple(stop)
            is_sampled = options.get("do_sample")
            sampling = Sampling(float(options.get("temperature", 0.0)) if is_sampled else 0.0, 0)
            generation = GenerationRequest(text, new, sampling, stop=stop)
            results.append(generate_text(self.decoder, self.tokenizer, [generation])[0].text)
        return results
