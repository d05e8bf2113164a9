"""The shared log of the index in Redis: one stream of events, and a snapshot of every location.

What is kept, all under one hash tag so that a Redis Cluster holds it on one node (an ACL user needs
`~{headrace:index}* +@read +@write +@scripting +@transaction +time`):

    {prefix}:log                stream: location, and `event` (bytes) or `gone` (epoch)
    {prefix}:lives              hash: location -> registered lifetime, next sequence, what its snapshot covers
    {prefix}:heard              sorted set: location by the time when it last wrote
    {prefix}:snapshot:LOCATION  list: parts of its snapshot; protobuf messages that joined are one message
    {prefix}:quarantined        sorted set: the last `MOST_QUARANTINED` hashes by the time when each was quarantined
    {prefix}:meta               hash: incarnation, last id, id up to which the stream may be trimmed

Every write is one script, so it happens whole or not at all, and a write of another lifetime or out of order is
refused where it would land. The stream is trimmed up to the oldest entry that some location's snapshot lacks.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha1
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from headrace.core.block import HASH_BYTES, BlockHash
from headrace.errors import InvalidRequest
from headrace.index.events import Event, Snapshot, event_to_bytes, snapshot_from_bytes

STAGED_MS = 60_000
"""How long the parts of an unfinished snapshot stay."""
MOST_QUARANTINED = 65_536
"""Hashes of quarantined blocks that are kept for readers which miss the entries that told of them."""
READ_ENTRIES = 64
"""Entries read at a time; publishers keep one to some 128 KiB."""


_log = logging.getLogger(__name__)


class Written(IntEnum):
    """Answer to a write; numbers are those of the scripts."""

    DONE = 1
    """It is in the log, now or since an earlier try."""
    FENCED = 2
    """A later lifetime of the location is registered: this one has ended."""
    RESYNC = 3
    """The log does not know what came before: the location has to register again, with all that it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """One life of one location; of two, the one that started later counts.

    Attributes:
        location: Name of the worker or kvstore.
        epoch: Differs between lives.
    """

    location: str
    epoch: str
    started_unix_ms: int


@dataclass(frozen=True, slots=True, order=True)
class EntryId:
    """Place of an entry in the stream; orders as the stream does."""

    unix_ms: int = 0
    number: int = 0

    def __str__(self) -> str:
        return f"{self.unix_ms}-{self.number}"

    @classmethod
    def parse(cls, text: bytes | str) -> "EntryId":
        """Read what Redis writes.

        Raises:
            InvalidRequest: it is no place.
        """
        unix_ms, _, number = (text if isinstance(text, str) else text.decode("utf-8", "replace")).partition("-")
        try:
            return cls(int(unix_ms), int(number))
        except ValueError as error:
            raise InvalidRequest("the index log holds something else in place of an entry's id") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry: an event's bytes, or none where the location was removed."""

    id: EntryId
    location: str
    event: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """What the log knows of a location.

    Attributes:
        snapshot_sequence: First event that its snapshot lacks.
        since: Where the stream ended when that snapshot was taken.
        before: A place before the first event that the snapshot lacks; none if it lacks none.
    """

    epoch: str
    snapshot_sequence: int
    since: EntryId
    before: EntryId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogState:
    """The log as a whole.

    Attributes:
        incarnation: Changes when Redis has lost everything; none as long as nothing is written.
        last: Its last entry.
        trimmed: Entries before this one may be gone.
    """

    incarnation: str | None
    last: EntryId
    trimmed: EntryId


