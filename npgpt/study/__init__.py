"""Lessons over the core: mistakes to find, hints, receipts.

May import generate and all that generate may, but not run.  Start with hints.py: what kind of mistake a wrong backward
is.  faults.py has the mistakes that tests and `npgpt.exercise bug` plant, receipt.py where a gradient comes from.
"""
