"""Models that casemate did not train: a PyTorch callable, or a checkpoint of a known network, as systems.

Images go in as float32 N x C x H x W in [0, 1]; what the model does to them (normalisation and all) is its own.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casemate.attacks import diagnostics
from casemate.errors import UserError, near
from casemate.networks.base import Normalise, Shape, build_network
from casemate.registry import resolve
from casemate.seeding import generator
from casemate.system import Offer, System, TorchSystem, View, frozen

STEADY = 1e-3
"""Two answers to the same images may differ by this share of the largest logit."""


class External(nn.Module):
    """A callable as a classifier; modules that it is, is bound to, or closes over are its own."""

    def __init__(self, model: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.call = model
        self.found = nn.ModuleList(_modules_of(model))

    def forward(self, x: Tensor) -> Tensor:
        out = self.call(x)
        return out if isinstance(out, Tensor) else torch.as_tensor(out, device=x.device)


def _modules_of(model: Callable[[Tensor], Any]) -> list[nn.Module]:
    inner = inspect.unwrap(model)
    while isinstance(inner, functools.partial):
        inner = inner.func
    held: list[Any] = [inner, getattr(inner, "__self__", None)]
    if inspect.isfunction(inner):
        seen = inspect.getclosurevars(inner)
        held += [*seen.nonlocals.values(), *seen.globals.values()]
    elif not isinstance(inner, nn.Module):
        held += list(getattr(inner, "__dict__", {}).values())
    return list({id(m): m for m in held if isinstance(m, nn.Module)}.values())


class ExternalSystem(TorchSystem):
    """A model that came from outside: what it offers is found by trying, and its answers are part of its hash."""

    def __init__(self, model: nn.Module, *, input_shape: Shape, device: str, name: str, source: str = "") -> None:
        """Raises UserError, in one line, if the model fails on two images or answers with no logits.

        `source` is the text of the code that made the model; it takes part in the hash.
        """
        model.to(device=device)
        self._source, self._device = source, torch.device(device)
        logits, differentiable = _try(model, input_shape, device, name)
        super().__init__(model, input_shape=input_shape, num_classes=logits.shape[1], name=name)
        known: tuple[Offer, ...] = ("gradient", "scores", "labels")
        self.offers = frozenset(known if differentiable else known[1:])
        self._answers = hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest()

    @property
    def device(self) -> torch.device:
        return self._device

    def hash(self) -> str:
        """Weights as far as they can be seen, the code, and the answers to fixed noise: weights may hide in both."""
        return hashlib.sha256(f"{super().hash()} {self._source} {self._answers}".encode()).hexdigest()[:16]


def _try(model: nn.Module, shape: Shape, device: str, name: str) -> tuple[Tensor, bool]:
    """(logits of fixed noise, whether they have a gradient)."""
    x = torch.rand((8, *shape), generator=generator("external", *shape)).to(device)
    with frozen(model):
        try:
            with torch.no_grad():
                first, second = model(x), model(x)
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                differentiable = bool(model(leaf).requires_grad)
            inside = diagnostics.gradients_inside(View("adaptive", model, True, frozenset()), x[:2])
        except Exception as error:
            what = " ".join(str(error).split())[:200]
            raise UserError(
                f"{name} failed on images of shape {tuple(x.shape)} in [0, 1]: {type(error).__name__}: {what}"
            ) from None
    if first.dim() != 2 or len(first) != len(x) or first.shape[1] < 2 or not first.is_floating_point():
        raise UserError(
            f"{name} must answer images {tuple(x.shape)} with logits of shape (8, classes), "
            f"and answered with {str(first.dtype).removeprefix('torch.')} {tuple(first.shape)}"
        )
    if not bool(first.isfinite().all()):
        raise UserError(f"{name} answers images in [0, 1] with infinite or undefined logits")
    if float((first - second).abs().max()) > STEADY * (1 + float(first.abs().max())):
        raise UserError(
            f"{name} answers the same images differently each time: its gradients would need averaging over many "
            "draws, which is not done here; fix its noise, or turn it off"
        )
    if inside:
        raise UserError(
            f"{name} takes gradients in its forward pass: it optimises at test time, and attacks that do not account "
            "for that would flatter it, so it gets no figure. Give the classifier alone, or make the optimisation a "
            "purification that brings its adaptive attacks (docs/extending.md)"
        )
    return first.float(), differentiable


# --- where models come from ---------------------------------------------------------------------------------


def load_callable(target: str, *, input_shape: Shape, device: str) -> System:
    """`file.py:name` or `package.module:name`: a module, a function of images, or a function that returns either."""
    where, _, attribute = target.rpartition(":")
    holder, path = _import(where)
    if not hasattr(holder, attribute):
        public = [key for key, value in vars(holder).items() if callable(value) and key[0] != "_"]
        raise UserError(f"{where} has no {attribute!r}{near(attribute, public)}")
    found: Any = getattr(holder, attribute)
    if inspect.isclass(found) or (not isinstance(found, nn.Module) and callable(found) and _needs_nothing(found)):
        try:
            found = found()
        except Exception as error:
            what = " ".join(str(error).split())[:200]
            raise UserError(f"{target} cannot be made: {type(error).__name__}: {what}") from None
    if not callable(found):
        raise UserError(f"{target} is {type(found).__name__}, not a model: give a callable, or a function making one")
    module = found if isinstance(found, nn.Module) else External(found)
    source = path.read_text() if path is not None else ""
    return ExternalSystem(module, input_shape=input_shape, device=device, name=target, source=source)


def _import(where: str) -> tuple[Any, Path | None]:
    path = Path(where)
    try:
        if path.suffix != ".py":
            module = importlib.import_module(where)
            file = getattr(module, "__file__", None)
            return module, Path(file) if file else None
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        made = importlib.util.spec_from_file_location(path.stem, path)
        assert made is not None and made.loader is not None
        loaded = importlib.util.module_from_spec(made)
        sys.path.insert(0, str(path.resolve().parent))
        sys.modules[path.stem] = loaded  # so that its classes can find their own module
        made.loader.exec_module(loaded)
        return loaded, path
    except UserError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{where} cannot be imported: {type(error).__name__}: {what}") from None


def _needs_nothing(function: Callable[..., Any]) -> bool:
    """Whether it can be called without arguments: then it makes the model, and is not the model."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def load_checkpoint(
    path: Path, network: str, *, options: Mapping[str, Any], input_shape: Shape, num_classes: int,
    normalise: Normalise | None, device: str,
) -> System:  # fmt: skip
    """A state dict (.safetensors, or .pt saved with `torch.save(model.state_dict())`) of a registered network."""
    resolve("network", network)
    module = build_network(
        network, input_shape=input_shape, num_classes=num_classes, normalise=normalise, **options
    )  # fmt: skip
    own, given = module.state_dict(), read_state(path)
    for key, value in own.items():
        if key not in given:
            raise UserError(
                f"{path} has no tensor {key!r}, which network {network!r} needs; its first is {next(iter(given))!r}"
            )
        if given[key].shape != value.shape:
            raise UserError(
                f"{path}: {key} has shape {tuple(given[key].shape)} where {network!r} for {num_classes} classes and "
                f"images {input_shape} has {tuple(value.shape)}"
            )
    extra = sorted(given.keys() - own.keys())
    if extra:
        raise UserError(f"{path} has a tensor {extra[0]!r}, which network {network!r} has not")
    module.load_state_dict(given)
    module.to(memory_format=torch.channels_last)
    return ExternalSystem(module.eval(), input_shape=input_shape, device=device, name=path.name)


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name, read without pickle or with weights only; the wrappings of common trainers are taken off."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise a dozen types for a file that is not theirs
        what = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} cannot be read as plain tensors ({what}); save it with torch.save(model.state_dict(), ...)"
        ) from None
    for wrapping in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapping), Mapping):
            found = found[wrapping]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no state dict; save it with torch.save(model.state_dict(), ...)")
    prefix = next((p for p in ("module.", "classifier/") if all(k.startswith(p) for k in found)), "")
    return {key.removeprefix(prefix): value for key, value in found.items()}
