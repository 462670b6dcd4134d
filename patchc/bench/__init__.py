"""`patchc bench`: the same experiments by patchc and by its peers, on a model of random weights.

`works` says what is measured, `targets` what it should cost, `peers` who else does it; `sweeps` and `others` measure,
`table` shows. Nothing is downloaded.
"""

PEERS = ("transformer-lens", "hooks", "autocircuit")
"""Who else may be measured, by the names that the table has."""
