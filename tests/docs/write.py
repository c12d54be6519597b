"""``python -m tests.docs.write``: writes what is made of code and figures: parts of pages in docs/, and README's picture."""

from __future__ import annotations

from tests.docs import api, picture, rooms

if __name__ == "__main__":
    for module in (api, rooms):
        module.PAGE.write_text(module.written(), encoding="utf-8")
    picture.write()
