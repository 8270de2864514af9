#!/bin/bash
# Runs once, when the volume is new: the role that the registry uses. `seedcore migrate --grant seedcore` gives it rights.
set -euo pipefail
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set ON_ERROR_STOP=1 \
  --set password="$SEEDCORE_PG_PASSWORD" <<'SQL'
CREATE ROLE seedcore LOGIN PASSWORD :'password';
SQL
