"""A lesson for each op: its exercise, the usual mistakes in it, and bugs to find.  ../lesson.py says what is in one."""

from npgpt.study.lessons import attention, cross_entropy, dropout, embedding, layernorm, linear, mlp

LESSONS = {  # by the op's name, from easy to hard
    module.LESSON.op: module.LESSON for module in (linear, dropout, embedding, cross_entropy, mlp, layernorm, attention)
}


def lesson_of(reference):
    """The lesson whose forward or backward a function is, or None."""
    return next((lesson for lesson in LESSONS.values() if reference in lesson.references()[:2]), None)
