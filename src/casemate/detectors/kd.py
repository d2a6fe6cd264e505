"""KD (Feinman et al. 2017): kernel density of the last hidden layer of an undefended network."""

from __future__ import annotations

from casemate.detectors.density import DensityDetector, Reads
from casemate.fields import Flag, spec


@spec
class KD(DensityDetector):
    """Its published bandwidths, 1.2 on MNIST and 0.26 on CIFAR-10, are for other networks: by default it is tuned."""

    standardise: Flag = False

    def reads(self) -> Reads:
        return "code"
