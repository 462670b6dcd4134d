"""What holds of every variant of a DAG from the moment it is made: each law saves work, none changes a number.

`lower` makes DAGs under all laws. Under fewer it makes the naive DAG that an optimiser's pass starts from.
"""

from __future__ import annotations

from enum import Flag, auto


class Law(Flag):
    """`EQUAL`: equal operations on equal variants are one variant. `BASE`: what provably equals the base run is number
    0, and nothing is computed for it. `STREAMS`: the stream below a rank is a value that its readers share and the
    stream above adds to; else each reader adds up all that is written below it. `FORWARD`: a value differs only from
    the first token on at which its world does, and attention carries a change to later tokens only."""

    EQUAL = auto()
    BASE = auto()
    STREAMS = auto()
    FORWARD = auto()


ALL_LAWS = Law.EQUAL | Law.BASE | Law.STREAMS | Law.FORWARD
NO_LAWS = Law(0)
