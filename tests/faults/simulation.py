"""A fleet, its relays, its registries and their database in one process, under faults drawn from a seed.

Everything of ours is the real code: the connection of every process, agents' clients and reporters, relays, death
watch, registry and write loop, callers' followers, resolvers and handles. Simulated are time, Ray (the actors and the
network between them), the processes and the database (the memory store, which the conformance suite holds to
PostgreSQL): see `simulated`.

    python -m tests.faults.simulation --seed 17            # one history, with what happened in it
    python -m tests.faults.simulation --count 10000        # many

The laws, checked all the time and at the end of every history:

1. A change acknowledged as durable is committed at that moment, and stays so.
2. The changes of one agent's process are committed in their order, each once.
3. Nothing follows `dead` in the life of an instance.
4. One registry writes in each term, and terms only grow.
5. No instance is declared dead whose process lives and could reach the registry.
6. At the end of all faults every process that ended is dead in the database, with a cause; at the latest when a freeze
   of expiry ends, where no witness confirms its end.
7. Then every process that lives is live once, with the status, the readiness and the endpoints that it reported last,
   in memory and in the database alike, and no client keeps an undelivered change, also where the database refused a
   value of another.
8. A registry resolves no instance whose death it has committed, and has none in its lists and its feed.
9. A follower's cache, while it is trusted, equals the state of its registry at the version that it has, verdicts
   included. When all is quiet it is trusted, and equals what the registry has.
10. A registry that has not read its database, or that a newer one has superseded, calls no instance unknown that the
    database has: it asks agents to register again only after a whole lease without its database.
11. An actor's instances are all of the epoch that it was started in, also those of the processes that Ray starts for it
    later; where a registry took the database over, those that insist on none go on in the epoch that continues it.
12. An operator's hold that was acknowledged as durable stays until it is released or expires, whatever the agent
    reports, and no registry that knows it resolves the instance.
13. The effective status of every instance, in memory and in the database, follows from its reported status and holds.
14. A registry refuses no report of a death, however full its backlog is.
15. A caller gets an instance, or a handle of its actor, only if a registry or the database has named it as routable
    shortly before, which is the time that an answer may take and a cache is trusted. Where neither answers, and for an
    agent that does not report, the actor itself has answered. When all is quiet, every routable agent is found, and no
    other.
16. A call that may not be repeated is sent at most once.
17. Nothing is lost that a living party holds, where the database loses its last commits or is restored to an earlier
    time. A registry that lives on writes nothing to it before it has joined it again; when it is complete, the
    registrations, statuses, holds, deaths with their causes and flips that it had acknowledged are there again, and
    their history where it claims so. A registry that is new gets the last registration, status and readiness of every
    agent that lives. When all is quiet, database, registry and agents agree (law 7).
18. Never a mixture of epochs: one answer of a registry, or one trusted cache, has instances of one epoch; a registry
    names none of an epoch that it has left; and once an agent has brought it a later epoch than its database has, or
    it has shown one itself, it names none until an operator has confirmed an epoch.

19. A node hold by Ray is on exactly the living instances of the nodes that Ray drains, once all is quiet. A drain that
    begins then leaves no instance of the node with any caller three seconds later, and no hold ends because a GCS that
    has restarted does not report the drain yet.

Between a loss and its end laws 1, 10, 11 and 12 do not hold for the database, but law 12 for a registry that lives on.
Law 1 does not hold for a registry that has not asked the database since the loss.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
from collections import Counter

from tests.faults.mutants import MUTANTS
from tests.faults.simulated.history import run_seed


def main() -> int:
    """Run one history, or many on every core, and print the seeds that broke a law."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="one history, with everything that happens in it")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="break the code so, and stop at the first violation")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # the order of sets is a part of the history
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.faults.simulation", *sys.argv[1:]])
    breakage = contextlib.ExitStack()
    if options.mutant is not None:
        # to the end: a patch that is not kept may be undone when it is collected
        breakage.enter_context(MUTANTS[options.mutant].patch())
    if options.seed is not None:
        _, violation, counts, log = run_seed(options.seed)
        print("\n".join(log), dict(counts), violation or "no violation", sep="\n")
        return 1 if violation else 0
    totals: Counter[str] = Counter()
    broken: list[str] = []
    # a process for each history: nothing of one may reach the next
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        seeds = range(options.first, options.first + options.count)
        for done, (_, violation, counts, _) in enumerate(pool.imap(run_seed, seeds), 1):
            totals.update(counts)
            if violation is not None:
                broken.append(violation)
                print(violation, flush=True)
                if options.mutant is not None:
                    return 1
            if done % 500 == 0:
                print(f"{done} histories, {len(broken)} with a violation", file=sys.stderr, flush=True)
    print(f"{options.count} histories, {len(broken)} with a violation")
    for name, count in totals.most_common():
        print(f"{count:10d}  {name}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
