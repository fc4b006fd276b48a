# faults.sh - the track faults: what is wrong, said in words that lead to the cure
# shellcheck shell=bash

track_faults() {
  case_ "an ObjectStore that is missing" missing_store
  case_ "a Secret that is missing" missing_secret
  case_ "azureCredentials" azure
  case_ "credentials of a role" iam_role
  case_ "a server name that is not in the store" no_such_server
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

# No role can be had here: the manifests are admitted, and the sidecar gets no right on any Secret
iam_role() {
  example examples/iam-role.yaml | k apply --dry-run=server -f - | indent
}

no_such_server() {
  apply examples/object-stores.yaml
  apply examples/restore.yaml 's/pg-restored/pg-nobody/; s/serverName: pg-main/serverName: nobody/'
  wait_for 120 "restore that fails" restore_failed
  restore_failed | sed 's/^/          /'
  k delete cluster pg-nobody >/dev/null
}
restore_failed() { # and says so; not every container of its Pods has a log at any time
  { k logs -l cnpg.io/cluster=pg-nobody --all-containers --tail=-1 || true; } | grep -oE '"error":"([^"\\]|\\.)*nobody([^"\\]|\\.)*"' | tail -1 | grep .
}
