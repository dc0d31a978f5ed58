"""Adapters of peft: read, checked, and added to a checkpoint's weights while they are read. Imports no torch."""

from typing import TYPE_CHECKING

from gemma_deploy.offering import offering

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.adapters.adapter import Adapter
    from gemma_deploy.checkpoint.adapters.settings import AdapterSettings
    from gemma_deploy.checkpoint.adapters.updates import LowRank, Replaced, TokenRows, Update

__all__ = ["Adapter", "AdapterSettings", "LowRank", "Replaced", "TokenRows", "Update"]
__getattr__ = offering(
    __name__,
    {
        "Adapter": "gemma_deploy.checkpoint.adapters.adapter",
        "AdapterSettings": "gemma_deploy.checkpoint.adapters.settings",
        "LowRank": "gemma_deploy.checkpoint.adapters.updates",
        "Replaced": "gemma_deploy.checkpoint.adapters.updates",
        "TokenRows": "gemma_deploy.checkpoint.adapters.updates",
        "Update": "gemma_deploy.checkpoint.adapters.updates",
    },
)
