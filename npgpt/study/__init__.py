"""Lessons over the core: exercises, mistakes to find, hints, receipts, and pictures of what a model does.

May import generate and all that generate may, but not run.  Start with lessons/layernorm.py: what a lesson on an op
holds.  lesson.py makes exercises of lessons, check.py compares what a student wrote, bugs.py plants mistakes to find,
progress.py keeps how far a student is, report.py says it of a class.  hints.py says what is wrong in a backward, by
what kinds.py sees in any array, and by the mistakes that mistakes.py makes in the steps of backward.py; refused.py
explains what NumPy refuses.  trace.py measures one forward and backward, which page.py shows; receipt.py tells where
one number's gradient comes from; plots.py draws curves and attention.
"""
