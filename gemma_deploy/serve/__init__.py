"""Many requests to one model: who is computed next, what is kept of texts, and the HTTP around it. Imports no torch."""
