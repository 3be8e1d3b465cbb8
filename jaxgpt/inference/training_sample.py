"""The sample that a training run takes of itself."""

from jaxgpt.config import SampleConfig
from jaxgpt.inference.decode import Decoder, encode_prompt
from jaxgpt.inference.generation import generate_text
from jaxgpt.inference.requests import GenerationRequest, Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer


class TrainingSample:
    """`TrainingSample(spec, tokenizer, config.sample)(params, seed)` returns a continuation of the
    configured prompt, "" where the prompt fills the context. Raises `BadInput` if the prompt does
    not fit the context, or a sampling value is out of range."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer, cfg: SampleConfig):
        self.spec, self.tokenizer, self.prompt = spec, tokenizer, cfg.prompt
        prompt_length = len(encode_prompt(tokenizer, cfg.prompt))
        self.max_new_tokens = min(cfg.max_new_tokens, spec.model.max_seq_len - prompt_length)
        if self.max_new_tokens < 0:
            raise BadInput(
                f"sample.prompt has {prompt_length} tokens, more than"
                f" model.max_seq_len={spec.model.max_seq_len}"
            )
        self.sampling = Sampling(cfg.temperature, cfg.top_k)
        self.sampling.check("sample.")

    def __call__(self, params: dict, seed: int) -> str:
        if not self.max_new_tokens:
            return ""
        decoder = Decoder.of(self.spec, params, self.tokenizer.vocab_size)
        request = GenerationRequest(self.prompt, self.max_new_tokens, self.sampling, seed)
        return generate_text(decoder, self.tokenizer, [request])[0].text
