"""Sessions from Python, without an engine: every verb, both forms, and what goes wrong."""

import asyncio
import pathlib

import pytest

import kvstore
from kvstore.sessions import Acknowledged, Append, Head, Piece, Refused, Sampler, Shape, Step, Store

HEAD = Head([1, 2, 3], facts={"model": "m"}, sampling={"top_k": "5"}, seed=7, shape=Shape(groups=1))


@pytest.fixture
def store(tmp_path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(f"file://{tmp_path}/store")


def begun(writer, session="chat", **more) -> None:
    """Opens a session, and gives it its prompt's KV and two tokens."""
    writer.open(session)
    pieces = [Piece(0, 3, b"abc"), Piece(3, 1, bytearray(b"d"))]
    sampler = Sampler(counter=2, budget=8, penalties=[(4, 1), (9, 2)], stop_tail="no", engine=b"\x00\xff")
    (answer,) = writer.append(Step(session, Append(3, [10, 11], 0, 4, sampler, pieces), HEAD, **more))
    assert (answer.tokens, answer.valid_tokens, answer.epoch) == (5, 4, 1)


def test_a_walk_through_every_verb(store):
    writer = store.begin("first")
    begun(writer)
    assert writer.sessions() == {"default/chat": 1} and writer.broken is None and not writer.is_due
    (one,) = store.ls()
    assert (one.session, one.epoch, one.holder.writer, one.holder.log) == ("default/chat", 1, "first", writer.log)
    found = store.inspect("chat")
    assert found.ends is None and found.sealed_by is None
    assert found.session.head == HEAD and found.session.generated == [10, 11] and found.session.tokens == 5
    assert found.session.sampler.engine == b"\x00\xff" and found.session.sampler.penalties == [(4, 1), (9, 2)]
    assert [(piece.start, piece.tokens, piece.data) for piece in found.session.pieces] == [(0, 3, None), (3, 1, None)]
    other = store.begin("second")
    claimed = other.claim("chat")
    assert claimed.epoch == 2 and [piece.data for piece in claimed.session.pieces] == [b"abc", b"d"]
    assert store.inspect("chat").listed.holder.writer == "second"
    (answer,) = other.append(Step("chat", Append(5, [12], 2, 4)))
    assert answer.tokens == 6 and store.inspect("chat").session.delivered == 2
    assert isinstance(other.close("chat"), Acknowledged)
    assert store.inspect("chat").ends == "closed"
    other.flush()
    other.tidy()
    with pytest.raises(kvstore.NotFound, match="closed"):
        store.begin().claim("chat")
    with pytest.raises(kvstore.NotFound, match="closed"):
        store.begin().open("chat")
    other.end()
    assert store.gc(dry_run=True).gone_sessions == 1 and store.gc().gone_sessions == 1
    assert store.ls() == []


def test_the_same_awaited(store):
    async def walk():
        writer = await store.begin_async()
        assert await writer.open_async("team/chat") == 1
        (answer,) = await writer.append_async(Step("team/chat", Append(3, [9], 0, 3, pieces=[Piece(0, 3, b"abc")]), HEAD))
        assert answer.valid_tokens == 3
        other = await store.begin_async()
        assert (await other.claim_async("team/chat", since=1)).session.generated == [9]
        with pytest.raises(kvstore.Fenced):
            await writer.append_async(Step("team/chat", Append(4, [9], 0, 3)))
        assert [one.session for one in await store.ls_async("team")] == ["team/chat"] and await store.ls_async("none") == []
        assert (await store.inspect_async("team/chat")).listed.epoch == 2
        started = other.start_append(Step("team/chat", Append(4, [8], 1, 3)))
        assert (await started.wait_async())[0].tokens == 5
        await other.close_async("team/chat")
        await other.flush_async()
        await other.tidy_async()
        await other.end_async()
        assert (await store.gc_async(dry_run=True)).closed_sessions + (await store.gc_async()).gone_sessions >= 1

    asyncio.run(walk())


def test_several_sessions_go_in_one_commit_and_a_refused_step_leaves_the_others(store):
    writer = store.begin()
    for session in ("a", "b", "c"):
        begun(writer, session)
    steps = [Step("a", Append(5, [1], 0, 4)), Step("b", Append(4, [1], 0, 4)), Step("c", Append(5, [2], 0, 4))]
    first, second, third = writer.append(*steps)
    assert first.number == third.number and isinstance(second, Refused) and "overlaps" in second.why
    assert [store.inspect(session).session.tokens for session in "abc"] == [6, 5, 6]


def test_a_step_that_was_started_is_waited_for_later_and_once(store):
    writer = store.begin()
    opening = writer.start_open("chat")
    assert opening.wait() == 1 and opening.done()
    with pytest.raises(kvstore.Invalid, match="was taken"):
        opening.wait()
    data = bytearray(b"abc")
    started = writer.start_append(Step("chat", Append(3, [], 0, 3, pieces=[Piece(0, 3, data)]), HEAD))
    data[:] = b"xyz"
    assert started.wait()[0].valid_tokens == 3
    assert store.begin().claim("chat").session.pieces[0].data == b"abc", "a buffer may change once the call has begun"


def test_of_two_claimants_one_wins_and_the_old_owner_is_refused(store):
    writers = [store.begin(name) for name in ("zombie", "one", "two")]
    begun(writers[0])
    begun(writers[0], "other")
    assert writers[1].claim("chat", since=1).epoch == 2
    with pytest.raises(kvstore.Fenced, match="owned by one"):
        writers[2].claim("chat", since=1)
    for session in ("chat", "other"):
        with pytest.raises(kvstore.Fenced, match="sealed .* by one"):
            writers[0].append(Step(session, Append(5, [13], 0, 4)))
    assert "sealed" in writers[0].broken and store.inspect("chat").session.generated == [10, 11]
    # What nobody else claimed is taken back, by a writer that is new.
    assert store.begin().claim("other", since=writers[0].sessions()["default/other"]).session.tokens == 5
    # Without an epoch, a claim takes it from whoever has it.
    assert writers[2].claim("chat").epoch == 3


def test_a_session_that_is_given_away_is_claimed_and_its_owner_goes_on(store):
    owner, next_owner = store.begin(), store.begin()
    begun(owner, "stays")
    begun(owner, "goes", ends="moved")
    assert next_owner.claim("goes").session.tokens == 5
    assert owner.append(Step("stays", Append(5, [1], 0, 4)))[0].tokens == 6


def test_what_is_wrong_is_refused_by_name(store, tmp_path):
    writer = store.begin()
    with pytest.raises(kvstore.Invalid, match="letters"):
        writer.open("a b")
    with pytest.raises(kvstore.NotFound, match="no session default/none"):
        writer.claim("none")
    with pytest.raises(kvstore.NotFound):
        store.inspect("none")
    writer.open("chat")
    with pytest.raises(kvstore.Invalid, match="exists"):
        store.begin().open("chat")
    assert store.inspect("chat").session is None
    (answer,) = writer.append(Step("chat", Append(0, [1])))
    assert "has yet to begin" in answer.why
    (answer,) = writer.append(Step("chat", Append(3, [1], 0, 3), HEAD))
    assert "hold that of 0" in answer.why
    with pytest.raises(TypeError, match="contiguous buffer"):
        writer.append(Step("chat", Append(3, [], 0, 3, pieces=[Piece(0, 3, "text")]), HEAD))
    with pytest.raises(kvstore.Invalid, match="KVSTORE_SESSIONS"):
        Store()
    with pytest.raises(kvstore.Invalid):
        Store("nothing://there")
    assert isinstance(kvstore.Fenced("x"), kvstore.Error)


def test_a_flipped_bit_is_refused(store, tmp_path):
    writer = store.begin()
    begun(writer)
    entry = sorted((tmp_path / "store" / "sessions" / "v1" / "logs" / writer.log).iterdir())[1]
    whole = entry.read_bytes()
    flip(entry, whole.index(b"abc"))
    with pytest.raises(kvstore.DataLoss, match="KV from token 0"):
        store.begin().claim("chat")
    entry.write_bytes(whole)
    flip(entry, whole.index(b"stop_tail"))
    with pytest.raises(kvstore.DataLoss):
        store.begin().claim("chat")
    entry.write_bytes(whole)
    assert store.begin().claim("chat").session.tokens == 5


def flip(path: pathlib.Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_more_kv_than_a_commit_takes_is_claimed_in_parts(store):
    writer, size = store.begin(), 8 << 20
    writer.open("long")
    head = Head([1] * 6, shape=Shape(groups=1))
    for at in range(6):
        writer.append(Step("long", Append(6, [], 0, at + 1, pieces=[Piece(at, 1, bytes([at]) * size)]), None if at else head))
    other = store.begin()
    pieces = other.claim("long").session.pieces
    assert [piece.data[0] for piece in pieces] == list(range(6))
    (answer,) = other.append(Step("long"))
    assert answer.valid_tokens == 4, "what does not fit beside the record is left out, and said to be"
    (answer,) = other.append(Step("long", Append(6, [7], 0, 6, pieces=pieces[4:])))
    assert (answer.tokens, answer.valid_tokens) == (7, 6)
    again = store.begin().claim("long").session
    assert [piece.data[0] for piece in again.pieces] == list(range(6)) and again.generated == [7]
