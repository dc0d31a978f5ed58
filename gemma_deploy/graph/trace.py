"""torch.export and torch.onnx.export of the disconnected module, as an onnx_ir model with checkpoint names.

Fourth step of the export. The result holds shapes only: initializers of the model's parameters have no data.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from gemma_deploy.errors import ExportError

OPSET = 21


def trace(pair: nn.Module, args: tuple[Any, ...], dynamic: tuple[Any, ...] | None = None) -> ir.Model:
    """Trace the module and convert it, without optimisation.

    Args:
        dynamic: which dimensions of `args` are free, in torch.export's form; None for none.

    Raises:
        ExportError: torch could not trace or convert the patched model.
    """
    with warnings.catch_warnings(), torch.no_grad():
        # torch's own use of its deprecated internals while exporting; nothing a user or this code can change.
        warnings.simplefilter("ignore")
        previous = logging.getLogger("torch.onnx").level
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.export.export(pair.eval(), args, dynamic_shapes=dynamic, strict=False)
            onnx_program = torch.onnx.export(
                program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False, input_names=None
            )
        except (RuntimeError, TypeError, ValueError, torch.onnx.OnnxExporterError) as error:
            raise ExportError(
                f"torch could not export the patched model: {str(error).splitlines()[0]}",
                where="export stage",
                next_step="check the versions of torch and onnxscript against constraints.txt",
            ) from error
        finally:
            logging.getLogger("torch.onnx").setLevel(previous)
    if onnx_program is None:
        raise ExportError(
            "torch.onnx.export returned nothing", where="export stage", next_step="this is a bug: report it"
        )
    return onnx_program.model
