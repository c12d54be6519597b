"""``spectral-compile eval``: what a compressed cache costs in quality and saves in bytes, beside dense and rival caches.

Every figure comes from the path that a user runs: the prompt goes through the compiled prefill graph, the scored tokens through
the extend graph (and the decode graph), and bytes are those of live tensors.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn
from rich.table import Table
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, QuantizedCache
from typer import Option

from spectral_compile import models
from spectral_compile.backend import reset, spectral
from spectral_compile.codec import PRESETS
from spectral_compile.generate import fail, phases
from spectral_compile.report import reports
from spectral_compile.stats import memory_stats
from spectral_compile.tensor import SpectralTensor

DENSE = "dense"
RIVALS = {  # the quantised caches of transformers: back end and bits
    "fp8": ("fp8", None),
    "quanto-4": ("quanto", 4),
    "quanto-2": ("quanto", 2),
    "hqq-4": ("hqq", 4),
    "hqq-2": ("hqq", 2),
}
SOURCES = ("argparse", "inspect", "typing", "tarfile", "doctest", "difflib", "turtle", "imaplib")  # each has over 20 000 tokens
CASES = 16
NEEDLE_TOKENS = 3000
ANSWER = "The magic number mentioned in the text above is"
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Contender:
    """A cache on trial: ``model`` takes what a transformers model takes and fills a cache that ``empty`` makes."""

    name: str
    model: PreTrainedModel
    empty: Callable[[], Cache]

    def feed(self, cache: Cache, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Append ``ids`` [1, n] to ``cache``; logits [n, vocabulary], or of the last ``keep`` tokens."""
        ids, start = ids.to(self.model.device), cache.get_seq_length()
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        out = self.model(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=keep)
        if self.name in PRESETS and not all(isinstance(layer.keys, SpectralTensor) for layer in cache.layers):
            # also when Dynamo gave up at its recompile limit, of which no report tells
            raise RuntimeError(f"{self.name}: the cache is dense, so its figures would be those of another cache")
        return out.logits[0]


def contender(model: PreTrainedModel, name: str, inner: str = "eager") -> Contender:
    """The cache called ``name``: dense, a preset, or a rival. Only the latest preset keeps its compiled graphs and reports."""
    if name in PRESETS:
        reset()
        compiled = torch.compile(model, backend=spectral, options={"preset": name, "strict": True, "inner": inner})
        return Contender(name, compiled, partial(DynamicCache, config=model.config))
    if name in RIVALS:
        backend, bits = RIVALS[name]
        return Contender(name, model, partial(QuantizedCache, backend, model.config, nbits=bits))
    return Contender(DENSE, model, partial(DynamicCache, config=model.config))


def installed_rivals(config: transformers.PreTrainedConfig) -> list[str]:
    """The rivals whose package is there and whose back end this transformers knows."""

    def runs(backend: str, bits: int | None) -> bool:
        try:
            QuantizedCache(backend, config, nbits=bits)
        except (ImportError, ValueError):
            return False
        return True

    return [name for name, (backend, bits) in RIVALS.items() if runs(backend, bits)]


def require_matched(kinds: set[str]) -> None:
    """Raise RuntimeError unless graphs of just these ``kinds`` were compiled, with every attention site compressed."""
    made = reports()
    if {report.kind for report in made} != kinds or any(report.matched < report.sites for report in made):
        found = "; ".join(map(str, made)) or "no graph at all"
        raise RuntimeError(f"expected {', '.join(sorted(kinds))} graphs with every site compressed, but got {found}")


@dataclass(frozen=True)
class Size:
    """Bytes of a cache; ``coded_ratio`` is dense bytes of the coded tokens over bytes of codes, bases and scales alone."""

    stored_bytes: int
    parts: dict[str, int]
    coded_ratio: float | None = None


