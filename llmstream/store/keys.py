"""Every key the service ever writes, by name. What must change together shares a ``{hash tag}``; every key has a TTL.

{prefix}:{JOB}:job          hash    one job: spec, status, attempt, owner, outcome
{prefix}:{JOB}:log          stream  its events; entry id = id of the entry's last event
{prefix}:{JOB}:readers      zset    who reads it -> end of the lease, where that decides whether it goes on
{prefix}:{s:SESSION}:jobs   zset    the jobs of a session by creation time; PRINCIPAL/SESSION where there are keys
{prefix}:{u:PRINCIPAL}:jobs zset    the latest jobs of a principal by creation time, where there are keys
{prefix}:{k:DIGEST}:job     string  what a request is known by when it comes again -> its job
{prefix}:{s:OWNER/SESSION}:chat   hash  a conversation: its messages, the job that answers the last ones, and these
{prefix}:{s:OWNER/SESSION}:turns  list  who is about to add to it, in order of arrival
{prefix}:{s:OWNER/SESSION}:alive  zset  the same by the end of their lease
{prefix}:{u:OWNER}:sessions       zset  the sessions of an owner by last use
{prefix}:{c:OWNER}:entries  hash    name of a request -> the job that answers it | end of its life in microseconds
{prefix}:{c:OWNER}:used     zset    the same names by last use
{prefix}:{c:OWNER}:stats    hash    hits, misses, shared and evictions of these entries
{prefix}:{q:POOL}:order     zset    waiting jobs by level and turn: the order of service inside a level
{prefix}:{q:POOL}:ages      zset    the same jobs by level and time of arrival: how urgent a level is
{prefix}:{q:POOL}:meta      hash    job -> level|arrival|principal|deadline|turn|model, while it waits or runs; of a
                                    caller with limits also |caller|most that run|urgency when it was parked
{prefix}:{q:POOL}:turns     hash    level -> turn being served, level:principal -> last turn given out
{prefix}:{q:POOL}:claims    hash    job -> replica|claimed at|number of the claim
{prefix}:{q:POOL}:replicas  zset    replica -> end of its lease
{prefix}:{q:POOL}:slots     hash    replica -> slots it offers
{prefix}:{q:POOL}:deadlines zset    waiting jobs with a deadline of their own
{prefix}:{q:POOL}:cancels   zset    recently cancelled jobs, for owners that missed the wake-up
{prefix}:{q:POOL}:index     zset    every job of the pool by creation time, trimmed to the retention time
{prefix}:{q:POOL}:stats     hash    measured service time, jobs served, number of the last claim
{prefix}:pools              zset    every pool -> its last heartbeat by any replica
{prefix}:{q:POOL}:unread    zset    jobs that end without readers -> when to look for these again
{prefix}:{q:POOL}:dead      zset    jobs that failed after all their attempts, by the time of it
{prefix}:{q:POOL}:scheduled zset    jobs that may not begin yet, by the time when they may
{prefix}:{q:POOL}:paused    zset    jobs that wait aside until a pause ends, by level and turn
{prefix}:{q:POOL}:control   hash    the pool's copy of what is paused and draining, and as of which version
{prefix}:queues             hash    what is paused and draining, and the version of it
{prefix}:{q:POOL}:hooked    hash    job -> who is to hear of its end, while it waits or runs
{prefix}:{q:POOL}:outbox    zset    job|receiver of each event to be delivered -> when to try, or when its lease ends
{prefix}:{q:POOL}:tries     hash    the same -> how often it was tried and what came of it
{prefix}:{q:POOL}:undelivered  zset events that were given up, by the time of it
{prefix}:{q:POOL}:callers   zset    state|caller|… of each job of a caller with limits: who has how many
{prefix}:{q:POOL}:parked    zset    jobs that wait until another one of their caller has ended, by level and turn
{prefix}:{n:NUMBER}:probe   string  written to see whether a server takes writes; numbers spread over a cluster
{prefix}:{t:TARGET}:window  hash    requests and tokens of the last minute by slice of time, and their sums
{prefix}:{t:TARGET}:holds   hash    replica|try -> slice it was counted in|tokens reserved|number: its slot
{prefix}:{t:TARGET}:leases  zset    replica -> until when its slots are its own
{prefix}:{t:TARGET}:line    zset    replica that waits -> its most urgent request
{prefix}:{t:TARGET}:asked   zset    replica that waits -> until when it counts as waiting
{prefix}:{breakers}:states  hash    target -> how often its breaker opened|until when|closed at|probe until|who probes
{prefix}:{breakers}:failures:TARGET hash  slice of time -> failures|successes
{prefix}:{l:WHO}:NAME       string  a bucket of a caller: looked at | what was missing then
{prefix}:{l:WHO}:took:RECEIPT string that something was taken under this receipt
{prefix}:{l:WHO}:noted:JOB  string  what was taken for a job | limit | window; then that it is settled
{prefix}:api_keys           hash    id of an API key -> all but its secret
{prefix}:stream_secret      string  signs the URLs of streams
{prefix}:wake               channel pool names with new work
{prefix}:cancel             channel ids of cancelled jobs
{prefix}:room               channel targets that may have room again
{prefix}:breaker            channel targets whose breaker opened or closed
{prefix}:revoked            channel ids of revoked API keys
{prefix}:over               channel ids of jobs that are over, where RabbitMQ waits to hear of it

{broker.result_prefix}:JOB  string  the result of an order from RabbitMQ, named by who posts it; also a channel that
                                    says 'set' when it is there
"""

