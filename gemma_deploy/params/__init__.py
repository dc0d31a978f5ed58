"""The parameter file: what goes in (plan), where (layout), how it gets there (writer). Imports no torch."""

from gemma_deploy.params.plan import ParamSpec, build_plan
from gemma_deploy.params.table import ParamRow, ParamTable, damaged_rows
from gemma_deploy.params.writer import finished_table, write_params

__all__ = ["ParamRow", "ParamSpec", "ParamTable", "build_plan", "damaged_rows", "finished_table", "write_params"]
