"""Evaluate a compressed KV cache by lm-evaluation-harness: ``python examples/lm_eval_tasks.py [MODEL]``.

MODEL is any decoder of transformers, by id or folder; without one it is SmolLM2-135M-Instruct. It needs
``pip install 'spectral-compile[lm-eval]'``. The tasks lie in ``lm_eval_tasks/`` and ask for what stands deep in long texts.

Log-likelihoods measure the dense model, whatever the preset: lm-eval asks for them in one call for context and continuation,
whose tokens see each other as they are, and drops the cache unread. ``ThroughCache`` reads them from the cache. What is
generated is read from it in any case, but for the first token, which follows from the prompt.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from spectral_compile import reports
from spectral_compile.models import device_of, load
from spectral_compile.outputs import cache_argument

TASKS = Path(__file__).with_name("lm_eval_tasks")


class ThroughCache(HFLM):
    """Log-likelihoods from the cache: ``chunk`` tokens are read at a time, and see all that came before as it is cached."""

    chunk = 128

    def _model_call(self, inps: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            chunks = [self.model(ids, **cache_argument(cache), use_cache=True) for ids in inps.split(self.chunk, 1)]
        return torch.cat([out.logits for out in chunks], 1)


def evaluate(lm: HFLM, *tasks: str, **metadata: Any) -> dict[str, Any]:
    """What lm-eval finds; ``metadata`` goes to ``lm_eval_tasks/texts.py``."""
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=metadata)
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager)


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **metadata: Any) -> None:
    model.compile(backend="spectral", options={"preset": "balanced", "strict": True})
    print(make_table(evaluate(HFLM(model, tokenizer=tokenizer), "recall", "recall_choices", **metadata)))
    print("recall_choices through the cache:")
    print(make_table(evaluate(ThroughCache(model, tokenizer=tokenizer), "recall_choices", **metadata)))
    for report in reports():
        print(report)


def main(model_name: str | None = None) -> None:
    model, tokenizer = load(model_name, torch.bfloat16)
    run(model.to(device_of(None)), tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:2])
