"""What the simulation simulates: time, Ray, the network, the processes and the database. The processes run real code.

One module for each: `virtual` (time), `ray` (Ray and its network), `database`, `nodes` (Ray's nodes with their relays),
`registries`, `fleet` (agents), `operators`, `callers`. `world` is what they share. `laws` and `caller_laws` check what
happens; `breakage` injects the faults; `history` runs it all.
"""