class IndexLog:
    """Reads and writes the log.

    Its methods raise `redis.exceptions.RedisError` or `OSError` when Redis does not answer; a write may then have
    happened, and repeating it is safe.

    Args:
        redis: A client that speaks version 2 of the protocol and returns bytes, as `connection.connect` makes.
        prefix: Begins the name of every key; one per cluster.
        forget_after_s: A location that has not written for so long is removed by the next that does.
        keep_s: Entries stay at least so long, so that a reader that was away briefly needs no snapshot.
    """

    def __init__(
        self, redis: Redis, *, prefix: str = "headrace:index", forget_after_s: float = 600.0, keep_s: float = 60.0
    ) -> None:
        self._redis = redis
        self._root = f"{{{prefix}}}"
        self._limits = (int(forget_after_s * 1000), int(keep_s * 1000))

    async def begin(self, life: Lifetime, sequence: int, snapshot: Sequence[bytes] = ()) -> Written:
        """Register a lifetime, or register it again; whatever the log knew of the location is replaced.

        Args:
            life: Who.
            sequence: Number of the event, without changes, that tells the readers: 0 for a new lifetime, else
                one that leaves a gap, so that they read the snapshot.
            snapshot: Parts, of all blocks after that event; empty is no block.
        """
        await self._stage(life, snapshot)
        event = event_to_bytes(Event(location=life.location, epoch=life.epoch, sequence=sequence))
        return await self._write(_BEGIN, life, sequence, len(snapshot), event)

    async def append(
        self, life: Lifetime, sequence: int, event: bytes, quarantined: Sequence[BlockHash] = ()
    ) -> Written:
        """Append an event; the one appended last may be repeated.

        Args:
            life: Who.
            sequence: Number of the event.
            event: Its bytes.
            quarantined: Blocks that the event says are not to be trusted: they are kept beside the stream too.
        """
        return await self._write(_APPEND, life, sequence, event, b"".join(quarantined), HASH_BYTES, MOST_QUARANTINED)

    async def quarantined(self) -> tuple[BlockHash, ...]:
        """Return the blocks that were quarantined last, for whoever may have missed an entry."""
        hashes: Any = await self._redis.zrange(self._key("quarantined"), 0, -1)
        return tuple(BlockHash(block_hash) for block_hash in hashes if len(block_hash) == HASH_BYTES)

    async def snapshot(self, life: Lifetime, next_sequence: int, snapshot: Sequence[bytes]) -> Written:
        """Replace the location's snapshot and trim what no snapshot lacks any more.

        Args:
            life: Who.
            next_sequence: Number of the event that it will append next.
            snapshot: Parts, of all blocks before that event.
        """
        await self._stage(life, snapshot)
        return await self._write(_SNAPSHOT, life, next_sequence, len(snapshot))

    async def touch(self, life: Lifetime, next_sequence: int) -> Written:
        """Say that the location is alive and where it stands."""
        return await self._write(_TOUCH, life, next_sequence)

    async def leave(self, life: Lifetime) -> Written:
        """Remove the location and all it holds."""
        return await self._write(_LEAVE, life, 0)

    async def state(self) -> LogState:
        """Return the state of the log."""
        values: Any = await self._redis.hmget(self._key("meta"), _STATE)
        return _state(values)

    async def registered(self) -> Mapping[str, Registered]:
        """Return every location of the log; what somebody else wrote there is left out."""
        lives: Any = await self._redis.hgetall(self._key("lives"))
        found: dict[str, Registered] = {}
        for location, packed in lives.items():
            try:
                found[_name(location)] = _registered(packed)
            except InvalidRequest as error:
                _log.warning("index_location_unreadable", extra={"problem": str(error)})
        return found

    async def read_snapshot(self, location: str) -> tuple[Registered, Snapshot] | None:
        """Return a location's snapshot and where it belongs; none if the log does not know the location.

        Raises:
            InvalidRequest: it is no snapshot.
        """
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hget(self._key("lives"), location)
            pipe.lrange(self._key("snapshot", location), 0, -1)
            packed, parts = await pipe.execute()
        if packed is None:
            return None
        life = _registered(packed)
        empty = Snapshot(location=location, epoch=life.epoch, next_sequence=life.snapshot_sequence)
        return life, snapshot_from_bytes(b"".join(parts)) if parts else empty

    async def read(self, after: EntryId, wait_s: float) -> tuple[list[Entry], LogState]:
        """Return up to `READ_ENTRIES` entries after a place, and the log's state once they were read.

        Args:
            after: The place.
            wait_s: How long to wait for a first one, 0 not at all; less than the connection waits for an answer.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.xread({self._key("log"): str(after)}, count=READ_ENTRIES, block=int(wait_s * 1000) or None)
            pipe.hmget(self._key("meta"), _STATE)
            found, values = await pipe.execute()
        return [_entry(*item) for _, items in found or () for item in items], _state(values)

    def _key(self, *names: str) -> str:
        return ":".join((self._root, *names))

    async def _stage(self, life: Lifetime, parts: Sequence[bytes]) -> None:
        """Leave a snapshot's parts where the script finds them, one at a time: none holds Redis up for long."""
        key = self._key("staged", life.location, life.epoch)
        if parts:
            await self._redis.delete(key)
        for part in parts:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.rpush(key, part)
                pipe.pexpire(key, STAGED_MS)
                await pipe.execute()

    async def _write(self, script: "_Script", life: Lifetime, *args: int | bytes) -> Written:
        argv = (life.location, life.epoch, life.started_unix_ms, *self._limits, *args)
        try:
            answer = await self._redis.evalsha(script.digest, 1, self._root, *argv)
        except NoScriptError:
            answer = await self._redis.eval(script.text, 1, self._root, *argv)
        return Written(answer)


