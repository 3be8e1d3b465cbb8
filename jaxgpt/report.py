"""Write a page with the curves of a run, or of several:

    python -m jaxgpt.report --workdir=DIR [--workdir=OTHER ...] [--out=FILE]

One HTML file that needs nothing else: curves, samples over time, config, data, environment. It goes
to DIR/report.html; several workdirs are compared on one page.
"""

from absl import flags
from etils import epath

from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import write_whole


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_multi_string("workdir", [], "folder of a run; repeatable", flag_values=values)
    flags.DEFINE_string("out", "", "file to write; default: DIR/report.html", flag_values=values)
    parse(values, argv, __doc__)
    if not values.workdir:
        raise BadInput("--workdir=DIR is required")
    # JAX is imported from here on: what is wrong with the flags is said at once
    from jaxgpt.reports.gather import gather, page

    text = page([gather(workdir) for workdir in values.workdir])
    out = epath.Path(values.out) if values.out else epath.Path(values.workdir[0]) / "report.html"
    try:
        write_whole(out, text)
    except OSError as e:
        raise BadInput(f"cannot write {out}: {e}") from e
    print(out)


if __name__ == "__main__":
    run(main)
