"""Fine-tuning of a checkpoint with TRL's SFTTrainer and PEFT: an adapter, a report, and the command that compiles it.

settings.py says what can be asked for, data.py makes token ids and labels of files, training.py trains, head.py is the
loss without the logits of a whole batch, table.py a token table in 16 bits, codes.py trains on an artifact's weights,
checkpoints.py lets a killed run go on, plan.py and disk.py estimate memory and disk, report.py writes the page. Imports
neither torch nor trl until a model is trained.
"""