def weigh(cache: Cache) -> Size:
    """The ``Size`` of a cache of any kind, summed over the storages of its live tensors."""
    keys = [layer.keys for layer in cache.layers]
    if not isinstance(keys[0], SpectralTensor):
        stored = storage_bytes([vars(layer) for layer in cache.layers])
        return Size(stored, {"dense" if isinstance(cache, DynamicCache) else "quantised": stored})
    stats = memory_stats(cache)
    row_bytes = sum(2 * key.shape[1] * key.shape[3] * key.element_size() for key in keys)
    coded = int(keys[0].store.timeline.ledger[:, 3].sum())
    coded_bytes = sum(stats.parts[part] for part in ("codes", "bases", "scales"))
    return Size(stats.stored_bytes, stats.parts, coded * row_bytes / coded_bytes if coded else None)


def storage_bytes(root: Any) -> int:
    """Bytes of all tensors within nested containers and tensor subclasses, every storage once and whole."""
    seen: dict[int, int] = {}

    def visit(x: Any) -> None:
        if isinstance(x, dict):
            x = list(x.values())
        if isinstance(x, (list, tuple)):
            for item in x:
                visit(item)
        elif hasattr(x, "__tensor_flatten__"):
            visit([getattr(x, name) for name in x.__tensor_flatten__()[0]])
        elif isinstance(x, torch.Tensor):
            seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()

    visit(root)
    return sum(seen.values())


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
    def mean(cls, parts: Sequence[Agreement]) -> Agreement:
        """All tokens of ``parts``, which have equally many, together."""
        columns = zip(*((p.nll, p.dense_nll, p.kl, p.top1) for p in parts), strict=True)
        return cls(sum(p.tokens for p in parts), *(math.fsum(column) / len(parts) for column in columns))

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def change(self) -> float:
        """Perplexity against dense, in percent."""
        return 100 * math.expm1(self.nll - self.dense_nll)


@dataclass(frozen=True)
class Reading:
    """What a cache held after the prompt, and the logits [n, vocabulary] from it in one chunk and token by token."""

    size: Size
    extended: torch.Tensor
    decoded: torch.Tensor


@torch.no_grad()
def read(cache_of: Contender, ids: torch.Tensor, prompt: int, decode: int = 0) -> Reading:
    """Prefill the first ``prompt`` of ``ids`` [1, n + 1], then predict the n - prompt tokens that follow each of the others.

    The first ``decode`` of them are predicted a second time, token by token on a copy of the cache.
    """
    cache = cache_of.empty()
    cache_of.feed(cache, ids[:, :prompt], keep=1)
    size = weigh(cache)
    copied = copy.deepcopy(cache) if decode else cache
    extended = cache_of.feed(cache, ids[:, prompt:-1])
    steps = [cache_of.feed(copied, ids[:, i : i + 1]) for i in range(prompt, prompt + decode)]
    return Reading(size, extended, torch.cat([extended[:0], *steps]))


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
class Needle:
    """A prompt [1, n] with a five-digit pass key at ``depth`` (0 the beginning, 1 the end) that the model is asked for."""

    ids: torch.Tensor
    key: str
    depth: float


def needles(tokenizer: PreTrainedTokenizerBase, tokens: int = NEEDLE_TOKENS, cases: int = CASES, seed: int = 0) -> list[Needle]:
    """Pass keys at evenly spread depths of ``tokens`` tokens of prose, other prose in each case; the reply is begun."""
    keys = random.Random(seed)
    made = []
    for case, text in enumerate(prose(cases)):
        hay = take(tokenizer, text, tokens, "the built-in prose")[0]
        depth, key = (case + 0.5) / cases, f"{keys.randrange(10_000, 100_000)}"
        before, after = (tokenizer.decode(part) for part in hay.tensor_split([int(depth * tokens)]))
        hint = f"The magic number is {key}. Remember it. {key} is the magic number."
        asked = f"{before}\n\n{hint}\n\n{after}\n\nWhat is the magic number mentioned in the text above?"
        chat = bool(tokenizer.chat_template)
        if chat:
            turn = {"role": "user", "content": asked}
            asked = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(f"{asked}{ANSWER}", add_special_tokens=not chat, return_tensors="pt").input_ids
        made.append(Needle(ids, key, depth))
    return made


