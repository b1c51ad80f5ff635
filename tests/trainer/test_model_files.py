"""Digests of files: by name and content, wherever they lie, in whatever order the file system lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_trainer.model_files import digest_of, folder_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with a further chat template."""
    made = tmp_path / "tokenizer"
    (made / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (made / name).write_text(name)
    return made


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tools.jinja"])
def test_a_folder_is_all_that_is_below_it(folder: Path, name: str) -> None:
    before = folder_digest(folder)
    (folder / name).write_text("other")
    assert folder_digest(folder) != before


def test_a_file_in_another_place_is_another_folder(folder: Path) -> None:
    before = folder_digest(folder)
    (folder / "additional_chat_templates" / "tools.jinja").rename(folder / "tools.jinja")
    assert folder_digest(folder) != before


def test_the_folders_own_place_does_not_count(folder: Path, tmp_path: Path) -> None:
    before = folder_digest(folder)
    assert folder_digest(folder.rename(tmp_path / "elsewhere")) == before


def test_files_in_any_order_and_any_place(folder: Path) -> None:
    """Of a flat folder both are the same."""
    files = [folder / "tokenizer.json", folder / "chat_template.jinja"]
    assert digest_of(files) == digest_of(files[::-1])
    (folder / "additional_chat_templates" / "tools.jinja").unlink()
    assert digest_of(files) == folder_digest(folder)
