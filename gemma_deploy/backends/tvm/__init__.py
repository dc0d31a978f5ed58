"""`backend.type: tvm`: the static pair compiled by TVM into a shared library for a CPU."""
