"""A run as named tensors and JSON, and back, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.trainable import Player


def named_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter and buffer, those outside `state_dict` too, as `module/parameter`."""
    return {
        f"{name}/{key}": tensor
        for name, module in modules.items()
        for key, tensor in (*module.named_parameters(), *module.named_buffers())
    }


@torch.no_grad()
def copy_into(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors as `named_tensors` names them. Raises UserError about `what` unless all fit exactly."""
    own = named_tensors(modules)
    odd = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
    if odd:
        raise UserError(f"{what} is of other code (tensor {odd[0]} does not fit); delete it and train anew")
    for key, tensor in own.items():
        tensor.copy_(tensors[key])


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors whose name begins with `prefix/`, without it."""
    return {key[len(prefix) + 1 :]: t for key, t in tensors.items() if key.startswith(prefix + "/")}


def pack_optimizers(players: Mapping[str, Player]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer states of all players as (tensors, JSON-able rest)."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, player in players.items():
        packed = player.optimizer.state_dict()
        rest: dict[str, dict[str, Any]] = {}
        for index, entries in packed["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{index}/{key}"] = value
                else:
                    rest.setdefault(str(index), {})[key] = value
        groups = [
            {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
            for group in packed["param_groups"]
        ]
        plain[name] = {"state": rest, "groups": groups}
    return tensors, plain


def unpack_optimizers(players: Mapping[str, Player], tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what `pack_optimizers` gave."""
    for name, player in players.items():
        parameters = [p for group in player.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for index, entries in plain[name]["state"].items():
            state.setdefault(int(index), {}).update(entries)
        for path, value in under(name, tensors).items():
            index, _, key = path.partition("/")
            state.setdefault(int(index), {})[key] = _laid_out_as(parameters[int(index)], value)
        packed = player.optimizer.state_dict()
        groups = [
            {**group, **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}}
            for group, saved in zip(packed["param_groups"], plain[name]["groups"], strict=True)
        ]
        player.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """The value in the parameter's memory format: fused optimizers walk both side by side."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape else value
