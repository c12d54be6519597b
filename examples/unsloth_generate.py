"""Generate with an Unsloth model from a compressed KV cache: ``python examples/unsloth_generate.py MODEL [PROMPT]``.

MODEL is an id or a folder that Unsloth loads, here with 4-bit weights; it needs ``pip install 'spectral-compile[unsloth]'``.
"""

import sys

from unsloth import FastLanguageModel

from spectral_compile import memory_stats, reports
from spectral_compile.models import prompt
from spectral_compile.unsloth import standard_forward


def main(model_name: str, text: str | None = None, new_tokens: int = 64) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(model_name, max_seq_length=8192, load_in_4bit=True)
    ids = tokenizer(text, return_tensors="pt").input_ids if text else prompt(tokenizer, 1000)

    generator = standard_forward(model)  # the same weights; go on training ``model`` as before
    generator.compile(backend="spectral")
    inputs = {"input_ids": ids.to(generator.device), "attention_mask": ids.new_ones(ids.shape).to(generator.device)}
    out = generator.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
    print(tokenizer.decode(out.sequences[0, ids.shape[1] :]))

    for report in reports():
        print(report)
    stats = memory_stats(out.past_key_values)
    print(f"{stats.logical_bytes} bytes of keys and values in {stats.stored_bytes}: {stats.ratio:.2f} times smaller")


if __name__ == "__main__":
    main(*sys.argv[1:3])
