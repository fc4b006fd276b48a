#!/usr/bin/env bash
# run.sh - the plugin on a real cluster: the one of KUBECONFIG, which runs CloudNativePG.
#
# It deploys bin/image-amd64.tar and deploy.yaml, and walks through examples/ in a namespace
# of its own: archive, back up, restore without and with archiving, point in time, a killed
# sidecar, bad input. Each case checks data; the last line is 'N passed, N failed'.
#
#   IMAGE_IMPORT    command that loads an image archive into the nodes: `kind load image-archive`
#   PG_IMAGE        PostgreSQL image for the clusters; the operator's default when empty
#   S3_ENDPOINT     an S3 server as Pods see it             (http://s3.s3.svc:9000)
#   S3_SECRET       namespace/name of a Secret with ACCESS_KEY_ID and ACCESS_SECRET_KEY,
#                   which may make buckets                  (default/s3-creds)
#   E2E_NAMESPACE   must not exist; deleted at the end      (barman-e2e-TIME)
#   E2E_LOGS        where logs of a failure go              (bin/e2e-logs)
#   E2E_CASES       only these cases: a pattern for the names of their functions; most need
#                   deploy|archive|backup
#   E2E_KEEP        set it to keep the namespace
#   E2E_KILL        command that kills the sidecar of the Pod whose name and uid are its
#                   arguments; by default a privileged Pod on that node does it
#
# The buckets of a run, e2e-TIME-..., stay in the S3 server.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGE_IMPORT=${IMAGE_IMPORT:?set it to the command that loads an image archive into the nodes, such as "kind load image-archive"}
PG_IMAGE=${PG_IMAGE:-}
S3_ENDPOINT=${S3_ENDPOINT:-http://s3.s3.svc:9000}
S3_SECRET=${S3_SECRET:-default/s3-creds}
E2E_LOGS=${E2E_LOGS:-bin/e2e-logs}
operator_namespace=$(sed -n 's/^  namespace: //p' deploy.yaml | head -1)
run_id=$(date -u +%Y%m%d%H%M%S)
E2E_NAMESPACE=${E2E_NAMESPACE:-barman-e2e-$run_id}
plugin=barman-cloud.cloudnative-pg.io
sidecar="plugin-barman-cloud"
image=$(sed -n 's/^ *image: //p' deploy.yaml | head -1)

# ---------------------------------------------------------------------------
# Telling, waiting, asking
# ---------------------------------------------------------------------------

passed=0 failed=0 skipped=0 running=
began=$(date +%s)
say() { printf '%4d s  %s\n' "$(($(date +%s) - began))" "$*"; }
fail() { say "    FAILED: $*"; return 1; }
k() { kubectl -n "$E2E_NAMESPACE" "$@"; }

# a case is a function; it runs by itself, and what it prints belongs to it
case_() { # case_ WHAT FUNCTION
  local status t0 # and running, which cleanup reads
  if ! [[ $2 =~ ^(${E2E_CASES:-.*})$ ]]; then skipped=$((skipped + 1)); return; fi
  t0=$(date +%s)
  say "--- $1"
  # in the background, so that an interruption does not have to wait for it
  (set -e; "$2") &
  running=$!
  status=0
  wait "$running" || status=$?
  running=
  if [ $status = 0 ]; then
    passed=$((passed + 1))
    say "    ok: $1 ($(($(date +%s) - t0)) s)"
  else
    failed=$((failed + 1))
    say "    FAILED: $1 ($(($(date +%s) - t0)) s)"
    collect "$2"
  fi
}

collect() { # collect NAME: everything that may explain a failure, in files; the ends of it here
  local dir=$E2E_LOGS/$1 pod container
  mkdir -p "$dir"
  k get clusters,backups,scheduledbackups,objectstores,pods,jobs,pvc,roles,rolebindings -o yaml >"$dir/objects.yaml" 2>&1 || true
  k get events --sort-by=.lastTimestamp >"$dir/events" 2>&1 || true
  kubectl -n "$operator_namespace" logs deploy/barman-cloud --tail=-1 >"$dir/plugin.log" 2>&1 || true
  kubectl -n "$operator_namespace" logs deploy/cnpg-controller-manager --tail=5000 >"$dir/operator.log" 2>&1 || true
  for pod in $(k get pods -o name); do
    for container in $(k get "$pod" -o jsonpath='{.spec.initContainers[*].name} {.spec.containers[*].name}'); do
      k logs "$pod" -c "$container" >"$dir/${pod#pod/}-$container.log" 2>&1 || true
      k logs "$pod" -c "$container" --previous >"$dir/${pod#pod/}-$container-previous.log" 2>/dev/null || true
    done
  done
  find "$dir" -size 0 -delete
  echo "       clusters, backups and pods; everything is in $dir:"
  k get clusters,backups,pods 2>&1 | sed 's/^/       /' || true
  tail -n 8 "$dir"/events "$dir"/plugin.log "$dir"/*"$sidecar"*.log 2>/dev/null | cut -c1-600 | sed 's/^/       /' || true
}

wait_for() { # wait_for SECONDS WHAT COMMAND...
  local limit=$1 what=$2 t0
  shift 2
  t0=$(date +%s)
  until "$@" >/dev/null 2>&1; do
    [ $(($(date +%s) - t0)) -lt "$limit" ] || fail "still no $what after $limit s"
    sleep 1
  done
}
field() { k get "$1" -o jsonpath="$2"; }
is() { [ "$(field "$1" "$2")" = "$3" ]; }
has() { field "$1" "$2" | grep -qF -- "$3"; }

healthy() { wait_for "${2:-240}" "healthy cluster $1" is "cluster/$1" '{.status.phase}' "Cluster in healthy state"; }
archiving='{.status.conditions[?(@.type=="ContinuousArchiving")].status}'
archiving_message='{.status.conditions[?(@.type=="ContinuousArchiving")].message}'

sql() { # sql CLUSTER SQL: as superuser on the primary, database app
  k exec "$(field "cluster/$1" '{.status.currentPrimary}')" -c postgres -- \
    psql --no-psqlrc --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 --dbname app --command "$2"
}
content() { sql "$1" "SELECT count(*) || ' rows, ' || coalesce(md5(string_agg(t::text, ',' ORDER BY id)), '') FROM ${2:-item} t"; }
same_content() { # same_content CLUSTER WANTED [TABLE]
  local got
  got=$(content "$1" "${3:-item}")
  say "    $1 has $got"
  [ "$got" = "$2" ] || fail "table ${3:-item} of $1 is $got, want $2"
}
archived() { # archived CLUSTER: end the WAL segment, and wait until PostgreSQL knows it archived
  local wal
  wal=$(sql "$1" "SELECT pg_walfile_name(pg_switch_wal())")
  wait_for 120 "archived $wal" sql_is "$1" "SELECT coalesce(last_archived_wal >= '$wal', false) FROM pg_stat_archiver" t
}
sql_is() { [ "$(sql "$1" "$2")" = "$3" ]; }

# manifests of ours, for this run: its buckets, its S3 server, its PostgreSQL image
example() { # example FILE [SED...]: as it is applied
  local file=$1 args=(-e "s#s3://#s3://e2e-$run_id-#" -e "s#http://s3.s3.svc:9000#$S3_ENDPOINT#")
  shift
  [ -z "$PG_IMAGE" ] || args+=(-e "s#^  instances: .*#&\n  imageName: $PG_IMAGE#")
  for s in "$@"; do args+=(-e "$s"); done
  sed "${args[@]}" "$file"
}
# shellcheck disable=SC2016
first='/^---/,$d' # only the first document of a file
apply() { example "$@" | k apply -f - | sed 's/^/          /'; }

completed() { # completed BACKUP: wait for it
  wait_for 300 "end of backup $1" ended "$1"
  is "backup/$1" '{.status.phase}' completed || fail "backup $1 is $(field "backup/$1" '{.status.phase}: {.status.error}')"
  say "    backup $1: id $(field "backup/$1" '{.status.backupId}'), WAL $(field "backup/$1" '{.status.beginWal} to {.status.endWal}')"
}
pod_ended() { case $(field "pod/$1" '{.status.phase}') in Succeeded | Failed) ;; *) return 1 ;; esac; }
ended() { case $(field "backup/$1" '{.status.phase}') in completed | failed) ;; *) return 1 ;; esac; }

# What is in the bucket, told by our own program in a Pod: one line for each backup, "ID STATUS"
catalog() { # catalog STORE SERVER
  k delete pod catalog --ignore-not-found --now >/dev/null
  k create secret generic catalog --dry-run=client -o yaml \
    --from-file=store.yaml=<(k get objectstore "$1" -o yaml; echo ---; k get secret s3-creds -o yaml) | k apply -f - >/dev/null
  k apply -f - >/dev/null <<YAML
apiVersion: v1
kind: Pod
metadata: {name: catalog}
spec:
  restartPolicy: Never
  containers:
  - name: list
    image: $image
    imagePullPolicy: IfNotPresent
    args: [list, --objectstore, /catalog/store.yaml, --server-name, $2, -o, json]
    volumeMounts: [{name: catalog, mountPath: /catalog}]
  volumes: [{name: catalog, secret: {secretName: catalog}}]
YAML
  wait_for 60 "end of pod catalog" pod_ended catalog
  is pod/catalog '{.status.phase}' Succeeded || fail "list: $(k logs catalog)"
  k logs catalog
}

# ---------------------------------------------------------------------------
# The cases
# ---------------------------------------------------------------------------

deploy() {
  say "    $IMAGE_IMPORT bin/image-amd64.tar"
  $IMAGE_IMPORT bin/image-amd64.tar >/dev/null
  kubectl apply --server-side --force-conflicts -f deploy.yaml >/dev/null
  # the image keeps its name from build to build, so Pods of an earlier run are replaced
  kubectl -n "$operator_namespace" rollout restart deploy/barman-cloud >/dev/null
  kubectl -n "$operator_namespace" rollout status deploy/barman-cloud --timeout 120s
  wait_for 60 "registration of the plugin" registered
}
registered() { # the operator says it once, when the Service and its certificates are there
  kubectl -n "$operator_namespace" get events --field-selector reason=PluginRegistered -o name | grep -q . ||
    kubectl -n "$operator_namespace" logs deploy/cnpg-controller-manager --tail=-1 | grep -q "Registered plugin.*$plugin"
}

archive() {
  apply examples/object-stores.yaml
  apply examples/cluster.yaml
  healthy pg-main
  wait_for 60 "working archive" is cluster/pg-main "$archiving" True
  sql pg-main "CREATE TABLE item AS SELECT id, md5(id::text) AS body FROM generate_series(1, 20000) AS id"
  archived pg-main
  wait_for 60 "plugin in the cluster's status" has cluster/pg-main '{.status.pluginStatus[*].name}' "$plugin"
}

backup() {
  apply examples/backup.yaml
  completed pg-main-now
  sql pg-main "INSERT INTO item SELECT id, md5(id::text) FROM generate_series(20001, 30000) AS id"
}

scheduled_backup() {
  apply examples/scheduled-backup.yaml
  wait_for 60 "backup of the schedule" has backups '{.items[*].metadata.ownerReferences[*].name}' pg-main-nightly
  completed "$(field backups '{.items[?(@.metadata.ownerReferences[0].name=="pg-main-nightly")].metadata.name}')"
  k delete -f examples/scheduled-backup.yaml >/dev/null # its Backup goes with it, the objects stay
}

restore() {
  local want
  want=$(content pg-main)
  archived pg-main
  apply examples/restore.yaml
  healthy pg-restored
  same_content pg-restored "$want"
  sql pg-restored "INSERT INTO item VALUES (0, 'writable')"
  k delete -f examples/restore.yaml >/dev/null
}

restore_and_archive() {
  local want
  want=$(content pg-main)
  archived pg-main
  apply examples/restore-and-archive.yaml
  healthy pg-moved
  same_content pg-moved "$want"
  wait_for 60 "working archive" is cluster/pg-moved "$archiving" True
  sql pg-moved "INSERT INTO item VALUES (0, 'moved')"
  archived pg-moved
  # what it archived in the second store is worth something: back it up, and restore from there
  apply examples/backup.yaml 's/pg-main/pg-moved/'
  completed pg-moved-now
  want=$(content pg-moved)
  apply examples/restore.yaml 's/pg-restored/pg-again/; s/pg-main/pg-moved/; s/main-store/second-store/'
  healthy pg-again
  same_content pg-again "$want"
  k delete cluster pg-again pg-moved >/dev/null
}

point_in_time() {
  local want target
  want=$(content pg-main)
  target=$(sql pg-main "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
  sleep 1
  sql pg-main "DROP TABLE item"
  archived pg-main
  apply examples/point-in-time.yaml "s/targetTime: .*/targetTime: \"$target\"/"
  healthy pg-past
  same_content pg-past "$want"
  k delete -f examples/point-in-time.yaml >/dev/null
}

# The sidecar dies without a word while it uploads a backup and while WAL is archived
kill_sidecar() {
  local pod uid want
  pod=$(field cluster/pg-main '{.status.currentPrimary}')
  uid=$(field "pod/$pod" '{.metadata.uid}')
  # random text, so that compressing and uploading takes a while
  sql pg-main "CREATE TABLE load AS SELECT id, (SELECT string_agg(md5(random()::text || n), '') FROM generate_series(id, id + 59) AS n) AS body FROM generate_series(1, 150000) AS id"
  # slowly, lest it is done before it is killed
  k patch objectstore main-store --type merge -p '{"spec":{"configuration":{"data":{"additionalCommandArgs":["--max-bandwidth=4MB"]}}}}' >/dev/null
  apply examples/backup.yaml 's/pg-main-now/pg-main-killed/'
  wait_for 120 "backup that copies files" copying
  sql pg-main "INSERT INTO load SELECT id, md5(id::text) FROM generate_series(150001, 600000) AS id" &
  kill_now "$pod" "$uid"
  wait $!
  wait_for 60 "restarted sidecar" restarted "$pod"
  wait_for 60 "end of the killed backup" ended pg-main-killed
  is backup/pg-main-killed '{.status.phase}' failed || fail "the backup whose sidecar was killed is $(field backup/pg-main-killed '{.status.phase}')"
  k patch objectstore main-store --type merge -p '{"spec":{"configuration":{"data":{"additionalCommandArgs":null}}}}' >/dev/null
  say "    the killed backup: $(field backup/pg-main-killed '{.status.error}')"
  archived pg-main
  say "    archives again"

  # the bucket knows as many good backups as Kubernetes does
  catalog main-store pg-main >"$E2E_LOGS/catalog.json"
  local done_
  done_=$(grep -oE '"status": *"DONE"' "$E2E_LOGS/catalog.json" | wc -l)
  [ "$done_" = 2 ] || fail "the bucket has $done_ backups that are DONE, want the 2 that were completed: $(cat "$E2E_LOGS/catalog.json")"

  apply examples/backup.yaml 's/pg-main-now/pg-main-after/'
  completed pg-main-after
  want=$(content pg-main load)
  archived pg-main
  # all the way from the backup before the kill, so that every WAL file since then is needed
  apply examples/restore.yaml "s/^      source: .*/&\n      recoveryTarget: {backupID: $(field backup/pg-main-now '{.status.backupId}')}/"
  healthy pg-restored
  same_content pg-restored "$want" load
  k delete cluster pg-restored >/dev/null
}
copying() { # the session of the backup has nothing to ask for a while, and has not ended the backup
  sql_is pg-main "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'barman_cloud_backup' AND state = 'idle' AND state_change < clock_timestamp() - interval '0.3 s' AND query !~ 'backup_stop|stop_backup|pg_stat_archiver'" t
}
restarted() { [ "$(field "pod/$1" "{.status.initContainerStatuses[?(@.name==\"$sidecar\")].restartCount}")" -gt 0 ]; }
kill_now() { # kill_now POD UID
  if [ -n "${E2E_KILL:-}" ]; then $E2E_KILL "$@"; return; fi
  # every process of the Pod has the Pod's uid in its mounts; the sidecar is the one that runs our binary
  k delete pod killer --ignore-not-found --now >/dev/null
  k apply -f - >/dev/null <<YAML
apiVersion: v1
kind: Pod
metadata: {name: killer}
spec:
  restartPolicy: Never
  hostPID: true
  nodeName: $(field "pod/$1" '{.spec.nodeName}')
  containers:
  - name: kill
    image: $(field "pod/$1" '{.spec.containers[?(@.name=="postgres")].image}')
    imagePullPolicy: IfNotPresent
    securityContext: {privileged: true, runAsUser: 0}
    command:
    - bash
    - -c
    - |
      for p in /proc/[0-9]*; do
        if grep -qs '$2' \$p/mountinfo && tr '\\0' ' ' <\$p/cmdline | grep -q '^/cnpg-barman-s3 sidecar'; then
          kill -9 \${p#/proc/} && echo killed \$p && n=1
        fi
      done
      [ -n "\$n" ]
YAML
  wait_for 60 "end of pod killer" pod_ended killer
  is pod/killer '{.status.phase}' Succeeded || fail "found no sidecar to kill in pod $1: $(k logs killer)"
}

missing_store() {
  apply examples/cluster.yaml 's/pg-main/pg-nostore/; s/main-store/no-such-store/'
  wait_for 90 "Event that tells of the missing ObjectStore" told pg-nostore
  say "    $(told pg-nostore)"
  told pg-nostore | grep -q no-such-store || fail "the Event does not name the ObjectStore"
  apply examples/object-stores.yaml 's/main-store/no-such-store/' "$first"
  healthy pg-nostore
  wait_for 60 "working archive" is cluster/pg-nostore "$archiving" True
  k delete cluster pg-nostore >/dev/null
}
told() { # told CLUSTER: what the Event says that `kubectl describe cluster` shows
  k get events --field-selector "involvedObject.name=$1,reason=ObjectStoreNotFound" -o jsonpath='{.items[*].message}' | grep .
}

missing_secret() {
  apply examples/object-stores.yaml 's/main-store/secretless/; s/name: s3-creds/name: no-such-secret/' "$first"
  apply examples/cluster.yaml 's/pg-main/pg-nosecret/; s/main-store/secretless/'
  wait_for 240 "archiving to fail for the Secret" has cluster/pg-nosecret "$archiving_message" no-such-secret
  is cluster/pg-nosecret "$archiving" False
  say "    $(field cluster/pg-nosecret "$archiving_message")"
  k get secret s3-creds -o yaml | sed 's/^  name: .*/  name: no-such-secret/; /uid:\|resourceVersion:\|creationTimestamp:/d' | k apply -f - >/dev/null
  wait_for 180 "working archive, now that the Secret is there" is cluster/pg-nosecret "$archiving" True
  k delete cluster pg-nosecret >/dev/null
}

azure() {
  local words
  if words=$(k apply -f - 2>&1 <<'YAML'
apiVersion: barmancloud.cnpg.io/v1
kind: ObjectStore
metadata: {name: azure}
spec:
  configuration:
    destinationPath: https://account.blob.core.windows.net/container
    azureCredentials: {inheritFromAzureAD: true}
YAML
  ); then fail "an ObjectStore with azureCredentials was taken"; fi
  say "    $words"
  grep -q "S3 only" <<<"$words" || fail "the refusal does not say that this plugin is S3 only"
}

no_such_server() {
  apply examples/restore.yaml 's/pg-restored/pg-nobody/; s/serverName: pg-main/serverName: nobody/'
  wait_for 120 "restore that fails" restore_failed
  k logs -l cnpg.io/cluster=pg-nobody --all-containers --tail=-1 | grep -oE '"error":"([^"\\]|\\.)*nobody([^"\\]|\\.)*"' | tail -1 | sed 's/^/          /' |
    grep . || fail "no log names the server name that is not there"
  k delete cluster pg-nobody >/dev/null
}
restore_failed() { k logs -l cnpg.io/cluster=pg-nobody --all-containers --tail=-1 | grep '"error":' | grep -q nobody; }

# ---------------------------------------------------------------------------

mkdir -p "$E2E_LOGS"
kubectl create namespace "$E2E_NAMESPACE"
cleanup() { # nothing of a run goes on after it, not even when it is interrupted
  status=$?
  trap - EXIT
  [ -z "$running" ] || kill "$running" 2>/dev/null || true
  [ -n "${E2E_KEEP:-}" ] || kubectl delete namespace "$E2E_NAMESPACE" --ignore-not-found --wait=false >/dev/null || true
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
kubectl -n "${S3_SECRET%/*}" get secret "${S3_SECRET#*/}" -o yaml |
  sed "s/^  name: .*/  name: s3-creds/; s/^  namespace: .*/  namespace: $E2E_NAMESPACE/; /uid:\|resourceVersion:\|creationTimestamp:/d" | k apply -f - >/dev/null

case_ "deploy the plugin" deploy
case_ "a cluster archives" archive
case_ "a backup on demand" backup
case_ "a scheduled backup" scheduled_backup
case_ "a restore that does not archive" restore
case_ "a restore that archives into a second store" restore_and_archive
case_ "a point in time" point_in_time
case_ "kill -9 of the sidecar during a backup" kill_sidecar
case_ "an ObjectStore that is missing" missing_store
case_ "a Secret that is missing" missing_secret
case_ "azureCredentials" azure
case_ "a server name that is not in the store" no_such_server

if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else echo "$passed passed, $failed failed"; fi
[ "$failed" = 0 ]
