"""Weight quantizers. Each is one file; they import torch only when called."""

from gemma_deploy.quantization.rtn import quantize_rows, quantize_rows_, row_scales, sqnr_db

__all__ = ["quantize_rows", "quantize_rows_", "row_scales", "sqnr_db"]