@torch.no_grad()
def retrieves(cache_of: Contender, tokenizer: PreTrainedTokenizerBase, needle: Needle) -> bool:
    """Whether the key stands in the first ``ANSWER_TOKENS`` tokens that follow greedily, one decode step each."""
    cache = cache_of.empty()
    answer = [cache_of.feed(cache, needle.ids, keep=1).argmax(-1)]
    while len(answer) < ANSWER_TOKENS:
        answer.append(cache_of.feed(cache, answer[-1][None]).argmax(-1))
    return needle.key in tokenizer.decode(torch.cat(answer))


def prose(pieces: int) -> list[str]:
    """The documentation of Python in disjoint pieces of equal length."""
    text = "\n\n".join(dict.fromkeys(topics.values()))
    size = len(text) // pieces
    return [text[i * size : (i + 1) * size] for i in range(pieces)]


def texts(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, files: Sequence[Path] = ()) -> dict[str, torch.Tensor]:
    """Texts of ``tokens`` tokens, int64 [1, tokens] by name: ``files``, or else half prose and half standard library."""
    if files:
        found = {path.name: path.read_text(encoding="utf-8") for path in files}
    else:
        sources = SOURCES[: count // 2]
        found = {f"topics {i}": text for i, text in enumerate(prose(count - len(sources)))}
        found |= {f"{name}.py": Path(find_spec(name).origin).read_text(encoding="utf-8") for name in sources}
    return {name: take(tokenizer, text, tokens, name) for name, text in found.items()}


def take(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, name: str) -> torch.Tensor:
    """The first ``tokens`` tokens of ``text``, int64 [1, tokens]."""
    ids = tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt").input_ids
    if ids.shape[1] < tokens:
        raise ValueError(f"{name} has only {ids.shape[1]} of {tokens} tokens: ask for fewer, or pass a longer --text")
    return ids


@dataclass(frozen=True)
class Result:
    """One cache on all texts, and in how many of ``cases`` it kept the pass key."""

    name: str
    dense_bytes: int
    scores: dict[str, Score]
    found: int = 0
    cases: int = 0

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
            "needle": {"found": self.found, "cases": self.cases},
            "texts": {name: asdict(score.span) for name, score in self.scores.items()},
        }

    def first(self, which: str) -> Agreement | None:
        return getattr(next(iter(self.scores.values())), which)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Iterable[str],
    passages: dict[str, torch.Tensor],
    prompt: int,
    decode: int = 0,
    hidden: Sequence[Needle] = (),
    inner: str = "eager",
    step: Callable[[str], None] = lambda what: None,
) -> Iterator[Result]:
    """A ``Result`` for the dense cache and then for each of ``names``; ``step`` is told of every text and needle to come.

    A preset whose graphs do not match at every site is a RuntimeError.
    """
    dense: dict[str, Reading] = {}
    kinds = {"prefill", "extend"} | ({"decode"} if decode or hidden else set())
    for name in (DENSE, *names):
        cache_of = contender(model, name, inner)
        scores, found = {}, 0
        for text, ids in passages.items():
            step(f"{name}: {text}")
            reading = read(cache_of, ids, prompt, decode)
            scores[text] = score(reading, dense.setdefault(text, reading), ids[0, prompt + 1 :].to(model.device))
        for needle in hidden:
            step(f"{name}: needle at {needle.depth:.0%}")
            found += retrieves(cache_of, tokenizer, needle)
        if name in PRESETS:
            require_matched(kinds)
        yield Result(name, next(iter(dense.values())).size.stored_bytes, scores, found, len(hidden))


