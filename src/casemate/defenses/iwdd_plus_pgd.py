"""IWDD with an linf adversary beside the generator: what the published robustness to PGD probably rests on."""

from __future__ import annotations

from casemate.defenses.iwdd import IWDD
from casemate.fields import Unit, spec


@spec
class IWDDPlusPGD(IWDD):
    """IWDD whose x~ is PGD-10 in the threat model for half of each batch.

    An image that keeps its patches is under no lp adversary, so `iwdd` alone should not be expected to reach the
    published 46 % under PGD-10; both rows belong into a table. Ten half batches of the classifier forward and to the
    input more than `iwdd`.
    """

    pgd_share: Unit = 0.5
