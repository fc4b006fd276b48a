#!/usr/bin/env bash
# demo.sh - what this plugin does, on one machine and without Kubernetes: a PostgreSQL
# archives through the sidecar's socket as it does under CloudNativePG, loses a table,
# and comes back in another directory as it was a moment before.
# Everything lives in one temporary directory and is gone at the end, whatever happens.
set -euo pipefail
cd "$(dirname "$0")/.."

# --- one temporary directory, and everything stopped at the end

tmp=$(mktemp -d "${TMPDIR:-/tmp}/cnpg-barman-s3-demo.XXXXXX")
pids=()
cleanup() {
  status=$?
  trap - EXIT
  if [ "$status" != 0 ]; then
    echo; echo "demo.sh: failed (exit code $status); the last lines of each log:"
    tail -n 15 "$tmp"/*.log || true
  fi
  # INT is a fast shutdown for PostgreSQL and the end for the others
  for pid in "${pids[@]}"; do kill -INT "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  rm -rf "$tmp"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# PostgreSQL refuses root: then everything runs as user postgres, as sidecar and server share a user in a Pod
if [ "$(id -u)" = 0 ]; then
  chown postgres: "$tmp"
  as() { runuser -u postgres -- "$@"; }
  start() { local log=$1; shift; setpriv --reuid postgres --regid postgres --init-groups "$@" >"$tmp/$log" 2>&1 & pids+=($!); }
else
  as() { "$@"; }
  start() { local log=$1; shift; "$@" >"$tmp/$log" 2>&1 & pids+=($!); }
fi

# --- telling what happens, with the time that it took

began=$(date +%s%N) last=$began
step() { # step WHAT: what has just been done
  local now
  now=$(date +%s%N)
  printf '%6.1f s  %s\n' "$(((now - last) / 100000000))e-1" "$1"
  last=$(date +%s%N)
}
until_ok() { # until_ok WHAT COMMAND...: poll, for at most a minute
  local what=$1 n=0
  shift
  until "$@" >/dev/null 2>&1; do
    n=$((n + 1))
    [ $n -lt 600 ] || { echo "demo.sh: gave up waiting for $what" >&2; return 1; }
    sleep 0.1
  done
}

# --- the parts

shopt -s nullglob
bindirs=("${PG_BINDIR:-}" /usr/lib/postgresql/*/bin)
for pg in "${bindirs[@]}"; do [ ! -x "$pg/initdb" ] || break; done
[ -x "$pg/initdb" ] || { echo "demo.sh: no initdb: install PostgreSQL (hack/deps.sh postgres) or set PG_BINDIR" >&2; exit 1; }
install -m 755 bin/cnpg-barman-s3 bin/socketclient bin/versitygw "$tmp" # where user postgres can run them
cd "$tmp"
for port in $(shuf -i 20000-32000 -n 20); do
  (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break # nothing listens: it is free
done
as mkdir "$tmp/sock" "$tmp/s3" "$tmp/s3/backups"

cat >"$tmp/store.yaml" <<YAML
apiVersion: barmancloud.cnpg.io/v1
kind: ObjectStore
metadata: {name: demo-store, namespace: default}
spec:
  configuration:
    destinationPath: s3://backups/
    endpointURL: http://127.0.0.1:$port
    s3Credentials:
      accessKeyId: {name: demo-keys, key: ACCESS_KEY_ID}
      secretAccessKey: {name: demo-keys, key: ACCESS_SECRET_KEY}
    wal: {compression: gzip}
    data: {immediateCheckpoint: true}
---
apiVersion: v1
kind: Secret
metadata: {name: demo-keys, namespace: default}
stringData: {ACCESS_KEY_ID: demo, ACCESS_SECRET_KEY: demodemodemo}
YAML
# what the instance manager would send along with each request
cat >"$tmp/cluster.json" <<JSON
{"apiVersion": "postgresql.cnpg.io/v1", "kind": "Cluster", "metadata": {"name": "demo", "namespace": "default"},
 "spec": {"instances": 1, "plugins": [{"name": "barman-cloud.cloudnative-pg.io", "isWALArchiver": true,
                                       "parameters": {"barmanObjectName": "demo-store"}}]}}
JSON
chmod 644 "$tmp/store.yaml" "$tmp/cluster.json"

server() { # server LOG PGDATA SETTING...
  local log=$1 pgdata=$2 settings=()
  shift 2
  for s in "$@"; do settings+=(-c "$s"); done
  start "$log" "$pg/postgres" -D "$pgdata" -k "$tmp/sock" -c listen_addresses= "${settings[@]}"
}
export PGHOST=$tmp/sock PGPORT=5432 PGUSER=postgres PGDATABASE=postgres
sql() { "$pg/psql" --no-psqlrc --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 --command "$1"; }
plugin() { as "$tmp/socketclient" --socket "$tmp/sock/plugin" --cluster "$tmp/cluster.json" "$@"; }
ours() { local command=$1; shift; as "$tmp/cnpg-barman-s3" "$command" --objectstore "$tmp/store.yaml" --server-name demo "$@"; }

# --- the story

ROOT_ACCESS_KEY_ID=demo ROOT_SECRET_ACCESS_KEY=demodemodemo \
  start s3.log "$tmp/versitygw" --port "127.0.0.1:$port" --quiet posix "$tmp/s3"
until_ok "the S3 server" bash -c "exec 3<>/dev/tcp/127.0.0.1/$port"
step "started an S3 server, http://127.0.0.1:$port"

start sidecar.log "$tmp/cnpg-barman-s3" sidecar --objectstore "$tmp/store.yaml" --socket "$tmp/sock/plugin" --pgdata "$tmp/pgdata"
until_ok "the sidecar" as "$tmp/cnpg-barman-s3" healthcheck --socket "$tmp/sock/plugin"
step "started the sidecar on its socket"

as "$pg/initdb" --pgdata "$tmp/pgdata" --auth trust --username postgres --locale C --encoding UTF8 >"$tmp/initdb.log"
server postgres.log "$tmp/pgdata" archive_mode=on max_wal_size=4GB \
  "archive_command=$tmp/socketclient --socket $tmp/sock/plugin --cluster $tmp/cluster.json archive %p"
primary=$!
until_ok "PostgreSQL" sql "SELECT 1"
step "started $("$pg/postgres" --version), which archives through that socket"

as "$pg/pgbench" --initialize --scale 10 --quiet 2>"$tmp/pgbench.log"
step "loaded pgbench: $(sql "SELECT count(*) FROM pgbench_accounts") accounts, $(sql "SELECT pg_size_pretty(pg_database_size(current_database()))")"

plugin backup >"$tmp/backup.log"
step "took a base backup through the socket: $(grep -oE '"backup_id":"[^"]*"' "$tmp/backup.log" | cut -d'"' -f4)"
ours list

as "$pg/pgbench" --client 2 --transactions 500 >>"$tmp/pgbench.log" 2>&1
before=$(sql "SELECT count(*), sum(abalance) FROM pgbench_accounts")
step "ran 1000 transactions after it; accounts and their balance: $before"

target=$(sql "SELECT clock_timestamp()")
sleep 0.1
sql "DROP TABLE pgbench_accounts"
wal=$(sql "SELECT pg_walfile_name(pg_switch_wal())")
step "noted the time $target, and dropped table pgbench_accounts"

until_ok "the archive to have $wal" bash -c "[ -e '$tmp/pgdata/pg_wal/archive_status/$wal.done' ]"
kill -INT "$primary"
wait "$primary" || true
step "the archive has everything up to $wal; stopped PostgreSQL"

ours restore --target-time "$target" "$tmp/restored"
step "restored the base backup, into another directory"

server restored.log "$tmp/restored" archive_mode=off
until_ok "the end of recovery" bash -c "[ \"\$('$pg/psql' -XAtc 'SELECT pg_is_in_recovery()')\" = f ]"
after=$(sql "SELECT count(*), sum(abalance) FROM pgbench_accounts")
step "started PostgreSQL on it: table pgbench_accounts is back, with $after"

[ "$after" = "$before" ] || { echo "demo.sh: the table was $before at that time, but is $after now" >&2; exit 1; }
printf '%6.1f s  in all\n' "$((($(date +%s%N) - began) / 100000000))e-1"
