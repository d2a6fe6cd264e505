"""Attacks of casemate and of other libraries at the same settings: what each leaves standing, and its time.

    python benchmarks/agreement.py [--model FOLDER --data NAME] [--images N] [--cases apgd_ce square] [--norms l2]

Without a model, the network of the tests is trained on the bundled digits. Other libraries are optional: what is not
installed is left out, and said. All results are judged alike: by the model's own decisions, inside the ball. Clean
errors count as fallen. Seconds are CPU time of one thread. A new attack joins with one entry in `CASES`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casemate.attacks.apgd import APGD, APGDT
from casemate.attacks.autoattack import AutoAttack
from casemate.attacks.base import Attack
from casemate.attacks.fab import FABT
from casemate.attacks.square import Square
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted

HERE = Path(__file__).parent
GOAL = 0.002
"""Accuracy that casemate may leave above another library at the same settings."""

Run = Callable[[Tensor, Tensor], Tensor]
Peer = Callable[[nn.Module, ThreatModel], Run]


@dataclass(frozen=True)
class Case:
    """One setting of one attack. `peers`: {module: what runs the same there}, imported only when it is used."""

    name: str
    family: str
    ours: Attack
    peers: dict[str, Peer]
    setting: str = ""
    slow: bool = False
    """Left out unless asked for by name."""


def authors(attack: str, **settings: Any) -> Peer:
    """The code of AutoAttack's authors, as the package pyautoattack has it."""

    def peer(model: nn.Module, threat: ThreatModel) -> Run:
        from pyautoattack import AutoAttack as Theirs

        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        options = {"version": "standard"} if attack == "standard" else {"version": "custom", "attacks": [attack]}
        made = Theirs(model, norm=norm, eps=threat.radius, seed=0, **options)
        made.apgd.n_restarts = made.fab.n_restarts = made.apgd_targeted.n_restarts = 1
        for name, value in settings.items():
            part, _, field = name.partition("__")
            setattr(getattr(made, part), field, value)
        return lambda x, y: made.run_standard_evaluation(x, y, batch_size=500)[0]

    return peer


def torchattacks(*attacks: tuple[str, dict[str, Any]]) -> Peer:
    def peer(model: nn.Module, threat: ThreatModel) -> Run:
        import torchattacks as library

        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        made = [getattr(library, name)(model, norm=norm, eps=threat.radius, **options) for name, options in attacks]
        run: Run = made[0] if len(made) == 1 else library.MultiAttack(made)
        return run

    return peer


CE, T = ("APGD", {"steps": 100, "loss": "ce"}), ("APGDT", {"steps": 100})
FAB, SQUARE = ("FAB", {"steps": 100, "multi_targeted": True}), ("Square", {"n_queries": 5000, "resc_schedule": False})

