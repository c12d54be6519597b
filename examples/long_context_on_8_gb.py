"""A long context on a small GPU: ``python examples/long_context_on_8_gb.py [MODEL] [--memory 8GiB] [--tokens 131072]``.

Says beforehand whether weights in 4 bits, the compressed cache and what the model works with fit into the memory, and in which
pieces the prompt must be read; then reads it, generates, and shows what was reserved. On a GPU PyTorch is held to the memory,
however much there is. MODEL is any decoder of transformers, by id or folder; without one it is SmolLM2-135M-Instruct. With
``--random`` weights are made up, and a folder with a ``config.json`` is enough. With ``--dense`` the same model runs as it is,
on the whole prompt and with all memory, to compare.
"""

import argparse
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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


def made_up(model: str | None, device: torch.device, bits: int) -> PreTrainedModel:
    """A model of that configuration with random weights, made one after the other where it runs."""
    config = AutoConfig.from_pretrained(**models.locate(model))
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    decoder, head = made.get_decoder(), made.get_output_embeddings()
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)  # its buffers are no weights
    generator = torch.Generator(device).manual_seed(0)

    def weight(like: torch.Tensor) -> torch.Tensor:
        new = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
        return new.normal_(std=0.02, generator=generator) if new.ndim > 1 else new.fill_(1)

    if bits == 4:
        from bitsandbytes.nn import Linear4bit, Params4bit

        linear = [(name, x) for name, x in made.named_modules() if isinstance(x, torch.nn.Linear) and x is not head]
        for name, child in linear:
            how = {"bias": child.bias is not None, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "device": "meta"}
            packed = Linear4bit(child.in_features, child.out_features, **how)
            packed.weight = Params4bit(weight(child.weight), requires_grad=False, quant_type="nf4").to(device)
            made.set_submodule(name, packed)
    for module in made.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            if own.is_meta:
                setattr(module, name, torch.nn.Parameter(weight(own), requires_grad=False))
    made.tie_weights()
    made.generation_config.eos_token_id = None
    return made.eval()


def run(model: PreTrainedModel, fit: Fit, new_tokens: int, inner: str | None) -> None:
    """Read a prompt of random tokens and generate; densely if there is no ``inner`` compiler."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(1, vocabulary, (1, fit.tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    if inner:
        model.compile(backend="spectral", options={"inner": inner, "strict": True})
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    if inner and fit.chunk < fit.tokens:
        given["prefill_chunk_size"] = fit.chunk
    started = time.perf_counter()
    model.generate(ids, min_new_tokens=3, max_new_tokens=3, **given)
    print(f"compiled, and read once, in {time.perf_counter() - started:.0f} s", flush=True)
    clock = Clock(lambda: None)
    out = model.generate(ids, min_new_tokens=new_tokens, max_new_tokens=new_tokens, streamer=clock, **given)
    print(f"first token after {clock.first:.1f} s, then {clock.rate:.1f} tokens a second")
    if inner:
        stats = memory_stats(out)
        print(f"cache: {binary(stats.stored_bytes)}, {stats.ratio:.1f} times smaller than a dense one")
    if model.device.type == "cuda":
        print(f"reserved: {binary(torch.cuda.max_memory_reserved())}")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--random", action="store_true", help="random weights, from the configuration alone")
    parser.add_argument("--dense", action="store_true", help="without this backend, to compare")
    asked = parser.parse_args(given)
    device = models.device_of(None)
    fit = plan(asked.model, parse_bytes(asked.memory), asked.tokens, asked.bits)
    print(fit, flush=True)
    if not (fit.fits or asked.dense):
        raise SystemExit(1)
    if device.type == "cuda" and not asked.dense:
        torch.cuda.set_per_process_memory_fraction(min(1.0, fit.memory / torch.cuda.get_device_properties(device).total_memory))
    make, started = made_up if asked.random else load, time.perf_counter()
    model = make(asked.model, device, asked.bits)
    print(f"weights are there after {time.perf_counter() - started:.0f} s", flush=True)
    run(model, fit, asked.new_tokens, None if asked.dense else asked.inner)


if __name__ == "__main__":
    main()
