"""Text to syntax tree, and back. `parse` gives the tree of a whole spec, or every syntax error that it finds.

The grammar is `grammar/patchc.lark`. Knows nothing of models, data or torch: names stay words.
"""

from patchc.parse.format import format_spec
from patchc.parse.parser import parse
from patchc.parse.printer import print_spec

__all__ = ["format_spec", "parse", "print_spec"]
