"""Fidelity: how predictions from a cache compare with those from the dense one.

Every figure comes from the path that a user runs: the prompt goes through the compiled prefill graph, the scored tokens through
the extend graph (and the decode graph), and bytes are those of live tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectral_compile.codec import Profile
from spectral_compile.evaluation.contenders import DENSE, Contender, contender, require_matched
from spectral_compile.evaluation.size import Size, weigh
from spectral_compile.evaluation.tasks import Question, answers


@dataclass(frozen=True)
class Agreement:
    """How predictions of ``tokens`` tokens from a cache compare with those from the dense one.

    ``nll`` and ``dense_nll`` are the text's mean negative log-likelihood in nats, ``kl`` is the mean KL(dense || cache) in
    nats, and ``top1`` the share of tokens for which both hold the same one most likely.
    """

    tokens: int
    nll: float
    dense_nll: float
    kl: float
    top1: float

    @classmethod
    def of(cls, logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor) -> Agreement:
        """Compare ``logits`` [n, vocabulary] with the dense ones; ``targets`` [n] are the tokens that came."""
        ours, theirs = logits.float().log_softmax(-1), dense.float().log_softmax(-1)
        return cls(
            len(targets),
            -ours.gather(1, targets[:, None]).mean().item(),
            -theirs.gather(1, targets[:, None]).mean().item(),
            (theirs.exp() * (theirs - ours)).sum(-1).mean().item(),
            (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        )

    @classmethod
    def mean(cls, texts: Sequence[Agreement]) -> Agreement:
        """The agreement on all tokens of ``texts``, which have equally many each."""
        columns = zip(*((text.nll, text.dense_nll, text.kl, text.top1) for text in texts), strict=True)
        return cls(sum(text.tokens for text in texts), *(math.fsum(column) / len(texts) for column in columns))

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def change(self) -> float:
        """Perplexity against dense, in percent."""
        return 100 * math.expm1(self.nll - self.dense_nll)


@dataclass(frozen=True)
class Reading:
    """What a cache held after the prompt, and the logits [n, vocabulary] from it chunk by chunk and token by token."""

    size: Size
    extended: torch.Tensor
    decoded: torch.Tensor


@torch.no_grad()
def read(cache_of: Contender, ids: torch.Tensor, prompt: int, decode: int = 0, chunk: int | None = None) -> list[Reading]:
    """Prefill the first ``prompt`` of ``ids`` [B, n + 1], then predict the n - prompt tokens that follow each of the others.

    They are fed ``chunk`` at a time, or all at once: tokens of one chunk see each other as they are. The first ``decode`` of
    them are predicted a second time, token by token on a copy of the cache. One reading a row, with its share of the bytes.
    """
    cache = cache_of.empty()
    cache_of.run(cache, ids[:, :prompt], logits_to_keep=1)
    size = weigh(cache).share(len(ids))
    copied = copy.deepcopy(cache) if decode else cache
    chunks = ids[:, prompt:-1].split(chunk or ids.shape[1], 1)
    extended = torch.cat([cache_of.run(cache, tokens).logits for tokens in chunks], 1)
    steps = [cache_of.run(copied, ids[:, i : i + 1]).logits for i in range(prompt, prompt + decode)]
    decoded = torch.cat([extended[:, :0], *steps], 1)
    return [Reading(size, *logits) for logits in zip(extended, decoded, strict=True)]


@dataclass(frozen=True)
class Score:
    """One cache on one text: ``span`` of all scored tokens; ``extended`` and ``decoded`` of those that were also decoded."""

    size: Size
    span: Agreement
    extended: Agreement | None = None
    decoded: Agreement | None = None


def score(reading: Reading, dense: Reading, targets: torch.Tensor) -> Score:
    """``reading`` against the dense one; ``targets`` [n] are the tokens that came."""
    span = Agreement.of(reading.extended, dense.extended, targets)
    count = len(reading.decoded)
    if not count:
        return Score(reading.size, span)
    extended = Agreement.of(reading.extended[:count], dense.extended[:count], targets[:count])
    return Score(reading.size, span, extended, Agreement.of(reading.decoded, dense.decoded, targets[:count]))


@dataclass(frozen=True)
class Result:
    """One cache on all texts, and how many questions of each task it answered, of how many."""

    name: str
    dense_bytes: int
    scores: dict[str, Score]
    answered: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        """Of the last text; lengths are the same in all."""
        return list(self.scores.values())[-1].size

    @property
    def ratio(self) -> float:
        """Dense bytes over all bytes held."""
        return self.dense_bytes / self.size.stored_bytes

    def mean(self, which: str = "span") -> Agreement:
        """Over all texts: of the ``span``, or of its ``extended`` or ``decoded`` beginning."""
        return Agreement.mean([getattr(score, which) for score in self.scores.values()])

    def summary(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        agreements = {which: self.mean(which) for which in ("span", "extended", "decoded") if self.first(which)}
        return {
            "cache": self.name,
            "ratio": self.ratio,
            "dense_bytes": self.dense_bytes,
            **asdict(self.size),
            **{name: {**asdict(x), "perplexity_change_percent": x.change} for name, x in agreements.items()},
            "tasks": {task: {"answered": answered, "cases": cases} for task, (answered, cases) in self.answered.items()},
            "texts": {name: asdict(score.span) for name, score in self.scores.items()},
        }

    def first(self, which: str) -> Agreement | None:
        return getattr(next(iter(self.scores.values())), which)


@dataclass(frozen=True)
class Trial:
    """What each cache is tried on: the first ``prompt`` tokens of each text are read, and the others predicted (``read``).

    ``passages`` are texts by name, int64 [1, n], all of the same length; ``batch`` of them are read at a time. ``decode`` and
    ``chunk`` are as in ``read``. ``questions`` are asked one by one.
    """

    passages: dict[str, torch.Tensor]
    prompt: int
    decode: int = 0
    chunk: int | None = None
    questions: Sequence[Question] = ()
    batch: int = 1


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    names: Iterable[str],
    trial: Trial,
    inner: str = "eager",
    profile: Profile | None = None,
    step: Callable[[str], None] = lambda what: None,
) -> Iterator[Result]:
    """A ``Result`` for the dense cache and then for each of ``names``; ``step`` is told of every text and question to come.

    Only questions need the ``tokenizer``. Layers that this backend leaves dense are dense in its caches, and count.
    RuntimeError where its graphs do not compress the same ones, ``Refused`` where they compress none.
    """
    dense: dict[str, Reading] = {}
    kinds = {"prefill", "extend"} | ({"decode"} if trial.decode or trial.questions else set())
    for name in (DENSE, *names):
        cache_of = contender(model, name, inner, profile)
        scores: dict[str, Score] = {}
        answered: dict[str, tuple[int, int]] = {}
        for start in range(0, len(trial.passages), trial.batch):
            together = dict(list(trial.passages.items())[start : start + trial.batch])
            for text in together:
                step(f"{name}: {text}")
            readings = read(cache_of, torch.cat(list(together.values())), trial.prompt, trial.decode, trial.chunk)
            for (text, ids), reading in zip(together.items(), readings, strict=True):
                targets = ids[0, trial.prompt + 1 :].to(model.device)
                scores[text] = score(reading, dense.setdefault(text, reading), targets)
        for question in trial.questions:
            step(f"{name}: {question.task} at {question.depth:.0%}")
            found, cases = answered.get(question.task, (0, 0))
            answered[question.task] = found + answers(cache_of, tokenizer, question), cases + 1
        if cache_of.compressed:
            require_matched(kinds)
        yield Result(name, next(iter(dense.values())).size.stored_bytes, scores, answered)
