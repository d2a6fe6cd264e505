"""Steps in which nobody learns: what a method trains on, shown to other modules than those that it trains."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from casemate.seeding import derive
from casemate.trainable import Context, Trainable
from casemate.training.graphs import on_device
from casemate.training.inputs import Draw, TrainingData
from casemate.training.recipe import Recipe
from casemate.training.updates import Updates

BATCHES = 50
"""As many as are shown, or all of a smaller training set."""


def rehearse(
    modules: dict[str, nn.Module], method: Trainable, context: Context, updates: Updates, data: TrainingData,
    recipe: Recipe, *, seed: int, device: torch.device, pad: int, flip: bool,
) -> None:  # fmt: skip
    """Run the method's step with `modules` in train mode on 50 batches, in an order of their own, and no update.

    Images are crafted as in training, and every forward pass of a step that moves running statistics there moves
    those of `modules`. The context and its state are copies, and generators are put back: the run does not notice.
    All draws depend on `seed` alone.
    """
    rng = torch.Generator()
    state = {key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in context.state.items()}
    draw = Draw(data, rng, pad=pad, flip=flip)
    aside = replace(context, modules=modules, rng=rng, draw=draw, state=state, logs={}, perturbed=False)
    batches = data.batches(
        recipe.batch_size, seed=seed, epoch=0, pad=pad, flip=flip, start=0,
        drop_last=len(data) >= recipe.batch_size,  # a smaller last batch would count as much as a whole one
    )  # fmt: skip
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, (x, y, indices) in enumerate(islice(batches, BATCHES)):
            rng.manual_seed(derive(seed, number))
            seed_torch(device, seed, number)
            aside.indices = indices
            for module in modules.values():
                module.train()  # a step may have left some of it in eval mode
            with on_device(rng, device) if recipe.noise == "device" else nullcontext():
                for update in method.step(aside, x.contiguous(memory_format=layout), y):
                    updates.rehearse(update)
            aside.logs.clear()


def seed_torch(device: torch.device, seed: int, *parts: object) -> None:
    """Seed the default generators of the CPU and of this device; others belong to somebody else."""
    made = derive(seed, "torch", *parts)
    torch.default_generator.manual_seed(made)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(made)
