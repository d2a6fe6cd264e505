"""The two sides of a parity check: a system in PyTorch, in float32 and float64, and the file exported from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from casemate.deploy.export import as_layout, prepare
from casemate.deploy.metadata import Metadata
from casemate.deploy.session import open_session
from casemate.errors import UserError
from casemate.purification.imt import IMT
from casemate.randomised import RandomisedSystem
from casemate.system import REJECT, TorchSystem

INNER = ("purified", "gradient")


class Sides:
    """`system` is a copy in the form of the file's metadata, on the device of the original; the file runs on the CPU
    with its purified images and first gradient among the outputs. All tensors that go in and out are on the CPU."""

    def __init__(self, system: TorchSystem, path: Path) -> None:
        self.session = open_session(_with_inner_values(path), "cpu")
        metadata = Metadata.read(self.session.get_modelmeta().custom_metadata_map, path)
        if metadata is None:
            raise UserError(f"{path} was not exported by casemate")
        self.metadata, self.device = metadata, system.device
        self.names: list[str] = [output.name for output in self.session.get_outputs()]
        self.input: str = self.session.get_inputs()[0].name
        self.noisy = metadata.ensemble.get("noise") == "random"
        self.system, self.double = self._prepared(system), self._prepared(system)
        for side in (self.system, self.double):
            for module in (side.classifier, *(side.detector.modules if side.detector else ())):
                module.to(self.device, torch.float32 if side is self.system else torch.float64)
        self.imt32: IMT | None = None
        self.imt64: IMT | None = None
        if isinstance(self.system.purification, IMT) and isinstance(self.double.purification, IMT):
            self.imt32, self.imt64 = self.system.purification, self.double.purification
            self.imt32.critic.to(self.device)
            self.imt64.critic.to(self.device).double()

    def onnx(self, x: Tensor, *names: str) -> dict[str, Tensor]:
        """The named outputs (by default all) of the file for images in [0, 1]."""
        wanted = list(names) or self.names
        found = self.session.run(wanted, {self.input: as_layout(x, self.metadata.layout).numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(wanted, found, strict=True)}

    def seen(self, x: Tensor) -> Tensor:
        """The images that the file sees: for a uint8 input, rounded to grey levels."""
        return x if self.metadata.layout == "float32-nchw" else (x * 255).round() / 255

    def decide(self, x: Tensor) -> Tensor:
        """(N,) labels of the system in float32, purification included; -1 where its detector flags the image. Of a
        randomised system those of one answer."""
        x = x.to(self.device)
        if self.system.detector is not None:
            return self.system.decide(x).cpu()
        return self.system.logits(x).argmax(1).cpu()

    def decisions(self, x: Tensor) -> Tensor:
        """The same of the file."""
        found = self.onnx(x, "logits", *(["detector"] if self.system.detector else []))
        labels = found["logits"].argmax(1)
        return torch.where(found["detector"] > 0, REJECT, labels) if "detector" in found else labels

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classifier alone, its ensemble of draws included, in float32 and in float64."""
        x = x.to(self.device)
        if isinstance(self.system, RandomisedSystem):
            return self.system.logits(x).cpu(), self.double.logits(x.double()).cpu()
        return self.system.classifier(x).cpu(), self.double.classifier(x.double()).cpu()

    def odds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The detector's log odds less its threshold (N,), in float32 and in float64."""
        assert self.system.detector is not None and self.double.detector is not None
        x = x.to(self.device)
        return self.system.detector.readout(x)[0].cpu(), self.double.detector.readout(x.double())[0].cpu()

    def answers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two answers of a randomised system with noise of their own (logits N x classes)."""
        system = self.system
        assert isinstance(system, RandomisedSystem)
        other = RandomisedSystem(
            system.classifier, input_shape=system.input_shape, num_classes=system.num_classes,
            ensemble=system.ensemble, seed=system.seed + 1,
        )  # fmt: skip
        x = x.to(self.device)
        return system.logits(x).cpu(), other.logits(x).cpu()

    def _prepared(self, system: TorchSystem) -> TorchSystem:
        """A copy in the form of the file, with as many draws."""
        made = prepare(system, self.metadata.form)
        if isinstance(made, RandomisedSystem):
            made.ensemble = int(self.metadata.ensemble["draws"])
        return made


def readout(imt: IMT, x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(gradient of the critic's logit, score), in the precision of `x`."""
    with torch.enable_grad():
        x = x.detach().to(device).requires_grad_()
        z, _ = imt.readout(x)
        (gradient,) = torch.autograd.grad(z.sum(), x)
    return gradient.cpu(), z.detach().sigmoid().cpu()


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 while comparing, and no gradients but the readout's own."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _with_inner_values(path: Path) -> bytes:
    import onnx

    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own, for which onnx has no name
        raise UserError(f"{path} is not an ONNX file: {error}") from None
    inside = {name for node in model.graph.node for name in node.output}
    served = {output.name for output in model.graph.output}
    if "manifold_score" in served and not inside >= set(INNER):
        raise UserError(f"{path} has no inner values {' and '.join(INNER)}, which its parity is measured by")
    for name in INNER:
        if name in inside - served:
            kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
            model.graph.output.append(onnx.helper.make_value_info(name, kind))
    return bytes(model.SerializeToString())
