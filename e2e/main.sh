# main.sh - the track main: what examples/ promises of archiving, backup and restore
# shellcheck shell=bash

track_main() {
  case_ "a cluster archives" archive
  case_ "a backup on demand" backup
  case_ "a scheduled backup" scheduled_backup
  case_ "a restore that does not archive" restore
  case_ "a restore that archives into a second store" restore_and_archive
  case_ "a point in time" point_in_time
  case_ "kill -9 of the sidecar during a backup" kill_sidecar
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
  sql pg-main "CREATE TABLE load AS SELECT id, (SELECT string_agg(md5(random()::text || n), '') FROM generate_series(id, id + 59) AS n) AS body FROM generate_series(1, 60000) AS id"
  # slowly, lest it is done before it is killed
  k patch objectstore main-store --type merge -p '{"spec":{"configuration":{"data":{"additionalCommandArgs":["--max-bandwidth=500kB"]}}}}' >/dev/null
  apply examples/backup.yaml 's/pg-main-now/pg-main-killed/'
  wait_for 120 "backup that copies files" copying
  sql pg-main "INSERT INTO load SELECT id, md5(id::text) FROM generate_series(60001, 300000) AS id" &
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
  ask main-store pg-main list -o json >"$E2E_LOGS/catalog.json"
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
restarted() { [ "$(sidecar_restarts "$1")" -gt 0 ]; }
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
      # one grep for all of them: a busy node has hundreds
      for p in \$(grep -ls '$2' /proc/[0-9]*/mountinfo); do
        p=\${p%/mountinfo}
        if tr '\\0' ' ' <\$p/cmdline | grep -q '^/cnpg-barman-s3 sidecar'; then
          kill -9 \${p#/proc/} && echo killed \$p && n=1
        fi
      done
      [ -n "\$n" ]
YAML
  wait_for 180 "end of pod killer" pod_ended killer
  is pod/killer '{.status.phase}' Succeeded || fail "found no sidecar to kill in pod $1: $(k logs killer)"
}
