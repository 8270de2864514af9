"""An embedded PostgreSQL: the server of a wheel, started on demand, for one node.

A process that uses the server holds it (`postgres`): it creates a file with its pid and start time in the data folder
(`layout`). The first holder starts the guardian, a detached process (`guardian`), which runs the server (`server`,
`programs`, `cluster`), publishes its state (`record`), and stops it when no holder has been alive for a while. A claim
(`claim`) keeps the registries of two Ray clusters from using one data folder.

The guardian imports the standard library, psutil and this package only, so that it starts in a fraction of a second.
"""
