"""A long context on a small GPU: ``python examples/long_context_on_8_gb.py [MODEL] [--memory 8GiB] [--tokens 131072]``.

Says beforehand whether weights in 4 bits, the compressed cache and what the model works with fit into the memory, and in which
pieces the prompt must be read; then reads it, generates, and shows what was reserved. On a GPU PyTorch is held to the memory,
however much there is. MODEL is any decoder of transformers, by id or folder; without one it is SmolLM2-135M-Instruct.
"""

import argparse
from typing import Any

import torch
from transformers import PreTrainedModel

from spectral_compile import memory_stats, models
from spectral_compile.cli.doctor import Weighed, fit_of, sketch
from spectral_compile.cli.memory import Fit, binary, parse_bytes
from spectral_compile.cli.session import Clock
from spectral_compile.explain import examine


def plan(model: str | None, memory: int, tokens: int, bits: int) -> Fit:
    """How all of it fits, before any weight is loaded."""
    built = sketch(model, torch.bfloat16)
    found = examine(built, options={"inner": "eager"}, input_ids=torch.ones(1, 24, dtype=torch.int64))
    return fit_of(model, Weighed.of(built, found, torch.bfloat16, None), memory, tokens, bits)


def load(model: str | None, device: torch.device, bits: int) -> PreTrainedModel:
    """The model, its linear weights in 4 bits if ``bits`` is 4."""
    how: dict[str, Any] = {}
    if bits == 4:
        from transformers import BitsAndBytesConfig

        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        how["device_map"] = {"": device}
    loaded, _ = models.load(model, torch.bfloat16, **how)
    return loaded if how else loaded.to(device)


def run(model: PreTrainedModel, fit: Fit, new_tokens: int, inner: str) -> None:
    """Read a prompt of random tokens and generate."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(1, vocabulary, (1, fit.tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    model.compile(backend="spectral", options={"inner": inner, "strict": True})
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    if fit.chunk < fit.tokens:
        given["prefill_chunk_size"] = fit.chunk
    model.generate(ids, min_new_tokens=3, max_new_tokens=3, **given)  # graphs are compiled
    clock = Clock(lambda: None)
    out = model.generate(ids, min_new_tokens=new_tokens, max_new_tokens=new_tokens, streamer=clock, **given)
    stats = memory_stats(out)
    print(f"first token after {clock.first:.1f} s, then {clock.rate:.1f} tokens a second")
    print(f"cache: {binary(stats.stored_bytes)}, {stats.ratio:.1f} times smaller than a dense one")
    if model.device.type == "cuda":
        print(f"reserved: {binary(torch.cuda.max_memory_reserved())} of {binary(fit.memory)}")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4)
    parser.add_argument("--inner", default="inductor")
    asked = parser.parse_args(given)
    device = models.device_of(None)
    fit = plan(asked.model, parse_bytes(asked.memory), asked.tokens, asked.bits)
    print(fit)
    if not fit.fits:
        raise SystemExit(1)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, fit.memory / torch.cuda.get_device_properties(device).total_memory))
    run(load(asked.model, device, asked.bits), fit, asked.new_tokens, asked.inner)


if __name__ == "__main__":
    main()
