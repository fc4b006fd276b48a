# takeover.sh - the track takeover: README's "Switching over from the original, and back", and
# the upgrade in place. The original's image is not to be had everywhere: its objects stand as
# its manifest makes them, and in them our own program, which works with the Secrets of others.
# shellcheck shell=bash

track_takeover() {
  case_ "the objects of the original, and a cluster under them" original
  case_ "switching over" switch_over
  case_ "what nobody uses any more is removed" remove_original
  case_ "an upgrade in place" upgrade
  case_ "back to the original" back
  case_ "and to this plugin once more, from below the original" switch_again
}

original_image=${image%:*}:original

original_manifest() {
  cat <<YAML
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: objectstores.barmancloud.cnpg.io}
spec:
  group: barmancloud.cnpg.io
  names: {kind: ObjectStore, listKind: ObjectStoreList, plural: objectstores, singular: objectstore}
  scope: Namespaced
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, x-kubernetes-preserve-unknown-fields: true}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: plugin-barman-cloud, namespace: $operator_namespace}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: barman-plugin-leader-election-role, namespace: $operator_namespace}
rules:
- {apiGroups: [""], resources: [configmaps], verbs: [get, list, watch, create, update, patch, delete]}
- {apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get, list, watch, create, update, patch, delete]}
- {apiGroups: [""], resources: [events], verbs: [create, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: barman-plugin-leader-election-rolebinding, namespace: $operator_namespace}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: barman-plugin-leader-election-role}
subjects: [{kind: ServiceAccount, name: plugin-barman-cloud, namespace: $operator_namespace}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: plugin-barman-cloud}
rules:
- {apiGroups: [""], resources: [secrets], verbs: [create, delete, get, list, watch]}
- {apiGroups: [barmancloud.cnpg.io], resources: [objectstores], verbs: [create, delete, get, list, patch, update, watch]}
- {apiGroups: [barmancloud.cnpg.io], resources: [objectstores/finalizers], verbs: [update]}
- {apiGroups: [barmancloud.cnpg.io], resources: [objectstores/status], verbs: [get, patch, update]}
- {apiGroups: [postgresql.cnpg.io], resources: [backups], verbs: [get, list, watch]}
- {apiGroups: [postgresql.cnpg.io], resources: [clusters/finalizers], verbs: [update]}
- {apiGroups: [rbac.authorization.k8s.io], resources: [roles, rolebindings], verbs: [create, get, list, patch, update, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: plugin-barman-cloud-binding}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: plugin-barman-cloud}
subjects: [{kind: ServiceAccount, name: plugin-barman-cloud, namespace: $operator_namespace}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: barman-plugin-metrics-auth-role}
rules: [{apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: barman-plugin-metrics-reader}
rules: [{nonResourceURLs: [/metrics], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: barman-plugin-metrics-auth-rolebinding}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: barman-plugin-metrics-auth-role}
subjects: [{kind: ServiceAccount, name: plugin-barman-cloud, namespace: $operator_namespace}]
---
apiVersion: v1
kind: Secret
metadata: {name: plugin-barman-cloud-8tfddg42gf, namespace: $operator_namespace}
stringData: {SIDECAR_IMAGE: "$original_image"}
---
apiVersion: v1
kind: Service
metadata:
  name: barman-cloud
  namespace: $operator_namespace
  labels: {app: barman-cloud, cnpg.io/pluginName: $plugin}
  annotations:
    cnpg.io/pluginClientSecret: barman-cloud-client-tls
    cnpg.io/pluginServerSecret: barman-cloud-server-tls
    cnpg.io/pluginPort: "9090"
spec:
  selector: {app: barman-cloud}
  ports: [{port: 9090, protocol: TCP, targetPort: 9090}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: barman-cloud, namespace: $operator_namespace, labels: {app: barman-cloud}}
spec:
  replicas: 1
  selector: {matchLabels: {app: barman-cloud}}
  strategy: {type: Recreate}
  template:
    metadata: {labels: {app: barman-cloud}}
    spec:
      serviceAccountName: plugin-barman-cloud
      containers:
      - name: barman-cloud
        image: $original_image
        imagePullPolicy: IfNotPresent
        args: [operator, --server-address=:9090, --server-secret=barman-cloud-server-tls, --client-secret=barman-cloud-client-tls]
        env:
        - name: SIDECAR_IMAGE
          valueFrom: {secretKeyRef: {name: plugin-barman-cloud-8tfddg42gf, key: SIDECAR_IMAGE}}
        ports: [{containerPort: 9090, protocol: TCP}]
        readinessProbe: {tcpSocket: {port: 9090}, periodSeconds: 2}
        securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, runAsUser: 10001, runAsGroup: 10001, capabilities: {drop: [ALL]}}
        volumeMounts: [{mountPath: /server, name: server}, {mountPath: /client, name: client}]
      volumes:
      - {name: server, secret: {secretName: barman-cloud-server-tls}}
      - {name: client, secret: {secretName: barman-cloud-client-tls}}
