"""Real text of several kinds that is on every machine."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

from spectral_compile.errors import Mistake

SOURCES = ("argparse", "inspect", "typing", "tarfile", "doctest", "difflib", "turtle", "imaplib")  # each has over 20 000 tokens
UNSEEN = ("pickletools", "subprocess")  # and these are for calibration alone


def prose(count: int) -> list[str]:
    """The documentation of Python cut into ``count`` texts of equal length."""
    text = "\n\n".join(dict.fromkeys(topics.values()))
    size = len(text) // count
    return [text[i * size : (i + 1) * size] for i in range(count)]


def source(module: str) -> str:
    """The source of a module of the standard library."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, "it is a file of the standard library"
    return Path(spec.origin).read_text(encoding="utf-8")


def dialogue(tokenizer: PreTrainedTokenizerBase, start: int) -> str:
    """Questions about Python and answers from its documentation in turns, as chat where the tokenizer has a template for it.

    Answers are whole paragraphs; each ``start`` gives other ones.
    """
    turns = []
    for topic, text in list(topics.items())[start:]:
        paragraphs = [paragraph for paragraph in text.split("\n\n")[2:] if len(paragraph) > 80]
        for name, paragraph in zip(("about", "more about"), paragraphs, strict=False):
            turns.append({"role": "user", "content": f"What can you tell me {name} {topic.lower()} in Python?"})
            turns.append({"role": "assistant", "content": " ".join(paragraph.split())})
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def texts(
    tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, given: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """Texts of ``tokens`` tokens, int64 [1, tokens] by name: those ``given``, or else prose, source and dialogue in turn."""
    found = dict(given or {})
    if not found:
        kinds = [range(i, count, 3) for i in range(3)]
        found = {f"topics {i}": text for i, text in enumerate(prose(len(kinds[0])))}
        found |= {f"{module}.py": source(module) for module in SOURCES[: len(kinds[1])]}
        found |= {f"dialogue {i}": dialogue(tokenizer, 36 * i) for i in range(len(kinds[2]))}
    return {name: take(tokenizer, text, tokens, name) for name, text in found.items()}


def calibration(
    tokenizer: PreTrainedTokenizerBase, tokens: int, given: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """Texts of ``tokens`` tokens: those ``given``, or else prose and source that ``texts`` has not among the first twenty."""
    last = prose(4)[-1]
    found = given or {"prose": last[-len(last) // 2 :], **{module: source(module) for module in UNSEEN}}
    return {name: take(tokenizer, text, tokens, name) for name, text in found.items()}


def take(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, name: str) -> torch.Tensor:
    """The first ``tokens`` tokens of ``text``, int64 [1, tokens]; ``Mistake`` where it has fewer."""
    ids = tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt").input_ids
    if ids.shape[1] < tokens:
        raise Mistake(f"{name} has only {ids.shape[1]} of {tokens} tokens: ask for fewer, or pass a longer --text")
    return ids
