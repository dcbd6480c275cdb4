"""Networks as programs that run without rcmae and timm: torch.export and ONNX, for batches of any size.

They take pixels in 0 to 1, "images" [b, c, h, w], and standardize them. A backbone gives "cls" [b, d] and
"patches" [b, d, gh, gw], a classifier "logits" [b, classes].
"""

import io
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import optional
from ..models.backbone import Backbone
from ..models.classifier import Classifier

LARGE = 1_500_000_000
"Bytes of weights from which on ONNX keeps them in a file of their own; its format ends at 2 GiB."


class _Named(nn.Module):
    """A network whose outputs have names."""

    def __init__(self, network: Backbone | Classifier):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        output = self.network(images)
        return {"logits": output} if isinstance(output, Tensor) else output._asdict()


def _export_arguments(network: Backbone | Classifier) -> tuple[nn.Module, dict[str, Any]]:
    images = torch.zeros(2, network.channels, *network.shape)
    return _Named(network).eval(), {
        "args": (images,),
        "dynamic_shapes": {"images": {0: torch.export.Dim("batch")}},
    }


def torch_program(network: Backbone | Classifier) -> dict[str, bytes]:
    """The network as model.pt2, for `torch.export.load("model.pt2").module()(images)`, a dict by name."""
    module, arguments = _export_arguments(network)
    content = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(module, **arguments), content)
    return {"model.pt2": content.getvalue()}


def onnx_program(network: Backbone | Classifier) -> dict[str, bytes]:
    """The network as model.onnx, with model.onnx.data for large ones. Raises ConfigError without the onnx
    extra."""
    for module_name in ("onnx", "onnxscript"):
        optional(module_name, "onnx")
    module, arguments = _export_arguments(network)
    outputs = ["logits"] if isinstance(network, Classifier) else ["cls", "patches"]
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    with TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module, **arguments, dynamo=True, input_names=["images"], output_names=outputs, verbose=False
        )
        assert program is not None  # with dynamo
        program.save(Path(folder) / "model.onnx", external_data=size > LARGE)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
