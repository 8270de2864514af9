"""Following: how a process keeps a copy of the live agents, from the registry or from the relay of its node.

**Authority.** None. A copy repeats what the registry has decided, and says how old it is.

**The follower** keeps the copy:

    empty --list all pages--> loaded, not trusted --next answer--> current --a call failed, or 4 s old--> not trusted
      ^                            ^                                  |                                     |
      |                            +-- a reset: list again -----------+---------- the registry answers -----+
      +---- another Ray session, an unexpected error -----------------+

**Serving.** `serving` answers followers from a feed: in the registry from its own, in a relay from the copy that the
relay follows. Both have the same stream and the same versions, so that a follower goes on at the other one where it
stopped. The number of followers is bounded in both.

**Trust.** A copy is trusted for 4 s (`MAX_AGE_S`) after the registry sent what confirms it. An answer of a relay says
how old the relay's own confirmation is, and that counts.
"""
