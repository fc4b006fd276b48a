#!/usr/bin/env bash
# deps.sh COMMAND... - install the Debian packages that bring these commands, where they
# are missing: postgres (the server, with pgbench), barman (Barman's cloud programs),
# codecs (the programs of the compression formats), pgbackrest, promtool (Prometheus' checker of rules).
set -euo pipefail

packages=()
for command in "$@"; do
  case $command in
  postgres)
    compgen -G "${PG_BINDIR:-/usr/lib/postgresql/*/bin}/initdb" >/dev/null || packages+=(postgresql) ;;
  codecs)
    for program in bzip2 lz4 xz:xz-utils zstd; do command -v "${program%:*}" >/dev/null || packages+=("${program#*:}"); done ;;
  promtool) command -v promtool >/dev/null || packages+=(prometheus) ;;
  barman) command -v barman-cloud-backup >/dev/null || packages+=(barman-cli-cloud) ;;
  pgbackrest) command -v pgbackrest >/dev/null || packages+=(pgbackrest) ;;
  *) echo "deps.sh: no package is known for $command" >&2; exit 2 ;;
  esac
done
[ ${#packages[@]} -gt 0 ] || exit 0

command -v apt-get >/dev/null || {
  echo "deps.sh: this is no Debian: install what Debian calls ${packages[*]} yourself" >&2
  exit 1
}
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
echo "installing ${packages[*]}"
# RUNLEVEL=1: the daemons in them are not started.
"${sudo[@]}" apt-get update -q
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -q -y --no-install-recommends "${packages[@]}"
