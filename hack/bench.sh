#!/usr/bin/env bash
# bench.sh - measure this program side by side with Barman's cloud programs, pgBackRest and
# the AWS SDK alone, and write the tables into BENCHMARKS.md between its markers. The
# environment may say BENCH_SCALE (of pgbench; 135, which is 2 GB), BENCH_ROUNDS (5), BENCH_SEGMENTS (64),
# BENCH_ONLY (an expression, of: start, one segment, many segments, base backup) and
# BENCH_ACTIONS (an expression, of names in the tables), with which the tables are only
# printed, and TMPDIR, whose disk is measured and needs 15 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

tmp=$(mktemp -d "${TMPDIR:-/tmp}/cnpg-barman-s3-bench.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
shopt -s nullglob
bindirs=("${PG_BINDIR:-}" /usr/lib/postgresql/*/bin)
for pg in "${bindirs[@]}"; do [ ! -x "$pg/pgbench" ] || break; done
[ -x "$pg/pgbench" ] || { echo "bench.sh: no pgbench: install PostgreSQL (hack/deps.sh postgres) or set PG_BINDIR" >&2; exit 1; }

install -m 755 bin/{cnpg-barman-s3,socketclient,versitygw,sdkalone,bench} "$tmp"
as=()
if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses root
  chown postgres: "$tmp"
  as=(runuser -u postgres --)
fi
# -C / : the working directory need not be one that user postgres may enter
"${as[@]}" env -C / "$tmp/bench" --dir "$tmp" --pg "$pg" --scale "${BENCH_SCALE:-135}" --rounds "${BENCH_ROUNDS:-5}" \
  --segments "${BENCH_SEGMENTS:-64}" --only "${BENCH_ONLY:-}" --actions "${BENCH_ACTIONS:-}" >"$tmp/tables" || { tail -n 20 "$tmp"/*.log >&2; exit 1; }
cat "$tmp/tables"
[ -z "${BENCH_ONLY:-}${BENCH_ACTIONS:-}" ] || exit 0
sed -i -e '/^<!-- make bench: begin -->$/,/^<!-- make bench: end -->$/ {/^<!-- make bench: begin/r '"$tmp/tables" -e '/^<!-- make bench/!d}' BENCHMARKS.md
