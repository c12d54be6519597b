"""How long a process takes to its first token: ``python -m spectral_compile.bench.process`` with JSON for an argument."""

from __future__ import annotations

import json
import sys
import time

STARTED = time.perf_counter()  # before PyTorch and transformers, whose import a user waits for


def main(given: str) -> None:
    """Build, compile and generate as asked; print JSON: seconds to the model, to the first and last token, or the error."""
    import torch
    import transformers

    from spectral_compile.bench.generation import Run, prepare, random_prompt
    from spectral_compile.bench.measure import GEOMETRIES, Settings, build, one_line, wait

    transformers.logging.set_verbosity_error()
    asked = json.loads(given)
    names = ("presets", "new_tokens", "inner", "seed", "layers")
    settings = Settings(
        geometries=None, pairs=(), cached=(), variants=(), chunk=None, steady_tokens=0,
        dtype=getattr(torch, asked["dtype"]), device=torch.device(asked["device"]), **{name: asked[name] for name in names},
    )  # fmt: skip
    geometry = GEOMETRIES[asked["geometry"]]
    model = build(geometry, settings)
    prompt = random_prompt(geometry.vocabulary, settings, asked["cached"])
    try:
        how = prepare(model, settings, asked["variant"], {})
        wait(settings.device)
        built = time.perf_counter() - STARTED
        run = Run.of(model, prompt, settings.new_tokens, how)
    except Exception as error:
        print(json.dumps({"error": one_line(error)}))
        return
    print(json.dumps({"model_s": built, "first_token_s": built + run.first, "last_token_s": time.perf_counter() - STARTED}))


if __name__ == "__main__":
    main(sys.argv[1])
