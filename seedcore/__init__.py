"""SeedCore Registry: a runtime registry for fleets of Ray actors."""

__version__ = "0.1.0"
