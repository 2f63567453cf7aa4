"""Generations of transformers that outlive their process: each token is durable before it is delivered.

A :class:`Worker` is a model and a writer of sessions in a store. It computes one group of tokens while the last one is written. Of a group,
the record has the ids, how many tokens the caller has, the sampler's counter, and the KV of what is new, once. Another process that has
only the store in common goes on with the very next token.

Sampling draws each token from a generator that is seeded with the session's seed and the token's number: it depends on nothing else
that the process does.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import kvstore
from kvstore.transformers import _CACHE_NAMES, _name_weights

from . import Acknowledged, Append, Head, Refused, Sampler, Session, Shape, Started, Step, Store, Writer, asked, split
from .caches import Kv, groups_of

__all__ = ["Answer", "Worker", "generate", "resume"]

logger = logging.getLogger("kvstore.sessions")

# Times that an answer's session is taken back in a row because its writer's log ended.
_TAKEN_BACK_MAX = 3
# What a commit fails with when the writer's log has ended.
_ENDED = (kvstore.Fenced, kvstore.Unavailable, kvstore.Busy)


def generate(model, ids, *, session: str, store: Store | str | None = None, **more) -> Answer:
    """Generates from a prompt, as :meth:`Worker.generate` of a new :class:`Worker`. To run several sessions, make one worker: a worker names the
    model's weights, which takes a pass over them, and its sessions share commits."""
    return Worker(model, store).generate(ids, session=session, **more)


def resume(model, *, session: str, store: Store | str | None = None, **more) -> Answer:
    """Goes on with a session, as :meth:`Worker.resume` of a new :class:`Worker`."""
    return Worker(model, store).resume(session, **more)


