#!/usr/bin/env bash
# run.sh [TRACK...] - the plugin on a real cluster: the one of KUBECONFIG, which runs CloudNativePG.
#
# It deploys bin/image-amd64.tar and deploy.yaml, and walks through examples/ in tracks, each in
# a namespace and buckets of its own, several at a time:
#
#   main      archive, back up, restore without and with archiving, point in time, a killed sidecar
#   life      private CA, two instances, walStorage, a tablespace: rotated keys, failover under
#             load, pg_rewind, a third instance, metrics, hibernation, restore
#   replica   replica clusters by archive and by streaming, promotion and the way back
#   big       a database of 500 MB with 64Mi for the sidecar
#   care      retention, two clusters in one store, another store under a cluster
#   upgrade   another major version of PostgreSQL in place; needs PG_IMAGE_NEXT
#   faults    what is missing or wrong is said in words that lead to the cure
#   takeover  the plugin is put over the original's objects, upgraded, and taken back; it runs
#             alone, because for a while the operator has no plugin
#
# Each case checks data; the last line is 'N passed, N failed'. A track ends at its first failure.
#
#   IMAGE_IMPORT    command that loads an image archive into the nodes: `kind load image-archive`
#   PG_IMAGE        PostgreSQL image for the clusters; the operator's default when empty
#   PG_IMAGE_NEXT   one of a later major version, which can run the programs of PG_IMAGE
#   S3_ENDPOINT     an S3 server as Pods see it             (http://s3.s3.svc:9000)
#   S3_SECRET       namespace/name of a Secret with ACCESS_KEY_ID and ACCESS_SECRET_KEY,
#                   which may make buckets                  (default/s3-creds)
#   S3_PRIVATE      the same server with a private CA, empty if there is none (https://s3.s3.svc:9443,
#                   unless S3_ENDPOINT is set)
#   S3_CA           namespace/name of a Secret with that CA as ca.crt         (default/s3-ca)
#   CNPG_NAMESPACE  where its operator runs                 (cnpg-system)
#   E2E_JOBS        tracks at a time                        (3)
#   E2E_PATIENCE    every time limit is multiplied by it    (3)
#   E2E_NAMESPACE   prefix of the namespaces, which must not exist; deleted at the end (barman-e2e-TIME)
#   E2E_LOGS        where logs of a failure go              (bin/e2e-logs)
#   E2E_KEEP        set it to keep the namespaces
#   E2E_KILL        command that kills the sidecar of the Pod whose name and uid are its
#                   arguments; by default a privileged Pod on that node does it
#
# The buckets of a run, e2e-TIME-..., stay in the S3 server.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGE_IMPORT=${IMAGE_IMPORT:?set it to the command that loads an image archive into the nodes, such as "kind load image-archive"}
PG_IMAGE=${PG_IMAGE:-}
PG_IMAGE_NEXT=${PG_IMAGE_NEXT:-}
[ -n "${S3_ENDPOINT:-}" ] || S3_PRIVATE=${S3_PRIVATE-https://s3.s3.svc:9443}
S3_ENDPOINT=${S3_ENDPOINT:-http://s3.s3.svc:9000}
S3_SECRET=${S3_SECRET:-default/s3-creds}
S3_PRIVATE=${S3_PRIVATE:-}
S3_CA=${S3_CA:-default/s3-ca}
E2E_JOBS=${E2E_JOBS:-3}
E2E_LOGS=${E2E_LOGS:-bin/e2e-logs}
operator_namespace=${CNPG_NAMESPACE:-cnpg-system}
run_id=$(date -u +%Y%m%d%H%M%S)
E2E_NAMESPACE=${E2E_NAMESPACE:-barman-e2e-$run_id}
plugin=barman-cloud.cloudnative-pg.io
sidecar="plugin-barman-cloud"
image=$(sed -n 's/^ *image: //p' deploy.yaml | head -1)

# ---------------------------------------------------------------------------
# Telling, waiting, asking
# ---------------------------------------------------------------------------

began=$(date +%s)
track=
say() { printf '%4d s  %-8s  %s\n' "$(($(date +%s) - began))" "$track" "$*"; }
fail() { say "    FAILED: $*" | tee -a "$failures"; return 1; }
indent() { sed "s/^/        $(printf '%-8s' "$track")      /"; }
k() { kubectl -n "$namespace" "$@"; }
o() { kubectl -n "$operator_namespace" "$@"; }

collect() { # collect NAME: everything that may explain a failure, in files; the ends of it here
  local dir=$E2E_LOGS/$1 pod container
  mkdir -p "$dir"
  k get clusters,backups,scheduledbackups,objectstores,pods,jobs,pvc,roles,rolebindings -o yaml >"$dir/objects.yaml" 2>&1 || true
  k get events --sort-by=.lastTimestamp >"$dir/events" 2>&1 || true
  o logs deploy/barman-cloud --tail=-1 >"$dir/plugin.log" 2>&1 || true
  o logs deploy/cnpg-controller-manager --tail=5000 >"$dir/operator.log" 2>&1 || true
  for pod in $(k get pods -o name); do
    for container in $(k get "$pod" -o jsonpath='{.spec.initContainers[*].name} {.spec.containers[*].name}'); do
      k logs "$pod" -c "$container" >"$dir/${pod#pod/}-$container.log" 2>&1 || true
      k logs "$pod" -c "$container" --previous >"$dir/${pod#pod/}-$container-previous.log" 2>/dev/null || true
    done
  done
  find "$dir" -size 0 -delete
  {
    echo "clusters, backups and pods; everything is in $dir:"
    k get clusters,backups,pods 2>&1 || true
    tail -n 8 "$dir"/events "$dir"/plugin.log "$dir"/*"$sidecar"*.log 2>/dev/null | cut -c1-600 || true
    echo "the operator's errors:"
    grep '"level":"error"' "$dir/operator.log" | grep "$namespace" | tail -n 4 | cut -c1-600 || true
  } | indent
}

wait_for() { # wait_for SECONDS WHAT COMMAND...: on a slow machine that many times E2E_PATIENCE
  local limit=$(($1 * ${E2E_PATIENCE:-3})) what=$2 t0
  shift 2
  t0=$(date +%s)
  until "$@" >/dev/null 2>&1; do
    [ $(($(date +%s) - t0)) -lt "$limit" ] || fail "still no $what after $limit s" || return 1
    sleep 2 # kubectl itself takes half a second of a busy core
  done
}
field() { k get "$1" -o jsonpath="$2"; }
is() { [ "$(field "$1" "$2")" = "$3" ]; }
has() { field "$1" "$2" | grep -qF -- "$3"; }
gone() { [ -z "$(k get "$@" --ignore-not-found -o name)" ]; }

healthy() { # healthy CLUSTER [INSTANCES]
  wait_for 300 "healthy cluster $1" is "cluster/$1" '{.status.phase} {.status.readyInstances}' "Cluster in healthy state ${2:-1}"
}
archiving='{.status.conditions[?(@.type=="ContinuousArchiving")].status}'
archiving_message='{.status.conditions[?(@.type=="ContinuousArchiving")].message}'
primary() { field "cluster/$1" '{.status.currentPrimary}'; }

# As superuser, database app. A server that is just being restarted, as after a promotion, has not
# heard the statement, which is therefore said again.
sql_on() { # sql_on POD SQL
  local errors status
  errors=$(mktemp)
  for _ in {1..10}; do
    status=0
    k exec "$1" -c postgres -- \
      psql --no-psqlrc --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 --dbname app --command "$2" 2>"$errors" || status=$?
    grep -q 'connection to server on socket .* failed: ' "$errors" || break
    sleep 2
  done
  cat "$errors" >&2
  rm "$errors"
  return $status
}
sql() { sql_on "$(primary "$1")" "$2"; } # sql CLUSTER SQL
content() { sql "$1" "SELECT count(*) || ' rows, ' || coalesce(md5(string_agg(md5(t::text), ',' ORDER BY id)), '') FROM ${2:-item} t"; }
same_content() { # same_content CLUSTER WANTED [TABLE]
  local got
  got=$(content "$1" "${3:-item}")
  say "    $1 has $got"
  [ "$got" = "$2" ] || fail "table ${3:-item} of $1 is $got, want $2"
}
archived() { # archived CLUSTER: end the WAL segment, and wait until PostgreSQL knows it archived
  local wal
  wal=$(sql "$1" "SELECT pg_walfile_name(pg_switch_wal())")
  # A new timeline's history file is no segment. What is archived while PostgreSQL shuts down (the
  # operator restarts it after a promotion) is not in its statistics any more.
  wait_for 120 "archived $wal" sql_is "$1" "SELECT coalesce(substr(last_archived_wal, 1, 24) >= '$wal' AND last_archived_wal NOT LIKE '%history', false)
    OR EXISTS (SELECT FROM pg_ls_archive_statusdir() WHERE name = '$wal.done') FROM pg_stat_archiver" t
}
sql_is() { [ "$(sql "$1" "$2")" = "$3" ]; }

# manifests of ours, for this run: its buckets, its S3 server, its PostgreSQL image
example() { # example FILE [SED...]: as it is applied
  local file=$1 args=(-e "s#s3://#s3://e2e-$run_id-$track-#" -e "s#http://s3.s3.svc:9000#$S3_ENDPOINT#")
  shift
  if [ -n "$S3_PRIVATE" ]; then args+=(-e "s#https://s3.s3.svc:9443#$S3_PRIVATE#")
  else args+=(-e "s#https://s3.s3.svc:9443#$S3_ENDPOINT#" -e '/endpointCA:/,+2d'); fi
  [ -z "$PG_IMAGE" ] || args+=(-e "s#^  instances: .*#&\n  imageName: $PG_IMAGE#")
  for s in "$@"; do args+=(-e "$s"); done
  sed "${args[@]}" "$file"
}
# shellcheck disable=SC2034,SC2016
first='/^---/,$d' second='1,/^---/d' # only that document of a file
apply() { example "$@" | k apply -f - | indent; }
copy_secret() { # copy_secret NAMESPACE/NAME NEW
  kubectl -n "${1%/*}" get secret "${1#*/}" -o yaml |
    sed "s/^  name: .*/  name: $2/; s/^  namespace: .*/  namespace: $namespace/; /uid:\|resourceVersion:\|creationTimestamp:/d" |
    k apply -f - >/dev/null
}

completed() { # completed BACKUP: wait for it
  local again
  wait_for 300 "end of backup $1" ended "$1"
  # The operator gives a backup up when its own look at the Pod has failed once.
  if [[ $(field "backup/$1" '{.status.error}') == *"no status found for target pod"* ]]; then
    say "    backup $1: $(field "backup/$1" '{.status.error}'); once more"
    again=$(k get backup "$1" -o yaml | sed '/^status:/,$d; /^  \(uid\|resourceVersion\|creationTimestamp\|generation\):/d')
    k delete backup "$1" >/dev/null
    k apply -f - <<<"$again" | indent
    wait_for 300 "end of backup $1" ended "$1"
  fi
  is "backup/$1" '{.status.phase}' completed || fail "backup $1 is $(field "backup/$1" '{.status.phase}: {.status.error}')"
  say "    backup $1: id $(field "backup/$1" '{.status.backupId}'), WAL $(field "backup/$1" '{.status.beginWal} to {.status.endWal}'), by $(field "backup/$1" '{.status.instanceID.podName}')"
}
pod_ended() { case $(field "pod/$1" '{.status.phase}') in Succeeded | Failed) ;; *) return 1 ;; esac; }
ended() { case $(field "backup/$1" '{.status.phase}') in completed | failed) ;; *) return 1 ;; esac; }
sidecar_restarts() { field "pod/$1" "{.status.initContainerStatuses[?(@.name==\"$sidecar\")].restartCount}"; }

