"""The table of smaller models: its rows are read back, and the page holds them safely."""

import json
import re

import pytest

from jaxgpt.reports.shrinking import read_rows, write_rows
from jaxgpt.system.errors import BadInput


def row(workdir, **more):
    fields = dict(method="original", command="", bytes_on_disk=8, resident_bytes=8, zeros=0.0)
    fields |= dict(bits_per_byte=1.5, tokens_per_second_1=3.0, tokens_per_second_8=None)
    return {"workdir": workdir} | fields | more


def test_rows_come_back_and_the_last_of_a_workdir_counts(tmp_path):
    assert read_rows(tmp_path) == []
    evil = row("b", method="int8", command="--out='</script><b>'")
    write_rows(tmp_path, [row("runs/<a>"), row("b"), evil])
    assert read_rows(tmp_path) == [row("runs/<a>"), evil]
    text = (tmp_path / "shrink.html").read_text()
    assert "Smaller models of &lt;a>" in text and text.count("</script>") == 1
    found = re.search(r"const ROWS = (\[.*?\]);\n", text)
    assert found and json.loads(found[1]) == [row("runs/<a>"), evil]
    assert not re.search(r"(src|href)=\"(?!data:)", text), "self-contained"


@pytest.mark.parametrize("text", ["[{}]", "{", '[{"workdir": 3}]'])
def test_a_damaged_table_is_named(tmp_path, text):
    (tmp_path / "shrink.json").write_text(text)
    with pytest.raises(BadInput, match="shrink.json.*delete it"):
        read_rows(tmp_path)
