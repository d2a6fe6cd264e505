"""A system as one self-contained .onnx file in standard operators, IMT's gradient inside."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casemate.deploy.decompositions import ConvMode
from casemate.deploy.detection import readout_of, require_fitted
from casemate.deploy.ensemble import Ensemble, Noise
from casemate.deploy.inference import DetectorInference, EnsembleInference, ImtInference, PlainInference
from casemate.deploy.metadata import About, Form, Layout, Metadata
from casemate.deploy.onnx_passes import tidy
from casemate.deploy.pooling import PoolMode
from casemate.deploy.tracing import operator_named
from casemate.detectors.base import DetectorSystem
from casemate.detectors.fitting import FittedDetector
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.purification.imt import IMT
from casemate.randomised import RandomisedSystem
from casemate.system import System, TorchSystem

INPUT = "image"
Inference = PlainInference | ImtInference | EnsembleInference | DetectorInference


@dataclass(frozen=True)
class ExportOptions:
    """How a system is written.

    layout: what the input "image" is: N x C x H x W float32 in [0, 1], or N x H x W x C uint8 in [0, 255].
    purified: offer the purified images as a fourth output.
    conv, pool: how the gradient is written; see `decompositions.table`. "auto" and "flip" suit the CPU, "transpose"
      a GPU. opset: 18 or later; from 22 on ONNX Runtime runs part of the graph on the CPU even where CUDA is used.
    draws, noise: of a randomised system; by default as many draws as its answer has. "seeded" noise is part of the
      file, "random" noise is drawn by the runtime; see `ensemble.Ensemble`.
    """

    layout: Layout = "float32-nchw"
    purified: bool = False
    conv: ConvMode = "auto"
    pool: PoolMode = "auto"
    opset: int = 18
    draws: int | None = None
    noise: Noise = "seeded"


def form_of(system: System) -> Form:
    """What the system does at inference, as the file will say it. Raises UserError if it cannot be exported."""
    system = require_torch(system)
    if isinstance(system, RandomisedSystem) and system.purification is not None:
        raise UserError(
            f"{system.name} cannot be exported: purification {type(system.purification).__name__} searches by "
            "gradient descent from random starts at every answer, thousands of passes for an image"
        )
    if isinstance(system, RandomisedSystem):
        return "ensemble"
    if system.purification is None:
        if system.detector is not None:
            require_fitted(system.detector)
        return "plain"
    if not isinstance(system.purification, IMT):
        raise UserError(f"{system.name}: purification {type(system.purification).__name__} cannot be exported")
    return "imt" if system.purification.rule == "full" else "limited"


def export_system(
    system: System, path: Path, about: About, *, form: Form | None = None, options: ExportOptions | None = None
) -> Metadata:
    """Write `path`. Outputs: logits and probabilities (N x classes); for IMT also manifold_score (N,), the critic's
    probability that the image as it came is clean, and on request purified (N x C x H x W in [0, 1]); for a system
    with a detector also detector (N,), which is above 0 where the image is to be rejected.

    form: "plain" leaves the purification out, "imt" and "limited" choose IMT's rule; by default what the system does.
    The weights are stored once, batch normalisation folded. Equal weights give an equal file. Nothing of this
    machine is in it. Raises UserError if the system has no such form or the network has no ONNX form.
    """
    options = options or ExportOptions()
    portable = prepare(system, form)
    chosen = form_of(portable)
    sample = torch.rand(2, *portable.input_shape, generator=torch.Generator().manual_seed(0))
    inference = inference_module(portable, sample, options)
    metadata = Metadata(
        about, chosen, portable.input_shape, options.layout,
        portable.purification.spec if portable.purification else {}, ensemble_of(portable, options),
        portable.detector.spec if portable.detector else {},
    )  # fmt: skip
    model = _to_onnx(inference, sample, options)
    tidy(model)
    _keep_outputs(model, inference.outputs)
    model.metadata_props.clear()
    model.metadata_props.update(metadata.strings())
    _write(model, path)
    return metadata


def require_torch(system: System) -> TorchSystem:
    """Raises UserError for what is no PyTorch classifier: a file that was exported already, say."""
    if not isinstance(system, TorchSystem):
        raise UserError(f"{system.name} is {type(system).__name__}; only a PyTorch classifier can be exported")
    return system


def prepare(system: System, form: Form | None = None) -> TorchSystem:
    """A copy on the CPU, in float32, eval mode and the plain memory layout, in the wanted form."""
    system, own = require_torch(system), form_of(system)
    classifier = _portable(system.classifier)
    if form not in (None, own) and own == "ensemble":
        raise UserError(f"{system.name} answers with noise: it can be exported as 'ensemble', not as {form!r}")
    shape: dict[str, Any] = {
        "input_shape": system.input_shape, "num_classes": system.num_classes, "name": system.name,
    }  # fmt: skip
    if isinstance(system, RandomisedSystem):
        counts = {name: getattr(system, name) for name in ("ensemble", "draws", "votes", "seed")}
        return RandomisedSystem(classifier, **shape, **counts)
    if isinstance(system, DetectorSystem):
        return DetectorSystem(classifier, _detector(require_fitted(system.detector), classifier), **shape)
    purification = None
    if (form or own) != "plain":
        if not isinstance(system.purification, IMT):
            raise UserError(f"{system.name} has no critic, so it has no form {form!r}; it can be exported as 'plain'")
        rule = {"imt": "full", "limited": "interval"}[form or own]
        purification = rebuild_imt(system.purification, classifier, _portable(system.purification.critic), rule)
    return TorchSystem(classifier, purification=purification, **shape)


def rebuild_imt(imt: IMT, classifier: nn.Module, critic: nn.Module, rule: str | None = None) -> IMT:
    """The same purification on other modules, optionally with another rule ("full" or "interval")."""
    changed = copy.copy(imt)
    changed.classifier, changed.critic = classifier, critic  # type: ignore[assignment]
    changed.rule = rule or imt.rule  # type: ignore[assignment]
    return changed


def ensemble_of(system: TorchSystem, options: ExportOptions) -> dict[str, Any]:
    """What the file says of its noise; empty for a system without."""
    if not isinstance(system, RandomisedSystem):
        return {}
    found: dict[str, Any] = {"draws": options.draws or system.ensemble, "noise": options.noise}
    return found | ({"seed": system.seed} if options.noise == "seeded" else {})


def _detector(detector: FittedDetector, classifier: nn.Module) -> FittedDetector:
    """The same detector on another copy of its classifier."""
    assert isinstance(classifier, Classifier)
    scorer, regression = _portable(detector.scorer), _portable(detector.regression)
    return FittedDetector(detector.made, classifier, scorer, regression)  # type: ignore[arg-type]


def _portable(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module).to("cpu", torch.float32).eval().requires_grad_(False)
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data = tensor.data.contiguous()
    return made


def inference_module(system: TorchSystem, sample: Tensor, options: ExportOptions) -> Inference:
    """What the file will compute, as a module without autograd; `sample` is N x C x H x W."""
    if isinstance(system.purification, IMT):
        return ImtInference(
            system.purification, sample, options.layout, purified=options.purified, conv=options.conv,
            pool=options.pool,
        ).eval()  # fmt: skip
    if isinstance(system, RandomisedSystem):
        draws = options.draws or system.ensemble
        made = Ensemble(system.classifier, sample, draws, options.noise, system.seed).eval()
        return EnsembleInference(made, sample, options.layout, options.noise).eval()
    if system.detector is not None:
        return DetectorInference(readout_of(system.detector, sample), sample, options.layout).eval()
    return PlainInference(system.classifier, sample, options.layout).eval()


def as_layout(x: Tensor, layout: Layout) -> Tensor:
    """N x C x H x W floats in [0, 1] as the file takes them; grey levels are rounded for uint8."""
    if layout == "float32-nchw":
        return x
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _to_onnx(inference: Inference, sample: Tensor, options: ExportOptions) -> Any:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                inference, (as_layout(sample, options.layout),), dynamo=True, opset_version=options.opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=[INPUT],
                output_names=list(inference.values), verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise UserError(f"the network cannot be written as ONNX: {operator_named(str(cause))}") from error
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals and logs what it cannot decompose."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _keep_outputs(model: Any, names: tuple[str, ...]) -> None:
    """Serve only `names`; other values keep their names inside, where the parity report finds them."""
    served = [value for value in model.graph.outputs if value.name in names]
    assert [value.name for value in served] == list(names)
    model.graph.outputs.clear()
    model.graph.outputs.extend(served)


def _write(model: Any, path: Path) -> None:
    import onnx
    import onnx_ir

    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    foreign = {node.domain for node in proto.graph.node} - {""}
    if foreign:
        raise UserError(f"the network needs operators outside the ONNX standard: {', '.join(sorted(foreign))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(proto.SerializeToString(deterministic=True))
    temporary.replace(path)
