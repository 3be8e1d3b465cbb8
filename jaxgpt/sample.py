"""Sample from a run: python -m jaxgpt.sample --workdir=DIR --prompt=TEXT [--temperature=0.8 ...]

Stdout is the prompt and its continuation, nothing else; several samples are separated by a line
`---`. A sample ends at end-of-text or after --max_new_tokens.
"""

import sys

import jax
from absl import flags

from jaxgpt.config import BadInput
from jaxgpt.config.cli import parse, run
from jaxgpt.inference.decode import check_length, generate, make_decode, prompt_tokens, until
from jaxgpt.inference.samplers import Sampling
from jaxgpt.inference.trained import open_trained


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default: the newest", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 200, "at most so many tokens", flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "0 = greedy", flag_values=values)
    flags.DEFINE_integer("top_k", 40, "only the k likeliest tokens; 0 = all", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "only the likeliest of this mass", flag_values=values)
    flags.DEFINE_float("min_p", 0.0, "only this share of the best's odds", flag_values=values)
    flags.DEFINE_float(
        "repetition_penalty", 1.0, "above 1: what was said is less likely", flag_values=values
    )
    flags.DEFINE_integer("num_samples", 1, "how many", flag_values=values)
    flags.DEFINE_integer("seed", 0, "same seed, same samples", flag_values=values)
    parse(values, argv, __doc__)
    check_flags(values)
    sampling = Sampling(
        values.temperature, values.top_k, values.top_p, values.min_p, values.repetition_penalty
    )
    sampling.check()
    trained = open_trained(values.workdir, values.step)
    prompt = prompt_tokens(trained.tokenizer, values.prompt)
    check_length(len(prompt), values.max_new_tokens, trained.config.model.max_seq_len)
    with jax.set_mesh(trained.mesh):
        decode = make_decode(trained.spec, sampling, values.max_new_tokens)
        prompts = [prompt] * values.num_samples
        length = trained.config.model.max_seq_len
        rows = generate(decode, trained.params(), prompts, length, values.seed)
    end = trained.tokenizer.end_of_text
    texts = [values.prompt + trained.tokenizer.decode(until(row, end)) for row in rows]
    sys.stdout.write("\n---\n".join(texts) + "\n")


def check_flags(values: flags.FlagValues) -> None:
    """Raises `BadInput` for a flag out of range."""
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("seed", 0)):
        if not values[name].value >= least:
            raise BadInput(f"--{name}={values[name].value} must be at least {least}")


if __name__ == "__main__":
    run(main)
