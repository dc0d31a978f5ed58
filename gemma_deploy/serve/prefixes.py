"""Beginnings of texts that are kept for those that begin alike: trees of pages, the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from gemma_deploy.runtime.many import PAGE, ManySequences
from gemma_deploy.serve.request import Scores

MOST = 4096  # beginnings that are kept, however little memory they take
LEAST = 16  # tokens that are worth taking over


@dataclass(eq=False, slots=True)
class _Node:
    """A text's beginning that ends with these tokens: a page of them, or less, and then nothing follows."""

    parent: _Node | None
    tokens: np.ndarray
    sequence: int = 0
    scores: Scores | None = None  # of these tokens; None: not known
    children: dict[bytes, _Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """What is known of a text.

    Args:
        sequence: a new one that holds its first `length` tokens; 0 where nothing is known.
        scores: of the first `scored` tokens.
    """

    sequence: int = 0
    length: int = 0
    scores: Scores | None = None
    scored: int = 0


class Prefixes:
    """The trees: one of the model alone, and one of each adapter, whose keys and values are other ones.

    Every page of a text is a sequence of its own, whose memory it shares with all that go on from there, so that what
    a window would have given back is there too: a text is taken over to the token up to which it is the same.
    """

    def __init__(self, model: ManySequences) -> None:
        self._model, self._roots = model, dict[int, _Node]()
        self._used: OrderedDict[_Node, None] = OrderedDict()  # the least recently used first; children before parents

    def __len__(self) -> int:
        return len(self._used)

    def length(self, ids: np.ndarray, *, adapter: int = 0) -> int:
        """How many of a text's first tokens are known."""
        return self._walk(ids, None, self._root(adapter))[2]

    def find(self, ids: np.ndarray, top: int | None = None, *, adapter: int = 0) -> Hit:
        """Take over what is known of a text, but its last token, which has to be read again for what follows it.

        Args:
            ids: [n] int32; top: its tokens' scores are asked for too, with so many alternatives: what is known without
                them is not taken.
            adapter: number of the adapter that it is computed with, 0: with none.
        """
        path, node, length = self._walk(ids, top, self._root(adapter))
        # The score of a token comes from reading the one before it.
        taken = min(length, len(ids)) - 1 if top is not None else min(length, len(ids) - 1)
        if taken < LEAST:
            return Hit()
        self._touch(node)
        sequence = self._model.sequence(node.sequence)
        self._model.rewind(sequence, taken)
        if top is None:
            return Hit(sequence, taken)
        scores, at = Scores.empty(length, top), 0
        for one in path:
            known = one.scores
            assert known is not None
            count = min(len(one.tokens), length - at)
            scores.put(at, known.part(0, count))
            at += count
        return Hit(sequence, taken, scores, length)

    def keep(self, ids: np.ndarray, sequence: int, scores: Scores | None = None, *, adapter: int = 0) -> None:
        """Keep a text's beginning, where everything before its last page is kept; the sequence stays the caller's.

        Args:
            ids: [n] int32, all that the sequence has read; scores: of these tokens, where they are known.
            adapter: as of `find`.
        """
        node = self._root(adapter)
        whole = (len(ids) - 1) // PAGE * PAGE
        for at in range(0, whole, PAGE):
            child = node.children.get(ids[at : at + PAGE].tobytes())
            if child is None:
                return
            node = child
        last = ids[whole:]
        kept = node.children.get(last.tobytes())
        if kept is None:
            key = last.tobytes()  # whose memory the tokens share
            kept = node.children[key] = _Node(node, np.frombuffer(key, np.int32), self._model.sequence(sequence))
        known = None if scores is None else scores.part(whole, len(ids))
        if known is not None and (kept.scores is None or kept.scores.top.shape[1] < known.top.shape[1]):
            kept.scores = known.copy()
        self._touch(kept)
        while len(self._used) > MOST:
            self.drop_oldest()

    def drop_oldest(self, count: int = 1) -> bool:
        """Give back what has not been used for longest, so many beginnings; False where nothing is kept."""
        dropped = min(count, len(self._used))
        for _ in range(dropped):
            node, _ = self._used.popitem(last=False)
            assert node.parent is not None
            assert not node.children
            del node.parent.children[node.tokens.tobytes()]
            self._model.drop(node.sequence)
        return dropped > 0

    def forget(self, adapter: int) -> None:
        """Give back all that was computed with an adapter."""
        left = [self._root(adapter)]
        del self._roots[adapter]
        while left:
            node = left.pop()
            left += node.children.values()
            if node.parent is not None:
                del self._used[node]
                self._model.drop(node.sequence)

    def _root(self, adapter: int) -> _Node:
        return self._roots.setdefault(adapter, _Node(None, np.zeros(0, np.int32)))

    def _walk(self, ids: np.ndarray, top: int | None, root: _Node) -> tuple[list[_Node], _Node, int]:
        """Nodes that make up the longest beginning that is known, the last of them, and its length."""
        path: list[_Node] = []
        node, at = root, 0
        while at < len(ids):
            child = node.children.get(ids[at : at + PAGE].tobytes())
            if child is None or not _has(child, top):
                break
            path.append(child)
            node, at = child, at + len(child.tokens)
        best, most = None, 0
        rest = ids[at : at + PAGE]
        for child in node.children.values() if len(rest) else ():
            if child.tokens[0] == rest[0] and _has(child, top) and (same := common(child.tokens, rest)) > most:
                best, most = child, same
        if best is not None:
            path.append(best)
            node = best
        return path, node, at + most

    def _touch(self, node: _Node) -> None:
        while node.parent is not None:
            self._used[node] = None
            self._used.move_to_end(node)
            node = node.parent


def _has(node: _Node, top: int | None) -> bool:
    return top is None or (node.scores is not None and node.scores.top.shape[1] >= top)


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    count = min(len(one), len(other))
    differ = np.flatnonzero(one[:count] != other[:count])
    return int(differ[0]) if len(differ) else count