class Worker:
    """A model whose generations outlive this process. ``store``: a :class:`Store` or a URL; by default, $KVSTORE_SESSIONS. ``name``: what others
    are told of who owns a session. ``weights_version``: names weights beside their bytes, which are hashed here once, at some gigabytes a
    second. After you train the model further, make another worker.

    Several answers may be read from at the same time, in threads or in turn: what they append is committed together. Nobody else may
    use the random generator that a seed is drawn from, if that matters to you: give a seed.

    Raises Unsupported, naming them, for models whose layers keep anything but every token or a sliding window of them.
    """

    def __init__(self, model, store: Store | str | None = None, *, name: str | None = None, weights_version: str = ""):
        groups_of(model)
        self.model, self.store = model, store if isinstance(store, Store) else Store(store)
        self._name = name
        self._weights = _name_weights(model, weights_version).hex()
        self._writer: Writer | None = None
        self._lock = threading.Lock()

    def generate(self, ids, *, session: str, every: int = 8, seed: int | None = None, tokenizer=None, **arguments: Any) -> Answer:
        """Generates from a prompt, and returns the :class:`Answer`, which yields tokens once they are durable.

        ``ids``: of the prompt, a tensor of shape (1, tokens) or a list. ``session``: a name that there has never been, "namespace/id" or an id.
        A session that was opened, but of which nothing was ever acknowledged, is begun anew: the same call again is the way on.
        ``every``: tokens of a commit, at most. ``seed``: of sampling; by default, drawn from torch's generator. ``tokenizer``: needed by stop
        strings. ``arguments``: those of `generate` that JSON can hold; None and defaults mean what they mean there.

        Raises Unsupported, naming it, for what cannot go on exactly in another process: beam search, assisted decoding, several sequences,
        processors, criteria or caches of your own, padding, clocks. Raises Invalid if an argument is wrong or, from the first tokens on, if
        the session exists, and NotFound if it was closed. While it runs, it raises Fenced once somebody else claimed the session, and
        Unavailable if the store does not answer: what was yielded is durable, and :meth:`resume` goes on.
        """
        prompt = _prompt(ids, self.model.device)
        kept = asked.stored(arguments)
        prepared = asked.prepare(self.model, prompt, kept, tokenizer)
        if seed is None and prepared.config.do_sample:
            seed = int(torch.randint(1 << 62, ()))
        stop = tokenizer if prepared.effective.get("stop_strings") else None
        head = Head(
            prompt=prompt[0].tolist(),
            facts=asked.facts_of(self.model, self._weights, stop),
            sampling=asked.sampling_of(kept, prepared),
            seed=seed,
        )
        return Answer(self, session, head, prepared, every, None, 0)

    def resume(
        self, session: str, *, every: int = 8, have: int | None = None, tokenizer=None, allow: Iterable[str] = ()
    ) -> Answer:
        """Claims a session, and returns the :class:`Answer` that goes on with it, exactly as it would have gone on where it was.

        ``have``: generated tokens that the client has; tokens from there on are yielded. By default, as many as the record says, which is a group
        or two less than it may have: ``Answer.start`` says where the yielded tokens begin. ``allow``: names of facts that may differ.

        Raises NotFound if there is no such session, it was closed, or nothing of it was ever acknowledged (then generate again); Invalid, naming
        what differs, if it cannot go on exactly here, in which case its owner is left alone; Fenced if another claimant was faster; and DataLoss if
        what is stored is not what was written.
        """
        found = self.store.inspect(session)
        if found.ends == "closed":
            raise kvstore.NotFound(f"the session {session} was closed")
        if found.session is None:
            raise kvstore.NotFound(f"the session {session} was opened, and nothing of it was ever acknowledged: generate again")
        head = found.session.head
        stop = tokenizer if "is.stop_strings" in head.sampling else None
        asked.check(session, head.facts, asked.facts_of(self.model, self._weights, stop), allow)
        prepared = asked.prepare(self.model, _prompt(head.prompt, self.model.device), asked.asked_of(head.sampling), tokenizer)
        asked.check_effective(head.sampling, prepared)
        writer = self._current()
        claimed = writer.claim(session)
        if claimed.session is None or claimed.session.head != head:
            raise kvstore.DataLoss(f"the session {session} is not what it was a moment ago")
        _check_sampler(claimed.session, prepared.max_length)
        return Answer(self, session, head, prepared, every, (writer, claimed.session, claimed.epoch), have)

    def end(self) -> None:
        """Ends the writer's log: sessions that go on are claimed by others, as they would be anyway."""
        with self._lock:
            if self._writer is not None and self._writer.broken is None:
                self._writer.end()
            self._writer = None

    def _current(self, instead_of: Writer | None = None) -> Writer:
        """Returns the writer, or begins another where that one has ended, or soon will."""
        with self._lock:
            if self._writer is None or self._writer is instead_of or self._writer.broken is not None or self._writer.is_due:
                self._writer = self.store.begin(self._name)
            return self._writer


def _prompt(ids, device) -> torch.Tensor:
    prompt = ids if isinstance(ids, torch.Tensor) else torch.tensor([list(ids)])
    if prompt.dim() == 1:
        prompt = prompt.unsqueeze(0)
    if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0 or prompt.is_floating_point():
        raise kvstore.Invalid(f"ids: a session is one sequence: a tensor of shape (1, tokens), and not {tuple(prompt.shape)}")
    return prompt.to(device=device, dtype=torch.long)


def _check_sampler(session: Session, max_length: int) -> None:
    generated, sampler = len(session.generated), session.sampler
    due = max_length - session.tokens
    if generated and (sampler.counter, sampler.budget) != (generated, due):
        raise kvstore.DataLoss(
            f"the sampler of the session {session.name} stands at {sampler.counter} tokens, with {sampler.budget} to come; "
            f"its ids say {generated} and {due}"
        )


