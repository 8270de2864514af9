"""The store: PostgreSQL, its in-memory twin, migrations, and the embedded server."""
