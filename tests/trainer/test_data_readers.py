"""Rows out of JSONL, Parquet and Arrow files, with their places; nothing is loaded whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_kit import write_jsonl

from posttrain_api.reasons import Reason
from posttrain_trainer.data.readers import Broken, Row, list_files, read
from posttrain_trainer.errors import TrainerFailure

ROWS = [{"text": f"row {i}", "n": i} for i in range(700)]


def _write(path: Path, kind: str) -> Path:
    table = pa.Table.from_pylist(ROWS)
    if kind == "jsonl":
        return write_jsonl(path.with_suffix(".jsonl"), ROWS)
    if kind == "parquet":
        pq.write_table(table, path.with_suffix(".parquet"), row_group_size=300)
        return path.with_suffix(".parquet")
    target = path.with_suffix(".arrow")
    with pa.OSFile(str(target), "wb") as sink:
        opener = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with opener(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=299)
    return target


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream", "file"])
def test_formats_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path / "data", kind)
    (file,) = list_files(path, "pvc://d/data")
    rows = [row for row in read(file) if isinstance(row, Row)]
    assert [row.values for row in rows] == ROWS
    unit = "line" if kind == "jsonl" else "row"
    assert str(rows[16].place) == f"{path.name} {unit} 17"


def test_broken_lines_have_their_place(tmp_path: Path) -> None:
    lines = ['{"text": "a"}'] * 20
    lines[16] = '{"text": "a" "b"}'
    lines[17] = "[1]"
    lines[18] = ""
    path = write_jsonl(tmp_path / "train.jsonl", lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"text": "\xff"}\n' + b"[" * 5000 + b"\n")
    with path.open("ab") as file:
        file.write(b'{"n": ' + b"1" * 5000 + b"}\n")
    (file,) = list_files(path, "pvc://d/train.jsonl")
    broken = {str(record.place): record for record in read(file) if isinstance(record, Broken)}
    assert broken["train.jsonl line 17"].detail == "broken JSON: Expecting ',' delimiter at column 14"
    assert {place: record.reason for place, record in broken.items()} == {
        "train.jsonl line 17": "BrokenJSON",
        "train.jsonl line 18": "NotAnObject",
        "train.jsonl line 21": "BrokenJSON",
        "train.jsonl line 22": "BrokenJSON",
        "train.jsonl line 23": "BrokenJSON",
    }


def test_folders_are_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/x.jsonl", "notes.txt", ".hidden.jsonl", "_cache/y.jsonl"):
        write_jsonl(tmp_path / "set" / name, [{"text": name}])
    files = list_files(tmp_path / "set", "pvc://d/set")
    assert [file.name for file in files] == ["a/x.jsonl", "b.jsonl"]


def _refusal(path: Path, wanted: str = "Auto") -> TrainerFailure:
    def read_all() -> None:
        for file in list_files(path, f"pvc://d/{path.name}", wanted):
            list(read(file))

    with pytest.raises(TrainerFailure) as caught:
        read_all()
    return caught.value


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [])
    failure = _refusal(tmp_path / "trian.jsonl")
    assert failure.reason is Reason.DATASET_NOT_FOUND
    assert "train.jsonl" in failure.message
    failure = _refusal(tmp_path / "no" / "such" / "x.jsonl")
    assert f"{tmp_path} has train.jsonl" in failure.message


@pytest.mark.parametrize(
    ("name", "content", "reason", "part"),
    [
        ("empty", None, Reason.DATASET_NOT_FOUND, "no data file"),
        ("data.csv", b"a,b", Reason.DATASET_SCHEMA_INVALID, "'.csv' says no format"),
        ("data.json", b'[{"text": "a"}]', Reason.DATASET_SCHEMA_INVALID, "JSON array"),
        ("data.parquet", b"no parquet at all", Reason.DATASET_SCHEMA_INVALID, "not a readable Parquet file"),
        ("data.arrow", b"no arrow at all", Reason.DATASET_SCHEMA_INVALID, "not a readable Arrow file"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, content: bytes | None, reason: Reason, part: str) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    failure = _refusal(path)
    assert failure.reason is reason
    assert part in failure.message


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_torn_pages_are_no_error_of_ours(tmp_path: Path, kind: str) -> None:
    """What the header promises and the pages do not hold shows only while rows are read."""
    path = _write(tmp_path / "data", kind)
    content = bytearray(path.read_bytes())
    if kind == "parquet":
        first = pq.ParquetFile(path).metadata.row_group(0).column(0)
        content[first.data_page_offset + 20 : first.data_page_offset + 120] = b"\xff" * 100
    else:
        content = content[: len(content) // 2]
    path.write_bytes(bytes(content))
    (file,) = list_files(path, "x")
    with pytest.raises(TrainerFailure, match=f"{path.name}: not a readable") as caught:
        list(read(file))
    assert caught.value.reason is Reason.DATASET_SCHEMA_INVALID


def test_a_string_that_is_no_utf8_is_one_bad_row(tmp_path: Path) -> None:
    """Arrow takes any bytes for a string."""
    values = [f"row {i}".encode() for i in range(300)]
    values[16] = b"\xff\xfe"
    pq.write_table(pa.table({"text": pa.array(values, pa.binary()).view(pa.string())}), tmp_path / "x.parquet")
    (file,) = list_files(tmp_path / "x.parquet", "x")
    found = list(read(file))
    assert [str(record.place) for record in found if isinstance(record, Broken)] == ["x.parquet row 17"]
    assert [record.values for record in found if isinstance(record, Row)] == [
        {"text": f"row {i}"} for i in range(300) if i != 16
    ]


def test_a_name_that_is_no_unicode_can_be_said(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).write_text("{")
    (file,) = list_files(tmp_path, "x")
    (broken,) = read(file)
    assert str(broken.place).encode() == b"caf\\udce9.jsonl line 1"


_MEASURE = """
import sys
from pathlib import Path
from posttrain_trainer.data.readers import list_files, read
for file in list_files(Path(sys.argv[1]), "x"):
    for row in read(file):
        pass
# Not getrusage: its peak begins with that of the process that started us.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, kind: str) -> None:
    """Eight times the rows: less than a third of the difference in bytes may stay in memory."""

    def peak(count: int) -> tuple[int, int]:
        rows = [{"text": f"{i:08d}" * 250} for i in range(count)]
        path = tmp_path / f"{kind}-{count}.{kind}"
        if kind == "jsonl":
            write_jsonl(path, rows)
        else:
            pq.write_table(
                pa.Table.from_pylist(rows), path, row_group_size=500, compression="none", use_dictionary=False
            )
        command = [sys.executable, "-c", _MEASURE, str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(output) * 1024, path.stat().st_size

    (small, small_size), (large, large_size) = peak(2000), peak(16000)
    assert large - small < (large_size - small_size) / 3
