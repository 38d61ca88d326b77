"""Embedding: what is looked up several times, and a backward that adds in place."""

from npgpt.study.lesson import Fault, Lesson, instead

IDX = ((1, 0, 1, 6), (3, 1, 4, 4), (6, 3, 1, 0))  # some tokens often, 2, 5 and 7 never
LOOKED_UP = "return wte[idx] + wpe[:T]"


def arguments(new, B, T, C, V, block_size, idx=None):
    import numpy as np

    idx = new.integers(V, B, T) if idx is None else np.array(idx)
    return {"idx": idx, "wte": new(V, C), "wpe": new(block_size, C)}


def places(dwte, dwpe, idx, **_):
    import numpy as np

    def rows(counts, like):
        return np.broadcast_to(np.asarray(counts)[:, None], like.shape)

    times = np.bincount(idx.reshape(-1), minlength=len(dwte))
    used = np.arange(len(dwpe)) < idx.shape[1]
    return {
        "dwte": {
            "the rows of tokens that occur more than once": rows(times > 1, dwte),
            "the rows of tokens that occur": rows(times > 0, dwte),
            "the rows of tokens that do not occur": rows(times == 0, dwte),
        },
        "dwpe": {
            "the rows of positions that occur": rows(used, dwpe),
            "the rows of positions that do not occur": rows(~used, dwpe),
        },
    }


REPEATED = "repeated index: of a token that occurs more than once only one gradient counts"
ONE_ROW = "one row only: every sequence of the batch used the same positions"
NOT_ALL = "wrong index: every position of the batch was looked up, the first and the last, too"
MISTAKES = (
    ("np.add", "\n".join(f"dwte[idx[{b}]] += dy[{b}]" for b in range(len(IDX))), REPEATED, None),
    ("dwpe", "dwpe[: T - 1] += dy.sum(axis=0)[:-1]", NOT_ALL, None),
    ("dwpe", "dwpe[1:T] += dy.sum(axis=0)[1:]", NOT_ALL, None),
    *instead("np.add", None, {
        "dwte[idx] += dy": REPEATED,
        "np.add.at(dwte, idx[:, 1:], dy[:, :-1])":
            "wrong index: a position's gradient goes to the token that stands there, not to the next one",
        "dwte[idx] = dy": "overwritten: add to the gradient so far, and once for each time that a token occurs",
        "np.add.at(dwte, idx[0], dy[0])": "one sequence only: the others of the batch looked up rows, too",
        "np.add.at(dwte, idx, dy / (idx[..., None] == idx.reshape(-1)).sum(axis=-1)[..., None])":
            "mean instead of sum: the gradients of a token that occurs more than once add up",
    }),
    ("dwpe", "dwpe[:T] += dy[0]", ONE_ROW, None),
    ("dwpe", "dwpe[:T] += dy[-1]", ONE_ROW, None),
    ("dwpe", "dwpe[1 : T + 1] += dy.sum(axis=0)", "wrong index: position t looked up row t", None),
)  # fmt: skip


LESSON = Lesson(
    op="embedding", topic="a row that is looked up several times, and adding in place",
    chapter="examples/08_embedding.py",
    forward=("embedding_forward_ref",), backward=("embedding_backward_ref",), results=("dwte", "dwpe"),
    arguments=arguments, sizes={"B": 3, "T": 4, "C": 5, "V": 8, "block_size": 6, "idx": IDX},
    lengths=("B", "T", "V", "C"), lines={"dwte": LOOKED_UP, "dwpe": LOOKED_UP},
    zeros="in the rows of what does not occur in the batch", places=places, mistakes=MISTAKES,
    bugs={
        13: Fault(
            "embedding: of a repeated token one gradient counts", "npgpt/ops/embedding.py",
            "    np.add.at(dwte, idx, dy)  # not dwte[idx] += dy: a token that occurs twice would count once\n",
            "    dwte[idx] += dy\n",
            "A token that occurs twice in the batch used the same row twice; both gradients belong to it.",
        ),
        18: Fault(
            "embedding: the tied output layer's share is lost", "npgpt/ops/embedding.py",
            "        dwte, dwpe = wte.grad_to_add_to(), wpe.grad_to_add_to()\n",
            "        wte.grad = None\n        dwte, dwpe = wte.grad_to_add_to(), wpe.grad_to_add_to()\n",
            "The token table is the output layer's weight as well; what that layer left in its gradient must stay.",
        ),
    },
)  # fmt: skip
