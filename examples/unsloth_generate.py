"""Generate with an Unsloth model from a compressed KV cache: ``python examples/unsloth_generate.py MODEL [PROMPT]``.

MODEL is an id or a folder that Unsloth loads, here with 4-bit weights; it needs ``pip install 'spectral-compile[unsloth]'``.
"""

import sys

from unsloth import FastLanguageModel  # first: it assigns to what the others import

from generate import run  # the example beside this one
from spectral_compile.unsloth import standard_forward

if __name__ == "__main__":
    model_name, *text = sys.argv[1:3]
    model, tokenizer = FastLanguageModel.from_pretrained(model_name, max_seq_length=8192, load_in_4bit=True)
    run(standard_forward(model), tokenizer, *text)  # the same weights; go on training ``model`` as before
