"""What sessions are, and what is asked and answered about them, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvstore import Invalid

__all__ = [
    "Acknowledged",
    "Append",
    "Claimed",
    "Collected",
    "Head",
    "Holder",
    "Inspected",
    "Listed",
    "Piece",
    "Refused",
    "Sampler",
    "Session",
    "Shape",
    "Step",
    "split",
]


def split(session: str) -> tuple[str, str]:
    """Returns namespace and id of a session's name: "namespace/id", or an id alone, whose namespace is "default"."""
    if not isinstance(session, str):
        raise Invalid(f"session: {session!r} is no name; use a text such as 'chat-7' or 'team/chat-7'")
    namespace, slash, id = session.rpartition("/")
    return (namespace if slash else "default", id)


@dataclass(frozen=True)
class Shape:
    """How the KV of a session is cut. ``groups`` of layers; 0: no KV is kept. ``ranks`` that hold parts of each group.
    ``block_tokens``: tokens of a block, of sessions that have blocks."""

    groups: int = 0
    ranks: int = 1
    block_tokens: int = 1


@dataclass(frozen=True)
class Head:
    """What never changes of a session. ``prompt``: ids. ``facts``: what must be equal where it goes on. ``sampling``: parameters, as the
    engine calls them. A text has 4096 bytes at most."""

    prompt: Sequence[int]
    facts: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    lora: str | None = None
    shape: Shape = Shape()


@dataclass(frozen=True)
class Sampler:
    """What changes with each token beside the ids. In an append, None is "as before". ``counter``: how often the generator was asked.
    ``budget``: tokens that may still come. ``penalties``: (token, count), sorted by token. ``stop_tail``: text that is held back.
    ``detokeniser``, ``grammar``, ``engine``: opaque states of 64 KiB at most."""

    counter: int | None = None
    budget: int | None = None
    penalties: Sequence[tuple[int, int]] | None = None
    stop_tail: str | None = None
    detokeniser: bytes | None = None
    grammar: bytes | None = None
    engine: bytes | None = None


@dataclass(frozen=True)
class Piece:
    """KV of ``tokens`` tokens from ``start`` on, of one group of layers and one rank, as bytes of at most 8 MiB. ``data``: a contiguous
    buffer, which may change once the call has begun. A piece replaces those of its group and rank that begin where it does or
    later, and leaves no gap to them. None, of what was looked at: it was not read."""

    start: int
    tokens: int
    data: Any = None
    group: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Append:
    """What is added to a session. ``start``: tokens that it has, its prompt included; anything else is refused. ``delivered``: generated
    tokens that the client has. ``valid_tokens``: tokens from the first on whose KV is durable with this; at most what pieces hold."""

    start: int
    ids: Sequence[int] = ()
    delivered: int = 0
    valid_tokens: int = 0
    sampler: Sampler = Sampler()
    pieces: Sequence[Piece] = ()


@dataclass(frozen=True)
class Step:
    """What becomes of one session by a commit. ``head``: given once, by the first step of a session that was opened. ``ends``: "closed",
    or "moved": the session is given away, and whoever claims it leaves this writer alone."""

    session: str
    append: Append | None = None
    head: Head | None = None
    ends: str | None = None


@dataclass(frozen=True)
class Acknowledged:
    """A step that is durable. ``tokens``: those of the session whose ids are; ``valid_tokens``: those whose KV is."""

    session: str
    epoch: int
    number: int
    tokens: int
    valid_tokens: int


@dataclass(frozen=True)
class Refused:
    """A step that was not made: its session is as it was."""

    why: str


@dataclass(frozen=True)
class Session:
    """A session, as far as it is durable. ``generated``: ids behind the prompt. ``pieces``: with their bytes where the session was
    claimed. ``blocks``: how many it names."""

    name: str
    head: Head
    epoch: int
    generated: list[int]
    delivered: int
    valid_tokens: int
    sampler: Sampler
    pieces: list[Piece]
    blocks: int

    @property
    def tokens(self) -> int:
        """How many tokens it has, its prompt included."""
        return len(self.head.prompt) + len(self.generated)


@dataclass(frozen=True)
class Holder:
    """Who owns a session: the id of a log, and what its writer calls itself."""

    log: str
    writer: str


@dataclass(frozen=True)
class Listed:
    """A session, and who owns it since which epoch. ``holder``: None if it was closed."""

    session: str
    epoch: int
    holder: Holder | None


@dataclass(frozen=True)
class Inspected:
    """A session just now. ``ends``: "closed" or "moved", if its owner ended it. ``sealed_by``: who sealed the owner's log. ``session``: None
    if it was opened, and nothing of it was ever acknowledged; or if it was closed for good."""

    listed: Listed
    ends: str | None
    sealed_by: Holder | None
    session: Session | None


