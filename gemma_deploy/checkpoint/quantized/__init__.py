"""Weights that arrive quantized: a file for each way in which codes are packed. Imports no torch.

matrix.py is the abstraction, modules.py finds which tensors of a file make a matrix together.
"""
