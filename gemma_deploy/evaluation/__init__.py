"""How good a model is: perplexity, KL and top-1 on text, accuracy on C-Eval, of an artifact, a checkpoint, or both.

models.py opens what is evaluated, perplexity.py and ceval.py do it, record.py keeps the result in the artifact. Judges
nothing: gates are parity's business.
"""
