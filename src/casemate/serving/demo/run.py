"""`casemate demo`: the page on a port of this machine."""

from __future__ import annotations

import warnings
from pathlib import Path

from fastapi import FastAPI

from casemate.deploy.session import Device
from casemate.serving import server
from casemate.serving.demo.contenders import find_contenders
from casemate.serving.demo.page import mount
from casemate.serving.demo.samples import Samples
from casemate.serving.intake import Bounded
from casemate.serving.limits import ENVELOPE, Limits


def run_demo(
    models: Path, *, host: str, port: int, robust: str | None = None, data: Path, device: Device = "auto"
) -> None:
    """Serve the page for the models of a profile's folder until a signal. Raises UserError if there is none."""
    with server.listen(host, port) as listening:
        contenders = find_contenders(models, robust, device)
        about = contenders[-1].predictor.model.metadata
        samples = Samples.load(about.about.dataset if about else "", data, contenders[-1].shape)
        limits, app = Limits(), FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        mount(app, contenders, samples, limits)
        app.add_middleware(Bounded, limits=limits, most=limits.picture + ENVELOPE)
        if not server.is_loopback(listening):
            print("note: whoever reaches this address may run attacks on this machine")
        rows = " and ".join(contender.row for contender in contenders)
        print(f"{rows} on {server.address(listening)}; Ctrl-C ends it", flush=True)
        # the page's library looks through every object of the process once, and some of PyTorch's warn when touched
        warnings.simplefilter("ignore", FutureWarning)
        server.run(app, listening, limits, websockets=True)
