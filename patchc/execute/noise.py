"""What `Noise` means, number by number: a definition, which both the compiled run and the hooks backend go by.

Each site and each prompt has a stream of numbers of its own, so that noise does not depend on what else is run or on
how the work is cut; a longer prompt's noise begins with a shorter one's.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from patchc.ir.experiment import Noise, Prompts


def prompt_noise(noise: Noise, place: str, prompt: int, length: int, width: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers `[length, width]` for one prompt at one place of the model.

    `place` names the site: `embed`, `head[0, 1]`, `head[0, 1].q`, `mlp[2].post`, `attn_out[1]`, `stream[3]` (the stream
    below rank 3). For scores and patterns see `entry_noise`.
    """
    digest = hashlib.sha256(f"{noise.seed}/{place}/{prompt}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    return generator.standard_normal((length, width))


def entry_noise(noise: Noise, place: str, prompt: int, position: int, length: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers `[length]` for a row of a prompt's scores or pattern, that of the query at `position`:
    each row has a stream of its own, so that a longer prompt's row begins with a shorter one's."""
    return prompt_noise(noise, f"{place}[{position}]", prompt, 1, length)[0]


def token_noise(noise: Noise, place: str, prompts: Prompts, width: int) -> npt.NDArray[np.float64]:
    """The same for every token of the layout, `[token, width]`; copies of a prompt have the same noise. Without a width
    the places are rows of scores or patterns: `[token, longest prompt]`, 0 beyond the token's own prompt."""
    lengths = prompts.layout.lengths
    if not width:
        return _row_noise(noise, place, prompts)
    rows = [prompt_noise(noise, place, row % prompts.n, n, width) for row, n in enumerate(lengths)]
    return np.concatenate(rows) if rows else np.zeros((0, width))


def _row_noise(noise: Noise, place: str, prompts: Prompts) -> npt.NDArray[np.float64]:
    layout = prompts.layout
    out = np.zeros((layout.n_tokens, max(layout.lengths, default=0)))
    for token in range(layout.n_tokens):
        row, position = layout.place(token)
        length = layout.lengths[row]
        out[token, :length] = entry_noise(noise, place, row % prompts.n, position, length)
    return out
