"""`MODEL_CARD.md`: what `card.json` says, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from casemate.deploy.card import Card, Check, Gate, Rate

FORMS = {
    "plain": "the classifier alone",
    "imt": "the classifier behind IMT, whose gradient is part of the graph",
    "limited": "the classifier behind the limited form of IMT, whose gradient is part of the graph",
    "detector": "the classifier with a detector beside it: an image is to be rejected where `detector` is above 0",
}
LAYOUTS = {
    "float32-nchw": "N x {0} x {1} x {2} float32 in [0, 1]",
    "uint8-nhwc": "N x {1} x {2} x {0} uint8 in [0, 255]",
}


def model_card(card: Card) -> str:
    """Markdown, the same for equal cards."""
    p = card.provenance
    parts = [
        f"# {p.row} ({p.mode}) on {card.dataset}",
        f"A {p.network} trained with `{p.method}` for {card.threat.norm} {card.threat.radius:g}; the file is "
        f"{FORMS.get(card.form, card.form)}, in {card.variant}.",
        _numbers(card),
        _verdict(card),
        _gate(card.gate, card.form),
        _use(card),
        _provenance(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _share(rate: Rate) -> str:
    low, high = 100 * rate.low, 100 * rate.high
    return f"{100 * rate.accuracy:.2f} % | {low:.1f} to {high:.1f} | {rate.n:,}"


def _numbers(card: Card) -> str:
    lines = ["## Numbers", "", "| | left | 95 % interval | n |", "|---|---|---|---|"]
    if card.clean is not None:
        lines.append(f"| clean | {_share(card.clean)} |")
    for suite, worst in card.robust.items():
        count = len(worst.attacks)
        lines.append(f"| worst case, {suite} ({count} attack{'s' * (count != 1)}) | {_share(worst)} |")
    if card.gate is not None:
        lines.append(f"| this file, attacked as it is served | {_share(card.gate.served)} |")
    lines += ["", "An image counts only if it survives every attack; clean errors count as failures."]
    if card.robust:
        lines += _whole(card)
    if card.form == "detector":
        lines.append("A clean image that is rejected is an error; an attacked one that is rejected fooled nobody.")
    elif not card.robust:
        lines.append("This file has no robust accuracy: its evaluation has no adaptive worst case.")
    return "\n".join(lines)


def _whole(card: Card) -> list[str]:
    """What "every attack" leaves out: hits outside the ball, and attacks on too few images."""
    lines = [
        f"An attack with a budget of its own counts only where its image lies inside {card.threat.norm} "
        f"{card.threat.radius:g}, and not in a worst case of images that it was not run on."
    ]  # fmt: skip
    if "all" not in card.robust:
        return lines
    counted, left = set(card.robust["all"].attacks), []
    for suite, worst in card.robust.items():
        out = [name for name in worst.attacks if not {name, f"{suite}/{name}"} & counted]
        whole = len(out) == len(worst.attacks) > 1
        left += [f"all of `{suite}`"] if whole else [f"`{suite}/{name}`" for name in out]
    if left:
        lines.append(f"The worst case of all suites leaves out what was run on fewer images: {', '.join(left)}.")
    return lines


def _verdict(card: Card) -> str:
    words = {
        "ok": "The masking gate found no sign that the gradients misled the attacks.",
        "unreliable": "**The masking gate failed: these numbers are not robustness.**",
    }
    return words.get(card.verdict, f"Masking gate: {card.verdict}.")


def _gate(gate: Gate | None, form: str) -> str:
    if gate is None:
        return "## Release gate\n\nThis file has not been through it."
    whose = "what the same attack leaves PyTorch" if form == "detector" else "the evaluation's worst case"
    said = "passed" if gate.passed else "**failed: do not serve this file for its robustness**"
    lines = [
        "## Release gate", "",
        f"{said}. Attacked as served, through ONNX Runtime: {', '.join(gate.served.attacks)}. Margin under "
        f"{whose}: {100 * gate.margin:g} points.", "",
        "| check | value | bound | |", "|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*lines, *map(_check, gate.checks)])


def _check(check: Check) -> str:
    sign = ">=" if check.at_least else "<="
    said = "passed" if check.passed else "**failed**"
    return f"| {check.name}: {check.detail} | {check.value:.4g} | {sign} {check.bound:.4g} | {said} |"


def _use(card: Card) -> str:
    channels, height, width = card.input.shape
    layout = LAYOUTS[card.input.layout].format(channels, height, width)
    return "\n".join([
        "## Use", "",
        f"- input `{card.input.name}`: {layout}. Resizing is not in the file: resize and crop before, as the data "
        "set's test images were.",
        f"- outputs: {', '.join(f'`{name}`' for name in card.outputs)}",
        f"- classes: {', '.join(card.classes)}",
        f"- file: {card.size:,} bytes, sha256 `{card.sha256}`",
        f"- limits: tested for {card.threat.norm} {card.threat.radius:g} on {card.dataset} only; other changes of an "
        "image, and other data, are not covered by the numbers above.",
    ])  # fmt: skip


def _provenance(card: Card) -> str:
    p = card.provenance
    scaled = "" if p.budget >= 1 else f" A scaled-down run (budget {p.budget:g}): its numbers are those of one."
    epochs = "" if p.epochs is None else f", {p.epochs:g} epochs"
    return (
        f"## Provenance\n\nProfile {p.profile}, row {p.row}, seed {p.seed}{epochs}, casemate {p.code_version}, data "
        f"`{p.data_checksum[:16]}`.{scaled}"
    )
