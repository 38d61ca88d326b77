"""Lessons over the core: exercises, mistakes to find, hints, receipts.

May import generate and all that generate may, but not run.  Start with lessons/layernorm.py: what a lesson on an op
holds.  blanks.py makes exercises of lessons, check.py compares what a student wrote, hints.py says what kind of mistake
a wrong backward is, bugs.py plants mistakes to find, receipt.py tells where a gradient comes from.
"""
