"""The parameter file: what goes in (plan), where (layout), how it gets there (writer). Imports no torch."""

from typing import TYPE_CHECKING

from gemma_deploy.offering import offering

if TYPE_CHECKING:
    from gemma_deploy.params.plan import ParamSpec, build_plan
    from gemma_deploy.params.table import ParamRow, ParamTable, damaged_rows
    from gemma_deploy.params.writer import finished_table, write_params

__all__ = ["ParamRow", "ParamSpec", "ParamTable", "build_plan", "damaged_rows", "finished_table", "write_params"]
__getattr__ = offering(
    __name__,
    {
        "ParamRow": "gemma_deploy.params.table",
        "ParamSpec": "gemma_deploy.params.plan",
        "ParamTable": "gemma_deploy.params.table",
        "build_plan": "gemma_deploy.params.plan",
        "damaged_rows": "gemma_deploy.params.table",
        "finished_table": "gemma_deploy.params.writer",
        "write_params": "gemma_deploy.params.writer",
    },
)
