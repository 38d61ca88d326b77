"""Writing: from a model and a prompt to text.

May import files and all that files may.  Start with sampling.py: which token comes next, where a text ends.  decode.py
is the model's forward for the newest tokens only, with a cache of keys and values.
"""
