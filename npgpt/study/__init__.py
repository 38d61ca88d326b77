"""Lessons over the core: mistakes to find, hints, receipts, and pictures of what a model does.

May import generate and all that generate may, but not run.  Start with hints.py: what kind of mistake a wrong backward
is.  faults.py has the mistakes that tests and `npgpt.exercise bug` plant.  trace.py measures one forward and backward,
which page.py shows; receipt.py tells where one number's gradient comes from; plots.py draws curves and attention.
"""
