# life.sh - the track life: what a cluster goes through, its standbys included
# shellcheck shell=bash

track_life() {
  case_ "private CA, walStorage, a tablespace, two instances" start_life
  case_ "metrics of a real Pod" metrics
  case_ "keys rotated while archiving" rotate_keys
  case_ "failover under load, and the old primary comes back" failover
  case_ "a third instance" scale
  case_ "hibernation and wake-up" hibernate
  case_ "a restore with walStorage and the tablespace" restore_storage
}

start_life() {
  apply examples/private-ca.yaml
  apply examples/storage.yaml "$first"
  healthy pg-storage 2
  wait_for 60 "working archive" is cluster/pg-storage "$archiving" True
  sql pg-storage "CREATE TABLE item TABLESPACE archive AS SELECT id, md5(id::text) AS body FROM generate_series(1, 20000) AS id"
  archived pg-storage
  apply examples/backup.yaml 's/pg-main/pg-storage/'
  completed pg-storage-now
  ! is backup/pg-storage-now '{.status.instanceID.podName}' "$(primary pg-storage)" || fail "the backup was taken from the primary"
}

metrics() {
  local pod
  for pod in $(k get pods -l cnpg.io/cluster=pg-storage -o jsonpath='{.items[*].metadata.name}'); do
    wait_for 30 "metrics of $pod" measured "$pod"
    say "    $pod: $(scrape "$pod" | grep '^barman_cloud.*last_available')"
  done
}
scrape() { k get --raw "/api/v1/namespaces/$namespace/pods/$1:9187/proxy/metrics"; }
measured() { scrape "$1" | grep -qE '^barman_cloud_cloudnative_pg_io_last_available_backup_timestamp 1\.[0-9]+e\+09'; }

# The store is given another Secret, then that Secret wrong keys, then right ones again
rotate_keys() {
  local pod uid
  pod=$(primary pg-storage)
  uid=$(field "pod/$pod" '{.metadata.uid}')
  writer start "$pod"
  copy_secret "$S3_SECRET" s3-rotated
  k patch objectstore private-store --type merge -p '{"spec":{"configuration":{"s3Credentials":{"accessKeyId":{"name":"s3-rotated"},"secretAccessKey":{"name":"s3-rotated"}}}}}' >/dev/null
  k delete secret s3-creds >/dev/null
  archived pg-storage
  say "    archives with the keys of another Secret"
  k patch secret s3-rotated -p '{"stringData":{"ACCESS_SECRET_KEY":"wrong"}}' >/dev/null
  wait_for 120 "archiving to fail for the wrong key" has cluster/pg-storage "$archiving_message" s3-rotated
  say "    $(field cluster/pg-storage "$archiving_message")"
  copy_secret "$S3_SECRET" s3-rotated
  wait_for 180 "working archive, now that the key is right" is cluster/pg-storage "$archiving" True
  archived pg-storage
  writer stop "$pod"
  copy_secret "$S3_SECRET" s3-creds # for what follows
  is "pod/$pod" '{.metadata.uid}' "$uid" || fail "the Pod was replaced"
  [ "$(sidecar_restarts "$pod")" = 0 ] || fail "the sidecar was restarted"
  verified private-store pg-storage
}

# A client on the primary: each row is a transaction of its own. /tmp/acknowledged gets its id
# and the WAL segment that the commit lies in, or before, once the server has said that it is done.
writer() { # writer start|stop POD
  case $1 in
  start)
    sql_on "$2" "SET client_min_messages = warning; CREATE TABLE IF NOT EXISTS load (id bigserial PRIMARY KEY, body text)"
    k exec -i "$2" -c postgres -- bash >/dev/null <<'BASH'
cd /controller
rm -f writer.stop acknowledged
setsid bash -c 'n=0
until [ -e writer.stop ]; do
  n=$((n + 1))
  psql -XqAt -d app -v ON_ERROR_STOP=1 -c "INSERT INTO load (body) SELECT string_agg(md5(random()::text), '"''"') FROM generate_series(1, 200) RETURNING id" \
    -c "SELECT pg_walfile_name(pg_current_wal_insert_lsn())" 2>/dev/null | paste -sd " " | grep " " >>acknowledged
  [ $((n % 25)) != 0 ] || psql -XqAt -d app -c "SELECT pg_switch_wal()" 
done' >/dev/null 2>&1 </dev/null &
BASH
    wait_for 30 "client that writes" sql_is_on "$2" "SELECT count(*) > 60 FROM load" t ;;
  stop) k exec "$2" -c postgres -- touch /controller/writer.stop ;;
  esac
}
sql_is_on() { [ "$(sql_on "$1" "$2")" = "$3" ]; }

