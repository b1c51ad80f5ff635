"""Bodies of server-side apply are read as YAML: any text must survive it."""

from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from posttrain_operator.cluster.api import yaml_json

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)


@given(ANY_TEXT)
def test_any_text_is_the_same_in_yaml(text: str) -> None:
    expected = "".join("\ufffd" if 0xD800 <= ord(char) <= 0xDFFF else char for char in text)
    assert yaml.safe_load(yaml_json({"logTail": text}).decode()) == {"logTail": expected}
