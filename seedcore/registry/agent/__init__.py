"""Inside an agent's process: what reports the agent to the registry.

Authority. This process alone decides what its agent has asked for: the order of its changes, each with the agent's own
number (`pending`), and its own `dead`, which is final. It does not decide whether the agent is alive to others: the
registry does. The process never judges its own lease; it learns that it was declared dead from the answer to a beat or
a change.

States of one agent (`client`, with `pending`, `delivery` and `enrolment`):

    new --register()--> starting --set_status()--> alive <--> draining
                            |                        |           |
                            +------- set_status(dead), stop() ---+--> dead   (final: make another client)

    declared dead by the registry --> the pause of `Comebacks` --> a new instance: starting, then the same status
    not known to the registry     --> the same instance registers again, with the numbers of its changes
    dead with its epoch           --> retired: RetiredEpochError, on_retired, no report any more

Whether it is ready (`readiness`), and which processes it depends on (`processes`), are its own words, too: sent with a
number, kept, and repeated in the order of the numbers to a registry that replaced another one. Without a fatal process
of its own it does not come back. A probe of a URL (`http_probe`) runs on threads, and reports in the event loop of
`loop_thread`.

A change goes from `PendingChanges` through RegistryConnection.take to the relay of the node or the registry. It leaves
the queue when a receipt is `durable`, or when it is refused for good; until then each call sends it again with the
same number, so that it is applied once.

Other details of the agent, such as its endpoints, go as a registration with the next number. Each status says all that
the one before it said, and each registration and each hold of a kind too, but none says what the others do. So a
registry that replaced the one called gets the last of each again, under its own number, before what is new.

Beats. `beat_loop` is one loop for all agents of an event loop: those that are due together share a message. An agent
with pending changes beats alone: it first delivers them. A `Reporter` joins that loop by its `pulse`; `ThreadReporter`
runs one on a thread that all blocking agents of the process share (`core.loop_thread`).

What it trusts, and for how long:

- The interval and the lease of the last answer, until the next one. Before the first answer it beats after pauses
  that grow from 1 s to the setting, 5 s at most, since its registration may have been taken.
- A receipt without `durable` means only that one registry process has the change in memory. The change is sent again,
  and `after` names that process, so that another one refuses a change whose predecessor it does not have.
- What Ray knows of this process (`identity`) is asked for again until it is complete, and in each Ray session.

When a neighbour is away:

- The registry: changes are kept, at most MAX_PENDING of them, and sent with the next beat. One warning for all agents
  of the process, one line when it ends (`outages`). The agent works on.
- The database: the registry answers without `durable`. The same, with a warning of its own.
- The relay of the node: the connection calls the registry itself for a while (protocol.relay_client).
- Ray: not connected yet, or again in another session. The agent reports once Ray is there, with its new node.
- This process, forked from a connected one: every call raises ForkedProcessError.
"""
