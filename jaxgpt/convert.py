"""Import weights from Hugging Face's folder layout, or export them to it:

    python -m jaxgpt.convert import --from=HF_DIR --workdir=DIR
    python -m jaxgpt.convert export --workdir=DIR --to=HF_DIR [--step=N|best] [--dtype=float32]
    python -m jaxgpt.convert export --workdir=DIR --to=DIR2 --format=gguf

`import` reads GPT-2, Llama, Qwen3, Mixtral, Qwen3-MoE, BERT, RoBERTa, T5 and BART folders
(safetensors or pytorch_model.bin), also by their name on the Hugging Face hub
(--from=openai-community/gpt2), and OpenAI's own GPT-2 release. It writes a workdir with one
checkpoint, for evaluate, sample, export and init_from.
`export` writes a folder that transformers loads, reads it back and compares logits; a folder that
does not match is removed. --format=gguf writes DIR2/model.gguf, of GPT-2's architecture: int8 as
Q8_0, int4 as Q4_0, everything else as float32.
"""

from pathlib import Path

from absl import flags

from jaxgpt.checkpointing.choice import check_run, define_step
from jaxgpt.cli.flags import parse_action
from jaxgpt.cli.run import run
from jaxgpt.hub.models import located
from jaxgpt.interchange.folder import check_folder
from jaxgpt.system.errors import BadInput
from jaxgpt.system.files import path_of
from jaxgpt.system.stores import is_object_store

FORMATS = ("hf", "gguf")
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "from", "", "import: the folder to read, or a name on the hub", flag_values=values
    )
    flags.DEFINE_string("to", "", "export: the folder to write", flag_values=values)
    flags.DEFINE_string("workdir", "", "the run", flag_values=values)
    define_step(values)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "export: as what", flag_values=values)
    flags.DEFINE_enum("format", "hf", FORMATS, "export: of the weights", flag_values=values)
    action = parse_action(values, argv, ("import", "export"), __doc__)
    needed = ("from", "workdir") if action == "import" else ("workdir", "to")
    for name in needed:
        if not values[name].value:
            raise BadInput(f"--{name}=DIR is required")
        if is_object_store(values[name].value) and (action, name) != ("export", "workdir"):
            raise BadInput(
                f"--{name}={values[name].value}: convert takes a local folder here; copy it from or"
                " to the object store"
            )
    flag = "from" if action == "import" else "to"
    folder = path_of(values[flag].value, f"--{flag}")
    if action == "export":
        check_run(values.workdir, values.step)
    else:
        check_folder(Path(located(str(folder))))
    # JAX is imported only now, so that wrong flags are reported at once
    from jaxgpt.jobs.convert import export_folder, export_gguf, import_folder

    if action == "import":
        import_folder(folder, Path(values.workdir))
    elif values.format == "gguf":
        export_gguf(values.workdir, values.step, folder)
    else:
        export_folder(values.workdir, values.step, folder, values.dtype)


if __name__ == "__main__":
    run(main)
