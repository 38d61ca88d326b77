"""A hint for what NumPy refuses: which two arrays do not fit, and what is likely to be meant by them."""

import ast
import builtins
import traceback

import numpy as np

from npgpt.study.backward import Run


def of_exception(error, tree, file):
    """Words for an exception of arrays that do not fit, or an empty string.  tree: that of the student's file."""
    if isinstance(error, IndexError):
        return "wrong index: what does it number, and how many of these are there?"
    places = [place for place in traceback.walk_tb(error.__traceback__) if place[0].f_code.co_filename == file]
    if not places or not isinstance(error, ValueError):
        return ""
    frame, line = places[-1]
    names = {**vars(builtins), **frame.f_globals, **frame.f_locals}
    on_line = [node for node in ast.walk(tree) if getattr(node, "lineno", line + 1) <= line <= (node.end_lineno or 0)]
    for node in reversed(on_line):  # the innermost first
        if isinstance(node, (ast.BinOp, ast.AugAssign, ast.Assign)) and (pair := _arrays(node, names)):
            return _words(node, *pair)
    return ""


def _arrays(node, names):
    """The shapes of what an operation cannot put together, or None."""
    try:
        if isinstance(node, ast.BinOp):
            left, right = node.left, node.right
        else:
            left, right = getattr(node, "target", None) or node.targets[0], node.value
            if isinstance(node, ast.Assign) and not isinstance(left, ast.Subscript):
                return None
        left, right = (np.asarray(Run(names, {}).value(part)) for part in (left, right))
        if isinstance(getattr(node, "op", None), ast.MatMult):
            left @ right
        elif isinstance(node, ast.BinOp):
            left + right
        elif np.broadcast_shapes(left.shape, right.shape) != left.shape:
            return left.shape, right.shape
    except ValueError:
        return left.shape, right.shape
    except Exception:  # whatever a student's expression may raise, evaluated out of its place
        return None
    return None


def _words(node, left, right):
    shapes = f"{left} and {right} do not fit; "
    if isinstance(getattr(node, "op", None), ast.MatMult):
        if left == right:
            return shapes + "wrong product: is @ meant, or *, element by element?"
        return shapes + "transposed: the inner axes of a matrix product must be the same; write it down with indices"
    stored = not isinstance(node, ast.BinOp)
    if len(right) > len(left) and stored:
        return shapes + "missing sum: over what the forward broadcast, the backward sums"
    if len(right) != len(left):
        words = "missing axis: what has one number for each row needs an axis of length 1 beside the rows: "
        return shapes + words + "keepdims=True, or [:, None]"
    if left == right[::-1]:
        return shapes + "transposed: which index comes first?"
    if stored and not isinstance(getattr(node, "target", None) or node.targets[0], ast.Subscript):
        return shapes + "wrong index: did the forward use all its rows?"
    if not any(sums in ast.unparse(node) for sums in (".sum(", ".mean(")):
        return shapes + "wrong value: which of the two has no place here?"
    return shapes + "wrong axis: which one does the sum go over, and which is left?"