# Our own program in a Pod, with the Kubernetes objects as its file: `list` and `verify`
ask() { # ask STORE SERVER COMMAND [FLAG...]
  local store=$1 server=$2 command=$3
  shift 3
  k delete pod ask --ignore-not-found --now >/dev/null
  k create secret generic ask --dry-run=client -o yaml \
    --from-file=store.yaml=<(k get objectstore "$store" -o yaml; for s in $(k get secrets -o name | grep /s3-); do echo ---; k get "$s" -o yaml; done) |
    k apply -f - >/dev/null
  k apply -f - >/dev/null <<YAML
apiVersion: v1
kind: Pod
metadata: {name: ask}
spec:
  restartPolicy: Never
  containers:
  - name: ask
    image: $image
    imagePullPolicy: IfNotPresent
    args: [$command, --objectstore, /ask/store.yaml, --server-name, $server$(printf ', "%s"' "$@")]
    volumeMounts: [{name: ask, mountPath: /ask}]
  volumes: [{name: ask, secret: {secretName: ask}}]
YAML
  wait_for 120 "end of pod ask" pod_ended ask
  k logs ask
  is pod/ask '{.status.phase}' Succeeded || fail "$command of $server"
}
verified() { # verified STORE SERVER: every backup and all WAL since the first one
  local words
  words=$(ask "$1" "$2" verify --log-level error) || { indent <<<"$words"; return 1; }
  say "    verify $2: $(tail -n 1 <<<"$words")"
}

