"""What is scored as rows of tokens: items, those that share a row, and batches of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SHARED_SHARE = 0.25  # below this, masked attention costs more than the shared tokens
SHARED_WIDTH = 1_024  # of a row of many texts that begin alike; attention is quadratic in it


@dataclass(frozen=True)
class Item:
    """A context and the continuations to be scored after it, as tokens; none of them empty.

    The first `unscored[k]` tokens of continuation k (none if `unscored` is empty) are read but not
    scored, so that contexts that differ in their last tokens can share the tokens before them.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]
    unscored: Sequence[int] = ()

    @property
    def length(self) -> int:
        """Tokens that the model reads; the last token of a continuation is only predicted."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)

    @property
    def predictions(self) -> int:
        """The largest number of positions that need logits; the first one is shared."""
        return 1 + sum(len(c) - 1 for c in self.continuations)

    @property
    def span(self) -> int:
        """Tokens of its longest text that the model reads."""
        return len(self.context) + max(len(c) - 1 for c in self.continuations)

    @property
    def texts(self) -> list[Item]:
        """Its continuations, an item each."""
        return [
            Item(self.context, [continuation], self.unscored[k : k + 1])
            for k, continuation in enumerate(self.continuations)
        ]

    @property
    def branches(self) -> bool:
        """Whether its row holds more than one text: several continuations after the context."""
        return sum(len(c) > 1 for c in self.continuations) > 1


def shared_rows(texts: Sequence[tuple[Sequence[int], int]]) -> list[Item]:
    """Items whose continuations, one after another, are the ends of the texts.

    A text is all its tokens and how many of the last are scored. Texts that follow each other and
    begin alike share a row where that spares at least SHARED_SHARE of what the next one's own row
    would read. What is scored is never shared.
    """
    items: list[Item] = []
    group: list[tuple[Sequence[int], int]] = []
    prefix = total = 0  # the group's common tokens, and all tokens that its row reads

    def close() -> None:
        if group:
            rests = [text[prefix:] for text, _ in group]
            unscored = [len(rest) - scored for rest, (_, scored) in zip(rests, group)]
            items.append(Item(group[0][0][:prefix], rests, unscored))

    for text, scored in texts:
        length = len(text) - 1
        if group:
            common = min(prefix, len(text) - scored)
            common = _common_prefix(group[0][0][:common], text[:common])
            joined = total + length - common + (prefix - common) * (len(group) - 1)
            spared = total + length - joined
            fits = joined <= max(SHARED_WIDTH, 4 * length)
            if common and fits and spared >= SHARED_SHARE * length:
                group.append((text, scored))
                prefix, total = common, joined
                continue
        close()
        group, prefix, total = [(text, scored)], len(text) - scored, length
    close()
    return items


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts of equal length have in common at their beginning."""
    if first == second:
        return len(first)
    return next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)


def batches(
    lengths: Sequence[int],
    token_budget: int,
    weights: Sequence[int] | None = None,
    weight_budget: int = 0,
) -> Iterator[list[int]]:
    """Indices in batches, longest first; padded tokens and weights of a batch within budget.

    A batch holds at least one row, however long it is.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    weight = 0
    for i in order:
        row_weight = weights[i] if weights else 0
        full = batch and (len(batch) + 1) * lengths[batch[0]] > token_budget
        if full or (batch and weights and weight + row_weight > weight_budget):
            yield batch
            batch, weight = [], 0
        batch.append(i)
        weight += row_weight
    if batch:
        yield batch


@dataclass(frozen=True)
class Layout:
    """The rows of a batch, padded to `width`, and where logits are needed.

    `positions` and `segments` are those of the tokens: segment 0 is the context, k the k-th
    continuation, -1 padding. `kept` are the positions that need logits, counted through all rows;
    `targets`, `sources` and `owners` are the scored tokens, the index of their logits in `kept`,
    and their continuations, counted through all items.
    """

    width: int
    ids: list[list[int]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    segments: list[list[int]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def add(self, item: Item, owner: int) -> None:
        """Add an item's row, whose first continuation is number `owner`."""
        start_of_row, first = len(self.ids) * self.width, len(self.kept)
        tokens, positions = list(item.context), list(range(len(item.context)))
        segment = [0] * len(tokens)
        unscored = item.unscored or [0] * len(item.continuations)
        if not all(unscored):
            self.kept.append(start_of_row + len(tokens) - 1)
        for number, (tail, skip) in enumerate(zip(item.continuations, unscored)):
            start, inside = start_of_row + len(tokens), len(tail) - 1
            self.sources.extend([] if skip else [first])
            self.sources.extend(range(len(self.kept), len(self.kept) + len(tail) - max(skip, 1)))
            self.kept.extend(range(start + max(skip, 1) - 1, start + inside))
            self.targets.extend(tail[skip:])
            self.owners.extend([owner + number] * (len(tail) - skip))
            tokens += tail[:-1]
            positions += range(len(item.context), len(item.context) + inside)
            segment += [number + 1] * inside
        padding = [0] * (self.width - len(tokens))
        self.ids.append(tokens + padding)
        self.positions.append(positions + padding)
        self.segments.append(segment + [-1] * len(padding))
