"""`backend.type: onnxruntime`: one graph with ONNX Runtime's own operators, and what onnxruntime-genai reads beside it.

The graph is built from the config, not traced: decoder.py reads like the model. linears.py has the kernels, weights.py
the initializers, which are views of params.safetensors.
"""