manifest() { make -s deploy-manifest NAMESPACE="$operator_namespace" IMAGE="${1:-$image}"; } # manifest [IMAGE]: README's step 2
deploy() {
  say "    $IMAGE_IMPORT bin/image-amd64.tar"
  $IMAGE_IMPORT bin/image-amd64.tar >/dev/null
  manifest | kubectl apply --server-side --force-conflicts -f - >/dev/null
  # the image keeps its name from build to build, so Pods of an earlier run are replaced
  o rollout restart deploy/barman-cloud >/dev/null
  o rollout status deploy/barman-cloud --timeout 120s >/dev/null
  wait_for 60 "registration of the plugin" registered
}
registered() { # the operator says it once, when the Service and its certificates are there
  o get events --field-selector reason=PluginRegistered -o name | grep -q . ||
    o logs deploy/cnpg-controller-manager --tail=-1 | grep -c "Registered plugin.*$plugin" >/dev/null
}

. e2e/main.sh
. e2e/life.sh
. e2e/replica.sh
. e2e/big.sh
. e2e/care.sh
. e2e/upgrade.sh
. e2e/faults.sh
. e2e/takeover.sh

# ---------------------------------------------------------------------------
# Tracks
# ---------------------------------------------------------------------------

# a case is a function; it runs by itself, and the next one only after its success
case_() { # case_ WHAT FUNCTION
  local status=0 t0
  [ -z "$broken" ] || { echo "skipped" >>"$results"; return; }
  t0=$(date +%s)
  say "--- $1"
  # in the background, so that an interruption does not have to wait for it
  (set -eE; trap 'say "      at ${BASH_SOURCE[0]}:$LINENO: $BASH_COMMAND" | cut -c1-300 >>"$failures"' ERR; "$2") &
  running=$!
  wait "$running" || status=$?
  running=
  if [ $status = 0 ]; then
    echo passed >>"$results"
    say "    ok: $1 ($(($(date +%s) - t0)) s)"
  else
    echo failed >>"$results"
    broken=1
    collect "$track-$2" >"$E2E_LOGS/$track.report" 2>&1 || true
    say "    FAILED: $1 ($(($(date +%s) - t0)) s)" | tee -a "$failures"
    cat "$E2E_LOGS/$track.report"
  fi
}

