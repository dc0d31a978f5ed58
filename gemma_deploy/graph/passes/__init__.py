"""Graph passes over onnx_ir, one per file: each works in place and returns how many things it changed."""
