"""The sample that a training run takes of itself."""

import dataclasses

from jaxgpt.config import SampleConfig
from jaxgpt.data.show import NO_EXAMPLE, Example
from jaxgpt.inference.chat import Chat
from jaxgpt.inference.decode import Decoder
from jaxgpt.inference.generation import encode_request, generate_text
from jaxgpt.inference.requests import GenerationRequest, Sampling
from jaxgpt.model import ModelSpec
from jaxgpt.system.errors import BadInput
from jaxgpt.tokenizer import Tokenizer


class TrainingSample:
    """`TrainingSample(spec, tokenizer, config.sample)(params, seed)` returns a continuation of the
    configured prompt, "" where the prompt fills the context. Where none is configured, that is
    `example`, if it fits, a chat's message in `template`. Raises `BadInput` if the configured
    prompt does not fit the context, or a sampling value is out of range."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        cfg: SampleConfig,
        example: Example = NO_EXAMPLE,
        template: str = "plain",
    ):
        self.spec, self.tokenizer = spec, tokenizer
        sampling = Sampling(cfg.temperature, cfg.top_k)
        sampling.check("sample.")
        configured = GenerationRequest(cfg.prompt, cfg.max_new_tokens, sampling)
        own = dataclasses.replace(configured, prompt=example.prompt)
        if example.is_chat:
            own = Chat(template).ask(own)
        is_own = not cfg.prompt and self._room(own) > 0
        self.request = own if is_own else configured
        room = self._room(self.request)
        if room < 0:
            raise BadInput(
                f"sample.prompt has {spec.model.max_seq_len - room} tokens, more than"
                f" model.max_seq_len={spec.model.max_seq_len}"
            )
        self.max_new_tokens = min(cfg.max_new_tokens, room)

    @property
    def prompt(self) -> str:
        """The text that is continued."""
        return self.request.prompt

    def _room(self, request: GenerationRequest) -> int:
        return self.spec.model.max_seq_len - len(encode_request(self.tokenizer, request))

    def __call__(self, params: dict, seed: int) -> str:
        if not self.max_new_tokens:
            return ""
        decoder = Decoder.of(self.spec, params, self.tokenizer.vocab_size)
        request = dataclasses.replace(self.request, max_new_tokens=self.max_new_tokens, seed=seed)
        return generate_text(decoder, self.tokenizer, [request])[0].text
