"""End a reply from another thread, as a server does when its caller has gone.

Use: python examples/cancel.py ARTIFACT SECONDS
"""

import sys
import threading

from gemma_deploy import GenerationStats, open_engine

if len(sys.argv) != 3:
    sys.exit(__doc__)

engine = open_engine(sys.argv[1])
session, stats = engine.session(), GenerationStats()
timer = threading.Timer(float(sys.argv[2]), session.cancel)
pieces = session.reply(engine.tokenizer.encode("Return the"), max_new_tokens=100, stats=stats)
timer.start()
print("".join(pieces))
timer.cancel()
print(f"ended by {stats.finish}; the session goes on after {len(session.ids)} tokens")
