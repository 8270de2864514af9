"""Inside a process that asks for agents: the manager, discovery, the command.

**Authority.** None. A caller decides no status and no death. It decides only which of the routable instances it uses,
and whether a handle is proven.

**Sources.** `sources` defines what a source is; `live_sources` and `fallback_sources` are the four of them; `resolver`
asks them in order and returns the first complete answer:

    followed cache  ->  registry  ->  PostgreSQL (discovery only)  ->  Ray's listing (names only)

A source that does not answer, or cannot answer this question, raises NoAnswerError, and the next one is asked. Only a
complete answer proves that an agent is not routable: NotResolvableError, with its `reason`. If no source can know,
CannotKnowError is raised: an outage never looks like an empty fleet.

**Handles.** `locator` uses the same ladder for one agent and proves the handle (`handles`, `proofs`). A manager also
remembers agents (`known_agents`), for while the registry is away. `handle_cache` keeps handles:

    not cached --locate by the followed cache, fresh--> cached, proof pending --proof yes--> cached, proven
         ^                                                     |                                  |
         +-------- evicted: the agent changed in the feed, the feed was reset, Ray reports <------+
                   the actor gone, the proof is negative, or the agent is certainly not routable

A cached handle is used only while the follower is current, so a resolution from the cache asks no other process.

**The followed cache** of live agents is kept by a follower (`registry.following`).

**Waits and watches.** `waiting` listens to the follower, proves each agent that changes, and returns once enough are
proven; at the deadline `missing` asks for the reason of each other agent. `watching` reads the follower's copy of the
feed: its position is its only state, so that a slow consumer gets a gap with the state instead of a silent loss.

**Trust.** The followed cache: 4 s (`MAX_AGE_S`) after the registry sent its last answer. A registry's or database's
record: until the actor's own answer contradicts it. A remembered agent, or a name in Ray's listing: not at all; only
the actor's answer counts. A negative answer is never cached.

**When a neighbour is away.**

- The registry: one caller waits for the timeout, the others fail fast (`protocol.connection`). The followed cache is
  used until it is too old, then PostgreSQL or the remembered agents, then Ray's listing.
- PostgreSQL: no effect while the registry answers; history and deaths are not available.
- Ray's table of actors (the GCS): the last handle of each name is used, if its actor answers (`ActorTable`).
- The agent's process: a call fails, its handle is evicted, the registry gets a report, and the agent is resolved again.
"""