from __future__ import annotations

from urllib.parse import quote

from llmstream.types import LOCAL

QUEUE_PARTS = (
    "order",
    "ages",
    "meta",
    "turns",
    "claims",
    "replicas",
    "slots",
    "deadlines",
    "cancels",
    "index",
    "stats",
    "unread",
    "dead",
    "scheduled",
    "paused",
    "control",
    "hooked",
    "outbox",
    "callers",
    "parked",
)
OUTBOX_PARTS = ("outbox", "tries", "undelivered")
BUDGET_PARTS = ("window", "holds", "leases", "line", "asked")


class Keys:
    """Names of keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.pools = f"{prefix}:pools"
        self.wake = f"{prefix}:wake"
        self.cancel = f"{prefix}:cancel"
        self.room = f"{prefix}:room"
        self.breaker = f"{prefix}:breaker"
        self.api_keys = f"{prefix}:api_keys"
        self.stream_secret = f"{prefix}:stream_secret"
        self.revoked = f"{prefix}:revoked"
        self.over = f"{prefix}:over"
        self.queues = f"{prefix}:queues"

    def job(self, job_id: str) -> str:
        return f"{self._prefix}:{{{job_id}}}:job"

    def log(self, job_id: str) -> str:
        return f"{self._prefix}:{{{job_id}}}:log"

    def readers(self, job_id: str) -> str:
        return f"{self._prefix}:{{{job_id}}}:readers"

    def probe(self, number: int = 0) -> str:
        return f"{self._prefix}:{{n:{number}}}:probe"

    def session(self, session_id: str, principal: str = LOCAL) -> str:
        owner = "" if principal == LOCAL else f"{quote(principal, safe='')}/"
        return f"{self._prefix}:{{s:{owner}{quote(session_id, safe='')}}}:jobs"

    def owned(self, principal: str) -> str:
        return f"{self._prefix}:{{u:{quote(principal, safe='')}}}:jobs"

    def repeat(self, digest: str) -> str:
        return f"{self._prefix}:{{k:{digest}}}:job"

    def conversation(self, owner: str, session_id: str) -> tuple[str, str, str]:
        """The conversation, its line and who is alive in it."""
        tag = f"{self._prefix}:{{s:{quote(owner, safe='')}/{quote(session_id, safe='')}}}"
        return f"{tag}:chat", f"{tag}:turns", f"{tag}:alive"

    def sessions(self, owner: str) -> str:
        return f"{self._prefix}:{{u:{quote(owner, safe='')}}}:sessions"

    def cache(self, owner: str) -> tuple[str, str, str]:
        """Entries, their last uses, statistics."""
        tag = f"{self._prefix}:{{c:{quote(owner, safe='')}}}"
        return f"{tag}:entries", f"{tag}:used", f"{tag}:stats"

    def queue(self, pool: str) -> tuple[str, ...]:
        """The keys of one pool's queue, in the order of ``QUEUE_PARTS``."""
        tag = f"{self._prefix}:{{q:{quote(pool, safe='')}}}"
        return tuple(f"{tag}:{part}" for part in QUEUE_PARTS)

    def outbox(self, pool: str) -> tuple[str, ...]:
        """The keys of one pool's deliveries, in the order of ``OUTBOX_PARTS``."""
        tag = f"{self._prefix}:{{q:{quote(pool, safe='')}}}"
        return tuple(f"{tag}:{part}" for part in OUTBOX_PARTS)

    def budget(self, target: str) -> tuple[str, ...]:
        """The keys of one target's limits, in the order of ``BUDGET_PARTS``."""
        tag = f"{self._prefix}:{{t:{quote(target, safe='')}}}"
        return tuple(f"{tag}:{part}" for part in BUDGET_PARTS)

    def breakers(self, *targets: str) -> tuple[str, ...]:
        """The key of all breakers' states, then that of each target's failures; all in one hash slot."""
        tag = f"{self._prefix}:{{breakers}}"
        return (f"{tag}:states", *(f"{tag}:failures:{quote(target, safe='')}" for target in targets))

    def bucket(self, who: str, name: str) -> str:
        return f"{self._prefix}:{{l:{quote(who, safe='')}}}:{name}"

    def receipt(self, who: str, receipt: str) -> str:
        return f"{self._prefix}:{{l:{quote(who, safe='')}}}:took:{receipt}"

    def noted(self, who: str, job_id: str) -> str:
        return f"{self._prefix}:{{l:{quote(who, safe='')}}}:noted:{job_id}"
