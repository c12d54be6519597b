"""The passes in their order, and how a graph goes through them.

A pass takes a ``Trace`` and changes it in place: it adds to what is known of each ``Site``, or refuses the site with a reason
that no later pass takes back. Passes look only at sites that are not refused yet (``Trace.matched``), so a site that one
refuses stays in the graph as it came. What a pass requires of the trace and what it gives stands in its docstring.

The order follows from that:

1. ``canonicalise_attention`` finds the sites that all others look at.
2. ``refuse_patched`` comes before anything is made of how keys reach a site: where another library has cut or replaced
   attention, its reason is the true one, and what later passes would say of the remains is not.
3. ``classify_edges`` says where keys and values come from: ``match_rope`` walks back from the chunk's own keys, and
   ``classify_masks`` must know how many columns are cached. It also picks the layout.
4. ``match_rope`` and ``classify_masks`` need edges, and not each other. Both run parts of the graph, and note on placeholders
   which constants they have read.
5. ``guard_constants`` comes behind both, since it guards what they noted.
6. ``slice_wide`` is the first to change what runs. It sorts nodes by ``Trace.order``, in which those that ``rewrite`` adds have
   no place, so it comes before that.
7. ``rewrite`` puts operations in the place of the sites, and needs all that is known of them.
8. ``clean_up`` drops what then has no use, and with it the lengths and handles of the cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from spectral_compile.passes.attention import canonicalise_attention
from spectral_compile.passes.clean_up import clean_up
from spectral_compile.passes.constants import guard_constants
from spectral_compile.passes.edges import classify_edges
from spectral_compile.passes.masks import classify_masks
from spectral_compile.passes.patched import refuse_patched
from spectral_compile.passes.rewrite import rewrite
from spectral_compile.passes.rope import match_rope
from spectral_compile.passes.slices import slice_wide
from spectral_compile.passes.trace import Trace
from spectral_compile.report import PassReport

log = logging.getLogger(__name__)

PASSES: tuple[Callable[[Trace], None], ...] = (
    canonicalise_attention,
    refuse_patched,
    classify_edges,
    match_rope,
    classify_masks,
    guard_constants,
    slice_wide,
    rewrite,
    clean_up,
)


def run_passes(
    trace: Trace, seen: Callable[[Trace], None] = lambda trace: None, passes: Sequence[Callable[[Trace], None]] = PASSES
) -> None:
    """Run ``passes`` in order and add a ``PassReport`` of each to ``trace.passes``; ``seen`` is called behind each one."""
    for run in passes:
        before = {id(site) for site in trace.sites if site.refusal is not None}
        started = time.perf_counter()
        run(trace)
        seconds = time.perf_counter() - started
        refused = [site for site in trace.sites if site.refusal is not None and id(site) not in before]
        trace.passes.append(PassReport(run.__name__, seconds, len(trace.matched), len(refused)))
        log.info("%s", trace.passes[-1])
        for site in refused:
            log.debug("refused: %s: %s", site.where, site.refusal)
        seen(trace)
