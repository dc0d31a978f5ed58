"""Calibration: what a model's activations look like on real text. Imports no torch until something is measured."""
