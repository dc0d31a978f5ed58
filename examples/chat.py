"""Two conversations with one artifact at the same time: sessions share its weights, and each has a cache of its own.

Use: python examples/chat.py ARTIFACT
"""

import sys

from gemma_deploy import Conversation, Sampling, open_engine

if len(sys.argv) != 2:
    sys.exit(__doc__)

engine = open_engine(sys.argv[1])
talks = [(Conversation(engine.tokenizer), engine.session(Sampling(temperature=0.7, seed=seed))) for seed in (1, 2)]
for message in ("Hello", "And now?"):
    for number, (conversation, session) in enumerate(talks):
        reply = "".join(session.reply(conversation.ask(message), max_new_tokens=12))
        conversation.answered(message, reply)
        print(f"{number}: {reply!r}")
