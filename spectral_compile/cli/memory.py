"""Whether a model and a long prompt fit into some memory, and in which pieces the prompt must be read for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from spectral_compile import models
from spectral_compile.errors import Mistake
from spectral_compile.kernels.attend.extend import AT_ONCE
from spectral_compile.kernels.sliced import ROWS

CHUNKS = (8192, 4096, 2048, 1024, 512)  # of a prompt, tried from the largest down; a longer one takes more and saves little
RESERVE = 1.25  # times what is counted: what an allocator holds and cannot use, and what nobody counted
HIDDEN = 3.5  # tensors of the size of hidden states that are alive in a layer, measured of Llama-3-8B's geometry
BLOCK = 64  # weights of 4 bits that share a scale of 4 bytes, in bitsandbytes
UNITS = {"": 2**30, "b": 1, **{f"{unit}b": 10 ** (3 * i) for i, unit in enumerate("kmgt", 1)}}
UNITS |= {f"{unit}ib": 2 ** (10 * i) for i, unit in enumerate("kmgt", 1)}


def parse_bytes(text: str) -> int:
    """Bytes out of such as 8GiB, 24GB, or 8, which are GiB; ``Mistake`` where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in UNITS or float(found[1]) <= 0:
        raise Mistake(f"{text!r} is no size of memory, such as 8GiB")
    return int(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class Shape:
    """Of a model what its memory depends on, beside its cache: bytes of weights, of a number, and sizes."""

    weights: int
    itemsize: int
    hidden: int
    intermediate: int
    query_channels: int  # of all heads
    kv_channels: int
    vocabulary: int
    unpacked: int  # bytes of the largest matrix of weights in the model's dtype, where weights are packed

    @classmethod
    def of(cls, model: str | None, dtype: torch.dtype, bits: int | None) -> Shape:
        """Of a model by id or folder, none of whose weights is read.

        Linear weights, but for the last one, have ``bits``: 4 and 8 of bitsandbytes, 16 of ``dtype``, None as configured.
        """
        with models.cannot_load(model):
            config = AutoConfig.from_pretrained(**models.locate(model))
            bits = _configured(config) if bits is None else bits
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = made.get_output_embeddings()  # which stays as it is where others are packed
        linear = [layer.weight.numel() for layer in made.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
        packed = sum(linear) if bits in (4, 8) else 0
        whole = sum(weight.numel() for weight in made.parameters()) - packed
        scales = 4 * packed // BLOCK if bits == 4 else 0
        weights = whole * dtype.itemsize + packed * (bits or 0) // 8 + scales
        text = made.config.get_text_config()
        heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            weights=weights,
            itemsize=dtype.itemsize,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            query_channels=heads * dim,
            kv_channels=kv_heads * dim,
            vocabulary=text.vocab_size,
            unpacked=max(linear) * dtype.itemsize if packed else 0,
        )

    def working(self, tokens: int, chunk: int) -> int:
        """Bytes that are alive beside weights and cache while ``chunk`` of ``tokens`` tokens are read, the most of a layer.

        Its attention holds sums in float32 and some of the past as dense keys and values, its MLP a slice of tokens.
        """
        hidden = int(HIDDEN * chunk * self.hidden * self.itemsize)
        past = min(tokens - chunk, AT_ONCE)
        attention = hidden + chunk * self.query_channels * self.itemsize
        if past:
            attention += chunk * self.query_channels * (4 + self.itemsize) + 2 * past * self.kv_channels * self.itemsize
        rows = chunk if chunk <= 2 * ROWS else ROWS
        mlp = hidden + 3 * rows * self.intermediate * self.itemsize
        logits = self.vocabulary * (4 + self.itemsize)
        return int(RESERVE * (max(attention, mlp) + logits + self.unpacked))


def _configured(config: PreTrainedConfig) -> int | None:
    """Bits of linear weights by the configuration of a checkpoint, None where they are not packed."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    told = given if isinstance(given, dict) else given.to_dict()
    return 8 if told.get("load_in_8bit") else int(told.get("bits") or 4)


@dataclass(frozen=True)
class Fit:
    """How a prompt of ``tokens`` tokens fits into ``memory`` bytes; ``chunk`` tokens at a time, all where it is ``tokens``."""

    memory: int
    tokens: int
    chunk: int
    weights: int
    cache: int
    dense_cache: int
    working: int

    @classmethod
    def of(cls, shape: Shape, memory: int, tokens: int, cache: int, dense_cache: int) -> Fit:
        """With the largest chunk that fits, or the smallest if none does."""
        tried = [
            cls(memory, tokens, chunk, shape.weights, cache, dense_cache, shape.working(tokens, chunk))
            for chunk in dict.fromkeys((tokens, *(chunk for chunk in CHUNKS if chunk < tokens)))
        ]
        return next((fit for fit in tried if fit.fits), tried[-1])

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working

    @property
    def fits(self) -> bool:
        return self.total <= self.memory

    @property
    def how(self) -> str:
        """What ``generate`` must be told."""
        return "in one piece" if self.chunk == self.tokens else f"with prefill_chunk_size={self.chunk}"

    def __str__(self) -> str:
        parts = f"{binary(self.weights)} of weights, {binary(self.cache)} of cache"
        parts += f" (dense: {binary(self.dense_cache)}) and about {binary(self.working)} to work with"
        verdict = f"fit into {binary(self.memory)} {self.how}" if self.fits else f"do not fit into {binary(self.memory)}"
        return f"{self.tokens} tokens {verdict}: {parts}, {binary(self.total)} in all"


def binary(size: float) -> str:
    """Bytes as memory is sold: in GiB, or MiB where there are few."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
