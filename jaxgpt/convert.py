"""Weights from and to Hugging Face's folder layout:

    python -m jaxgpt.convert import --from=HF_DIR --workdir=DIR
    python -m jaxgpt.convert export --workdir=DIR --to=HF_DIR [--step=N|best] [--dtype=float32]

`import` reads GPT-2, Llama and Qwen3 folders (safetensors or pytorch_model.bin) and OpenAI's own
GPT-2 release, and makes a workdir of one checkpoint, for evaluate, sample, export and `init_from`.
`export` writes a folder that transformers loads, then reads it back and compares logits: a folder
that does not match is not left behind.
"""

from pathlib import Path

from absl import flags

from jaxgpt.checkpointing.choice import define_step
from jaxgpt.cli.flags import parse
from jaxgpt.cli.run import run
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import path_of
from jaxgpt.system.stores import is_object_store

DTYPES = ("float32", "float16", "bfloat16")


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("from", "", "import: the folder to read", flag_values=values)
    flags.DEFINE_string("to", "", "export: the folder to write", flag_values=values)
    flags.DEFINE_string("workdir", "", "the run", flag_values=values)
    define_step(values)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "export: as what", flag_values=values)
    what = argv[1] if len(argv) > 1 else ""
    if what not in ("import", "export"):
        if not any(arg.endswith(("-h", "-help")) for arg in argv):
            raise BadInput("say what to do: jaxgpt.convert import ... or jaxgpt.convert export ...")
    parse(values, [argv[0], *argv[2:]] if what in ("import", "export") else argv, __doc__)
    needed = ("from", "workdir") if what == "import" else ("workdir", "to")
    for name in needed:
        if not values[name].value:
            raise BadInput(f"--{name}=DIR is required")
    for name in ("from", "to", "workdir") if what == "import" else ("from", "to"):
        if is_object_store(values[name].value):
            raise BadInput(
                f"--{name}={values[name].value}: convert takes a local folder here; copy it from or"
                " to the object store"
            )
    # JAX is imported from here on: what is wrong with the flags is said at once
    from jaxgpt.jobs.convert import export_folder, import_folder

    if what == "import":
        import_folder(path_of(values["from"].value, "--from"), Path(values.workdir))
    else:
        export_folder(values.workdir, values.step, path_of(values.to, "--to"), values.dtype)


if __name__ == "__main__":
    run(main)
