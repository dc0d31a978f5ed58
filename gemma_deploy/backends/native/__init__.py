"""`backend.type: native`: kernels of our own, in one library of C++ (src/)."""
