"""Questions whose answers stand somewhere in a long prompt, in the manner of RULER (Hsieh et al. 2024, arXiv:2404.06654)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from spectral_compile.evaluation.contenders import Contender
from spectral_compile.evaluation.texts import prose, take

ANSWER_TOKENS = 8
NAMES = ("amber", "birch", "copper", "delta", "ember", "falcon", "garnet", "harbor")


@dataclass(frozen=True)
class Question:
    """A prompt int64 [1, n] of a ``task``: ``asked`` is a question on its text, and ``begun`` the answer's beginning, its end.

    What is asked for stands at ``depth`` (0 the beginning, 1 the end).
    """

    task: str
    ids: torch.Tensor
    answer: str
    depth: float
    asked: str
    begun: str


@dataclass(frozen=True)
class Hidden:
    """What is put into the text: ``lines``, the one that matters first, then the question and the beginning of its answer."""

    lines: tuple[str, ...]
    question: str
    begun: str
    answer: str


def _number(chance: random.Random) -> str:
    return f"{chance.randrange(10_000, 100_000)}"


def one_key(chance: random.Random) -> Hidden:
    """A pass key."""
    key = _number(chance)
    line = f"The magic number is {key}. Remember it. {key} is the magic number."
    asked, begun = "What is the magic number mentioned in the text above?", "The magic number mentioned in the text above is"
    return Hidden((line,), asked, begun, key)


def several_keys(chance: random.Random) -> Hidden:
    """One of four pass keys, by name."""
    keys = {name: _number(chance) for name in chance.sample(NAMES, 4)}
    lines = tuple(f"The magic number for {name} is {key}." for name, key in keys.items())
    wanted, key = next(iter(keys.items()))
    asked = f"What is the magic number for {wanted} mentioned in the text above?"
    return Hidden(lines, asked, f"The magic number for {wanted} mentioned in the text above is", key)


def variable(chance: random.Random) -> Hidden:
    """The value of a variable that was assigned from another one."""
    first, second = chance.sample(NAMES, 2)
    value = _number(chance)
    lines = (f"Let {second} be equal to {first}.", f"Let {first} be equal to {value}.")
    return Hidden(lines, f"Which number is {second} equal to?", f"{second} is equal to {first}, which is the number", value)


def counted(chance: random.Random) -> Hidden:
    """The word that was called out most often."""
    most, *others = chance.sample(NAMES, 4)
    calls = [most] * 5 + others
    lines = tuple(f"The word that is called out now is {word}." for word in calls)
    return Hidden(
        lines, "Which word was called out most often in the text above?", "The word that was called out most is", most
    )


TASKS: dict[str, Callable[[random.Random], Hidden]] = {
    "key": one_key,
    "keys": several_keys,
    "variable": variable,
    "count": counted,
}


def questions(tokenizer: PreTrainedTokenizerBase, task: str, tokens: int, cases: int, seed: int = 0) -> list[Question]:
    """``cases`` questions on some ``tokens`` tokens of prose, other prose in each.

    The line that matters stands at evenly spaced depths: in the middle of each ``cases``-th of the text, one a question.
    """
    chance, made = random.Random(f"{task} {seed}"), []
    for case, text in enumerate(prose(cases)):
        hay = take(tokenizer, text, tokens, "the built-in prose")[0]
        depth, hidden = (case + 0.5) / cases, TASKS[task](chance)
        # what matters at its depth, and what else there is at random ones
        places = sorted([(depth, hidden.lines[0]), *((chance.random(), line) for line in hidden.lines[1:])])
        cut = [tokenizer.decode(ids) for ids in hay.tensor_split([int(place * tokens) for place, _ in places])]
        told = "\n\n".join(x for pair in zip(cut, (line for _, line in places), strict=False) for x in pair)
        asked = f"{told}\n\n{cut[-1]}\n\n{hidden.question}"
        chat = bool(tokenizer.chat_template)
        if chat:
            turn = {"role": "user", "content": asked}
            asked = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(f"{asked}{hidden.begun}", add_special_tokens=not chat, return_tensors="pt").input_ids
        made.append(Question(f"{task} {tokens}", ids, hidden.answer, depth, hidden.question, hidden.begun))
    return made


@torch.no_grad()
def answers(cache_of: Contender, tokenizer: PreTrainedTokenizerBase, question: Question) -> bool:
    """Whether the answer stands in the first ``ANSWER_TOKENS`` tokens that follow greedily, one decode step each."""
    cache = cache_of.empty()
    said = [cache_of.feed(cache, question.ids, keep=1).argmax(-1)]
    while len(said) < ANSWER_TOKENS:
        said.append(cache_of.feed(cache, said[-1][None]).argmax(-1))
    return question.answer in tokenizer.decode(torch.cat(said))
