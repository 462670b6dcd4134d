"""From a torch module to its residual graph and the functions of its parts, proved against the module itself.

`load` is the entry, `pieces` what the later stages run on. Knows nothing of the language or of patches.
"""
