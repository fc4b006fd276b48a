# upgrade.sh - the track upgrade: another major version of PostgreSQL, in place
# shellcheck shell=bash

track_upgrade() {
  case_ "a major upgrade: the old archive is not overwritten, and the error names the cure" major_upgrade
}

major_upgrade() {
  local want message id
  apply examples/object-stores.yaml "$first"
  apply examples/cluster.yaml 's/pg-main/pg-up/'
  healthy pg-up
  sql pg-up "CREATE TABLE item AS SELECT id, md5(id::text) AS body FROM generate_series(1, 20000) AS id"
  apply examples/backup.yaml 's/pg-main/pg-up/'
  completed pg-up-now
  archived pg-up
  want=$(content pg-up)
  id=$(sql pg-up "SELECT system_identifier FROM pg_control_system()")
  k patch cluster pg-up --type merge -p "{\"spec\":{\"imageName\":\"$PG_IMAGE_NEXT\"}}" >/dev/null
  wait_for 300 "server of the new version" sql_is pg-up "SELECT system_identifier <> $id FROM pg_control_system()" t
  say "    $(sql pg-up "SELECT version()" | cut -d' ' -f1,2) has another system identifier"
  sql pg-up "SELECT pg_switch_wal()" >/dev/null
  wait_for 180 "archiving to fail" is cluster/pg-up "$archiving" False
  message=$(field cluster/pg-up "$archiving_message")
  say "    $message"
  grep -q serverName <<<"$message" || fail "the error does not name the cure"
  k patch cluster pg-up --type json -p '[{"op":"add","path":"/spec/plugins/0/parameters/serverName","value":"pg-up-next"}]' >/dev/null
  wait_for 240 "working archive under the new server name" is cluster/pg-up "$archiving" True
  archived pg-up
  apply examples/backup.yaml 's/pg-main-now/pg-up-next/; s/pg-main/pg-up/'
  completed pg-up-next
  verified main-store pg-up-next
  verified main-store pg-up
  same_content pg-up "$want"
}
