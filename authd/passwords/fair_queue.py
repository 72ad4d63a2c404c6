"""A bounded queue of jobs that shares the work among those who ask for it, on every level of a tree. Pure.

A job's path names its holders, outermost first: its queue, its networks, its account. On each level the holders that
wait get equal seconds of work (or by their weights), whatever the number, the cost and the order of their jobs. This is
self-clocked fair queueing (S. J. Golestani, INFOCOM 1994): a holder's tag is the seconds of work it will have had when
its next job is done, on a clock that its siblings share; the lowest tag is served, and the clock is set to it. A holder
that comes, or comes back, begins at the clock. It gains nothing by leaving, so nothing is remembered of who left.

Every operation looks once at the holders beside those of its path, so it takes steps as many as jobs may wait at most.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Generic, TypeVar

T = TypeVar("T")
Path = tuple[str, ...]


@dataclass(eq=False, slots=True)
class _Holder(Generic[T]):
    """Who holds jobs that wait: a leaf itself, all others through their children."""

    key: str
    parent: "_Holder[T] | None" = None
    weight: float = 1.0
    #: Those that hold jobs.
    children: "dict[str, _Holder[T]]" = field(default_factory=dict)
    #: A leaf's items and the seconds that each takes, in order.
    ready: OrderedDict[T, float] = field(default_factory=OrderedDict)
    paused: OrderedDict[T, float] = field(default_factory=OrderedDict)
    #: Jobs, paused ones too.
    size: int = 0
    #: Seconds of the jobs that are ready.
    work_s: float = 0.0
    #: The children's clock: the highest tag of a child that was served.
    clock_s: float = 0.0
    #: The work had so far, and with the next job, on the parent's clock. No tag: no job is ready.
    start_s: float = 0.0
    tag_s: float = inf
    #: The child that is served next, and the seconds of its next job, or of a leaf's own.
    next: "_Holder[T] | None" = None
    head_s: float = inf


class FairQueue(Generic[T]):
    """Holds each item once. Paths are equally long; the first key names one of the queues."""

    def __init__(self, weights: Mapping[str, float], size_max: int) -> None:
        """`weights`: the queues, and which part of the work each gets while others wait, too. `size_max`: of each."""
        self._weights = dict(weights)
        self._size_max = size_max
        self._root: _Holder[T] = _Holder("")
        self._leaves: dict[T, _Holder[T]] = {}
        self._paused: OrderedDict[T, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leaves)

    @property
    def paused_until(self) -> float:
        """When the first of the paused is ready again; never: inf."""
        return next(iter(self._paused.values()), inf)

    def add(self, item: T, path: Path, cost_s: float, until: float | None = None) -> T | None:
        """Enqueue behind all of the same path. Return who had to leave the full queue: another, `item` itself, or None.

        `cost_s`: seconds of work. `until`: not ready before; never earlier than that of the items paused before it.
        """
        queue = self._root.children.get(path[0])
        left = None
        if queue is not None and queue.size >= self._size_max:
            left = self._newest_of_biggest(path)
            if left is None:
                return item
            self.discard(left)
        leaf = self._leaf(path)
        self._leaves[item] = leaf
        if until is None:
            leaf.ready[item] = cost_s
        else:
            leaf.paused[item] = cost_s
            self._paused[item] = until
        self._update(leaf, 1, cost_s if until is None else 0.0)
        return left

    def take(self, now: float) -> T | None:
        """Take out the item whose turn it is, and charge its holders; None if none is ready."""
        while self.paused_until <= now:
            self._resume(next(iter(self._paused)))
        holder = self._root
        while holder.next is not None:
            holder, parent = holder.next, holder
            holder.start_s = holder.tag_s
            # A holder whose long job waited, and that then had a short one before it, may be behind the clock.
            parent.clock_s = max(parent.clock_s, holder.tag_s)
        if not holder.ready:
            return None
        item = next(iter(holder.ready))
        self.discard(item)
        return item

    def discard(self, item: T) -> bool:
        """Take out an item that is not served. False if it does not wait."""
        leaf = self._leaves.pop(item, None)
        if leaf is None:
            return False
        self._paused.pop(item, None)
        leaf.paused.pop(item, None)
        self._update(leaf, -1, -leaf.ready.pop(item, 0.0))
        return True

    def clear(self) -> list[T]:
        """Take out all, and return them."""
        items = list(self._leaves)
        for item in items:
            self.discard(item)
        return items

    def work_ahead_s(self, path: Path, cost_s: float) -> float:
        """Return the seconds of work served before an item that is added now, if none comes after it. At most one job
        of each other holder too much; paused jobs do not count.
        """
        holders = [self._root]
        for key in path:
            if key not in holders[-1].children:
                break
            holders.append(holders[-1].children[key])
        ahead_s = holders[-1].work_s if len(holders) > len(path) else 0.0
        for depth in reversed(range(min(len(holders), len(path)))):
            parent = holders[depth]
            own = holders[depth + 1] if depth + 1 < len(holders) else None
            weight = own.weight if own is not None else self._weight(parent, path[depth])
            start_s = own.start_s if own is not None and own.tag_s < inf else parent.clock_s
            tag_s = start_s + (ahead_s + cost_s) / weight
            for other in parent.children.values():
                if other is not own and other.tag_s <= tag_s:
                    ahead_s += min(other.work_s, other.head_s + (tag_s - other.tag_s) * other.weight)
        return ahead_s

    def _newest_of_biggest(self, path: Path) -> T | None:
        """Return the item that must leave the full queue for one of `path`: None where no other holder has more than
        that one would have, on any level.
        """
        parent = self._root.children[path[0]]
        for key in path[1:]:
            own = parent.children.get(key)
            biggest = max(parent.children.values(), key=_size)
            if biggest is not own and biggest.size > (own.size if own is not None else 0) + 1:
                while biggest.children:
                    biggest = max(biggest.children.values(), key=_size)
                return next(reversed(biggest.ready or biggest.paused))
            if own is None:
                return None
            parent = own
        return None

    def _leaf(self, path: Path) -> _Holder[T]:
        holder = self._root
        for key in path:
            parent, found = holder, holder.children.get(key)
            holder = found or _Holder(key, parent, self._weight(parent, key))
            parent.children[key] = holder
        return holder

    def _weight(self, parent: _Holder[T], key: str) -> float:
        return self._weights[key] if parent is self._root else 1.0

    def _resume(self, item: T) -> None:
        del self._paused[item]
        leaf = self._leaves[item]
        leaf.ready[item] = cost_s = leaf.paused.pop(item)
        self._update(leaf, 0, cost_s)

    def _update(self, leaf: _Holder[T], jobs: int, work_s: float) -> None:
        """Make the leaf and all above it agree with what it holds now. Those that hold nothing go."""
        leaf.head_s = next(iter(leaf.ready.values()), inf)
        holder = leaf
        while holder.parent is not None:
            parent = holder.parent
            holder.size += jobs
            holder.work_s = holder.work_s + work_s if holder.head_s < inf else 0.0
            self._tag(holder, parent)
            if not holder.size:
                del parent.children[holder.key]
            first = min(parent.children.values(), key=_tag_s, default=None)
            parent.next = first if first is not None and first.tag_s < inf else None
            parent.head_s = parent.next.head_s if parent.next is not None else inf
            holder = parent

    def _tag(self, holder: _Holder[T], parent: _Holder[T]) -> None:
        if holder.head_s == inf:
            holder.tag_s = inf
            return
        if holder.tag_s == inf:
            holder.start_s = max(holder.start_s, parent.clock_s)
        holder.tag_s = holder.start_s + holder.head_s / holder.weight


def _size(holder: _Holder[T]) -> int:
    return holder.size


def _tag_s(holder: _Holder[T]) -> float:
    return holder.tag_s