YAML
}

load_image() { # load_image REFERENCE: this build under another name
  ./image.sh bin/cnpg-barman-s3-linux-amd64 amd64 "$1" bin/image-other.tar >/dev/null
  $IMAGE_IMPORT bin/image-other.tar >/dev/null
}
certificate() { # certificate server|client: as cert-manager's self-signed issuer leaves it
  local dir
  dir=$(mktemp -d)
  openssl req -x509 -newkey rsa:2048 -nodes -days 90 -subj /CN=barman-cloud -addext subjectAltName=DNS:barman-cloud \
    -addext "extendedKeyUsage=$1Auth" -keyout "$dir/tls.key" -out "$dir/tls.crt" 2>/dev/null
  o create secret generic "barman-cloud-$1-tls" --type kubernetes.io/tls --dry-run=client -o yaml \
    --from-file="$dir/tls.crt" --from-file="$dir/tls.key" --from-file=ca.crt="$dir/tls.crt" | kubectl apply -f - >/dev/null
  rm -r "$dir"
}
rolled_out() { # a Deployment that answers, and the operator knows it
  o rollout status deploy/barman-cloud --timeout 120s >/dev/null
}
sidecar_image() { field "pod/$1" "{.spec.initContainers[?(@.name==\"$sidecar\")].image}"; }
runs() { # runs CLUSTER IMAGE: every Pod has that sidecar
  local pod
  for pod in $(k get pods -l "cnpg.io/cluster=$1" -o jsonpath='{.items[*].metadata.name}'); do
    [ "$(sidecar_image "$pod")" = "$2" ] || return 1
  done
}
goes_on() { # goes_on IMAGE: the cluster is rolled to that sidecar, and archives and backs up
  wait_for 240 "sidecar $1 in every Pod" runs pg-taken "$1"
  healthy pg-taken
  sql pg-taken "INSERT INTO item (body) VALUES ('$1')"
  archived pg-taken
  wait_for 60 "working archive" is cluster/pg-taken "$archiving" True
  say "    pg-taken runs $1 and archives"
}

take_back() { # README, with the original's manifest as manifest.yaml
  o delete deployment barman-cloud >/dev/null
  original_manifest >"$E2E_LOGS/manifest.yaml"
  kubectl apply -f "$E2E_LOGS/manifest.yaml" 2>&1 | grep -v "missing the kubectl.kubernetes.io/last-applied" | indent
  o delete secret cnpg-barman-s3-ca cnpg-barman-s3-server-tls cnpg-barman-s3-client-tls >/dev/null
  o delete role,rolebinding plugin-barman-cloud-certificates >/dev/null
  rolled_out
}

original() {
  load_image "$original_image"
  certificate server
  certificate client
  take_back
  apply examples/object-stores.yaml
  # a store that our rules refuse, with a status: it must survive, and stay writable
  k apply -f - >/dev/null <<'YAML'
apiVersion: barmancloud.cnpg.io/v1
kind: ObjectStore
metadata: {name: old-store}
spec: {configuration: {destinationPath: "https://account.blob.core.windows.net/container", azureCredentials: {inheritFromAzureAD: true}}}
YAML
  apply examples/cluster.yaml 's/pg-main/pg-taken/'
  healthy pg-taken
  sql pg-taken "CREATE TABLE item (id bigserial PRIMARY KEY, body text)"
  apply examples/backup.yaml 's/pg-main/pg-taken/'
  completed pg-taken-now
  goes_on "$original_image"
}

