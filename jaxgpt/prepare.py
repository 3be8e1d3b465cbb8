"""Clean and tokenize a corpus:

    python -m jaxgpt.prepare --config=FILE [--out=DIR] [--config.FIELD=VALUE ...]

Cleans and tokenizes the config's data source and writes token shards, into the cache or into
--out, from where `--config.data.source=shards:DIR` reads them. The last line on stdout is JSON.

--explain shows examples of what each cleaning rule dropped or masked; --show=K prints batch K
(which trains step K + 1) as text; --against=SOURCE looks for an evaluation set's n-grams in the
training part.
"""

import itertools
import json
from collections.abc import Iterator

from absl import flags

from jaxgpt.cli.flags import config_of, define_config_flag, parse
from jaxgpt.cli.run import run
from jaxgpt.config import Config
from jaxgpt.config.fields import INT32
from jaxgpt.data.prepare import Prepared, cache_folder, check_shards
from jaxgpt.labelled.prepare import TASKS
from jaxgpt.metrics.progress import Bar
from jaxgpt.system.console import say
from jaxgpt.system.errors import BadInput
from jaxgpt.text.contamination import contamination
from jaxgpt.text.pieces import join_pieces
from jaxgpt.text.sources import open_sources


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    define_config_flag(values, argv)
    flags.DEFINE_string("out", "", "folder to write to; default: the cache", flag_values=values)
    flags.DEFINE_bool("explain", False, "show examples of what cleaning did", flag_values=values)
    flags.DEFINE_integer("show", None, "print this batch as text", flag_values=values)
    flags.DEFINE_string("against", "", "an evaluation set to look for", flag_values=values)
    config = config_of(parse(values, argv, __doc__))
    if values.show is not None and not 0 <= values.show < INT32:
        raise BadInput(f"--show={values.show}: batches count from 0 (batch k trains step k + 1)")
    # JAX is imported from here on: what is wrong with the flags is said at once
    from jaxgpt.data.show import show_batch
    from jaxgpt.training.objectives import companions_of

    companions = companions_of(config.objective)
    if config.objective in TASKS and (values.against or values.show is not None):
        raise BadInput(
            f"--show and --against are for running text, not objective={config.objective}"
        )
    data = companions.prepare(config, values.out)
    check_shards(config.data, data)
    if values.explain:
        explain(data)
    if config.data.pack or values.show is not None:
        stream = companions.stream(config, data)  # writes the plan of packing
    if values.show is not None:
        for line in show_batch(stream, data, values.show):
            print(line)
    counts = data.counts | {
        "dropped": {rule: entry["documents"] for rule, entry in data.dropped.items()},
        "vocab_size": data.tokenizer.vocab_size,
        "cache": values.out or str(data.folder),
    }
    if data.masked:
        counts["masked"] = {kind: entry["masks"] for kind, entry in data.masked.items()}
    if values.against:
        counts["against"] = compare(config, data, values.against)
    print(json.dumps(counts))


def explain(data: Prepared) -> None:
    """Says how many documents each rule dropped or masked, with the first few."""
    lines = []
    for rule, entry in data.dropped.items():
        lines.append((f"{rule} dropped {entry['documents']:,} documents, for example", entry))
    for kind, entry in data.masked.items():
        documents = f"{entry['documents']:,} documents, which now read"
        lines.append((f"pii masked {entry['masks']:,} {kind} addresses in {documents}", entry))
    for line, entry in lines or [("nothing was dropped or masked", {"examples": []})]:
        say(f"explain   {line}")
        for example in entry["examples"]:
            say(f"          {example['where']}: {' '.join(example['text'].split())}")


def compare(config: Config, data: Prepared, source: str) -> dict:
    """Returns how much of `source` is in the training part (see `contamination`)."""
    cfg = config.data
    opened = open_sources(source, cfg, cache_folder(cfg))
    pieces = (piece for part in opened for piece in join_pieces(part.documents()))
    overlap = contamination(((p.where, p.text) for p in pieces), training_documents(data))
    documents = f"{overlap['overlapping']:,} of {overlap['compared']:,} documents of {source}"
    grams = f"{overlap['found']:,} of {overlap['ngrams']:,} n-grams"
    say(f"against   {documents} share an n-gram with the training part; {grams}")
    for worst in overlap["worst"]:
        say(f"          {worst['share']:.1%} of the {worst['ngram']}-grams of {worst['where']}")
    return overlap


def training_documents(data: Prepared) -> Iterator[str]:
    """Yields the training part's documents, decoded."""
    tokens = data.train.tokens
    with Bar("against  ", len(tokens), "tokens") as bar:
        for start, end in itertools.pairwise([*data.train.starts.tolist(), len(tokens)]):
            yield data.tokenizer.decode(tokens[start + 1 : end])
            bar.advance(end - start)


if __name__ == "__main__":
    run(main)
