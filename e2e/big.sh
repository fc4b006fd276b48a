# big.sh - the track big: 500 MB with 64Mi for the sidecar, from the first WAL file to the restore
# shellcheck shell=bash

track_big() {
  case_ "500 MB in, archived and backed up with 64Mi" big_backup
  case_ "500 MB back with 64Mi" big_restore
}

big_backup() {
  apply examples/object-stores.yaml "$first" 's/^spec:/&\n  instanceSidecarConfiguration: {resources: {limits: {memory: 64Mi}}}/'
  apply examples/cluster.yaml 's/pg-main/pg-big/; s/size: 1Gi/size: 4Gi/'
  healthy pg-big
  sql pg-big "CREATE EXTENSION pgcrypto; CREATE TABLE item AS SELECT id, repeat(encode(gen_random_bytes(480), 'hex'), 2) AS body FROM generate_series(1, 265000) AS id"
  archived pg-big
  say "    the database has $(sql pg-big "SELECT pg_size_pretty(pg_database_size('app'))"), the archive $(sql pg-big "SELECT archived_count FROM pg_stat_archiver") segments"
  sql_is pg-big "SELECT pg_database_size('app') > 500 * 1024 * 1024" t || fail "the database is too small"
  apply examples/backup.yaml 's/pg-main/pg-big/'
  completed pg-big-now
  never_restarted pg-big
}
never_restarted() { # the kernel kills a process at its limit, and the sidecar is started again
  local pod
  for pod in $(k get pods -l "cnpg.io/cluster=$1" -o jsonpath='{.items[*].metadata.name}'); do
    [ "$(sidecar_restarts "$pod")" = 0 ] || fail "the sidecar of $pod was restarted: $(field "pod/$pod" "{.status.initContainerStatuses[?(@.name==\"$sidecar\")].lastState}")"
    is "pod/$pod" "{.spec.initContainers[?(@.name==\"$sidecar\")].resources.limits.memory}" 64Mi || fail "the sidecar of $pod has another limit"
  done
}

big_restore() {
  local want
  sql pg-big "INSERT INTO item SELECT id, md5(id::text) FROM generate_series(265001, 500000) AS id"
  want=$(content pg-big)
  archived pg-big
  apply examples/restore.yaml 's/pg-restored/pg-big-restored/; s/pg-main/pg-big/; s/size: 1Gi/size: 4Gi/'
  healthy pg-big-restored
  same_content pg-big-restored "$want"
  never_restarted pg-big-restored
  [ "$(k get jobs -l cnpg.io/cluster=pg-big-restored -o jsonpath='{.items[*].status.failed}')" = "" ] || fail "the restore had to be tried again"
}