switch_over() {
  local stores window
  stores=$(k get objectstores -o jsonpath='{.items[*].metadata.uid}')
  window=$(field objectstore/main-store '{.status.serverRecoveryWindow.pg-taken.firstRecoverabilityPoint}')
  o delete deployment barman-cloud >/dev/null
  # the instances go on while there is no plugin
  sql pg-taken "INSERT INTO item (body) VALUES ('no plugin')"
  archived pg-taken
  manifest | kubectl apply -f - 2>&1 | grep -v "missing the kubectl.kubernetes.io/last-applied" | indent
  rolled_out
  goes_on "$image"
  [ "$(k get objectstores -o jsonpath='{.items[*].metadata.uid}')" = "$stores" ] || fail "the ObjectStores are not those of before"
  is objectstore/main-store '{.status.serverRecoveryWindow.pg-taken.firstRecoverabilityPoint}' "$window" || fail "the recovery window is another one"
  k patch objectstore old-store --subresource status --type merge -p '{"status":{"serverRecoveryWindow":{"x":{"firstRecoverabilityPoint":"2026-01-01T00:00:00Z"}}}}' >/dev/null 2>&1
  k delete backup pg-taken-ours --ignore-not-found >/dev/null
  apply examples/backup.yaml 's/pg-main-now/pg-taken-ours/; s/pg-main/pg-taken/'
  completed pg-taken-ours
  verified main-store pg-taken
}

remove_original() { # README; cert-manager's objects, which are not here, come first there
  o delete secret barman-cloud-server-tls barman-cloud-client-tls >/dev/null
  o get secrets -o name | grep '^secret/plugin-barman-cloud-' | xargs kubectl -n "$operator_namespace" delete >/dev/null
  o delete --ignore-not-found lease/822e3f5c.cnpg.io \
    role/barman-plugin-leader-election-role rolebinding/barman-plugin-leader-election-rolebinding >/dev/null
  kubectl delete clusterrole/barman-plugin-metrics-auth-role clusterrole/barman-plugin-metrics-reader \
    clusterrolebinding/barman-plugin-metrics-auth-rolebinding >/dev/null
  o rollout restart deploy/barman-cloud >/dev/null
  rolled_out
  k patch cluster pg-taken --type merge -p '{"spec":{"instances":2}}' >/dev/null
  healthy pg-taken 2
}

# The new version is another image: the operator rolls the Pods, standbys first, by a switchover
upgrade() {
  local next=${image%:*}:next before
  load_image "$next"
  before=$(primary pg-taken)
  manifest "$next" | kubectl apply -f - >/dev/null
  rolled_out
  wait_for 240 "sidecar $next in every Pod" runs pg-taken "$next"
  healthy pg-taken 2
  sql pg-taken "INSERT INTO item (body) VALUES ('$next')"
  archived pg-taken
  say "    both Pods run $next; the primary was $before and is $(primary pg-taken)"
  # the plugin's own Pod may be restarted, or changed, without any effect on a cluster
  before=$(k get pods -l cnpg.io/cluster=pg-taken -o jsonpath='{.items[*].metadata.uid}')
  manifest "$next" | sed 's/--log-level=info/--log-level=debug/' | kubectl apply -f - >/dev/null
  rolled_out
  k annotate cluster pg-taken looked-at=now --overwrite >/dev/null
  sleep 10 # nothing is to happen: there is no condition to wait for
  healthy pg-taken 2
  [ "$(k get pods -l cnpg.io/cluster=pg-taken -o jsonpath='{.items[*].metadata.uid}')" = "$before" ] || fail "a restart of the plugin rolled the Pods"
}

back() {
  k patch cluster pg-taken --type merge -p '{"spec":{"instances":1}}' >/dev/null
  healthy pg-taken
  certificate server
  certificate client
  take_back
  goes_on "$original_image"
  verified main-store pg-taken
}

switch_again() {
  switch_over
  remove_original
  # and another namespace than the usual one: what the API server would make of it
  kubectl create namespace "$namespace-operator" >/dev/null
  make -s deploy-manifest NAMESPACE="$namespace-operator" >"$E2E_LOGS/other-namespace.yaml"
  kubectl apply --dry-run=server -f "$E2E_LOGS/other-namespace.yaml" >/dev/null
  ! grep -n "namespace: $operator_namespace" "$E2E_LOGS/other-namespace.yaml" || fail "the manifest still names $operator_namespace"
  kubectl delete namespace "$namespace-operator" --wait=false >/dev/null
}
