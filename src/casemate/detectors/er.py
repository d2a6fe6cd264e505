"""The ER-Detector (Li et al.): kernel density of the codes of an ER-Classifier, with or without its hidden layers."""

from __future__ import annotations

from typing import Literal

from casemate.detectors.density import DensityDetector, Reads
from casemate.fields import spec


@spec
class ERDetector(DensityDetector):
    """ER1 reads the code, ER2 ("combined") the means of the hidden layers as well.

    The paper's ER2 has 1,924 features with MNIST's encoder and 1,488 with CIFAR-10's, a mean for each channel.
    """

    code: Literal["direct", "combined"] = "direct"
    means: Literal["channels", "layers"] = "channels"
    """Of "combined": one mean per channel of each hidden layer, or one per layer."""

    def reads(self) -> Reads:
        return "code" if self.code == "direct" else self.means
