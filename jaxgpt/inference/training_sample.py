"""The sample that is taken while a model trains."""

from jaxgpt.config import SampleConfig
from jaxgpt.inference.complete import Request, completed
from jaxgpt.inference.decode import Decoder, prompt_tokens
from jaxgpt.inference.samplers import Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer


class Sampler:
    """The sample taken while training; compiled once, seeded by the step."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, cfg: SampleConfig):
        self.spec, self.tokenizer = spec, tokenizer
        self.text, length = cfg.prompt, len(prompt_tokens(tokenizer, cfg.prompt))
        self.room = min(cfg.max_new_tokens, spec.cfg.max_seq_len - length)
        if self.room < 0:
            raise BadInput(
                f"sample.prompt has {length} tokens, more than"
                f" model.max_seq_len={spec.cfg.max_seq_len}"
            )
        self.sampling = Sampling(cfg.temperature, cfg.top_k)
        self.sampling.check("sample.")

    def __call__(self, params: dict, seed: int) -> str:
        if not self.room:
            return ""
        decoder = Decoder.of(self.spec, params, self.tokenizer.vocab_size)
        request = Request(self.text, self.room, self.sampling, seed)
        return completed(decoder, self.tokenizer, [request])[0].text
