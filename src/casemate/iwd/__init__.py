"""The internal Wasserstein distance between two images: their patch distributions, l1 ground cost.

`measure` is exact. Sliced and entropic figures are estimates that state their error and must not be compared with it.
"""

from casemate.iwd.exact import IWD, measure
from casemate.iwd.windows import PROTOCOLS, Windows

__all__ = ["IWD", "PROTOCOLS", "Windows", "measure"]
