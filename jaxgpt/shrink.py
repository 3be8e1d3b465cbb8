"""Make a trained model smaller, and measure what that costs:

    python -m jaxgpt.shrink --workdir=A --out=B --method=int8|int4|nf4

Writes the new workdir B, which evaluate, sample, serve and convert take like any other, and leaves
A as it is. The last line of stdout is JSON: method, bytes of the weights and bits per byte (as
evaluate measures it), before and after.

int8 has a scale for each output of a projection, int4 and nf4 for each --group of its inputs.
Embeddings and head are quantised too, unless --keep=head. int4 is calibrated on --calibration
windows of the run's training text; 0 rounds each weight to the nearest.

Methods compose in this order: heads, prune, svd, then one of int8, int4, nf4.
"""

import json

from absl import flags
from etils import epath

from jaxgpt.checkpointing.choice import define_step
from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.config.stored import read_config
from jaxgpt.shrinking.spec import check_order, parse_method, parse_options
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import path_of
from jaxgpt.system.stores import is_object_store


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "the run to shrink", flag_values=values)
    flags.DEFINE_string("out", "", "the new workdir", flag_values=values)
    flags.DEFINE_string("method", "", "see above", flag_values=values)
    flags.DEFINE_integer("group", None, "inputs a scale: 0 (all), 32, 64, 128", flag_values=values)
    flags.DEFINE_string("keep", "", "what stays float, for example head", flag_values=values)
    flags.DEFINE_integer("calibration", 128, "windows; 0 = none", flag_values=values)
    flags.DEFINE_string("data", "", "text for a run without its own", flag_values=values)
    define_step(values)
    parse(values, argv, __doc__)
    for name in ("workdir", "out", "method"):
        if not values[name].value:
            raise BadInput(f"--{name}=... is required")
    if is_object_store(values.out):
        raise BadInput(f"--out={values.out}: shrink writes a local folder; copy it from there")
    method = parse_method(values.method)
    options = parse_options(method[0], values.group, values.keep, values.calibration, values.data)
    done = read_config(epath.Path(values.workdir)).shrink.done
    check_order(done, method[0], values.workdir)
    # JAX is imported only now, so that wrong flags are reported at once
    from jaxgpt.jobs.shrink import shrink

    out = path_of(values.out, "--out")
    print(json.dumps(shrink(values.workdir, out, values.step, method, options)), flush=True)


if __name__ == "__main__":
    run(main)
