"""A training.

May import generate and all that generate may, but not study.  Start with trainer.py, the loop.  parallel.py splits a
batch over threads, ranks.py over processes; audit.py checks the gradients of a live run, finite.py its numbers;
memory.py counts bytes.
"""