_STATE = ["incarnation", "last", "trimmed"]


def _state(values: Sequence[bytes | None]) -> LogState:
    incarnation, last, trimmed = values
    return LogState(
        incarnation=None if incarnation is None else _name(incarnation),
        last=EntryId() if last is None else EntryId.parse(last),
        trimmed=EntryId() if trimmed is None else EntryId.parse(trimmed),
    )


class _Packed(msgspec.Struct, frozen=True):
    """What the scripts keep of a location."""

    epoch: str
    snapshot_sequence: int
    since: str
    before: str | None = None


def _registered(packed: bytes) -> Registered:
    try:
        life = msgspec.msgpack.decode(packed, type=_Packed)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the index log holds something else in place of a location: {error}") from error
    return Registered(
        epoch=life.epoch,
        snapshot_sequence=life.snapshot_sequence,
        since=EntryId.parse(life.since),
        before=None if life.before is None else EntryId.parse(life.before),
    )


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    return Entry(id=EntryId.parse(entry_id), location=_name(fields.get(b"location", b"")), event=fields.get(b"event"))


def _name(data: bytes) -> str:
    """Return a name; one that somebody else wrote may be anything, and then is nobody's."""
    return data.decode("utf-8", "replace")


class _Script:
    """A script and the name by which Redis knows it."""

    def __init__(self, body: str) -> None:
        self.text = _PRELUDE + body
        self.digest = sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_PRELUDE = """
local root, location, epoch, started = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local forget_ms, keep_ms, sequence = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local META, LIVES, HEARD, LOG = root .. ':meta', root .. ':lives', root .. ':heard', root .. ':log'
local DONE, FENCED, RESYNC = 1, 2, 3
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local packed = redis.call('HGET', LIVES, location)
local life = packed and cmsgpack.unpack(packed)

local refusal = nil
if not life then
  refusal = RESYNC
elseif life.epoch ~= epoch then
  local is_later = life.started > started or (life.started == started and life.epoch > epoch)
  refusal = is_later and FENCED or RESYNC
end

local function last()
  return redis.call('HGET', META, 'last') or '0-0'
end

local function add(name, kind, payload)
  local id = redis.call('XADD', LOG, '*', 'location', name, kind, payload)
  redis.call('HSETNX', META, 'incarnation', time[1] .. '.' .. time[2])
  redis.call('HSET', META, 'last', id)
  return id
end

local function remove(name, ended)
  redis.call('HDEL', LIVES, name)
  redis.call('ZREM', HEARD, name)
  redis.call('DEL', root .. ':snapshot:' .. name)
  add(name, 'gone', ended)
end

-- Nobody is removed for silence while nobody could write: a long silence of all spares all.
local function hear()
  redis.call('ZADD', HEARD, now, location)
  local times = redis.call('HMGET', META, 'written', 'spared')
  local spared = tonumber(times[2] or 0)
  if now - tonumber(times[1] or now) > forget_ms / 10 then
    spared = now + forget_ms
    redis.call('HSET', META, 'spared', spared)
  end
  redis.call('HSET', META, 'written', now)
  if now < spared then return end
  local silent = redis.call('ZRANGE', HEARD, '-inf', now - forget_ms, 'BYSCORE', 'LIMIT', 0, 16)
  for _, name in ipairs(silent) do
    local other = redis.call('HGET', LIVES, name)
    remove(name, other and cmsgpack.unpack(other).epoch or '')
  end
end

local function save()
  redis.call('HSET', LIVES, location, cmsgpack.pack(life))
  hear()
end

local function install(num_parts)
  local staged, snapshot = root .. ':staged:' .. location .. ':' .. epoch, root .. ':snapshot:' .. location
  if num_parts == 0 then
    redis.call('DEL', snapshot)
    return true
  end
  if redis.call('LLEN', staged) ~= num_parts then return false end
  redis.call('RENAME', staged, snapshot)
  redis.call('PERSIST', snapshot)
  return true
end

local function is_before(a, b)
  local a_ms, a_number = a:match('(%d+)-(%d+)')
  local b_ms, b_number = b:match('(%d+)-(%d+)')
  if a_ms ~= b_ms then return tonumber(a_ms) < tonumber(b_ms) end
  return tonumber(a_number) < tonumber(b_number)
end

local function trim()
  local oldest, kept = last(), string.format('%.0f-0', math.max(0, now - keep_ms))
  if is_before(kept, oldest) then oldest = kept end
  for _, other in ipairs(redis.call('HVALS', LIVES)) do
    local is_life, known = pcall(cmsgpack.unpack, other)
    local before = is_life and type(known) == 'table' and known.before
    if before and is_before(before, oldest) then oldest = before end
  end
  if redis.call('XTRIM', LOG, 'MINID', '=', oldest) > 0 then
    redis.call('HSET', META, 'trimmed', oldest)
  end
end
"""

