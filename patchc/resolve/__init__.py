"""Syntax tree, residual graph and tokenizer to a `Study`: names looked up, selectors expanded, every error
reported.

`resolve` is the stage; `model_choice` reads the `model` statement before the model is loaded. Knows nothing
of execution, and needs neither torch nor weights.
"""

from patchc.resolve.model_choice import model_choice
from patchc.resolve.records import Given
from patchc.resolve.study import Resolved, resolve

__all__ = ["Given", "Resolved", "model_choice", "resolve"]
