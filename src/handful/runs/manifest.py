"""The manifest: a row for every image, saying what it is, how it came about and how near it is to the exemplars.

A cohort's marker holds its rows, so the manifest is nothing but the markers, joined in the plan's order.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from handful.recipe.schema import Recipe

DONE, FAILED = "done", "failed"
SHARD = b"shard_sha256"  # in the metadata of a marker


def manifest_schema(energies: Sequence[str], started: bool = False, prompts: bool = False) -> pa.Schema:
    """The manifest's columns.

    Args:
        energies: Columns of the potentials' energies on the final images, as 8-bit files hold them. A potential of a set
            has one energy for all images of a cohort.
        prompts: Whether a class has several prompts: then which one is said.
        started: Whether images start from exemplars: then which one is said.
    """
    return pa.schema(
        [
            ("file", pa.string()),  # relative to the run directory; null where the cohort failed
            ("class", pa.string()),
            ("label", pa.int64()),  # null for an unconditional model
            ("index", pa.int64()),  # within the class
            ("seed", pa.int64()),  # of this image's noise
            ("cohort", pa.int64()),  # within the class
            ("model", pa.string()),
            ("guidance", pa.string()),  # JSON: the terms with their scales
            *((name, pa.float64()) for name in energies),
            *([("prompt", pa.string())] if prompts else []),
            *([("started_from", pa.string())] if started else []),  # CLASS/FILE in the folder of exemplars
            ("nearest_exemplar", pa.string()),  # CLASS/FILE in the folder of exemplars, or CLASS/NUMBER in a file of features
            ("nearest_exemplar_distance", pa.float64()),  # Euclidean, in the first potential's features
            ("sha256", pa.string()),  # of the file
            ("status", pa.string()),  # done or failed
        ]
    )


def guidance_text(recipe: Recipe) -> str:
    """The recipe's terms as JSON, always the same text for the same terms."""
    return json.dumps(recipe.as_dict()["guidance"] or [])


def parquet_bytes(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> bytes:
    """Rows -> a parquet file's bytes, which depend on the rows and on pyarrow's version."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema), stream)
    return stream.getvalue()


def read_rows(path: Path, schema: pa.Schema) -> list[dict[str, Any]] | None:
    """The rows of a marker; None where it is missing, damaged, or of another schema."""
    try:
        # Not pq.read_table: its thread pool and torch's abort the process at exit, every second time ("terminate called
        # without an active exception"; pyarrow 26 beside torch 2.13).
        table = pq.ParquetFile(io.BytesIO(path.read_bytes())).read(use_threads=False)
    except (OSError, pa.ArrowException):
        return None
    return table.to_pylist() if table.schema.equals(schema) else None


def read_hashes(path: Path, schema: pa.Schema) -> tuple[list[str], list[str], str | None] | None:
    """What a marker says of files: each image's, its SHA-256, and that of the shard that holds them all, where one does."""
    try:
        marker = pq.ParquetFile(io.BytesIO(path.read_bytes()))
        if not marker.schema_arrow.equals(schema):
            return None
        table, told = marker.read(["file", "sha256"], use_threads=False), marker.schema_arrow.metadata or {}
    except (OSError, pa.ArrowException):
        return None
    shard = told.get(SHARD)
    return table["file"].to_pylist(), table["sha256"].to_pylist(), None if shard is None else shard.decode()
