"""Model families: which are read, which are refused and why, in one table that the tests go through.

`python -m tests.families` prints it as the README has it.
"""
