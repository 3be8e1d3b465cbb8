"""Prepare a corpus: python -m jaxgpt.prepare --config=FILE [--out=DIR] [--config.FIELD=VALUE ...]

Tokenizes the config's data source and writes token shards, into the cache or into --out, from
where `--config.data.source=shards:DIR` reads them. The last line on stdout is JSON.
"""

import json

from absl import flags

from jaxgpt.config.cli import parse, run
from jaxgpt.config.load import config_of, define_config_flag
from jaxgpt.data.prepare import prepare


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    define_config_flag(values, argv)
    flags.DEFINE_string("out", "", "folder to write to; default: the cache", flag_values=values)
    config = config_of(parse(values, argv, __doc__))
    data = prepare(config.data, values.out)
    splits = (data.train, data.validation)
    counts = {
        "documents": sum(split.documents for split in splits),
        "tokens": sum(len(split.tokens) for split in splits),
        "bytes": sum(split.bytes for split in splits),
        "dropped": {},
        "vocab_size": data.tokenizer.vocab_size,
        "cache": str(data.folder),
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    run(main)
