"""A model is measured once on a machine, and known from then on."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectral_compile.codec import Profile
from spectral_compile.evaluation.calibrate import calibrate, steps
from spectral_compile.evaluation.texts import calibration
from spectral_compile.explain import fingerprint_of
from spectral_compile.fingerprint import keep, known


def calibrate_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int = 4096, scored: int = 128
) -> Profile:
    """The profile that ``model.compile(backend="spectral")`` finds, which is measured now if there is none yet, and kept.

    Three texts, of which ``tokens`` are cached and ``scored`` predicted; a progress bar shows how far it is. Graphs that the
    backend has compiled are forgotten, so it comes before ``model.compile``. ``Refused`` where no layer can be compressed, and
    ``Mistake`` where a model cannot have a profile: its layers differ in shape, or its weights hold no vectors to know it by.
    """
    if (found := known(fingerprint_of(model))) is not None:
        return found
    passages = list(calibration(tokenizer, tokens + scored + 1).values())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as shown:
        task = shown.add_task("filling caches", total=steps(model.config.get_text_config().num_hidden_layers, len(passages)))
        profile = calibrate(model, passages, tokens, lambda what: shown.update(task, description=what, advance=1))
    keep(profile)
    return profile
