"""Labelled images from a parquet file as `datasets` writes it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from handful.data.parquet import read_labelled
from handful.errors import RequestError


def png(red: int, side: int = 4) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (red, 0, 255)).save(stream, "PNG")
    return stream.getvalue()


def table(path: Path, rows: list[tuple[bytes, str | None, int]], names: list[str] | None = None) -> Path:
    made = pa.table(
        {"image": [{"bytes": content, "path": where} for content, where, _ in rows], "label": [label for *_, label in rows]}
    )
    if names:
        told = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(made, path)
    return path


ROWS: list[tuple[bytes, str | None, int]] = [
    (png(0), "dog/1.png", 1),
    (png(51), "cat/2.png", 0),
    (png(102), "dog/3.png", 1),
    (png(153), "cat/4.png", 0),
]


def test_images_come_in_the_files_order_with_the_classes_in_the_order_of_their_labels(tmp_path):
    images, classes = read_labelled(table(tmp_path / "a.parquet", ROWS), channels=3)
    assert classes == ["cat", "dog"]
    assert images.labels == ["dog", "cat", "dog", "cat"]
    assert images.images.shape == (4, 3, 4, 4)
    torch.testing.assert_close(images.images[:, 0, 0, 0], torch.tensor([0, 51, 102, 153]) / 127.5 - 1)
    assert [file.name for file in images.files] == ["1.png", "2.png", "3.png", "4.png"]


def test_the_files_own_names_of_labels_come_before_the_paths(tmp_path):
    _, classes = read_labelled(table(tmp_path / "a.parquet", ROWS, ["feline", "canine"]), channels=3)
    assert classes == ["feline", "canine"]


def test_without_names_and_paths_labels_are_called_by_their_numbers(tmp_path):
    rows = [(content, None, 10 * label) for content, _, label in ROWS]
    images, classes = read_labelled(table(tmp_path / "a.parquet", rows), channels=3)
    assert classes == ["0", "10"]
    assert images.labels == ["10", "0", "10", "0"]


def test_a_limit_takes_the_first_of_each_class_and_a_size_resizes(tmp_path):
    images, _ = read_labelled(table(tmp_path / "a.parquet", ROWS), channels=1, size=(8, 8), limit=1)
    assert images.labels == ["dog", "cat"]
    assert images.images.shape == (2, 1, 8, 8)


def test_a_folder_is_read_as_a_folder(tmp_path):
    for content, where, _ in ROWS:
        (tmp_path / str(where)).parent.mkdir(exist_ok=True)
        (tmp_path / str(where)).write_bytes(content)
    images, classes = read_labelled(tmp_path, channels=3)
    assert classes == ["cat", "dog"]
    assert images.labels == ["cat", "cat", "dog", "dog"]


def test_what_is_no_table_of_images_is_refused_by_name(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    whole = table(tmp_path / "whole.parquet", ROWS).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"picture": ["a"]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), tmp_path / "paths.parquet")
    pq.write_table(pa.table({"image": [{"bytes": png(0), "path": ""}], "label": [0.5]}), tmp_path / "labels.parquet")
    table(tmp_path / "image.parquet", [*ROWS, (b"no image", "cat/9.png", 0)])
    table(tmp_path / "sizes.parquet", [*ROWS, (png(0, side=5), "cat/9.png", 0)])
    for name in ("nothing", "text", "cut", "columns", "paths", "labels", "image", "sizes"):
        with pytest.raises(RequestError, match=f"^--data: .*{name}.parquet"):
            read_labelled(tmp_path / f"{name}.parquet", channels=3, field="--data")
