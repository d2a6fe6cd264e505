"""A torchvision network with its own input gradient, as one ONNX file that any runtime can run.

    python examples/saliency.py [--network resnet18] [--side 224] [--out saliency.onnx]

Needs torch, torchvision and onnxruntime, and of casemate nothing but `gradient_graph`. Weights are random: give the
network your own before you trace it.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torchvision

from casemate.deploy.gradient_graph import gradient_graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="a classifier of torchvision.models")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--out", type=Path, default=Path("saliency.onnx"))
    options = parser.parse_args()

    known = torchvision.models.list_models(module=torchvision.models)
    if options.network.lower() not in known:
        near = difflib.get_close_matches(options.network.lower(), known) or ["resnet18"]
        parser.exit(2, f"error: --network {options.network}: torchvision.models has none; try {' or '.join(near)}\n")

    torch.manual_seed(0)
    extra = {"init_weights": True, "aux_logits": True} if options.network == "inception_v3" else {}
    net = torchvision.models.get_model(options.network, weights=None, **extra).eval()
    sample = torch.rand(2, 3, options.side, options.side)

    # The gradient of the largest logit: which pixels the decision hangs on. No autograd is left in `saliency`.
    saliency = gradient_graph(net, lambda logits: logits.amax(1), sample)
    torch.onnx.export(
        saliency, (sample,), options.out, dynamo=True, opset_version=18, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["image"],
        output_names=["gradient", "value", "logits"],
    )  # fmt: skip

    session = onnxruntime.InferenceSession(options.out, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = np.random.default_rng(batch).random((batch, *sample.shape[1:]), np.float32)
        gradient, value, _ = session.run(None, {"image": images})
        x = torch.from_numpy(images).requires_grad_()
        (expected,) = torch.autograd.grad(net(x).amax(1).sum(), x)
        cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(gradient).flatten(1), expected.flatten(1))
        print(f"batch {batch}: value {value.mean():.3f}, cosine with autograd {float(cosine.min()):.6f}")


if __name__ == "__main__":
    main()
