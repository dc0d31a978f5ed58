"""Names and versions of operators that other tools read by a rule of their own."""

import re

import onnx
import onnx_ir as ir
import pytest

from gemma_deploy.backends.onnxruntime import parts
from gemma_deploy.graph import functions
from gemma_deploy.graph.contract import GRAPHS
from gemma_deploy.graph.trace import OPSET
from gemma_deploy.paths import PACKAGE, source_code_dir

LITERAL = re.compile(rf"{functions.DOMAIN}::(\w+)")
DOMAINS = ("", "ai.onnx.ml")  # of ONNX's own operators


def vendor_operators():
    """Of the sources' own names, and of every function body."""
    files = [*PACKAGE.rglob("*.py"), *source_code_dir().rglob("*.py")]
    names = {name for file in files for name in LITERAL.findall(file.read_text(encoding="utf-8"))}
    linears = functions.quantized_linear_per_channel, functions.quantized_linear_per_group
    others = functions.quantize_dequantize_per_token, functions.quantize_cache, functions.dequantize_cache
    return names | {body(OPSET).name for body in (*linears, *others)}


def test_no_vendor_operator_bears_a_standard_name():
    """TVM's importer ignores domains: it would put its own operator in the place of the function's body."""
    ours = vendor_operators()
    assert {"QuantizedLinearPerChannel", "QuantizeCache", "AllReduce", "QuantizeDequantizePerToken"} <= ours
    known = {schema.name.lower() for schema in onnx.defs.get_all_schemas_with_history() if schema.domain in DOMAINS}
    assert len(known) > 150
    assert {name for name in ours if name.lower() in known} == set()


def test_every_function_of_a_graph_is_among_them(built):
    out, _ = built("gemma3_text", "w8a16")
    ours = vendor_operators()
    for name in GRAPHS:
        model = ir.load(out / f"{name}.onnx")
        assert {function.name for function in model.functions.values()} == {"QuantizedLinearPerChannel"}
        assert {node.op_type for node in model.graph if node.domain == functions.DOMAIN} <= ours


@pytest.mark.parametrize("opset", [OPSET, parts.OPSET])
def test_opsets_stay_below_the_attention_that_has_no_cpu_kernel(opset):
    """Attention of opset 25, which has windows, is 74 to 88 nodes in ONNX Runtime 1.32."""
    assert opset <= 24
