"""TensorBoard's files, read by TensorBoard."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from jaxgpt.metrics.board import Board


@pytest.mark.parametrize("appends", [True, False])
def test_tensorboard_reads_curves_and_texts_over_a_resume(tmp_path, appends):
    first = Board(tmp_path, 0, appends)
    for step in range(1, 6):
        first.scalar("train/loss", 10.0 - step, step)
    first.text("sample", "```\nbefore\n```", 2)
    first.close()
    second = Board(tmp_path, 3, appends)
    for step in range(4, 7):
        second.scalar("train/loss", 100.0 + step, step)
    second.text("sample", "```\ndéjà vu\n```", 6)
    second.close()

    seen = EventAccumulator(str(tmp_path)).Reload()
    curve = [(point.step, point.value) for point in seen.Scalars("train/loss")]
    assert curve == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 104.0), (5, 105.0), (6, 106.0)]
    texts = [(text.step, text.tensor_proto.string_val[0]) for text in seen.Tensors("sample")]
    assert texts == [(2, b"```\nbefore\n```"), (6, "```\ndéjà vu\n```".encode())]
    assert seen.SummaryMetadata("sample").plugin_data.plugin_name == "text"


def steps_of(board: Board) -> list[int]:
    return [e.step for e in EventFileLoader(str(board.path)).Load() if e.HasField("summary")]


@pytest.mark.parametrize("appends", [True, False])
def test_what_was_flushed_survives_a_kill(tmp_path, appends):
    board = Board(tmp_path, 0, appends)
    board.scalar("loss", 1.0, 1)
    board.flush()
    board.scalar("loss", 2.0, 2)  # still waits
    assert steps_of(board) == [1]
    board.flush()
    assert steps_of(board) == [1, 2]