_BEGIN = _Script("""
if refusal == FENCED then return FENCED end
if not install(tonumber(ARGV[7])) then return RESYNC end
local id = add(location, 'event', ARGV[8])
life = {epoch = epoch, started = started, next = sequence + 1, snapshot_sequence = sequence + 1, since = id}
save()
trim()
return DONE
""")

_APPEND = _Script("""
if refusal then return refusal end
if sequence == life.next - 1 then
  hear()
  return DONE
end
if sequence ~= life.next then return RESYNC end
if not life.before then life.before = last() end
add(location, 'event', ARGV[7])
local hashes, size, most = ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
for start = 1, #hashes, size do
  redis.call('ZADD', root .. ':quarantined', now, hashes:sub(start, start + size - 1))
end
if #hashes > 0 then redis.call('ZREMRANGEBYRANK', root .. ':quarantined', 0, -most - 1) end
life.next = sequence + 1
save()
return DONE
""")

_SNAPSHOT = _Script("""
if refusal then return refusal end
if sequence ~= life.next or not install(tonumber(ARGV[7])) then return RESYNC end
life.snapshot_sequence, life.since, life.before = sequence, last(), nil
save()
trim()
return DONE
""")

_TOUCH = _Script("""
if refusal then return refusal end
if sequence ~= life.next then return RESYNC end
hear()
return DONE
""")

_LEAVE = _Script("""
if not refusal then remove(location, epoch) end
return refusal or DONE
""")