CASES = [
    Case("apgd_ce", "autoattack", APGD(),
         {"pyautoattack": authors("apgd-ce"), "torchattacks": torchattacks(CE)}, "100 steps"),
    Case("apgd_dlr", "autoattack", APGD(objective="dlr"),
         {"pyautoattack": authors("apgd-dlr"),
          "torchattacks": torchattacks(("APGD", {"steps": 100, "loss": "dlr"}))}, "100 steps"),
    Case("apgd_t", "autoattack", APGDT(),
         {"pyautoattack": authors("apgd-t"), "torchattacks": torchattacks(T)}, "9 targets, 100 steps"),
    Case("fab_t", "autoattack", FABT(),
         {"pyautoattack": authors("fab-t"), "torchattacks": torchattacks(FAB)}, "9 targets, 100 steps"),
    Case("square", "autoattack", Square(),
         {"pyautoattack": authors("square"), "torchattacks": torchattacks(SQUARE)}, "5000 queries"),
    Case("autoattack", "autoattack", AutoAttack(),
         {"pyautoattack": authors("standard"), "torchattacks": torchattacks(CE, T, FAB, SQUARE)}, "standard"),
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    name: str
    system: TorchSystem
    x: Tensor
    y: Tensor
    radii: dict[str, float]


def digits_target(images: int) -> Target:
    """The network and the images of the tests."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from attack_toys import digits, system, trained_network

    x, y = digits()
    x, y = x[1500:][:images], y[1500:][:images]
    return Target("digits, plain training", system(trained_network(), (1, 8, 8), 10), x, y, {"linf": 0.08, "l2": 0.4})


def trained_target(folder: str, data: str, root: Path, images: int, radii: dict[str, float]) -> Target:
    """A trained row of the pipeline, on the front of the evaluation order."""
    from casemate.evaluation.bring import Request
    from casemate.evaluation.images import EvaluationSet, evaluation_order

    brought = Request(folder, data, root).load()
    assert isinstance(brought.system, TorchSystem), "the other libraries attack PyTorch models only"
    found = EvaluationSet(brought.images)
    x, y = found.take(evaluation_order(len(found))[:images])
    return Target(f"{data}, {Path(folder).name}", brought.system, x, y, radii)


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begun = time.thread_time()
        found = run()
    return found.detach(), time.thread_time() - begun


def left(target: Target, x_adv: Tensor, threat: ThreatModel) -> float:
    """Accuracy that is left; an image counts as fallen only inside the ball."""
    with target.system.frozen():
        clean = target.system.decide(target.x) != target.y
        wrong = (target.system.decide(x_adv) != target.y) & threat.contains(x_adv, target.x)
    return 1 - float((clean | wrong).float().mean())


def measure(case: Case, target: Target, norm: str) -> list[dict[str, Any]]:
    threat = ThreatModel(norm, target.radii[norm])  # type: ignore[arg-type]
    goal = untargeted(target.y)
    runs: dict[str, Callable[[], Tensor]] = {
        "casemate": lambda: case.ours(target.system, target.x, goal, threat).x_adv
    }
    for module, peer in case.peers.items():
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not installed: left out", file=sys.stderr)
            continue
        with target.system.frozen():
            run = peer(target.system.classifier.eval(), threat)
        runs[module] = lambda run=run: run(target.x, target.y)  # type: ignore[misc]
    rows = []
    for library, attack in runs.items():
        x_adv, seconds = timed(attack)
        row = {
            "model": target.name, "images": len(target.x), "family": case.family, "case": case.name,
            "setting": case.setting, "norm": norm, "radius": threat.radius, "library": library,
            "version": _version(library), "left": left(target, x_adv, threat), "seconds": seconds,
        }  # fmt: skip
        rows.append(row)
        print(_line(row), flush=True)
    ours = rows[0]
    for row in rows[1:]:
        row["above"] = ours["left"] - row["left"]
        row["times"] = row["seconds"] / ours["seconds"]
    return rows


def _version(library: str) -> str:
    return importlib.metadata.version(library)


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:24} {row['case']:11} {row['norm']:4} {row['radius']:.4g}  {row['library']:13} "
        f"{100 * row['left']:6.2f} % left of {row['images']}, {row['seconds']:8.2f} s"
    )


def table(about: dict[str, Any]) -> str:
    """The rows as a page: accuracy left, and the others' time over ours."""
    lines = [
        "# Agreement with other libraries", "",
        "Made by `python benchmarks/agreement.py`. Accuracy left at the same settings, clean errors counted as "
        f"fallen; in brackets the library's CPU time over casemate's, one thread. torch {about['torch']}, "
        f"{about['machine']}. Goal: casemate never more than {100 * GOAL:g} points above another.", "",
    ]  # fmt: skip
    libraries = sorted({row["library"] for row in about["rows"]} - {"casemate"})
    head = ["model", "images", "attack", "setting", "ball", "casemate", *libraries]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in about["rows"]:
        key = tuple(row[k] for k in ("model", "images", "case", "setting", "norm", "radius"))
        groups.setdefault(key, {})[row["library"]] = row
    for (model, images, case, setting, norm, radius), found in groups.items():
        ours = found["casemate"]
        cells = [model, str(images), case, setting, f"{norm} {radius:.4g}",
                 f"{100 * ours['left']:.2f} % ({ours['seconds']:.1f} s)"]  # fmt: skip
        for library in libraries:
            row = found.get(library)
            cells.append("" if row is None else f"{100 * row['left']:.2f} % ({row['times']:.2f} x)")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the folder of a trained row; by default a network for the digits")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root", type=Path, default=Path("data/raw"))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--radius-linf", type=float, default=0.3)
    parser.add_argument("--radius-l2", type=float, default=2.0)
    parser.add_argument("--norms", nargs="+", default=["linf", "l2"], choices=["linf", "l2"])
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES if not case.slow])
    parser.add_argument("--json", type=Path, default=HERE / "results" / "agreement.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    radii = {"linf": options.radius_linf, "l2": options.radius_l2}
    if options.model is None:
        target = digits_target(options.images)
    else:
        target = trained_target(options.model, options.data, options.data_root, options.images, radii)
    known = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    about: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "goal": GOAL}
    for norm in options.norms:
        for case in (case for case in CASES if case.name in options.cases):
            new = measure(case, target, norm)
            kept = [r for r in known if (r["model"], r["case"], r["norm"]) != (target.name, case.name, norm)]
            known = sorted(kept + new, key=lambda r: (r["model"], r["norm"], r["family"]))
            options.json.write_text(json.dumps({**about, "rows": known}, indent=1) + "\n")
            options.json.with_suffix(".md").write_text(table({**about, "rows": known}))
    worst = max((row["above"] for row in known if "above" in row), default=0.0)
    print(f"casemate leaves at most {100 * worst:.2f} points more than another; goal {100 * GOAL:g}")


if __name__ == "__main__":
    main()
