"""How a tokenizer is learnt from a text: by one call of the package, in a process whose end alone interrupts it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from threading import Thread

from npgpt.data.bpe_format import SIZE, cut_at_lines, the_package

WORD = 2**10  # characters of a word at most where a text without a space is learnt from
_LEARN = (  # what the process runs
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from npgpt.data import bpe_learning; bpe_learning.learn_alone()"
)


def learnt(pieces, vocab_size, check):
    """The JSON of the tokenizer that a process of its own learns, which ends when this one does.

    Raises ValueError if it fails, and what pieces and check raise.
    """
    command = [sys.executable, "-c", _LEARN, json.dumps(sys.path), str(vocab_size)]
    start, said, n = time.monotonic(), 2, 0
    with tempfile.TemporaryFile() as out, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=out,
        start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # no Ctrl-C is for it
    ) as child:  # fmt: skip

        def look():
            nonlocal said
            check()
            if (seconds := time.monotonic() - start) > said:
                said = 2 * seconds
                text = f"npgpt: learning {vocab_size:,} tokens from {n:,} characters, {seconds:.0f} s so far"
                with contextlib.suppress(OSError):
                    print(text, file=sys.stderr, flush=True)

        try:
            for piece in cut_at_lines(pieces, SIZE, 2 * SIZE):
                n += len(piece)
                for part in _short_words(piece):
                    _send(child, part)
                look()
            _send(child, "")
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.1)
                look()
        except BaseException:
            child.kill()
            raise
        finally:
            with contextlib.suppress(OSError):  # what it did not read
                child.stdin.close()
        if child.returncode:
            raise ValueError(f"the package tokenizers failed with exit code {child.returncode}")
        out.seek(0)
        return out.read().decode("utf-8")


def _send(child, text):
    raw = text.encode("utf-8")
    with contextlib.suppress(OSError):  # it has failed, which its exit code will tell
        child.stdin.write(len(raw).to_bytes(8, "little") + raw)
        child.stdin.flush()


def learn_alone():
    """What the process does: pieces of a text, each after its length, come in, and the tokenizer's JSON goes out."""
    stdin, package = sys.stdin.buffer, the_package()

    def pieces():
        while length := int.from_bytes(stdin.read(8), "little"):
            yield stdin.read(length).decode("utf-8")
        Thread(target=end_with_parent, daemon=True).start()

    def end_with_parent():
        stdin.read()
        os._exit(1)

    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=int(sys.argv[2]), min_frequency=2, show_progress=False, special_tokens=[],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    # (the package keeps some hundred pieces: they are short, and a word that is cut in two does no harm here)
    tokenizer.train_from_iterator(pieces(), trainer)
    sys.stdout.buffer.write(tokenizer.to_str().encode("utf-8"))
    sys.stdout.buffer.flush()
    os._exit(0)


def _short_words(piece):
    """A piece in parts: where one of its lines is longer than SIZE, no word is longer than WORD.

    For each pair that is learnt, the package takes time that grows with the square of a word's length.
    """
    start = 0
    if max(map(len, piece.split("\n"))) > SIZE:
        for word in re.finditer(r"\S+|\s+", piece):
            for end in range(word.start() + WORD, word.end(), WORD):
                yield piece[start:end]
                start = end
    yield piece[start:]
