"""What benchmarks and tasks put in front of a model, to the character and to the token."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxgpt import convert
from jaxgpt.config import DataConfig
from jaxgpt.data.prepare import prepare_whole
from jaxgpt.evaluation import tasks
from jaxgpt.evaluation.benchmarks import Item, read_items
from jaxgpt.evaluation.multiple_choice import last_words, multiple_choice, token_pair
from jaxgpt.inference.trained import open_trained
from jaxgpt.jobs import evaluate as job
from jaxgpt.objectives.text import batch_sharding
from jaxgpt.system.errors import BadInput
from jaxgpt.text.tasks import read_examples
from jaxgpt.tokenizer.base import ByteTokenizer
from tests.interchange.test_import_export import model_folder

BYTES = ByteTokenizer()
SWAG = {
    "activity_label": "Removing ice from car",
    "ctx": "Then, the man writes. then, THE MAN",
    "ctx_a": "Then, the man writes.",
    "ctx_b": "then, THE MAN",
    "endings": [" [step] adds wax  to it.", "is [title] Cut back.", "sits"],
    "label": "1",
}
TITLED = {
    "activity_label": "Family Life",
    "ctx_a": "[header] How to tell [title] Talk. [step] Watch.",
    "ctx_b": "",
    "endings": ["é", "b"],
    "label": 0,
}
ARC = {
    "question": "Which is\nit? ",
    "choices": {"text": ["x", "yz ", "'q'"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
AI2 = {
    "question": {
        "stem": "Q?",
        "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}],
    },
    "answerKey": "1",
}
ITEMS = [
    (
        "hellaswag",
        SWAG,
        "Removing ice from car: Then, the man writes. Then, the man",
        ("  adds wax to it.", " is. Cut back.", " sits"),
        1,
    ),
    ("hellaswag", TITLED, "Family Life: How to tell. Talk. Watch.", (" é", " b"), 0),
    ("hellaswag", TITLED | {"ctx_a": "Do it [step]"}, "Family Life: Do it ", (" é", " b"), 0),
    ("arc", ARC, "Question: Which is\nit? \nAnswer:", (" x", " yz ", " 'q'"), 1),
    (
        "arc",
        ARC | {"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Which is\nit? \nAnswer:",
        (" x", " y"),
        1,
    ),
    ("arc", AI2, "Question: Q?\nAnswer:", (" x", " y"), 0),
    ("lambada", {"text": "He said  hello"}, "He said ", (" hello",), 0),
    ("lambada", {"text": "two\nlines end."}, "two\nlines", (" end.",), 0),
]


def written(folder, rows) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(("task", "row", "prompt", "choices", "right"), ITEMS)
def test_items_to_the_character(tmp_path, task, row, prompt, choices, right):
    assert read_items(task, [written(tmp_path, [row])]) == [Item(prompt, choices, right)]


NOT_ROWS = {
    "hellaswag": [
        *({}, 1, None, "x", SWAG | {"ctx_a": None}, SWAG | {"ctx_b": 1}, SWAG | {"label": ""}),
        *(SWAG | {"label": label} for label in ("x", None, -1, 3, [], 10**400, "9" * 5000)),
        *(SWAG | {"endings": ends} for ends in (None, 1, [], [1], [None, "b", "c"], {"a": 1})),
        *(SWAG | {"activity_label": bad} for bad in (None, 1, "\ud800")),
    ],
    "arc": [
        *({}, 1, None, "x", ARC | {"question": None}, ARC | {"question": {"stem": 1}}),
        *(ARC | {"answerKey": key} for key in (None, "D", 1, [], {})),
        *(ARC | {"choices": bad} for bad in (None, [], {}, [1], {"text": ["a"]}, "ab")),
        ARC | {"choices": {"text": [None, "b"], "label": ["A", "B"]}},
        ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}},
        ARC | {"question": "\udfff"},
    ],
    "lambada": [
        *({}, 1, None, "x"),
        *({"text": bad} for bad in (None, 1, [], "", "one", "a \ud800")),
    ],
}


@pytest.mark.parametrize("task", NOT_ROWS)
def test_what_is_no_row_is_refused(tmp_path, task):
    for row in NOT_ROWS[task]:
        with pytest.raises(BadInput, match="rows.jsonl, line 1"):
            read_items(task, [written(tmp_path, [row])])


def test_an_array_s_elements_are_rows(tmp_path):
    for rows, said in (([[]], "rows.jsonl, row 1"), ([SWAG, 1], "rows.jsonl, row 2")):
        with pytest.raises(BadInput, match=said):
            read_items("hellaswag", [written(tmp_path, [rows])])
    assert len(read_items("hellaswag", [written(tmp_path, [[SWAG, SWAG]])])) == 2


def test_a_row_without_its_context_is_named(tmp_path):
    row = {name: value for name, value in SWAG.items() if name != "ctx_a"}
    with pytest.raises(BadInput, match=r"line 1 is no row of hellaswag: KeyError\('ctx_a'\)"):
        read_items("hellaswag", [written(tmp_path, [row])])


def test_spaces_at_a_prompt_s_end_are_scored_with_the_continuation():
    for prompt, continuation, kept, scored in (
        ("a b", " c", "a b", " c"),
        ("a b ", " c", "a b", "  c"),
        ("a\n", "c", "a", "\nc"),
        ("", " c", "", " c"),
    ):
        ids = token_pair(BYTES, prompt, continuation)
        assert tuple(map(BYTES.decode, ids)) == (kept, scored)


class Given(tasks.AnswerScorer):
    """Fixed likelihoods, in the order of the pairs."""

    tokenizer = BYTES

    def __init__(self, scores):
        self.given = np.array(scores)

    def scores(self, params, pairs):
        assert len(pairs) == len(self.given)
        return self.given


def test_accuracy_by_likelihood_and_by_character():
    items = [
        Item("p", (" abcd", " a"), 0),
        Item("p", (" abcd", " a"), 1),
        Item("p", (" a", " abc"), 1),
    ]
    found = multiple_choice(items, Given([-4.0, -2.0, -4.0, -0.5, -1.0, -2.5]), {})
    # by character: -1.0 and -2.0, -1.0 and -0.5, -1.0 and -0.83 (the space in front does not count)
    assert found == {"examples": 3, "accuracy": 1 / 3, "accuracy_norm": 1.0}
    words = [Item("p", (" ab",), 0), Item("q", (" cd",), 0)]
    right = {"p": b" ab", "q": b" ce"}
    found = last_words(
        words,
        Given([-1.0, -3.0]),
        {},
        lambda ids, count: np.frombuffer(right[BYTES.decode(ids)], np.uint8)[:count],
    )
    assert found == {"examples": 2, "accuracy": 0.5, "perplexity": pytest.approx(np.exp(2))}


QA = {"context": "a", "question": "b", "answers": ["c"]}


def test_every_task_s_prompt_begins_as_its_training_does(command, tmp_path, monkeypatch):
    """With the end-of-text token that stands in front of each document."""
    model_folder(tmp_path / "hf", max_seq_len=96)
    command(convert.main, "import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/w")
    trained, seen = open_trained(f"{tmp_path}/w", None), []
    file = written(tmp_path, [QA])
    source = f"task:questions:{file}"
    learnt = prepare_whole(source, DataConfig(), trained.tokenizer, tmp_path / "cache")

    def generated(decoder, prompts, count, *args, **kwargs):
        seen.append(prompts[0])
        return [np.zeros(count, np.int32)], None

    monkeypatch.setattr(job, "generate", generated)
    monkeypatch.setattr(job.Decoder, "of", lambda *_: None)
    (example,) = read_examples("questions", [file])
    job.greedy_line(trained, {})(example.prompt)
    job.greedy_tokens(trained, {})(trained.tokenizer.encode(example.prompt), 2)
    for ids in seen:
        assert len(ids) == 1 + len("Context: a\nQuestion: b\nAnswer:")
        np.testing.assert_array_equal(ids, learnt.tokens[: len(ids)])

    def losses(params, batch):
        seen.append(np.asarray(batch["inputs"])[0, 0, : len(ids)])
        return np.zeros((8, 96), np.float32)

    with jax.set_mesh(trained.mesh):
        sharding = batch_sharding(trained)
        choices = tasks.AnswerScorer(losses, sharding, trained.tokenizer, 96, 8)
        encode = trained.tokenizer.encode
        choices.scores({}, [(encode(example.prompt), encode(" c"))])
    np.testing.assert_array_equal(seen[-1], ids)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "yaml"),
    [
        ("hellaswag", "hellaswag/hellaswag"),
        ("arc", "arc/arc_easy"),
        ("lambada", "lambada/lambada_openai"),
    ],
)
def test_documents_are_lm_eval_s(tmp_path, name, yaml):
    """The harness's own task code reads the same rows: contexts, choices, gold, both accuracies."""
    from pathlib import Path

    import lm_eval.tasks
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = [row for task, row, *_ in ITEMS if task == name and row is not AI2]
    file = written(tmp_path, [row | {"label": str(row.get("label"))} for row in rows])
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / f"{yaml}.yaml")
    local = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": file, "cache_dir": str(tmp_path / "hf")},
        "training_split": None,
        "validation_split": None,
        "test_split": "train",
    }
    task = ConfigurableTask(config=config | local)
    task.build_all_requests()
    items = read_items(name, [file])
    ours = [(item.prompt, choice) for item in items for choice in item.choices]
    assert ours == [one.args for one in task.instances]
    model = SimpleNamespace(backend="causal", tok_encode=lambda text: BYTES.encode(text).tolist())
    for pair in ours:
        theirs = TemplateLM._encode_pair(model, *pair)
        assert tuple(ids.tolist() for ids in token_pair(BYTES, *pair)) == theirs
    if name == "lambada":
        return
    rng = np.random.default_rng(0)
    for _ in range(20):
        for item, doc in zip(items, task.test_docs(), strict=True):
            scores = rng.normal(-10, 3, len(item.choices))
            found = multiple_choice([item], Given(scores), {})
            theirs = task.process_results(doc, [(score, False) for score in scores])
            assert (found["accuracy"], found["accuracy_norm"]) == (
                theirs["acc"],
                theirs["acc_norm"],
            )
