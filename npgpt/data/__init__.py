"""What a model learns from: text, tokens, batches.

    corpus = open_data(["my_book.txt"])                a Corpus, whose text comes in pieces; or TokenFiles
    tokens = map_tokens(path, dtype)                   its tokens, in a file that the run folder holds
    blocks = Blocks(tokens, block_size, seed)          a split of them, cut into training examples
    x, y = blocks.batch(n, batch_size)                 batch number n: (B, T) tokens, and the token after each

May import leaves, kernels and core.  Start with text.py: what --data names.  tokens.py has files of tokens, batches.py
the splits and the blocks, notes.py what to know of a text before it is learnt, kinds.py what a file is.

characters.py says what every tokenizer can do, and has those that need no learning, bpe.py byte pair encoding, with
bpe_format.py (tokenizer.json), bpe_files.py (what stands beside it), and bpe_learning.py.
"""
