"""Generate from a compressed KV cache: ``python examples/generate.py [MODEL [PROMPT]]``.

MODEL is any decoder of transformers, by id or folder; without one it is SmolLM2-135M-Instruct.
"""

import sys

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from spectral_compile import memory_stats, reports
from spectral_compile.models import load, prompt


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None = None, new_tokens: int = 64) -> None:
    ids = tokenizer(text, return_tensors="pt").input_ids if text else prompt(tokenizer, 1000)
    ids = ids.to(model.device)

    model.compile(backend="spectral", options={"preset": "balanced"})
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        return_dict_in_generate=True,
    )

    for report in reports():
        print(report)
    stats = memory_stats(out)
    print(f"{stats.logical_bytes} bytes of keys and values in {stats.stored_bytes}: {stats.ratio:.2f} times smaller")


def main(model_name: str | None = None, text: str | None = None) -> None:
    run(*load(model_name, torch.bfloat16), text)


if __name__ == "__main__":
    main(*sys.argv[1:3])
