"""Adapters of peft: read, checked, and added to a checkpoint's weights while they are read. Imports no torch."""

from gemma_deploy.checkpoint.adapters.adapter import Adapter
from gemma_deploy.checkpoint.adapters.settings import AdapterSettings
from gemma_deploy.checkpoint.adapters.updates import LowRank, Replaced, TokenRows, Update

__all__ = ["Adapter", "AdapterSettings", "LowRank", "Replaced", "TokenRows", "Update"]
