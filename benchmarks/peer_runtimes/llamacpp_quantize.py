"""A GGUF file of floats as one of another type, by llama.cpp itself: IN OUT TYPE (`Q4_0`, `Q4_K_M`)."""

import ctypes
import sys

import llama_cpp

source, out, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
code = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
if code:
    raise SystemExit(f"error: llama_model_quantize gave {code}")
