"""The estimate of a run's memory; tests/endurance.py measures whether it holds."""

from npgpt.config import TrainConfig
from npgpt.run import memory


def test_every_part_grows_with_what_it_depends_on():
    def parts(vocab_size=100, n_tokens=1000, workers=2, **changes):
        return memory.parts(TrainConfig(**changes), vocab_size, n_tokens, workers)

    base = parts()
    assert all(size > 0 for size in base.values())
    for bigger, grown in (
        (parts(n_layer=8), {"weights", "gradients", "optimizer", "activations"}),
        (parts(vocab_size=10_000), {"weights", "gradients", "optimizer", "activations"}),
        (parts(workers=3), {"gradients", "optimizer", "activations"}),
        (parts(batch_size=24), {"activations"}),
        (parts(dropout=0.1), {"activations"}),
        (parts(n_tokens=10**6), {"text"}),
    ):
        for words, size in bigger.items():
            expected = any(word in words for word in grown)
            assert (size > base[words]) == expected, words


def test_a_token_takes_as_many_bytes_as_its_vocabulary_asks_for():
    for vocab_size, size in ((100, 2), (2**16, 2), (2**16 + 1, 4)):
        assert memory.parts(TrainConfig(), vocab_size, 1000, 1)[memory.MAPPED] == size * 1000
