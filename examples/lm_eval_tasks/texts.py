"""What the tasks ask for: a number that stands somewhere in a long text."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset


def hidden(items: str, characters: int = 6000, **_: Any) -> dict[str, Dataset]:
    """The items of a file beside this one, each in as many characters of Python's documentation.

    6000 are some 1400 tokens; of texts with less than 1244 the preset ``balanced`` codes nothing.
    """
    prose, made = "\n".join(topics.values())[:characters], []
    for line in Path(__file__).with_name(items).read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        cut = int(item["depth"] * characters)
        told = f"{item['begun']} {item['choices'][item['right']]}."
        made.append(item | {"text": f"{prose[:cut]}\n\n{told}\n\n{prose[cut:]}\n\n{item['begun']}"})
    return {"test": Dataset.from_list(made)}
