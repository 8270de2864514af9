#!/bin/bash
# Runs once, on a new volume: creates the registry's role. `seedcore migrate --grant seedcore` grants its rights.
set -euo pipefail
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set ON_ERROR_STOP=1 \
  --set password="$SEEDCORE_PG_PASSWORD" <<'SQL'
CREATE ROLE seedcore LOGIN PASSWORD :'password';
SQL
