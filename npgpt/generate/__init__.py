"""Writing: from a model and a prompt to text.

May import files and all that files may.  Start with sampling.py: which token comes next.  generation.py lets texts grow
from a prompt by it, writer.py makes text of tokens.  decode.py is the model's forward for the newest tokens only, with
a cache of keys and values, and decode_kernel.py what computes it; prompt.py reads long prompts into this cache.
matrices.py has the model's weights for both, as they are or rounded.  draft.py guesses tokens that are then checked
together, and stats.py is told how long all takes.
"""
