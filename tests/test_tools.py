"""What training recipes make of pages; that they train is seen where they are run."""

from __future__ import annotations

import gzip
from pathlib import Path

from tools.train_128_channels import Unseen, english, read

PROSE = "The purpose of this page is to tell for whom it is meant, and that it is of use to all of them. " * 12


def test_a_page_is_its_running_text(tmp_path: Path) -> None:
    page = (
        "<html><head><title>T</title><script>no()</script></head><body><nav>Home</nav><p>One  two</p><pre>a\n  b</pre></body>"
    )
    (tmp_path / "page.html").write_text(page)
    assert read(tmp_path / "page.html").split() == ["One", "two", "a", "b"]
    assert "a\n  b" in read(tmp_path / "page.html")
    (tmp_path / "words.dz").write_bytes(gzip.compress(b"plain\r\n\n\n\ntext  \n"))
    assert read(tmp_path / "words.dz") == "plain\n\ntext"


def test_english_is_told_from_lists_and_other_languages() -> None:
    assert english(PROSE)
    assert not english("alpha beta gamma delta " * 30) and not english("der Zweck dieser Seite ist es zu sagen " * 30)


def test_a_paragraph_comes_once() -> None:
    unseen = Unseen()
    assert unseen(PROSE) == PROSE
    assert unseen(PROSE) is None
