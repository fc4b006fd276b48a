# replica.sh - the track replica: clusters that follow another one
# shellcheck shell=bash

track_replica() {
  case_ "a replica cluster by way of the archive" follow
  case_ "a replica cluster that streams" stream
  case_ "the two swap roles" swap
  case_ "and back again" swap_back
  case_ "promotion when the source is gone for ever" source_gone
}

follow() {
  apply examples/object-stores.yaml
  apply examples/replica-clusters.yaml "$first"
  healthy pg-a
  sql pg-a "CREATE TABLE item AS SELECT id, md5(id::text) AS body FROM generate_series(1, 20000) AS id"
  apply examples/backup.yaml 's/pg-main/pg-a/'
  completed pg-a-now
  apply examples/replica-clusters.yaml "$second"
  healthy pg-b
  sql pg-a "INSERT INTO item SELECT id, md5(id::text) FROM generate_series(20001, 30000) AS id"
  follows pg-b pg-a
}
follows() { # follows REPLICA SOURCE: what is archived there comes here
  local want
  want=$(content "$2")
  archived "$2"
  sql_is "$1" "SELECT pg_is_in_recovery()" t || fail "$1 is not in recovery"
  wait_for 120 "content of $2 in $1" content_is "$1" "$want"
  say "    $1 has what $2 has: $want"
}
content_is() { [ "$(content "$1")" = "$2" ]; }

stream() {
  local want
  apply examples/replica-streaming.yaml
  healthy pg-c
  sql pg-a "INSERT INTO item SELECT id, md5(id::text) FROM generate_series(30001, 31000) AS id"
  want=$(content pg-a)
  wait_for 60 "streamed content" content_is pg-c "$want" # no segment was ended
  sql_is pg-a "SELECT count(*) > 0 FROM pg_stat_replication WHERE state = 'streaming'" t || fail "pg-c does not stream"
  say "    pg-c has it without any segment being archived"
  k delete cluster pg-c --wait=false >/dev/null
}

# What README tells to do
hand_over() { # hand_over FROM TO
  local token
  k patch cluster "$1" --type merge -p "{\"spec\":{\"replica\":{\"primary\":\"$2\",\"promotionToken\":null}}}" >/dev/null
  wait_for 180 "demotion token of $1" has "cluster/$1" '{.status.demotionToken}' ey
  token=$(field "cluster/$1" '{.status.demotionToken}')
  k patch cluster "$2" --type merge -p "{\"spec\":{\"replica\":{\"primary\":\"$2\",\"promotionToken\":\"$token\"}}}" >/dev/null
  wait_for 180 "promotion of $2" sql_is "$2" "SELECT pg_is_in_recovery()" f
  healthy "$2"
  healthy "$1"
}

swap() {
  local want
  sql pg-a "INSERT INTO item VALUES (0, 'the last word of pg-a')"
  want=$(content pg-a)
  hand_over pg-a pg-b
  same_content pg-b "$want"
  sql pg-b "INSERT INTO item VALUES (-1, 'the first word of pg-b')"
  follows pg-a pg-b
}

swap_back() {
  local want
  sql pg-b "INSERT INTO item VALUES (-2, 'the last word of pg-b')"
  want=$(content pg-b)
  hand_over pg-b pg-a
  same_content pg-a "$want"
  sql pg-a "INSERT INTO item VALUES (-3, 'pg-a again')"
  follows pg-b pg-a
  apply examples/backup.yaml 's/pg-main-now/pg-a-again/; s/pg-main/pg-a/'
  completed pg-a-again
  verified main-store pg-a
}

# pg-a goes with its store: pg-b is promoted without a token
source_gone() {
  local want
  want=$(content pg-b)
  k delete cluster pg-a >/dev/null
  k delete objectstore main-store >/dev/null
  k patch cluster pg-b --type merge -p '{"spec":{"replica":{"primary":"pg-b"}}}' >/dev/null
  wait_for 180 "promotion of pg-b" sql_is pg-b "SELECT pg_is_in_recovery()" f
  healthy pg-b
  same_content pg-b "$want"
  sql pg-b "INSERT INTO item VALUES (-4, 'alone')"
  archived pg-b
  apply examples/backup.yaml 's/pg-main/pg-b/'
  completed pg-b-now
}
