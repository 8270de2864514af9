"""What the simulation simulates: time, Ray, the network, the processes and the database. The code in them is the real one.

A room for each thing, so that a reader knows what is simulated: `virtual` (time), `ray` (Ray and its network), `database`,
`nodes` (Ray's nodes with their relays), `registries`, `fleet` (agents), `operators`, `callers`. `world` is what they
share. `laws` and `caller_laws` decide whether what happened was allowed; `breakage` breaks things; `history` runs it all.
"""
