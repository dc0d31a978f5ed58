"""gemma-deploy: one recipe and one command take a Gemma checkpoint to a verified accelerator artifact."""

__version__ = "0.1.0"
