"""How a profile finds its model again: by the weights in a graph, and by files that are named after them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from spectral_compile.codec.profile import Profile, shipped
from spectral_compile.errors import Mistake
from spectral_compile.files import cache_folder, make_folder
from spectral_compile.report import SpectralWarning

CODEC = b"1"  # counts up when losses that were measured no longer say what layers lose


def fingerprint(weights: Iterable[torch.Tensor]) -> str | None:
    """What tells a model from others: a digest of all vectors among its weights, in whatever order; None where there are none.

    Those are biases and the scales of norms. They are the same under adapters, and where the matrices are quantised; they are
    compared as bfloat16 has them, so that the dtype that a model is loaded in makes no difference.
    """
    vectors = [x.detach() for x in weights if x.ndim == 1 and x.is_floating_point()]
    if not vectors or any(type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta for x in vectors):
        return None
    numbers = (x.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes() for x in vectors)
    digests = sorted(hashlib.sha256(vector).digest() for vector in numbers)
    return hashlib.sha256(b"".join([CODEC, *digests])).hexdigest()[:32]


def path_of(found: str) -> Path:
    """Where on this machine the profile of the model with this fingerprint is kept."""
    return cache_folder() / "profiles" / f"{found}.json"


def keep(profile: Profile) -> Path:
    """Write a profile to where the backend finds it for its model; ``Mistake`` where that cannot be done."""
    if profile.fingerprint is None:
        raise Mistake("its weights hold no vectors to know this model by: name a file, and give that as the option profile")
    path = path_of(profile.fingerprint)
    make_folder(path.parent)
    profile.save(path)
    return path


def known(found: str | None) -> Profile | None:
    """The profile of the model with this fingerprint that lies on this machine, or comes with the package."""
    if found is None:
        return None
    try:
        path = path_of(found)
        kept = path.is_file()
    except (OSError, RuntimeError):  # a folder that may not be read, or a user without a home
        kept = False
    if kept:
        try:
            return Profile.load(path)
        except ValueError as error:
            warnings.warn(f"all layers get the same bytes: {error}", SpectralWarning, stacklevel=2)
            return None
    profiles = (Profile.load(json.loads(file.read_bytes())) for file in shipped().values())
    return next((profile for profile in profiles if profile.fingerprint == found), None)
