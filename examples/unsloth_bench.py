"""Time Unsloth's own ``generate`` beside transformers' and the compressed cache, over the same random weights.

``python examples/unsloth_bench.py --cached 4096,32768`` needs a GPU and ``pip install 'spectral-compile[unsloth,bench]'``.
"""

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from unsloth import FastLanguageModel  # first: it assigns to what the others import

# isort: split
import torch
import typer
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spectral_compile.bench import generation
from spectral_compile.bench.measure import GEOMETRIES, Measurement, Settings, build, tidy
from spectral_compile.cli.bench import header
from spectral_compile.cli.console import output
from spectral_compile.cli.options import count
from spectral_compile.files import check_writable, write_whole
from spectral_compile.models import device_of
from spectral_compile.unsloth import standard_forward

UNSLOTH = "unsloth"
VARIANTS = (generation.SPECTRAL, "static", UNSLOTH)  # Unsloth's buffers stay allocated after its text, so it is the last


def save(folder: str, geometry: str, settings: Settings) -> None:
    """A checkpoint of random weights and a tokenizer of one word, for Unsloth to load."""
    build(GEOMETRIES[geometry], settings).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)


def main(
    geometry: str = "llama-3-8b",
    cached: str = "4096,32768",
    new_tokens: int = 64,
    preset: str = "balanced",
    load_in_4bit: bool = False,
    device: str | None = None,
    inner: str = "inductor",
    json_: Annotated[Path | None, typer.Option("--json", callback=check_writable)] = None,
) -> None:
    lengths = tuple(count(text) for text in cached.split(","))
    settings = Settings(
        geometries=(geometry,),
        pairs=(),
        presets=(preset,),
        cached=lengths,
        variants=VARIANTS,
        chunk=None,
        new_tokens=new_tokens,
        steady_tokens=0,
        dtype=torch.bfloat16,
        device=device_of(device),
        inner=inner,
        seed=0,
    )
    with TemporaryDirectory() as folder:
        save(folder, geometry, settings)
        tidy()
        most = max(lengths) + new_tokens
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=most, dtype=settings.dtype, load_in_4bit=load_in_4bit
        )
    FastLanguageModel.for_inference(model)

    def make(variant: str) -> PreTrainedModel:
        torch.compiler.set_stance("default")  # Unsloth's text leaves eager_on_recompile behind
        return model if variant == UNSLOTH else standard_forward(model)

    rows, facts = [], header(settings)

    def write() -> None:
        if json_:
            write_whole(json_, json.dumps({"header": facts, "rows": rows}, indent=1).encode())

    for variant in VARIANTS:
        for length in lengths:
            labels = {"geometry": geometry, "cached": length, "variant": variant}
            run = partial(generation.generate, partial(make, variant), settings, length, new_tokens, variant)
            rows.append(Measurement(labels, run).row())
            typer.echo(f"{rows[-1]['seconds']:7.1f} s  {variant}, {length}  {rows[-1]['error'] or ''}", err=True)
            write()
    rows.sort(key=lambda row: (row["cached"], -VARIANTS.index(row["variant"])))
    generation.derive(rows)
    write()
    output().print(facts, generation.show(rows))


if __name__ == "__main__":
    typer.run(main)
