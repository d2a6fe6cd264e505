"""Source x victim tables as queries of the ledger."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_toys import Counter, digits, fresh_network, trained_network

from casemate.attacks.gradient import PGD
from casemate.attacks.transfer import Transfer
from casemate.data.base import Images
from casemate.errors import UserError
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.matrix import transfer_matrix
from casemate.evaluation.plan import Runner
from casemate.evaluation.robustness import wilson
from casemate.networks.base import Classifier
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted

LINF = ThreatModel("linf", 0.1)
WIDE = ThreatModel("linf", 0.15)
"""Here white box and transfer are far apart, whatever a processor's rounding makes of the networks."""


def runner(folder: Path, chunk: int = 60, threat: ThreatModel = LINF) -> Runner:
    x, y = digits()
    pixels = (x[1500:1620] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    data = EvaluationSet(Images(np.ascontiguousarray(pixels), y[1500:1620].numpy()))
    return Runner(Ledger(folder, chunk), data, threat)


def deployed(network: torch.nn.Module, name: str) -> TorchSystem:
    return TorchSystem(network, input_shape=(1, 8, 8), num_classes=10, name=name)


def second() -> Classifier:
    """Another network of the same recipe."""
    x, y = digits()
    network = fresh_network(5).train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for rows in torch.randperm(1500, generator=torch.Generator().manual_seed(5)).repeat(4).split(64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


def test_every_source_meets_every_victim_and_the_diagonal_is_the_white_box(tmp_path: Path) -> None:
    crafted = Counter(trained_network())
    first, other = deployed(crafted, "first"), deployed(second(), "other")
    attack = Transfer(steps=10)
    run = runner(tmp_path, threat=WIDE)
    matrix = transfer_matrix({"first": first, "other": other}, {"first": first, "other": other}, run, attack)
    assert len(crafted.gradients) == 20  # 2 chunks of 10 steps, for two victims
    for source, row in matrix.cells.items():
        for victim, found in row.items():
            assert found["n"] == 120
            left = round(found["accuracy"] * 120)
            assert (found["low"], found["high"]) == pytest.approx(wilson(left, 120))
            if source != victim:
                assert found["accuracy"] > matrix.cells[victim][victim]["accuracy"] + 0.1
                assert found["accuracy"] < matrix.clean[victim]["accuracy"]
    x, y = run.data.take(run.order())
    white = PGD(steps=10, relative_step=0.25, restarts=1)(other, x, untargeted(y), WIDE).success
    assert matrix.cells["other"]["other"]["accuracy"] == pytest.approx(1 - float(white.float().mean()), abs=0.05)


def test_its_cells_are_the_ledgers_and_are_not_computed_twice(tmp_path: Path) -> None:
    counter = Counter(trained_network())
    source, victims = deployed(counter, "source"), {"other": deployed(fresh_network(1), "other")}
    attack = Transfer(steps=3)
    once = transfer_matrix({"source": source}, victims, runner(tmp_path), attack, images=60)
    spent = len(counter.forwards)
    assert (
        transfer_matrix({"source": source}, victims, runner(tmp_path), attack, images=60).as_dict() == once.as_dict()
    )
    assert len(counter.forwards) == spent
    run = runner(tmp_path)
    cell = run.ledger.read(victims["other"], run.data, attack.with_source(source), LINF, "adaptive", run.order(60))
    assert cell.complete and once.cells["source"]["other"]["n"] == 60


def test_it_can_be_read_and_written(tmp_path: Path) -> None:
    source, victim = deployed(trained_network(), "a"), deployed(fresh_network(1), "b")
    matrix = transfer_matrix({"a": source}, {"b": victim}, runner(tmp_path), Transfer(steps=2), images=30)
    written = json.loads(json.dumps(matrix.as_dict()))
    assert written["threat"] == "linf 0.1" and set(written["clean"]) == {"a", "b"}
    assert written["cells"]["a"]["b"]["n"] == 30
    lines = str(matrix).splitlines()
    assert lines[0] == "transfer, linf 0.1, 30 images, accuracy in %" and lines[1].split() == ["crafted", "on", "b"]
    assert lines[2].startswith("(clean)") and lines[3].startswith("a ")


def test_an_attack_without_a_source_is_refused(tmp_path: Path) -> None:
    victim = deployed(trained_network(), "a")
    with pytest.raises(UserError, match="attack PGD has no source system"):
        transfer_matrix({"a": victim}, {"a": victim}, runner(tmp_path), PGD())
