"""Train a small Llama with eight KV heads of 128 channels on manuals, so that compression is measured on a real such model.

No package ships a model with 128 channels a head, and random weights have keys and values that nothing can be said of. Run by
hand, never in CI: ``gather`` where there is a Debian mirror, ``train`` on a GPU in one call of ten minutes without a network.

    apt-get update; python -m tools.train_128_channels gather --out .dev/train
    python -m tools.train_128_channels train .dev/train --also-installed 60 --minutes 9 --out /tmp/model

What evaluations read is left out by the paragraph: of Python's topics, 2.5 % (in pieces of 80 characters) remain in the corpus.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import islice
from multiprocessing import Pool
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spectral_compile.evaluation.texts import SOURCES, UNSEEN, source
from spectral_compile.models import locate

# Debian packages whose pages are mostly running English text; two hold novels and narrative, four are dictionaries
PACKAGES = [
    "r-cran-janeaustenr",
    "sword-text-web",
    "dict-gcide",
    "dict-wn",
    "dict-foldoc",
    "dict-jargon",
    "dict-devil",
    "fortunes",
    "debian-handbook",
    "debian-policy",
    "developers-reference",
    "debian-reference-en",
    "debian-faq",
    "maint-guide",
    "debmake-doc",
    "installation-guide-amd64",
    "freedombox-doc-en",
    "gnome-user-docs",
    "gnucash-docs",
    "gimp-help-en",
    "libreoffice-help-en-us",
    "grass-doc",
    "apache2-doc",
    "git-doc",
    "bash-doc",
    "zsh-doc",
    "linux-doc-6.1",
    "postgresql-doc-15",
    "sqlite3-doc",
    "db5.3-doc",
    "nodejs-doc",
    "perl-doc",
    "python3.11-doc",
    "python-django-doc",
    "python-sqlalchemy-doc",
    "python-pandas-doc",
    "python-scipy-doc",
    "python-sympy-doc",
    "python-sklearn-doc",
    "python-statsmodels-doc",
    "python-astropy-doc",
    "twisted-doc",
    "racket-doc",
    "rust-doc",
]
SMOKE_PACKAGES = ["debian-faq", "developers-reference", "maint-guide"]
SUFFIXES = {".html", ".htm", ".page", ".pod", ".dz", ".bzz", ".rdb", ""}  # "": fortunes
PACKAGE_CHARACTERS = 20_000_000  # of one package at most, so that no manual of an interface outweighs the others
COMMON = {"the", "of", "and", "to", "is", "that", "for"}
PIECE = 200_000  # characters that are one document at most

TOKENIZER = "tokenizer.json", "tokenizer_config.json"  # and no template of chats, whose tokens are in no manual
END = "<|endoftext|>"  # between documents
WARMUP = 0.03  # of the time; then the rate falls in a line to zero, which suits training that ends long before it has converged
RESERVE = 20  # seconds for held-out documents, for saving and for a look at what the model writes
PEAK = 790e12  # FLOP/s that products in bfloat16 reach on an H200


class Page(HTMLParser):
    """The running text of an HTML page: paragraphs with an empty line between them, and no navigation."""

    BLOCKS = frozenset(
        re.split(" ", "p div h1 h2 h3 h4 h5 h6 ul ol li dl dt dd tr table section article blockquote pre title desc item")
    )
    SKIPPED = frozenset(re.split(" ", "script style head nav header footer button select svg math noscript info"))
    NAVIGATION = re.compile(
        r"(?<!with)sidebar|related|headerlink|\btoc|nav(header|footer|bar|igation)|linenos|breadcrumb|footer"
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping: list[str] = []  # the tag whose end is awaited, once for each open element of that name
        self.preformatted = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self.skipping:
            self.skipping += [tag] * (tag == self.skipping[0])
        elif tag in self.SKIPPED or (
            tag in ("a", "div", "td", "ul") and self.NAVIGATION.search(dict(attributes).get("class") or "")
        ):
            self.skipping = [tag]
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")
            self.preformatted += tag == "pre"
        elif tag in ("td", "th", "br"):
            self.parts.append("\n" if tag == "br" else " ")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            if tag == self.skipping[0]:
                self.skipping.pop()
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")
            self.preformatted = max(0, self.preformatted - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def inflate(data: bytes) -> bytes:
    """All zlib streams in ``data``, with whatever lies between them left out."""
    streams, at = [], 0
    while (at := data.find(b"x", at)) >= 0:
        stream = zlib.decompressobj()
        try:
            streams.append(stream.decompress(data[at:]))
            at = len(data) - len(stream.unused_data)
        except zlib.error:
            at += 1
    return b"\n".join(streams)


def read(path: Path) -> str:
    """The text of a page, a dictionary (``.dz``), a book of the SWORD project (``.bzz``) or the strings of R (``.rdb``)."""
    data = path.read_bytes()
    if path.suffix == ".dz":
        data = gzip.decompress(data)
    elif path.suffix == ".bzz":
        data = inflate(data)
    elif path.suffix == ".rdb":  # each string is a tag, its length in four bytes, and itself
        data = b"\n".join(re.findall(rb"\x00\x04\x00\x09\x00\x00..([^\x00]*)", inflate(data), re.DOTALL))
    text = data.decode("utf-8", errors="ignore")
    if path.suffix in (".html", ".htm", ".page", ".bzz"):
        page = Page()
        page.feed(text)
        text = "".join(page.parts)
    text = re.sub(r"[ \t]+(?=\n)", "", text.replace("\r", ""))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def english(text: str) -> bool:
    """Whether ``text`` is running English: these are of its commonest words, and neither in lists nor in other languages."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in COMMON for word in words) >= 0.06 * max(len(words), 50)


