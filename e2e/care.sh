# care.sh - the track care: retention, and stores that clusters share and leave
# shellcheck shell=bash

track_care() {
  case $S3_ENDPOINT in http://*) ;; *) say "skipped: backups are made old by a plain request to S3_ENDPOINT"; return ;; esac
  case_ "two clusters in one store" share_store
  case_ "retention drops an old backup and its Backup object" retention
  case_ "retention while the primary changes" retention_failover
  case_ "a store switched under a cluster" switch_store
}

share_store() {
  local b
  apply examples/object-stores.yaml 's/^spec:/&\n  retentionPolicy: 1d\n  instanceSidecarConfiguration: {retentionPolicyIntervalSeconds: 10}/' \
    's#second-backups/#main-backups/second/#' # a running cluster makes no bucket
  apply examples/cluster.yaml 's/pg-main/pg-one/; s/^  instances: 1/  instances: 2\n  backup: {target: primary}/'
  apply examples/cluster.yaml 's/pg-main/pg-two/'
  healthy pg-one 2
  healthy pg-two
  sql pg-one "CREATE EXTENSION pgcrypto; CREATE TABLE item AS SELECT id, md5(id::text) AS body FROM generate_series(1, 20000) AS id"
  for b in a b c; do
    apply examples/backup.yaml "s/pg-main-now/one-$b/; s/pg-main/pg-one/"
    completed "one-$b"
    sql pg-one "INSERT INTO item SELECT max(id) + 1, '$b' FROM item"
    archived pg-one
  done
  apply examples/backup.yaml "s/pg-main-now/two-a/; s/pg-main/pg-two/"
  completed two-a
}

# A backup becomes old by other times in its backup.info. The requests are signed by pgcrypto and
# sent by bash, from a Pod of the cluster: nothing else is at hand everywhere.
s3() { # s3 METHOD KEY [FILE ON THE POD]: the body of the reply
  local pod bucket host
  pod=$(primary pg-one)
  bucket=$(field objectstore/main-store '{.spec.configuration.destinationPath}' | sed 's#^s3://##; s#/$##')
  host=${S3_ENDPOINT#http://}
  k exec -i "$pod" -c postgres -- env METHOD="$1" TARGET="/$bucket/$2" FILE="${3:-/dev/null}" HOST="${host%/}" \
    ID="$(k get secret s3-creds -o jsonpath='{.data.ACCESS_KEY_ID}' | base64 -d)" \
    KEY="$(k get secret s3-creds -o jsonpath='{.data.ACCESS_SECRET_KEY}' | base64 -d)" bash -euo pipefail <<'BASH'
now=$(date -u +%Y%m%dT%H%M%SZ) day=${now%T*}
request="$METHOD
$TARGET

host:$HOST
x-amz-content-sha256:UNSIGNED-PAYLOAD
x-amz-date:$now

host;x-amz-content-sha256;x-amz-date
UNSIGNED-PAYLOAD"
signature=$(psql -XqAt -d app -v request="$request" -v now="$now" -v day="$day" -v key="$KEY" <<'SQL'
SELECT encode(hmac(convert_to(concat_ws(E'\n', 'AWS4-HMAC-SHA256', :'now', :'day' || '/us-east-1/s3/aws4_request',
    encode(sha256(convert_to(:'request', 'UTF8')), 'hex')), 'UTF8'),
  hmac('aws4_request', hmac('s3', hmac('us-east-1', hmac(convert_to(:'day', 'UTF8'), convert_to('AWS4' || :'key', 'UTF8'),
    'sha256'), 'sha256'), 'sha256'), 'sha256'), 'sha256'), 'hex')
SQL
)
port=${HOST##*:}
[ "$port" != "$HOST" ] || port=80
exec 3<>"/dev/tcp/${HOST%%:*}/$port"
{
  printf '%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nx-amz-date: %s\r\nx-amz-content-sha256: UNSIGNED-PAYLOAD\r\n' "$METHOD" "$TARGET" "$HOST" "$now"
  printf 'Authorization: AWS4-HMAC-SHA256 Credential=%s/%s/us-east-1/s3/aws4_request, SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature=%s\r\n' "$ID" "$day" "$signature"
  printf 'Content-Length: %d\r\n\r\n' "$(stat -c %s "$FILE")"
  cat "$FILE"
} >&3
read -r _ code _ <&3
while read -r line <&3 && [ "$line" != $'\r' ]; do :; done
cat <&3
[ "$code" = 200 ] || { echo "$METHOD $TARGET: $code" >&2; exit 1; }
BASH
}
age() { # age BACKUP DATE: it was taken then
  local key
  key=pg-one/base/$(field "backup/$1" '{.status.backupId}')/backup.info
  s3 GET "$key" | sed -E "s/^((begin|end)_time=)[^ ]+/\1$2/; s/^((begin|end)_time_iso=)[^T]+/\1$2/" |
    k exec -i "$(primary pg-one)" -c postgres -- bash -c 'cat >/controller/backup.info'
  s3 PUT "$key" /controller/backup.info
}
backups_of() { ask main-store "$1" list -o json | grep -c '"status": *"DONE"'; }

retention() {
  age one-a 2025-01-01
  age one-b 2025-02-01
  wait_for 90 "end of the Backup object whose backup was given up" gone backup/one-a
  # the one that the window's begin needs, the new one, and the other cluster's
  k get backup one-b one-c two-a -o name | indent
  [ "$(backups_of pg-one)" = 2 ] || fail "pg-one has $(backups_of pg-one) backups, want 2"
  [ "$(backups_of pg-two)" = 1 ] || fail "pg-two lost its backup"
  verified main-store pg-one
  verified main-store pg-two
  wait_for 60 "first recoverability point of 2025" has objectstore/main-store '{.status.serverRecoveryWindow.pg-one.firstRecoverabilityPoint}' 2025-02-01
}

retention_failover() {
  local old want
  old=$(primary pg-one)
  age one-c 2025-03-01
  apply examples/backup.yaml "s/pg-main-now/one-d/; s/pg-main/pg-one/"
  completed one-d
  k delete pod "$old" --force --grace-period=0 >/dev/null 2>&1
  wait_for 120 "new primary" moved pg-one "$old"
  wait_for 120 "end of Backup one-b" gone backup/one-b
  healthy pg-one 2
  [ "$(backups_of pg-one)" = 2 ] || fail "pg-one has $(backups_of pg-one) backups, want 2"
  archived pg-one
  verified main-store pg-one
  want=$(content pg-one)
  apply examples/restore.yaml 's/pg-main/pg-one/'
  healthy pg-restored
  same_content pg-restored "$want"
  k delete cluster pg-restored --wait=false >/dev/null
}

switch_store() {
  k patch cluster pg-one --type json -p '[{"op":"replace","path":"/spec/plugins/0/parameters/barmanObjectName","value":"second-store"}]' >/dev/null
  archived pg-one
  apply examples/backup.yaml "s/pg-main-now/one-e/; s/pg-main/pg-one/"
  completed one-e
  verified second-store pg-one
  sleep 25 # two rounds of the housekeeping, of which nothing is to be seen
  k get backup one-c one-d one-e -o name | indent
  [ "$(backups_of pg-one)" = 2 ] || fail "the backups in the first store are $(backups_of pg-one), want 2"
}
