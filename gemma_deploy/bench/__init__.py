"""How fast an artifact is and what it takes; `figures.measure` is the whole of it.

process.py runs in processes of its own, memory.py knows what a token has to read, picture.py draws.
"""