@dataclass(frozen=True)
class Claimed:
    """A session that is this writer's since ``epoch``. ``session``: None if nothing of it was ever acknowledged: its first step begins
    it."""

    epoch: int
    session: Session | None


@dataclass(frozen=True)
class Collected:
    """What a collection did, or would do: sessions that go on, that were found closed, and that went; logs that stay, went, and were
    sealed as nobody wrote to them; objects and bytes of logs that went. ``unreadable``: what could not be read, and keeps all logs."""

    sessions: int
    closed_sessions: int
    gone_sessions: int
    logs: int
    gone_logs: int
    sealed_logs: int
    gone_objects: int
    gone_bytes: int
    unreadable: list[str]


# ---------------------------------------------------------------- as the module takes and gives them


def _hex(state: bytes | None) -> str | None:
    return None if state is None else bytes(state).hex()


def _asked_sampler(sampler: Sampler) -> dict:
    penalties = None if sampler.penalties is None else [list(pair) for pair in sampler.penalties]
    opaque = {name: _hex(getattr(sampler, name)) for name in ("detokeniser", "grammar", "engine")}
    return dict(counter=sampler.counter, budget=sampler.budget, penalties=penalties, stop_tail=sampler.stop_tail, **opaque)


def _asked_append(append: Append, data: list) -> dict:
    pieces = []
    for piece in append.pieces:
        pieces.append(dict(group=piece.group, rank=piece.rank, start=piece.start, tokens=piece.tokens, data=len(data)))
        data.append(piece.data)
    return dict(
        start=append.start,
        ids=list(append.ids),
        delivered=append.delivered,
        valid_tokens=append.valid_tokens,
        sampler=_asked_sampler(append.sampler),
        pieces=pieces,
    )


def _asked_head(head: Head) -> dict:
    texts = dict(facts=dict(head.facts), sampling=dict(head.sampling))
    return dict(prompt=list(head.prompt), seed=head.seed, lora=head.lora, shape=asdict(head.shape), **texts)


def asked(steps: Sequence[Step]) -> tuple[str, list]:
    """Returns an append as the module takes it, and its buffers."""
    data: list = []
    forms = []
    for step in steps:
        namespace, id = split(step.session)
        append = None if step.append is None else _asked_append(step.append, data)
        head = None if step.head is None else _asked_head(step.head)
        forms.append(dict(namespace=namespace, id=id, head=head, append=append, ends=step.ends))
    return json.dumps({"verb": "append", "steps": forms}), data


def acknowledged(answer: str) -> list[Acknowledged | Refused]:
    """Returns what an append answers."""
    return [
        Refused(one["refused"])
        if "refused" in one
        else Acknowledged(_name(one), one["epoch"], one["number"], one["tokens"], one["valid_tokens"])
        for one in json.loads(answer)
    ]


def _name(one: dict) -> str:
    return f"{one['namespace']}/{one['id']}"


def _session(name: str, one: dict | None, data: Sequence) -> Session | None:
    if one is None:
        return None
    head, sampler = dict(one["head"]), dict(one["sampler"])
    shape = Shape(**head.pop("shape"))
    for opaque in ("detokeniser", "grammar", "engine"):
        sampler[opaque] = None if sampler[opaque] is None else bytes.fromhex(sampler[opaque])
    if sampler["penalties"] is not None:
        sampler["penalties"] = [tuple(pair) for pair in sampler["penalties"]]
    filled = list(data) or [None] * len(one["pieces"])
    pieces = [
        Piece(piece["start"], piece["tokens"], bytes_, piece["group"], piece["rank"])
        for piece, bytes_ in zip(one["pieces"], filled)
    ]
    rest = {key: one[key] for key in ("epoch", "generated", "delivered", "valid_tokens", "blocks")}
    return Session(name=name, head=Head(shape=shape, **head), sampler=Sampler(**sampler), pieces=pieces, **rest)


def _holder(one: dict | None) -> Holder | None:
    return None if one is None else Holder(**one)


def listed(answer: str) -> list[Listed]:
    """Returns what a listing answers."""
    return [_listed(one) for one in json.loads(answer)]


def _listed(one: dict) -> Listed:
    return Listed(_name(one), one["epoch"], _holder(one["holder"]))


def inspected(answer: str) -> Inspected:
    """Returns what an inspection answers."""
    one = json.loads(answer)
    listed = _listed(one["listed"])
    session = _session(listed.session, one["session"], ())
    return Inspected(listed, one["ends"], _holder(one["sealed_by"]), session)


def claimed(session: str, answer: str, data: Sequence) -> Claimed:
    """Returns what a claim answers."""
    one = json.loads(answer)
    return Claimed(one["epoch"], _session("/".join(split(session)), one["session"], data))


def collected(answer: str) -> Collected:
    """Returns what a collection answers."""
    return Collected(**json.loads(answer))
