"""The whole of `patchc bench`: the model, the peers that are there, the rows one after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial

import torch

from patchc import api
from patchc.bench import PEERS
from patchc.bench.measure import n_threads
from patchc.bench.others import OTHERS
from patchc.bench.peers import Peer
from patchc.bench.peers.autocircuit import AutoCircuit
from patchc.bench.peers.hooks import Hooks
from patchc.bench.peers.transformer_lens import TransformerLens
from patchc.bench.row import Row
from patchc.bench.shape import GPT2_SMALL, IOI_LIKE, SETTINGS, Shape, random_model
from patchc.bench.sweeps import FULL, QUICK, Bench, measure
from patchc.bench.works import HEAD_OUT, HEAD_SITES, WORKS, Work


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured. `rows`: a part of the names of rows, or a pattern with `*`. `peers`: their names.
    `autocircuit`: the interpreter of an environment that has it. `threads`: those of the wall clock's runs."""

    quick: bool = False
    rows: str | None = None
    peers: Sequence[str] = PEERS
    autocircuit: str | None = None
    threads: int | None = None
    shape: Shape = GPT2_SMALL


@dataclass(frozen=True, slots=True)
class Step:
    """A row to be measured: `title` says which."""

    work: str
    setting: str
    title: str
    measure: Callable[[Bench], Row]


def steps(options: Options) -> list[Step]:
    """The rows that are asked for, in the table's order."""
    found = [_sweep(work, setting) for work in WORKS for setting in SETTINGS if _measured(work, setting, options.quick)]
    found += [Step(o.name, o.setting, o.name, o.measure) for o in OTHERS if o.quick or not options.quick]
    return [step for step in found if options.rows is None or _named(step, options.rows)]


def _measured(work: Work, setting: str, quick: bool) -> bool:
    """A quick run has every work, in one setting; of q, k and v the first; and one work in the other setting."""
    if not quick:
        return True
    return work not in HEAD_SITES[1:] and (setting == IOI_LIKE or work is HEAD_OUT)


def _sweep(work: Work, setting: str) -> Step:
    return Step(work.name, setting, work.title, partial(measure, work=work, setting=setting))


def _named(step: Step, pattern: str) -> bool:
    """By a part of the name, or by a pattern; brackets in names are brackets."""
    quoted = pattern.replace("[", "[[]")
    return pattern in step.title or fnmatch(step.title, quoted) or fnmatch(f"{step.title}, {step.setting}", quoted)


def rows(options: Options, say: Callable[[str], None]) -> Iterator[Row]:
    """Each row as it is measured; `say` hears what is being done and what cannot be."""
    chosen = steps(options)
    with ExitStack() as stack:
        stack.enter_context(n_threads(1))
        stack.enter_context(torch.no_grad())
        bench = _bench(options, say)
        for number, step in enumerate(chosen, start=1):
            say(f"{number}/{len(chosen)}  {step.title}{', ' if step.setting else ''}{step.setting}")
            yield step.measure(bench)


def _bench(options: Options, say: Callable[[str], None]) -> Bench:
    say("making and tracing a model of random weights")
    model = api.load(random_model(options.shape))
    peers = [peer for peer in _peers(options) if _there(peer, say)]
    effort = QUICK if options.quick else FULL
    return Bench(model, options.shape, peers, effort, options.threads or os.cpu_count() or 1)


def _peers(options: Options) -> Iterator[Peer]:
    make = partial(random_model, options.shape)
    if "transformer-lens" in options.peers:
        yield TransformerLens(make)
    if "hooks" in options.peers:
        yield Hooks()
    if "autocircuit" in options.peers:
        yield AutoCircuit(make, options.autocircuit)


def _there(peer: Peer, say: Callable[[str], None]) -> bool:
    missing = peer.missing()
    if missing is not None:
        say(f"without {peer.name}: {missing}")
    return missing is None
