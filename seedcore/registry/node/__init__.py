"""The relay: one small actor on each node that has instances.

**Authority.** None on instances. It is the first witness of the end of a process on its node, and it gathers the beats
and changes of the node's agents into few messages. The registry decides.

**Life.** The registry creates it under a name that no other relay has, owns it, and replaces it:

    created --- answers `__ray_ready__` ---> watching ---+--- the registry ends it, or itself ends ---> gone
       |                                        |        |
       +--- no answer within 60 s ---> gone     +--------+ polled by `exits`; no answer for 10 s ---> gone

A new relay watches nothing until it has received the node's instances again, and then looks at every process again. So
a process that ended while there was no relay is reported by the next one.

**An instance** on the node is

    sent ---> watched by its process (pidfd) ---> its process ended ---> reported, until acknowledged
      |                                                                      |
      +-----> watched by its actor (Ray) -----> its actor ended -------------+---> reported again with Ray's reason
      |
      +-----> unwatched, with the reason (`messages.Unwatched`); the registry sends it again later

**A process that an instance depends on** is watched by its pidfd alone, for each instance that names it in its
registration, with the same guarantees. Its end is reported with the last lines of the log that the agent named, where
they can be read within 0.5 s. One that this process cannot see is tried again every 5 s.

**What it trusts.** The kernel: a descriptor of a process stays that of the process, whatever happens to its id. A
process id only together with the start time, the PID namespace and the boot id in the process key. Ray's state of an
actor that this process has called. What cannot be read is no evidence.

**When a neighbour is away.**

- The registry, while it hangs: reports wait here, one for each instance, and are repeated until they are acknowledged.
  When its actor ends, Ray ends this one too; the relays of the next registry look at every process again. Beats and
  changes are refused: at once if its actor is gone, after the time limit of a call if it hangs. The agents then send
  them to the registry directly, and retry.
- Ray (GCS): processes are watched as before. Instances that only Ray can see are `unwatched`, and Ray's reason for an
  end is left out.
- An agent: its process ends, which is reported; or it hangs, which only its missing beats show.
- The relay itself: its node's instances live by their beats alone until there is another. A lost relay is no evidence
  of any death. Agents whose relay does not answer use the registry directly, for pauses that grow to a minute.
"""