def table(results: Sequence[Result], title: str) -> Table:
    """A row for each cache."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("cache")
    decoded, cases = results[0].first("decoded"), results[0].cases
    columns = ["ratio, all bytes", "ratio, coded part", "perplexity", "change", "KL, nats", "top-1"]
    if decoded:
        columns += [f"KL, first {decoded.tokens}", "KL, same decoded"]
    for column in columns + (["needle"] if cases else []):
        shown.add_column(column, justify="right")
    for result in results:
        span, coded = result.mean(), result.size.coded_ratio
        cells = [f"{result.ratio:.2f}", f"{coded:.2f}" if coded else "-", f"{span.perplexity:.2f}", f"{span.change:+.2f} %"]
        cells += [f"{span.kl:.4f}", f"{span.top1:.3f}"]
        if decoded:
            cells += [f"{result.mean(which).kl:.4f}" for which in ("extended", "decoded")]
        shown.add_row(result.name, *cells, *([f"{result.found}/{cases}"] if cases else []))
    return shown


def evaluate(
    model: Annotated[str | None, Option(help="Id or folder of a transformers model", show_default=models.DEFAULT)] = None,
    presets: Annotated[str, Option(help="Codecs to compare, by comma")] = ",".join(PRESETS),
    rivals: Annotated[str | None, Option(help="Quantised caches of transformers, by comma", show_default="installed")] = None,
    tokens: Annotated[int, Option(min=1, help="Tokens that are cached before scoring")] = 4096,
    scored: Annotated[int, Option(min=1, help="Tokens that are then scored")] = 512,
    decode: Annotated[int, Option(min=0, help="How many of those to score token by token too")] = 0,
    texts_: Annotated[int, Option("--texts", min=1, help="Number of built-in texts")] = 6,
    text: Annotated[list[Path] | None, Option(exists=True, dir_okay=False, help="A text to use instead; repeatable")] = None,
    needle: Annotated[bool, Option(help="Ask for pass keys hidden in long prompts too")] = False,
    seed: Annotated[int, Option(help="Of the pass keys")] = 0,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], Option(help="Of weights and dense cache")] = "bfloat16",
    device: Annotated[str | None, Option(help="Where to run", show_default="cuda if there is one")] = None,
    inner: Annotated[str, Option(help="Compiler of the rewritten graph: inductor, aot_eager or eager")] = "eager",
    json_: Annotated[Path | None, Option("--json", help="File to write every figure to")] = None,
) -> None:
    """Compare caches by quality and bytes on one model and the same texts."""
    screen = Console(stderr=True)
    transformers.logging.disable_progress_bar()
    names = by_comma(presets, PRESETS) + by_comma(rivals or "", RIVALS)
    if decode > scored:
        raise typer.BadParameter("--decode counts scored tokens: it cannot exceed --scored")
    with phases(screen, BarColumn(), MofNCompleteColumn()) as display:
        task = display.add_task(f"loading {model or models.DEFAULT}")
        try:
            loaded, tokenizer = models.load(model, getattr(torch, dtype))
            passages = texts(tokenizer, texts_, tokens + scored + 1, text or ())
            hidden = needles(tokenizer, seed=seed) if needle else []
        except (OSError, ValueError) as error:
            fail(screen, str(error))
        loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        names += installed_rivals(loaded.config) if rivals is None else []
        display.update(task, total=(1 + len(names)) * (len(passages) + len(hidden)))

        def step(what: str) -> None:
            display.update(task, description=what, advance=1)

        results = list(compare(loaded, tokenizer, names, passages, tokens, decode, hidden, inner, step))
    title = f"{model or models.DEFAULT} in {dtype}: {tokens} tokens cached, {scored} scored, {len(passages)} texts"
    Console().print(table(results, title))
    if json_:
        settings = {
            "model": model or models.DEFAULT, "tokens": tokens, "scored": scored, "decode": decode, "dtype": dtype,
            "inner": inner, "seed": seed, "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        json_.write_text(json.dumps({"settings": settings, "caches": [result.summary() for result in results]}, indent=1))


def by_comma(given: str, known: Iterable[str]) -> list[str]:
    """The names in ``given``, each of which must be ``known``."""
    names = [name for name in given.split(",") if name]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"unknown cache {name!r}: choose from {', '.join(known)}")
    return names
