"""What a model learns from: text, tokens, batches.

May import leaves, kernels and core.  Start with text.py: what --data names.  tokenizer.py turns text into tokens, and
kinds.py tells what a file is.
"""
