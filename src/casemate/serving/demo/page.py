"""The page: choose or upload a picture, set a budget, attack both models, compare what they say."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from jinja2 import Environment, FileSystemLoader
from nicegui import events, ui

from casemate.errors import UserError
from casemate.serving.demo.attack import Attacked, Norm, attack_image
from casemate.serving.demo.contenders import Contender, Reading
from casemate.serving.demo.figures import difference_uri, picture_uri
from casemate.serving.demo.samples import Samples
from casemate.serving.limits import Limits
from casemate.serving.pictures import read_picture

HERE = Path(__file__).parent
STYLE = HERE / "demo.css"
PARTS: Any = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("parts.html.j2").module
SHOWN = 14
STEPS = 30  # of the slider, up to twice the radius that the robust model was tested at
log = logging.getLogger("casemate.serving")


@dataclass
class State:
    """Of one open page. `label` is what the attacks move away from; `truth` whether the dataset says so."""

    image: np.ndarray | None = None
    label: int | None = None
    truth: bool = False
    sample: int | None = None
    notes: tuple[str, ...] = ()
    budget: float = 0.0
    clean: dict[str, Reading] = field(default_factory=dict)
    attacked: dict[str, Attacked] = field(default_factory=dict)
    readings: dict[tuple[str, str], Reading] = field(default_factory=dict)
    """(whose image, who looks at it) -> what it says."""
    page: int = 0
    busy: bool = False


def mount(app: FastAPI, contenders: list[Contender], samples: Samples, limits: Limits) -> None:
    """Put the page at the root of `app`. One attack runs at a time, whoever asks."""
    turn = asyncio.Lock()

    def root() -> None:
        Page(contenders, samples, limits, turn).build()

    ui.run_with(app, root=root, title="casemate: attack it yourself", dark=None, favicon=FAVICON, tailwind=False,
                show_welcome_message=False)  # fmt: skip


class Page:
    """One visitor's page."""

    def __init__(self, contenders: list[Contender], samples: Samples, limits: Limits, turn: asyncio.Lock) -> None:
        self.contenders, self.samples, self.limits, self.turn = contenders, samples, limits, turn
        told = contenders[-1].tested
        self.norm: Norm = "l2" if told and told.norm == "l2" else "linf"
        self.radius = told.radius if told and told.radius > 0 else (0.5 if self.norm == "l2" else 8 / 255)
        self.state = State(budget=self.radius)

    def build(self) -> None:
        ui.add_css(STYLE)
        ui.colors(primary="#0b62a4")
        with ui.element("main").classes("demo"):
            metadata = self.contenders[-1].predictor.model.metadata
            dataset = metadata.about.dataset if metadata else ""
            ui.html(PARTS.head(dataset, len(self.contenders) > 1), sanitize=False)
            with ui.element("section").classes("controls"):
                self._picker()
                self._budget()
            self.duel()
            ui.html(PARTS.foot(self.contenders[-1].tested), sanitize=False).classes("foot")
        if len(self.samples):
            self.choose(self.samples.some(SHOWN, 0)[0])

    # --- controls -------------------------------------------------------------------------------------------

    def _picker(self) -> None:
        with ui.element("div").classes("panel pick"):
            with ui.element("div").classes("bar"):
                ui.html("<h2>1. A picture</h2>", sanitize=False)
                if len(self.samples):
                    ui.button("others", icon="refresh", on_click=self.turn_page).props("flat dense no-caps")
            if len(self.samples):
                self.thumbnails()
            else:
                ui.html('<p class="muted">The dataset is not on this machine; upload a picture.</p>', sanitize=False)
            ui.upload(
                label="or upload a JPEG or PNG", auto_upload=True, max_files=1, max_file_size=self.limits.picture,
                on_upload=self.uploaded, on_rejected=lambda: ui.notify("not taken: one JPEG or PNG", type="negative"),
            ).props('accept="image/jpeg,image/png" flat bordered').classes("upload")  # fmt: skip
            self.chosen()

    @ui.refreshable_method
    def thumbnails(self) -> None:
        with ui.element("div").classes("thumbs"):
            for index in self.samples.some(SHOWN, self.state.page):
                image, label = self.samples.take(index)
                name = escape(self.contenders[-1].predictor.classes[label])
                mark = " on" if index == self.state.sample else ""
                button = ui.element("button").classes("thumb" + mark)
                with button.props(f'type=button aria-label="test image, {name}"'):
                    ui.html(f'<img src="{picture_uri(image)}" alt="">', sanitize=False)
                button.on("click", lambda _, index=index: self.choose(index))

    @ui.refreshable_method
    def chosen(self) -> None:
        state = self.state
        if state.image is None or state.label is None:
            return
        name = escape(self.contenders[-1].predictor.classes[state.label])
        whose = "The test set says" if state.truth else "Uploaded; attacks move it away from"
        notes = "".join(f"<br>{escape(note)}" for note in state.notes)
        ui.html(f'<p class="said">{whose} <b>{name}</b>.{notes}</p>', sanitize=False)

    def _budget(self) -> None:
        with ui.element("div").classes("panel budget"):
            ui.html("<h2>2. A budget</h2>", sanitize=False)
            self.amount()
            most = 2 * self.radius
            least = most / STEPS
            slider = ui.slider(min=least, max=most, step=least, value=self.radius, on_change=self.changed)
            slider.props('aria-label="budget"').classes("slider")
            marks = ("", f"{self.radius:.3g}: tested at", f"{most:.3g}")
            ui.html("".join(f"<span>{mark}</span>" for mark in marks), sanitize=False).classes("scale")
            words = {
                "linf": "No pixel is changed by more than this, black being 0 and white 1.",
                "l2": "The change of all pixels together has no greater length than this, black being 0 and white 1.",
            }
            ui.html(words[self.norm], sanitize=False).classes("muted")
            self.button()

    @ui.refreshable_method
    def amount(self) -> None:
        ui.html(f'<p class="amount"><b>{self.state.budget:.3f}</b> {self.norm}</p>', sanitize=False)

    @ui.refreshable_method
    def button(self) -> None:
        both = "both models" if len(self.contenders) > 1 else "it"
        made = ui.button(f"Attack {both}", icon="bolt", on_click=self.attack).props("unelevated no-caps size=lg")
        made.classes("attack")
        if self.state.busy:
            made.props("loading")
        if self.state.busy or self.state.image is None:
            made.disable()

    # --- what happens ---------------------------------------------------------------------------------------

    def choose(self, index: int) -> None:
        image, label = self.samples.take(index)
        self.show(image, label, truth=True, sample=index)

    def show(
        self, image: np.ndarray, label: int | None, *, truth: bool, sample: int | None, notes: tuple[str, ...] = ()
    ) -> None:
        """A new picture: what the models say of it, and nothing attacked yet."""
        state = self.state
        state.clean = {c.title: c.read(image) for c in self.contenders}
        state.label = state.clean[self.contenders[-1].title].label if label is None else label
        state.image, state.truth, state.sample, state.notes = image, truth, sample, notes
        self.forget()
        for part in (self.thumbnails, self.chosen, self.button):
            part.refresh()

    def forget(self) -> None:
        self.state.attacked, self.state.readings = {}, {}
        self.duel.refresh()

    def turn_page(self) -> None:
        self.state.page += 1
        self.thumbnails.refresh()

    async def uploaded(self, event: events.UploadEventArguments) -> None:
        event.sender.reset()  # type: ignore[attr-defined]
        try:
            if event.file.size() > self.limits.picture:
                raise UserError(f"the picture is larger than {self.limits.picture:,} bytes")
            body, shape = await event.file.read(), self.contenders[-1].shape
            kind = "image/png" if body.startswith(b"\x89PNG") else "image/jpeg"
            found = await asyncio.to_thread(read_picture, body, kind, shape, self.limits)
        except UserError as error:
            ui.notify(str(error), type="negative")
            return
        self.show(found.image, None, truth=False, sample=None, notes=found.changes)

    def changed(self, event: events.ValueChangeEventArguments[Any]) -> None:
        self.state.budget = float(event.value)
        self.amount.refresh()
        if self.state.attacked:
            self.forget()

    async def attack(self) -> None:
        state = self.state
        if state.busy or state.image is None or state.label is None:
            return
        state.busy, image, label, budget = True, state.image, state.label, state.budget
        self.button.refresh()
        self.duel.refresh()
        try:
            async with self.turn:
                for contender in self.contenders:
                    found = await asyncio.to_thread(attack_contender, contender, image, label, self.norm, budget)
                    if state.image is not image or state.budget != budget:
                        return  # another picture was chosen meanwhile
                    state.attacked[contender.title] = found
                    for judge in self.contenders:
                        state.readings[contender.title, judge.title] = judge.read(found.image)
        except Exception as error:
            log.exception("the attack failed")
            ui.notify(f"the attack failed: {type(error).__name__}", type="negative")
        finally:
            state.busy = False
            self.button.refresh()
            self.duel.refresh()

    # --- what is shown --------------------------------------------------------------------------------------

    @ui.refreshable_method
    def duel(self) -> None:
        with ui.element("section").classes("duel"):
            for contender in self.contenders:
                ui.html(PARTS.card(self._shown(contender)), sanitize=False).classes("panel card")

    def _shown(self, contender: Contender) -> dict[str, Any]:
        """What the card of a model shows."""
        state, title = self.state, contender.title
        shown = {"title": title, "row": contender.row, "busy": state.busy, "clean": None, "attacked": None}
        if state.image is None or state.label is None:
            return shown
        shown |= {"clean": state.clean[title], "picture": picture_uri(state.image), "verdict": self._verdict(title),
                  "truth": contender.predictor.classes[state.label]}  # fmt: skip
        attacked = state.attacked.get(title)
        if attacked is None:
            return shown
        others = [
            (other.title, *state.readings[title, other.title].top[0])
            for other in self.contenders
            if other is not contender
        ]
        return shown | {
            "attacked": attacked, "changed": picture_uri(attacked.image), "after": state.readings[title, title],
            "difference": difference_uri(state.image, attacked.image), "others": others,
            "most": float(np.abs(attacked.image - state.image).max()),
        }  # fmt: skip

    def _verdict(self, title: str) -> str:
        state = self.state
        if state.clean[title].label != state.label:
            return "wrong already"
        if title not in state.attacked:
            return ""
        return "holds" if state.readings[title, title].label == state.label else "fooled"


def attack_contender(contender: Contender, image: np.ndarray, label: int, norm: Norm, radius: float) -> Attacked:
    return attack_image(contender.victim(), image, label, norm, radius)


FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#0b62a4"/>'
    '<path d="M6 24V13l10-6 10 6v11h-7v-6h-6v6z" fill="#fff"/></svg>'
)
