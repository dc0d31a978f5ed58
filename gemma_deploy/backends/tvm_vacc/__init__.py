"""`backend.type: tvm_vacc`: a static pair of graphs for the vendor's compiler, proven and run in ONNX Runtime here.

backend.py is what compile sees. contract.py, runner.py, sessions.py run the pair; segments.py, cutting.py and proof.py
prove it a layer at a time.
"""
