"""Names of the hub in a config get the commit that they mean now, so that `config.json` says which
files a run was made from, and a resumed run takes the same:

    data.source   hf:ORG/NAME   becomes   hf:ORG/NAME@0123456789abcdef0123456789abcdef01234567
"""

from etils import epath

from jaxgpt.config import Config
from jaxgpt.config.schema import get_field, set_field
from jaxgpt.config.stored import read_config
from jaxgpt.data.prepare import cache_folder
from jaxgpt.hub.datasets import pinned_dataset
from jaxgpt.hub.models import pinned_model
from jaxgpt.hub.names import FIELDS, Name, map_names, names_in


def pin(config: Config, workdir: epath.Path | None = None) -> None:
    """Puts the commit into every name of the hub in `config`: that of the run in `workdir` where it
    has the same name, else what the hub says.

    Raises:
      BadInput: if the hub has no such thing, or cannot be reached and the cache lacks it.
    """
    is_resumed = workdir is not None and (workdir / "config.json").exists()
    stored = read_config(workdir) if is_resumed else Config()
    for field in FIELDS:
        before = {name.at(""): name for name in names_in(field, get_field(stored, field))}

        def pinned(name: Name, before=before, field=field) -> Name:
            if name.is_pinned or name in before:
                return before.get(name, name)
            if field.endswith("source"):
                return pinned_dataset(name, cache_folder(config.data))
            return pinned_model(name)

        set_field(config, field, map_names(field, get_field(config, field), pinned))