def read_english(path: Path) -> str | None:
    text = read(path)
    return text if english(text) else None


class Unseen:
    """Drops paragraphs that came before, and documents of which little is left; of evaluations' texts all came before."""

    def __init__(self) -> None:
        self.seen: Counter[int] = Counter()
        for text in [*topics.values(), *map(source, SOURCES + UNSEEN)]:
            self.seen.update({self.key(paragraph): 99 for paragraph in text.split("\n\n")})

    @staticmethod
    def key(paragraph: str) -> int:
        return hash(re.sub(r"[\W_]+", "", paragraph.lower()))  # markup differs between a topic and the page it is from

    def __call__(self, text: str) -> str | None:
        kept = []
        for paragraph in text.split("\n\n"):
            key = self.key(paragraph)
            self.seen[key] += 1
            if self.seen[key] <= (1 if len(paragraph) > 40 else 20):  # headings come again with each command or function
                kept.append(paragraph)
        left = "\n\n".join(kept)
        return left if len(left) > max(400, len(text) / 2) else None


def unpacked(package: str, folder: Path) -> list[Path]:
    """Files of a Debian package that may have text."""
    download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]  # its own user cannot write here
    subprocess.run(download, cwd=folder, check=True)
    (archive,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
    found = (folder / package).rglob("*")
    return sorted(path for path in found if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink())


def pages(packages: list[str]) -> Iterator[tuple[str, str]]:
    """Name and text of each file of Debian packages that is English and new."""
    unseen = Unseen()
    with Pool() as pool:
        for package in packages:
            with tempfile.TemporaryDirectory() as scratch:
                paths = unpacked(package, Path(scratch))
                size = count = 0
                for path, text in zip(paths, pool.imap(read_english, paths, chunksize=16), strict=True):
                    if text and (text := (unseen(text) or "")[: PACKAGE_CHARACTERS - size]):
                        size, count = size + len(text), count + 1
                        yield str(path.relative_to(scratch)), text
                print(f"{package}: {count} of {len(paths)} files, {size / 1e6:.1f} MB", flush=True)


def installed(megabytes: float) -> Iterator[tuple[str, str]]:
    """Python sources of this machine, in an order that takes some of each package, up to so many MB."""
    unseen, left = Unseen(), megabytes * 1e6
    folders = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}
    paths = {path for folder in folders for path in Path(folder).rglob("*.py")}
    for path in sorted(paths, key=lambda path: zlib.crc32(bytes(path))):
        if left <= 0:
            return
        text = unseen(path.read_text(encoding="utf-8", errors="ignore"))
        if text and len(text) < PIECE:  # longer ones are tables
            left -= len(text)
            yield str(path), text


