"""Make a trained model smaller, and measure what that costs:

    python -m jaxgpt.shrink --workdir=A --out=B --method=METHOD

Writes the new workdir B, which evaluate, sample, serve and convert take like any other, and leaves
A as it is. The last line of stdout is JSON: method, bytes of the weights and bits per byte (as
evaluate measures it), before and after.

layers:S and heads:S remove the least important share S of the layers, or of the heads and of the
feed-forward columns of every layer; prune:S and prune24 set the least important weights of each
projection to zero, a share S or two of every four along the inputs. svd:R stores projections
(--targets, default all) as two factors of rank R, or, below 1, of the rank that keeps the share R
of the energy, where that is smaller. All of these measure on --calibration windows of the run's
training text; prune and svd with --calibration=0 look at the weights alone. tt:R stores the
embeddings as a tensor train of rank R. Train on with --config.init_from=B: zeros stay zero, factors
and cores stay what they are.

int8 has a scale for each output of a projection, int4 and nf4 for each --group of its inputs.
Embeddings and head are quantised too, unless --keep=head. Rounding is calibrated (GPTQ) on
--calibration windows of the run's training text; 0 rounds each weight to the nearest. A run that
was trained with compute.fake_quantise is by default rounded as it was trained: to the nearest.

Methods compose in this order: layers and heads, prune, svd, tt, then one of int8, int4, nf4;
between them the model may be trained. B/shrink.html shows size, bits per byte and speed (unless
--nospeed) beside A, what the table of A shows, and the workdirs --beside=DIR,DIR, what their
tables show or, of such as were trained, for example with objective=distill, what is measured now.
"""

import json
import shlex

from absl import flags
from etils import epath

from jaxgpt.checkpointing.choice import define_step
from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.config.stored import methods_done, read_config
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
    flags.DEFINE_string("keep", None, "what stays float, for example head", flag_values=values)
    flags.DEFINE_string("targets", "", "what svd factorises; default: all", flag_values=values)
    flags.DEFINE_integer("calibration", None, "windows: 32; 0 = none", flag_values=values)
    flags.DEFINE_string("data", "", "text for a run without its own", flag_values=values)
    flags.DEFINE_list("beside", [], "workdirs that the table shows too", flag_values=values)
    flags.DEFINE_bool("speed", True, "measure tokens per second", flag_values=values)
    define_step(values)
    parse(values, argv, __doc__)
    for name in ("workdir", "out", "method"):
        if not values[name].value:
            raise BadInput(f"--{name}=... is required")
    if is_object_store(values.out):
        raise BadInput(f"--out={values.out}: shrink writes a local folder; copy it from there")
    for folder in values.beside:
        read_config(epath.Path(folder))
    method = parse_method(values.method)
    config = read_config(epath.Path(values.workdir))
    given = values.group, values.keep, values.calibration, values.data, values.targets
    options = parse_options(config, method[0], *given)
    check_order(methods_done(config), method[0], values.workdir)
    # JAX is imported only now, so that wrong flags are reported at once
    from jaxgpt.jobs.shrink import Table, shrink

    out = path_of(values.out, "--out")
    command = shlex.join(["python", "-m", "jaxgpt.shrink", *argv[1:]])
    table = Table(command, tuple(values.beside), values.speed)
    row = shrink(values.workdir, out, values.step, method, options, table)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run(main)
