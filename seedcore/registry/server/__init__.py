"""The registry: one detached, named actor in each namespace, pinned to the head node.

**Authority.** It decides which instances live, which status they have, which epoch is shown, and who is dead. It
answers from memory. The database is the record: a change is acknowledged as durable when it is committed there.

**Its session with the database** (`database`). A registry writes under a term; the database refuses an older one.

    unread ---- join: take a term, read all live instances ----> writing <---- an answer ---- failing
                                                                  |   |                          ^
                                                                  |   +------ an error ----------+
    writing <--- what was lost is written again --- restoring <---+ lost commits
                                                                  |
    writing <--- the newer registry is not at work any more --- superseded <--- a newer term, in any state

It serves in all of these states. While it is `restoring`, its answers are complete: memory has what the database has
lost (`restoration`). While it is `unread` or `superseded`, answers carry `complete=False`, no lease ends, and an
instance that memory does not have is not called unknown, until the database has been away for a whole lease. A
`superseded` registry refuses every change and records no beat.

**A change** (`registry`, `operations`, `backlog`, `flusher`, `writer`).

    accepted in memory ---> in the backlog ---> committed in a batch ---> durable: the receipt
          |                      |
          +-> refused: an error  +-> refused by the database alone: memory takes the database's state (`comparison`)

The backlog is bounded, and refuses changes when it is full; agents keep and repeat them. A death that the registry
declares is never refused: there is room for one of each instance.

**What an operator does** (`operations`) is a hold beside what the agent reports. The agent's reports go on under it and
do not end it; the status that callers see follows from both (`core.holds`).

    not held ---> drain ---> held ---> undrain, or its end: released ---> as the agent reports

**A node that Ray drains** (`drains`) is a hold of each of its instances, as long as Ray reports the drain.

    not held ---> a look at Ray's tables reports it ---> held ---> 12 looks in a row do not: released

The agent's own hold of kind `readiness` is a change of the agent, with its number. That of kind `process` is placed
here when a relay reports the end of a process that the agent's registration names (`ended_processes`), and released by
the agent, which then depends on another one.

**An instance** (`expiry`; the table is in docs/verdicts.md, the function is `core.verdict.judge`).

    fresh ---> late ---> suspect ---> dead: lease        beats
      any of these ----> dead: process, node, actor      a witness

All that is known of an instance is judged at once, in one place. A death by a witness is declared at once; expired
leases are declared by the sweep, a bounded number at a time, and not while expiry is frozen.

**What it trusts, and for how long.** A beat: until the lease ends (`lease_s`), with every stall of this process
credited. A relay's or Ray's report of an end: at once and for good. A caller's report that an actor is dead: as a
reason to ask Ray, and to resolve the instance no longer until its next beat. The database's state of an instance: over
memory's, unless memory is ahead by a newer sequence number or knows a death. Its term: until the database refuses it.

**When a neighbour is away.**

- The database: the registry goes on from memory. Changes are answered `durable=False`, and wait in the backlog.
  History, dead instances and epoch flips raise StoreUnavailableError at once.
- A relay: another is created, after delays that grow until one has worked for a while. Its node's instances live by
  their beats alone until then; `health` shows it.
- Ray (GCS): nodes, relays and actors are not asked; what was known stays, the holds of draining nodes too. Calls to Ray
  run in threads, so that the event loop never waits.
- An agent: its verdict becomes late, then suspect, and its lease ends.
- A large part of the fleet: expiry is frozen. A death is declared if it has a witness: a relay, Ray, or a newer
  instance of the same actor that beats.
- This process itself: Ray starts it again. It joins the database, every instance gets a whole lease, and agents repeat
  what was not acknowledged.
"""