def tokenised(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Tokens, uint16, to train on and of one file in a hundred; files keep their order, so that a window is of one manual."""
    end = tokenizer.token_to_id(END)
    parts = {"training": [np.array([end], dtype=np.uint16)], "held_out": [np.array([end], dtype=np.uint16)]}
    pieces = (
        ("held_out" if zlib.crc32(name.encode()) % 100 == 0 else "training", text[at : at + PIECE])
        for name, text in documents
        for at in range(0, len(text), PIECE)
    )
    while batch := list(islice(pieces, 1000)):  # of which all cores have some
        kinds, texts = zip(*batch, strict=True)
        for kind, encoding in zip(kinds, tokenizer.encode_batch_fast(texts), strict=True):
            parts[kind].append(np.array([*encoding.ids, end], dtype=np.uint16))
    return {kind: np.concatenate(arrays) for kind, arrays in parts.items()}


def gather(documents: Iterable[tuple[str, str]], out: Path) -> None:
    """Write tokens of ``documents`` and the tokenizer. As tokens xz makes them a tenth smaller than as text."""
    out.mkdir(parents=True, exist_ok=True)
    smollm2 = Path(locate(None)["pretrained_model_name_or_path"])
    for name in TOKENIZER:
        shutil.copy(smollm2 / name, out)
    # an integer has two bytes, and what a whole corpus repeats is found
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 28, "lc": 3, "lp": 1, "pb": 1}]
    for kind, tokens in tokenised(documents, Tokenizer.from_file(str(out / "tokenizer.json"))).items():
        packed = lzma.compress(tokens.tobytes(), filters=filters)
        (out / f"{kind}.xz").write_bytes(packed)
        print(f"{kind}: {len(tokens) / 1e6:.2f} M tokens, {len(packed) / 2**20:.2f} MiB", flush=True)


def gathered(corpus: Path, code: float, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train on and those held out, of the corpus and of so many MB of code."""
    sources = tokenised(installed(code), tokenizer)

    def both(kind: str) -> torch.Tensor:
        packed = np.frombuffer(lzma.decompress((corpus / f"{kind}.xz").read_bytes()), dtype=np.uint16)
        return torch.from_numpy(np.concatenate([packed, sources[kind]]).astype(np.int32))

    return both("training"), both("held_out")


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on how many tokens at a time.

    Heads are those of Qwen3-0.6B: two queries share a key, as in every model in use that has 128 channels, so that keys have to
    serve both. ``lengths`` are of windows, in the first two thirds of the time and in the last, when the products of attention
    are most of the work; evaluations take 4608 tokens.
    """

    hidden: int = 512
    intermediate: int = 1536
    layers: int = 8
    query_heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    lengths: tuple[int, int] = (2048, 5120)
    micro_batch: int = 40960  # tokens, of which logits have fewer than 2^31 elements
    accumulated: int = 3
    rate: float = 2e-3

    @property
    def tokens(self) -> int:
        """Of one update."""
        return self.micro_batch * self.accumulated

    def config(self, tokenizer: Tokenizer) -> LlamaConfig:
        end = tokenizer.token_to_id(END)
        return LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
        )

    def flops(self, parameters: int, length: int) -> int:
        """Of a token, forward and backward: products with weights, and attention to half of ``length`` tokens on average."""
        return 6 * parameters + 6 * self.layers * length * self.query_heads * self.head_dim


SMOKE = Recipe(
    hidden=64,
    intermediate=128,
    layers=2,
    query_heads=2,
    kv_heads=1,
    head_dim=32,
    lengths=(128, 256),
    micro_batch=512,
    rate=1e-2,
)


@torch.compile(dynamic=False)
def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), targets.flatten())


class Trainer:
    """A model with weights in float32 and products in bfloat16, compiled a layer at a time: all layers share one compilation.

    Of a model compiled as a whole, transformers cannot tell that nothing is masked, and attention would not be flash attention.
    """

    def __init__(self, recipe: Recipe, config: LlamaConfig, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.model = LlamaForCausalLM(config).to(device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        # else what layers add their results to would be in float32, of twice the traffic
        self.model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.bfloat16())
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def loss(self, tokens: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
        """The mean loss of windows of ``tokens``; always with gradients, without which layers would be compiled anew."""
        windows = tokens[starts[:, None] + torch.arange(length + 1)].to(self.device, torch.long)
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.model.model(windows[:, :-1], use_cache=False).last_hidden_state
            return cross_entropy(hidden, self.model.lm_head.weight, windows[:, 1:])

    def step(self, tokens: torch.Tensor, length: int, rate: float) -> float:
        """One update; returns the loss in nats."""
        total = torch.zeros((), device=self.device)
        for _ in range(self.recipe.accumulated):
            starts = torch.randint(len(tokens) - length, (self.recipe.micro_batch // length,))
            loss = self.loss(tokens, starts, length) / self.recipe.accumulated
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()

    def evaluate(self, tokens: torch.Tensor, length: int) -> float:
        """The mean loss in nats of all whole windows of ``tokens``, in batches of the shape that training has."""
        batches = torch.arange(0, len(tokens) - length, length).split(self.recipe.micro_batch // length)
        losses = [self.loss(tokens, starts, length).item() for starts in batches if len(starts) == len(batches[0])]
        return math.fsum(losses) / len(losses)


def train(corpus: Path, out: Path, minutes: float, code: float, recipe: Recipe) -> None:
    """Train until ``minutes`` after the start, imports not counted, and save the model, its loss curve and a report."""
    start = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s: {what}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    tokens, held_out = gathered(corpus, code, tokenizer)
    say(f"{len(tokens) / 1e6:.1f} M tokens to train on, {len(held_out) / 1e6:.2f} M held out")
    trainer = Trainer(recipe, recipe.config(tokenizer), device)
    for length in recipe.lengths:
        trainer.step(tokens, length, 0.0)
        say(f"{trainer.parameters / 1e6:.1f} M parameters, compiled for {length} tokens")

    begin, end = time.monotonic(), start + 60 * minutes - RESERVE
    told, curve, worked = begin, [], 0.0
    while (now := time.monotonic()) < end:
        progress = (now - begin) / (end - begin)
        length = recipe.lengths[progress > 2 / 3]
        rate = recipe.rate * min(progress / WARMUP, (1 - progress) / (1 - WARMUP))
        loss = trainer.step(tokens, length, rate)
        worked += recipe.tokens * recipe.flops(trainer.parameters, length)
        curve.append({"seconds": round(now - begin, 2), "length": length, "rate": round(rate, 7), "loss": round(loss, 4)})
        if now - told > 15:
            seconds, told = time.monotonic() - begin, now
            speed = f"{len(curve) * recipe.tokens / seconds:.0f} tokens/s, {worked / seconds / PEAK:.1%} of the peak"
            say(f"step {len(curve)}, windows of {length}, rate {rate:.2e}, loss {loss:.3f}, so far {speed}")
    seconds = time.monotonic() - begin

    loss = trainer.evaluate(held_out, recipe.lengths[-1])
    report = {
        "parameters": trainer.parameters,
        "corpus_tokens": len(tokens),
        "steps": len(curve),
        "tokens": len(curve) * recipe.tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(len(curve) * recipe.tokens / seconds),
        "share_of_peak": round(worked / seconds / PEAK, 4),
        "held_out_tokens": len(held_out),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 3),
    }
    trainer.model.to(torch.bfloat16).save_pretrained(out)
    for name in TOKENIZER:
        shutil.copy(corpus / name, out)
    (out / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    say(json.dumps(report))
    say(repr(sample(out, device)))


def sample(folder: Path, device: torch.device) -> str:
    """What the saved model writes, as whoever evaluates it loads it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    inputs = tokenizer("The purpose of this chapter is", return_tensors="pt").to(device)
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=60, do_sample=False)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gathering = commands.add_parser("gather", help="make the corpus from Debian packages")
    training = commands.add_parser("train", help="train on a corpus")
    training.add_argument("corpus", type=Path, help="the folder that gather made")
    training.add_argument("--minutes", type=float, default=9, help="of all but imports")
    training.add_argument("--also-installed", type=float, default=0, metavar="MB", help="of Python sources of this machine")
    for command in gathering, training:
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--smoke", action="store_true", help="little of everything, to see whether it runs")
    arguments = parser.parse_args()
    if arguments.command == "gather":
        gather(pages(SMOKE_PACKAGES if arguments.smoke else PACKAGES), arguments.out)
    else:
        recipe = SMOKE if arguments.smoke else Recipe()
        train(arguments.corpus, arguments.out, arguments.minutes, arguments.also_installed, recipe)


if __name__ == "__main__":
    main()
