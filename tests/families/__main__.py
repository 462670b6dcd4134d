"""Prints the table of families."""

from tests.families.table import table

print(table())
