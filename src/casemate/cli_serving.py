"""The commands of `casemate` that serve, show and hand over exported files. Nothing heavy is imported up here."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from casemate.errors import UserError, one_line_errors

app = typer.Typer()


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="An .onnx file, a released folder, or models:/NAME@ALIAS.")],
    host: Annotated[str, typer.Option(help="Where to listen; loopback unless behind a proxy.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of the model; 0: all.")] = 0,
    name: Annotated[str | None, typer.Option(help="The model's name in the routes.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images that one request may have.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Images that the model is run on at once.")] = 64,
    wait_ms: Annotated[float, typer.Option(min=0, max=1000, help="How long a batch may wait for company.")] = 1.0,
    pixels: Annotated[int, typer.Option(min=1, help="Pixels that a picture may have.")] = 16_000_000,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a client to send its headers, a body, or take its answer.")
    ] = 20.0,
) -> None:
    """Answer over HTTP: the Open Inference Protocol (KServe V2), and pictures. Metrics for Prometheus."""
    with one_line_errors("stopped"):
        extra("serve", "fastapi", "uvicorn", "prometheus_client")
        from casemate.serving.app import build_app
        from casemate.serving.limits import Limits
        from casemate.serving.server import address, is_loopback, listen, run
        from casemate.serving.service import Service

        if name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise UserError("--name: at most 100 letters, digits, '_', '.' and '-', and no mark first")
        limits = Limits(images=images, batch=batch, wait=wait_ms / 1000, pixels=pixels, headers=timeout,
                        body=timeout, writing=timeout, queue=max(1024, images))  # fmt: skip
        with listen(host, port) as listening:
            service = Service.load(model, limits, device=device, threads=threads or None, name=name)
            if service.verified == "nothing":
                print("note: no card.json beside the model: nothing says that this file is the one that was tested")
            elif service.tested is not None and service.tested.gate == "failed":
                print("warning: the release gate did NOT pass this file: it withstands less than its table says")
            if not is_loopback(listening):
                print("note: whoever reaches this address may ask: docs/serving.md says how to put a lock before it")
            print(
                f"{service.name} on {address(listening)} ({service.predictor.provider}); Ctrl-C ends it", flush=True
            )
            run(build_app(service), listening, limits)


@app.command()
def demo(
    models: Annotated[
        Path | None, typer.Argument(help="A profile's folder, such as models/mnist; by default params.yaml's.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    robust: Annotated[str | None, typer.Option(help="ROW or ROW/MODE; by default the champion.")] = None,
    data: Annotated[Path, typer.Option(help="Where datasets are kept.")] = Path("data/raw"),
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """A page to try it: attack the standard and the robust model on a picture of yours."""
    with one_line_errors("stopped"):
        extra("demo", "nicegui")
        if models is None:
            from casemate.params import load_params

            models = load_params(Path("params.yaml")).models_dir
        from casemate.serving.demo.run import run_demo

        run_demo(models, host=host, port=port, robust=robust, data=data, device=device)


def extra(name: str, *modules: str) -> None:
    """Raises UserError if an optional part of the installation is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed; pip install 'casemate[{name}]'")


@app.command("export-repository")
def export_repository(
    models: Annotated[list[Path], typer.Argument(help="Released folders, such as models/mnist/champion.")],
    out: Annotated[Path, typer.Option(help="The folder of the repository.")],
    engine: Annotated[str, typer.Option(help="triton or mlserver.")] = "triton",
    max_batch: Annotated[int, typer.Option(min=1, help="Images that the server may put together.")] = 64,
    delay: Annotated[float, typer.Option(min=0, help="Milliseconds that it may wait for them.")] = 2.0,
) -> None:
    """Released files as another server's model repository, each checked against its card first."""
    with one_line_errors("interrupted; run the same command again"):
        from casemate.deploy.repository import write_repository

        if engine == "triton":
            made = write_repository(models, out, "triton", max_batch=max_batch, delay_ms=delay)
        elif engine == "mlserver":
            made = write_repository(
                models, out, "mlserver", max_batch=max_batch, delay_ms=delay, save_model=_save_model()
            )
        else:
            raise UserError(f"--engine {engine}: known are triton and mlserver")
        for folder in made:
            typer.echo(str(folder))


def _save_model() -> Any:
    """What writes an MLflow model; None where MLflow is not installed."""
    from casemate import model_registry

    return model_registry.save_onnx if importlib.util.find_spec("mlflow") else None
