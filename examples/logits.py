"""The likeliest next tokens after a prompt, and after one token more.

Use: python examples/logits.py ARTIFACT PROMPT
"""

import sys

from gemma_deploy import open_engine

if len(sys.argv) != 3:
    sys.exit(__doc__)

engine = open_engine(sys.argv[1])
session = engine.session()
logits = session.read(engine.tokenizer.encode(sys.argv[2]))  # [vocabulary] float32
for _ in range(2):
    likeliest = logits.argsort()[::-1][:5]
    print([(engine.tokenizer.decode([int(token)]), round(float(logits[token]), 2)) for token in likeliest])
    logits = session.read([int(likeliest[0])])