failover() {
  local old standby kept last archived_wal started rewound
  old=$(primary pg-storage)
  writer start "$old"
  wait_for 60 "some archived segments" sql_is pg-storage "SELECT archived_count > 3 FROM pg_stat_archiver" t
  # the standby's connection breaks: what the archive does not have will be on the old primary only
  standby=$(k get pods -l cnpg.io/cluster=pg-storage,role=replica -o jsonpath='{.items[0].metadata.name}')
  # shellcheck disable=SC2016
  k exec "$standby" -c postgres -- bash -c 'sed -i "/^primary_conninfo/s/port=[0-9]*/port=1/" "$PGDATA/override.conf" && psql -XqAtc "SELECT pg_reload_conf()"' >/dev/null
  wait_for 30 "standby without a connection" sql_is pg-storage "SELECT count(*) FROM pg_stat_replication" 0
  # what the client was told is committed, and the archive has
  archived_wal=$(sql pg-storage "SELECT last_archived_wal FROM pg_stat_archiver")
  kept=$(k exec "$old" -c postgres -- cat /controller/acknowledged | awk -v w="$archived_wal" '$2 <= w { id = $1 } END { print id + 0 }')
  started=$(date +%s)
  k delete pod "$old" --force --grace-period=0 >/dev/null 2>&1
  wait_for 120 "new primary" moved pg-storage "$old"
  wait_for 120 "new primary that answers" sql pg-storage "SELECT 1"
  say "    $(primary pg-storage) is the primary $(($(date +%s) - started)) s after $old was killed under load"
  last=$(sql pg-storage "SELECT max(id) FROM load")
  say "    committed and archived: $kept rows; the new primary has them to $last"
  [ "$kept" -gt 0 ] || fail "nothing was committed and archived"
  [ "$last" -ge "$kept" ] || fail "the new primary ends at $last, but $kept was committed and archived"
  # ids are without gaps where transactions are: all that failed was the last one, if any
  sql_is pg-storage "SELECT count(*) >= $kept FROM load WHERE id <= $kept" t || fail "rows before $kept are missing"
  healthy pg-storage 2
  wait_for 120 "old primary that follows" sql_is pg-storage "SELECT count(*) FROM pg_stat_replication WHERE application_name = '$old' AND state = 'streaming'" 1
  rewound=$(k logs "$old" -c postgres --tail=-1 | grep -o '"msg":"pg_rewind: [^"]*' | cut -d: -f3- | paste -sd ';')
  say "    $old follows, after pg_rewind:$rewound"
  grep -q "Done!" <<<"$rewound" || fail "the old primary did not have to be rewound"
  archived pg-storage
}
moved() { [ "$(primary "$1")" != "$2" ] && [ "$(field "cluster/$1" '{.status.targetPrimary}')" = "$(primary "$1")" ]; }

scale() {
  k patch cluster pg-storage --type merge -p '{"spec":{"instances":3}}' >/dev/null
  healthy pg-storage 3
  wait_for 60 "two standbys" sql_is pg-storage "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'" 2
  apply examples/backup.yaml 's/pg-main-now/pg-storage-three/; s/pg-main/pg-storage/'
  completed pg-storage-three
}

hibernate() {
  local want
  sql pg-storage "INSERT INTO item SELECT id, md5(id::text) FROM generate_series(20001, 30000) AS id"
  want=$(content pg-storage)
  k annotate cluster pg-storage cnpg.io/hibernation=on --overwrite >/dev/null
  wait_for 240 "hibernation" is cluster/pg-storage '{.status.conditions[?(@.type=="cnpg.io/hibernation")].status}' True
  wait_for 60 "end of all Pods" gone pods -l cnpg.io/cluster=pg-storage
  # whoever restores it now gets everything: the WAL of the last moment is there as well
  apply examples/storage.yaml "$second"
  healthy pg-storage-restored
  same_content pg-storage-restored "$want"
  k delete cluster pg-storage-restored --wait=false >/dev/null
  k annotate cluster pg-storage cnpg.io/hibernation=off --overwrite >/dev/null
  healthy pg-storage 3
  same_content pg-storage "$want"
  archived pg-storage
  verified private-store pg-storage
}

restore_storage() {
  local want
  wait_for 120 "end of the first restored cluster" gone pvc -l cnpg.io/cluster=pg-storage-restored
  sql pg-storage "INSERT INTO item VALUES (0, 'after waking up')"
  want=$(content pg-storage)
  archived pg-storage
  # from the first backup on: through the rotation, two timelines and the hibernation
  apply examples/storage.yaml "$second" "s/^      source: .*/&\n      recoveryTarget: {backupID: $(field backup/pg-storage-now '{.status.backupId}')}/"
  healthy pg-storage-restored
  same_content pg-storage-restored "$want"
  same_content pg-storage-restored "$(content pg-storage load)" load
  sql_is pg-storage-restored "SELECT spcname FROM pg_tablespace t JOIN pg_class c ON c.reltablespace = t.oid WHERE relname = 'item'" archive || fail "table item is not in its tablespace"
  k exec "$(primary pg-storage-restored)" -c postgres -- readlink /var/lib/postgresql/data/pgdata/pg_wal >/dev/null || fail "pg_wal is not on its own volume"
}
