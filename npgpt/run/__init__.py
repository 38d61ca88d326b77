"""A training.

May import generate and all that generate may, but not study.  Start with trainer.py, the loop.  What it works with is
made once, by setup.py, with beginning.py (tokenizer, first weights) and tokens.py; state.py is where a run stands, and
what of it a checkpoint holds; saving.py writes the run folder, and aside.py when mpiexec ends the process.  parallel.py
splits a batch over threads, ranks.py over processes; audit.py checks the gradients of a live run; events.py,
divergence.py and memory.py are small, and what their names say.
"""