run_track() { # run_track NAME: in a namespace of its own
  track=$1
  namespace=$E2E_NAMESPACE-$track
  broken='' running=''
  trap '[ -z "$running" ] || kill "$running" 2>/dev/null; exit 130' INT TERM
  kubectl create namespace "$namespace" >/dev/null
  copy_secret "$S3_SECRET" s3-creds
  [ -z "$S3_PRIVATE" ] || copy_secret "$S3_CA" s3-ca
  "track_$track"
  [ -n "${E2E_KEEP:-}" ] || kubectl delete namespace "$namespace" --wait=false >/dev/null
}

[ $# -gt 0 ] || set -- life replica main care big ${PG_IMAGE_NEXT:+upgrade} faults takeover
for name; do declare -F "track_$name" >/dev/null || { echo "run.sh: there is no track $name" >&2; exit 2; }; done
rm -rf "$E2E_LOGS"
mkdir -p "$E2E_LOGS"
results=$(mktemp) failures=$(mktemp)
tracks=()
cleanup() { # nothing of a run goes on after it, not even when it is interrupted
  status=$?
  trap - EXIT
  for p in "${tracks[@]}"; do kill "$p" 2>/dev/null || true; done
  for name in "$@"; do
    [ -n "${E2E_KEEP:-}" ] || kubectl delete namespace "$E2E_NAMESPACE-$name" --ignore-not-found --wait=false >/dev/null || true
  done
  rm -f "$results" "$failures"
  exit "$status"
}
# shellcheck disable=SC2064
trap "cleanup $*" EXIT
trap 'exit 130' INT TERM

namespace=$operator_namespace broken='' running=''
case_ "deploy the plugin" deploy
[ -z "$broken" ] || exit 1
start_track() { # in the background, so that an interruption does not have to wait for it
  (trap '[ $? = 0 ] || echo failed >>"$results"' EXIT; run_track "$1") &
  tracks+=($!)
}
for name; do
  [ "$name" != takeover ] || continue
  while [ "$(jobs -rp | wc -l)" -ge "$E2E_JOBS" ]; do wait -n || true; done
  start_track "$name"
done
wait
case " $* " in *" takeover "*) start_track takeover; wait ;; esac

cat "$failures" # once more, where it is found
count() { grep -c "^$1$" "$results" || true; }
skipped=$(count skipped)
echo "$(count passed) passed, $(count failed) failed$([ "$skipped" = 0 ] || echo ", $skipped skipped") in $(($(date +%s) - began)) s"
[ "$(count failed)" = 0 ]