class _Decoder:
    """A model, a sequence and its cache: one token after the other, each as an uninterrupted run computes it."""

    def __init__(self, model, prepared: asked.Prepared, ids: list[int], prompt: int, seed: int | None):
        self._model, self._prepared, self._prompt, self._seed = model, prepared, prompt, seed
        self.ids = torch.tensor([ids], device=model.device)
        self.kv = Kv(model)
        self._logits: torch.Tensor | None = None
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[1])
        self._more = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._has_positions = "position_ids" in parameters

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @torch.no_grad()
    def catch_up(self) -> int:
        """Computes what the cache lacks of the sequence, but for its last token; how many tokens that were. The prompt is computed in one pass and
        the others one by one, as they were: other passes give other roundings."""
        lacks = self.length - 1 - self.kv.tokens
        if self.kv.tokens < self._prompt or self.length == self._prompt:
            self.kv = Kv(self._model)
            lacks = self.length - (1 if self.length > self._prompt else 0)
            self._forward(0, self._prompt)
        while self.kv.tokens < self.length - 1:
            self._forward(self.kv.tokens, self.kv.tokens + 1)
        return lacks

    def _forward(self, start: int, end: int) -> None:
        given = {self._cache_name: self.kv.cache, **self._more}
        if self._has_positions:
            given["position_ids"] = torch.arange(start, end, device=self.ids.device).unsqueeze(0)
        ids = self.ids[:, start:end].clone(memory_format=torch.contiguous_format)
        output = self._model(input_ids=ids, use_cache=True, return_dict=True, **given)
        self._logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=self.ids.device)

    @torch.no_grad()
    def step(self) -> int:
        """Returns the next token."""
        if self.kv.tokens < self.length:
            self._forward(self.kv.tokens, self.length)
        assert self._logits is not None
        scores = self._prepared.processors(self.ids, self._logits)
        if self._prepared.config.do_sample:
            probabilities = torch.nn.functional.softmax(scores, dim=-1)
            token = torch.multinomial(probabilities, num_samples=1, generator=self._generator()).squeeze(1)
        else:
            token = torch.argmax(scores, dim=-1)
        self.ids = torch.cat([self.ids, token[:, None]], dim=-1)
        return int(token)

    def _generator(self) -> torch.Generator:
        """Of one token: its seed is made of the session's and the token's number."""
        number = self.length - self._prompt
        digest = hashlib.blake2b(f"kvstore sampler 1 {self._seed} {number}".encode(), digest_size=8).digest()
        return torch.Generator(device=self.ids.device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def is_done(self) -> bool:
        """Whether the sequence has ended; it has not as long as nothing was generated."""
        return self.length > self._prompt and bool(self._prepared.criteria(self.ids, None).all())


class Answer:
    """A generation, as an iterator: each item is a list of tokens that are durable, ``every`` at most but for those that were durable before a
    resume. The last item is followed by the session's close. What a caller was given is recorded with the next commit.

    ``session``: its name. ``prompt``: ids. ``tokens``: generated ids that are durable. ``start``: how many generated tokens come before the first
    one that is yielded. ``prefilled``: tokens computed again, beside the last one, since their KV was not durable; 0 behind an acknowledged
    append. None until the first item. ``valid_tokens``: tokens, those of the prompt included, whose KV is durable.

    Use it in a ``with`` block, or call :meth:`close`: an answer that is left before its end is given away then, so that whoever resumes it
    leaves this worker alone. Otherwise whoever resumes it seals this worker's log, and its other answers have to take theirs back.
    """

    def __init__(self, worker: Worker, session: str, head: Head, prepared, every: int, claimed, have: int | None):
        if every < 1:
            raise kvstore.Invalid(f"every: {every} is not valid; use 1 or more tokens")
        self.session, self.prompt, self._head = "/".join(split(session)), list(head.prompt), head
        self._worker, self._prepared, self._every = worker, prepared, every
        self._writer: Writer | None = None
        self._epoch = 0
        self._opening: Started | None = None
        self._pending: tuple[Started, int] | None = None
        self._resumed = claimed is not None
        self.tokens: list[int] = []
        self.valid_tokens = 0
        kv = None
        if claimed is None:
            self._writer = worker._current()
            self._opening = self._writer.start_open(session)
        else:
            self._writer, found, self._epoch = claimed
            self.tokens, self.valid_tokens = list(found.generated), found.valid_tokens
            kv, have = found, found.delivered if have is None else have
        if not 0 <= (have or 0) <= len(self.tokens):
            raise kvstore.Invalid(f"have: {have} is not valid: {len(self.tokens)} generated tokens are durable")
        self.start = self._given = have or 0
        self.prefilled: int | None = None
        self._decoder = _Decoder(worker.model, prepared, self.prompt + self.tokens, len(self.prompt), head.seed)
        if kv is not None and len(self.prompt) <= kv.valid_tokens < kv.tokens and kv.generated:
            self._decoder.kv.restore(head.facts["kv"], kv.pieces, kv.valid_tokens)
        self._is_over = False
        self._run = self._steps()

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> list[int]:
        return next(self._run)

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def ids(self) -> list[int]:
        """Reads to the end, and returns all ids: the prompt's, and all that were generated."""
        for _ in self:
            pass
        return self.prompt + self.tokens

    def close(self) -> None:
        """Gives the session away, unless its answer has ended: :meth:`Worker.resume` goes on with it, here or elsewhere. What was computed and
        not yet appended is computed again there."""
        self._run.close()
        if self._is_over:
            return
        self._is_over = True
        try:
            self._acknowledge()
            if self._opening is None and self.tokens:
                self._append(Step(self.session, ends="moved"))
        except kvstore.Error as error:
            logger.info("kvstore: the session %s was not given away: %s", self.session, error)

    # ---------------------------------------------------------------- tokens

    def _steps(self) -> Iterator[list[int]]:
        decoder = self._decoder
        if self._resumed:
            self._carry()
            yield from self._deliver()
        self.prefilled = decoder.catch_up() if self._resumed else 0
        if not self._resumed:
            decoder.catch_up()
        self._opened()
        # The first token goes by itself: its client waits for it.
        group, most = len(self.tokens), 1 if not self.tokens else self._every
        while not decoder.is_done():
            decoder.step()
            if self._pending and self._pending[0].done():
                self._acknowledge()
                yield from self._deliver()
            group += 1
            if group - self._appended() >= most or decoder.is_done():
                if self._pending:
                    self._acknowledge()
                    yield from self._deliver()
                self._send()
                most = self._every
        self._acknowledge()
        yield from self._deliver()
        self._close()

    def _appended(self) -> int:
        """Generated tokens that went to the log, acknowledged or not."""
        return self._pending[1] if self._pending else len(self.tokens)

    def _deliver(self) -> Iterator[list[int]]:
        """Yields what is durable and was not yielded."""
        if self._given < len(self.tokens):
            tokens = self.tokens[self._given :]
            yield tokens
            self._given += len(tokens)

    # ---------------------------------------------------------------- the log

    def _opened(self) -> None:
        """Waits until the session is open; one of which nothing was ever acknowledged is taken."""
        if self._opening is None:
            return
        opening, self._opening = self._opening, None
        try:
            self._epoch = opening.wait()
        except kvstore.Invalid:
            if self._worker.store.inspect(self.session).session is not None:
                raise
            claimed = self._writer.claim(self.session)
            if claimed.session is not None:
                raise
            self._epoch = claimed.epoch

    def _append(self, step: Step) -> Acknowledged:
        (answer,) = self._writer.append(step)
        return _taken(answer)

    def _carry(self) -> None:
        """Writes a claimed session to the own log, where KV that does not fit into one commit is left out: it goes again."""
        acknowledged = self._append(Step(self.session))
        self.valid_tokens = acknowledged.valid_tokens
        self._decoder.kv.went(min(acknowledged.valid_tokens, self._decoder.kv.tokens))

    def _send(self) -> None:
        """Starts the commit of all that is new. Its KV goes before its ids where it does not fit into one commit with them."""
        for _ in range(_TAKEN_BACK_MAX):
            try:
                if self._writer.is_due:
                    self._append(Step(self.session, ends="moved"))
                    self._take_back()
                return self._send_once()
            except _ENDED:
                if not self._writer.broken:
                    raise
                self._take_back()
        self._send_once()

    def _send_once(self) -> None:
        decoder, first = self._decoder, None
        if not self.tokens and not self._begun():
            facts = {**self._head.facts, "kv": decoder.kv.layout()}
            shape = Shape(groups=decoder.kv.groups)
            first = Head(self.prompt, facts, self._head.sampling, self._head.seed, None, shape)
        steps = list(decoder.kv.steps())
        for pieces, valid in steps[:-1]:
            step = Step(self.session, self._adding([], pieces, valid), first)
            self.valid_tokens, first = self._append(step).valid_tokens, None
            self._is_begun = True
        pieces, valid = steps[-1]
        ids = decoder.ids[0, len(self.prompt) + len(self.tokens) :].tolist()
        step = Step(self.session, self._adding(ids, pieces, valid), first)
        self._pending = (self._writer.start_append(step), len(self.tokens) + len(ids))

    _is_begun = False

    def _begun(self) -> bool:
        return self._resumed or self._is_begun

    def _adding(self, ids: list[int], pieces, valid: int) -> Append:
        start = len(self.prompt) + len(self.tokens)
        generated = len(self.tokens) + len(ids)
        sampler = Sampler(counter=generated, budget=self._prepared.max_length - start - len(ids))
        return Append(start, ids, min(self._given, generated), valid, sampler, pieces)

    def _acknowledge(self) -> None:
        """Waits until what was sent is durable. Where the log ended meanwhile, and nobody else has the session, it is sent again to another one."""
        for _ in range(_TAKEN_BACK_MAX):
            if self._pending is None:
                return
            (started, generated), self._pending = self._pending, None
            try:
                (answer,) = started.wait()
                acknowledged = _taken(answer)
            except _ENDED as error:
                if not self._writer.broken:
                    raise
                logger.info("kvstore: %s", error)
                self._take_back()
                if len(self.tokens) < generated:
                    self._send_once()
                continue
            self._is_begun = True
            self.valid_tokens = acknowledged.valid_tokens
            ids = self._decoder.ids[0, len(self.prompt) + len(self.tokens) : len(self.prompt) + generated]
            self.tokens += ids.tolist()
        if self._pending is not None:
            raise kvstore.Unavailable(f"the session {self.session} could not be gone on with: its logs end one after the other")

    def _take_back(self) -> None:
        """Claims the own session for another writer, unless somebody else has it: a log ends for all of its sessions at once."""
        self._writer = self._worker._current(instead_of=self._writer)
        claimed = self._writer.claim(self.session, since=self._epoch)
        self._epoch, found = claimed.epoch, claimed.session
        if found is None:
            self._is_begun = False
            self._decoder.kv.went(0)
            return
        own = self._decoder.ids[0, len(self.prompt) :].tolist()
        if found.generated != own[: len(found.generated)] or len(found.generated) < len(self.tokens):
            raise kvstore.DataLoss(f"the session {self.session} is not what this process acknowledged")
        self._is_begun = True
        self.tokens = list(found.generated)
        self._carry()

    def _close(self) -> None:
        end = Append(len(self.prompt) + len(self.tokens), [], len(self.tokens), self.valid_tokens)
        for _ in range(_TAKEN_BACK_MAX):
            try:
                self._append(Step(self.session, end, ends="closed"))
                self._is_over = True
                return
            except _ENDED:
                if not self._writer.broken:
                    raise
                self._take_back()
        raise kvstore.Unavailable(f"the session {self.session} could not be closed")


def _taken(answer: Acknowledged | Refused) -> Acknowledged:
    if isinstance(answer, Refused):
        raise kvstore.Invalid(answer.why)
    return answer
