"""Lessons over the core: mistakes to find, hints, receipts.

May import generate and all that generate may, but not run.  Start with hints.py: what kind of mistake a wrong backward
is.  bugs.py has the mistakes that `npgpt.exercise bug` plants, receipt.py tells where a gradient comes from.
"""
