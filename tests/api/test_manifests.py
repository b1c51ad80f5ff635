"""YAML as kubectl reads it: lines, duplicate keys, several documents, and what is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_cli.manifests import ManifestError, load_documents

TEXT = """\
# a comment
metadata:
  name: x
spec:
  data:
    train:
      - uri: a
      - {uri: b,
         maxRows: 3}
  labels: {a.b/c: d}
---
---
second: 2
"""


def test_lines() -> None:
    first, second = load_documents(TEXT)
    assert first.value["spec"]["data"]["train"][1] == {"uri": "b", "maxRows": 3}
    assert first.line_of("metadata.name") == 3
    assert first.line_of("spec.data.train[1].maxRows") == 9
    assert first.line_of("spec.data.train[1].columns.prompt") == 8, "the nearest thing around it"
    assert first.line_of("spec.labels.a.b/c") == 10
    assert first.line_of("spec.storage") == 4
    assert first.line_of("nowhere") == first.line
    assert second.line_of("second") == 13


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key 'a'"),
        ("a:\n  b: [1\n", 3, "not valid YAML"),
        ("a: .inf\n", 1, "write a finite one"),
        ("a:\n- .nan\n", 2, "write a finite one"),
        ("a: !!python/object:os.system x\n", 1, "not valid YAML"),
        ("a: *nobody\n", 1, "not valid YAML"),
        ("a: \x00\n", 1, "not valid YAML"),
        ("{a: 1}: b\n", 1, "a key must be a text"),
        ("a:\n\tb: c\n", 2, "not valid YAML"),
    ],
)
def test_refused(text: str, line: int, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        load_documents(text)
    assert caught.value.line == line


def test_json_types_only() -> None:
    (document,) = load_documents("a: 1e-5\nb: 64.0\nc: 2024-01-01\nd: 12:30\ne: '1'\n1: x\ntrue: z\n")
    assert document.value == {"a": 1e-5, "b": 64, "c": "2024-01-01", "d": "12:30", "e": "1", "1": "x", "true": "z"}
    assert isinstance(document.value["b"], int)


def test_anchors_and_merges() -> None:
    (document,) = load_documents("base: &b {x: 1, z: 2}\nderived: {<<: *b, z: 3}\n")
    assert document.value["derived"] == {"x": 1, "z": 3}


@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`#,\n 01.~<", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ManifestError):  # the only error there may be
        assert all(document.value is not None for document in load_documents(text))
