// The control plane against a real kube-apiserver with RBAC: the program runs as the
// ServiceAccount of deploy.yaml, and the tests play the CloudNativePG operator over the
// real port, with the certificates that the operator would read.
//
// KUBECONFIG_API names the kubeconfig of an administrator of a disposable API server;
// `make test-api` sets it. No controllers and no node are needed.

package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	neturl "net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloudnative-pg/cnpg-i/pkg/identity"
	"github.com/cloudnative-pg/cnpg-i/pkg/lifecycle"
	"github.com/cloudnative-pg/cnpg-i/pkg/reconciler"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	clientfeatures "k8s.io/client-go/features"
	clientfeaturestesting "k8s.io/client-go/features/testing"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/yaml"
)

// ---------------------------------------------------------------------------
// The API server
// ---------------------------------------------------------------------------

// api is a namespace of its own on the API server, with an administrator's rights.
type api struct {
	t         *testing.T
	config    *rest.Config
	client    dynamic.Interface
	namespace string
}

// resources of the kinds that the tests create.
var resources = map[string]schema.GroupVersionResource{
	"CustomResourceDefinition": {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
	"Namespace":                {Version: "v1", Resource: "namespaces"},
	"ServiceAccount":           {Version: "v1", Resource: "serviceaccounts"},
	"Secret":                   secrets,
	"Service":                  {Version: "v1", Resource: "services"},
	"Pod":                      {Version: "v1", Resource: "pods"},
	"Job":                      {Group: "batch", Version: "v1", Resource: "jobs"},
	"Role":                     roles,
	"RoleBinding":              roleBindings,
	"ClusterRole":              {Group: rbacv1.GroupName, Version: "v1", Resource: "clusterroles"},
	"ClusterRoleBinding":       {Group: rbacv1.GroupName, Version: "v1", Resource: "clusterrolebindings"},
	"ObjectStore":              objectStores,
	"Cluster":                  {Group: "postgresql.cnpg.io", Version: "v1", Resource: "clusters"},
	"Backup":                   {Group: "postgresql.cnpg.io", Version: "v1", Resource: "backups"},
}

// testAPI connects to the API server, installs crd.yaml and makes a namespace.
func testAPI(t *testing.T) *api {
	t.Helper()
	kubeconfig := os.Getenv("KUBECONFIG_API")
	if kubeconfig == "" {
		t.Skip("needs an API server: set KUBECONFIG_API to a disposable one's kubeconfig, or run make test-api")
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1
	config.WarningHandler = rest.NoWarnings{}
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	a := &api{t: t, config: config, client: client}
	a.installCRD("crd.yaml", nil)
	ns := a.create(&unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"generateName": "test-"},
	}})
	a.namespace = ns.GetName()
	t.Cleanup(func() { // what later tests' plugins would look after too
		for _, resource := range []schema.GroupVersionResource{objectStores, roles} {
			if err := client.Resource(resource).Namespace(a.namespace).DeleteCollection(context.Background(), metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
				t.Error(err)
			}
		}
	})
	return a
}

// documents are the YAML documents of a file.
func documents(t *testing.T, file string) []*unstructured.Unstructured {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var all []*unstructured.Unstructured
	for doc := range strings.SplitSeq(string(b), "\n---\n") {
		all = append(all, fromYAML(t, doc))
	}
	return all
}

// fromYAML parses one YAML document.
func fromYAML(t *testing.T, doc string) *unstructured.Unstructured {
	t.Helper()
	var u unstructured.Unstructured
	b, err := yaml.YAMLToJSON([]byte(doc))
	if err == nil {
		err = u.UnmarshalJSON(b)
	}
	if err != nil {
		t.Fatalf("%v in\n%s", err, doc)
	}
	return &u
}

// installCRD puts a CustomResourceDefinition in place, after change, and waits until it is served.
func (a *api) installCRD(file string, change func(*unstructured.Unstructured)) {
	a.t.Helper()
	crd := documents(a.t, file)[0]
	if change != nil {
		change(crd)
	}
	a.apply(crd)
	waitFor(a.t, "the API server to serve "+crd.GetName(), func() bool {
		served := a.read("CustomResourceDefinition", "", crd.GetName())
		conditions, _, _ := unstructured.NestedSlice(served.Object, "status", "conditions")
		return slices.ContainsFunc(conditions, func(c any) bool {
			m := c.(map[string]any)
			return m["type"] == "Established" && m["status"] == "True"
		})
	})
}

func (a *api) on(u *unstructured.Unstructured) dynamic.ResourceInterface {
	a.t.Helper()
	gvr, ok := resources[u.GetKind()]
	if !ok {
		a.t.Fatalf("unknown kind %s", u.GetKind())
	}
	return a.client.Resource(gvr).Namespace(u.GetNamespace())
}

func (a *api) create(u *unstructured.Unstructured) *unstructured.Unstructured {
	a.t.Helper()
	created, err := a.on(u).Create(a.t.Context(), u, metav1.CreateOptions{})
	if err != nil {
		a.t.Fatalf("create %s %s: %v", u.GetKind(), u.GetName(), err)
	}
	return created
}

// apply creates or replaces an object.
func (a *api) apply(u *unstructured.Unstructured) *unstructured.Unstructured {
	a.t.Helper()
	applied, err := a.on(u).Apply(a.t.Context(), u.GetName(), u, metav1.ApplyOptions{FieldManager: "test", Force: true})
	if err != nil {
		a.t.Fatalf("apply %s %s: %v", u.GetKind(), u.GetName(), err)
	}
	return applied
}

func (a *api) read(kind, namespace, name string) *unstructured.Unstructured {
	a.t.Helper()
	u, err := a.client.Resource(resources[kind]).Namespace(namespace).Get(a.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		a.t.Fatalf("get %s %s/%s: %v", kind, namespace, name, err)
	}
	return u
}

// change applies f to an object as it is now, whoever else writes it.
func (a *api) change(kind, namespace, name string, f func(object map[string]any)) {
	a.t.Helper()
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		u := a.read(kind, namespace, name)
		f(u.Object)
		_, err := a.on(u).Update(a.t.Context(), u, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		a.t.Fatalf("change %s %s: %v", kind, name, err)
	}
}

func (a *api) exists(kind, namespace, name string) bool {
	a.t.Helper()
	_, err := a.client.Resource(resources[kind]).Namespace(namespace).Get(a.t.Context(), name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		a.t.Fatal(err)
	}
	return err == nil
}

func (a *api) remove(kind, namespace, name string) {
	a.t.Helper()
	if err := a.client.Resource(resources[kind]).Namespace(namespace).Delete(a.t.Context(), name, metav1.DeleteOptions{}); err != nil {
		a.t.Fatal(err)
	}
}

// as decodes an object into its type.
func as[T any](t *testing.T, u *unstructured.Unstructured) *T {
	t.Helper()
	var v T
	if err := fromUnstructured(u, &v); err != nil {
		t.Fatal(err)
	}
	return &v
}

// asServiceAccount is the configuration of a Pod that runs under that ServiceAccount.
func (a *api) asServiceAccount(namespace, name string) *rest.Config {
	a.t.Helper()
	request := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"metadata": map[string]any{"name": name, "namespace": namespace}, "spec": map[string]any{},
	}}
	answer, err := a.client.Resource(resources["ServiceAccount"]).Namespace(namespace).
		Create(a.t.Context(), request, metav1.CreateOptions{}, "token")
	if err != nil {
		a.t.Fatalf("token of ServiceAccount %s/%s: %v", namespace, name, err)
	}
	config := rest.AnonymousClientConfig(a.config)
	config.BearerToken = as[authenticationv1.TokenRequest](a.t, answer).Status.Token
	return config
}

// ---------------------------------------------------------------------------
// The plugin, and the operator's side of its port
// ---------------------------------------------------------------------------

const testImage = "registry.example.com/sidecar:1"

// plugin is the running program.
type plugin struct {
	*api
	namespace     string // the operator's, as in deploy.yaml
	address, http string
	cmd           *exec.Cmd
	requests      *recorder // that it makes of the API server
}

// recorder notes each request to the API server that passes it.
type recorder struct {
	http.RoundTripper
	mu   sync.Mutex
	seen []apiRequest
}

// apiRequest is a request in the terms of RBAC.
type apiRequest struct {
	verb, group, resource, namespace, name string
	code                                   int
}

func (r *recorder) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := r.RoundTripper.RoundTrip(request)
	var a apiRequest
	parts := strings.Split(strings.Trim(request.URL.Path, "/"), "/")
	if parts[0] == "apis" {
		a.group, parts = parts[1], parts[1:]
	}
	parts = append(parts[2:], "", "", "", "", "")
	if parts[0] == "namespaces" && parts[2] != "" {
		a.namespace, parts = parts[1], parts[2:]
	}
	a.resource, a.name = parts[0], parts[1]
	if parts[2] != "" {
		a.resource += "/" + parts[2]
	}
	switch {
	case request.Method != "GET":
		a.verb = map[string]string{"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[request.Method]
	case request.URL.Query().Get("watch") == "true":
		a.verb = "watch"
	case a.name == "":
		a.verb = "list"
	default:
		a.verb = "get"
	}
	if response != nil {
		a.code = response.StatusCode
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, a)
	return response, err
}

// since are the requests after the first n.
func (r *recorder) since(n int) []apiRequest {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.seen[n:])
}

// recorded is a proxy before the API server, for a client that brings its own token.
func (a *api) recorded() (url string, ca []byte, requests *recorder) {
	a.t.Helper()
	transport, err := rest.TransportFor(rest.AnonymousClientConfig(a.config))
	if err != nil {
		a.t.Fatal(err)
	}
	host, err := neturl.Parse(a.config.Host)
	if err != nil {
		a.t.Fatal(err)
	}
	requests = &recorder{RoundTripper: transport}
	proxy := httptest.NewUnstartedServer(&httputil.ReverseProxy{
		Transport: requests, FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0),
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(host) },
	})
	proxy.EnableHTTP2 = true
	proxy.StartTLS()
	a.t.Cleanup(func() { proxy.CloseClientConnections(); proxy.Close() })
	return proxy.URL, chainPEM(proxy.Certificate(), nil), requests
}

// install applies deploy.yaml, without the Deployment, for a namespace of this test.
func (a *api) install() string {
	a.t.Helper()
	namespace := a.create(&unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"generateName": "operator-"},
	}}).GetName()
	for _, u := range documents(a.t, "deploy.yaml") {
		if u.GetNamespace() != "" {
			u.SetNamespace(namespace)
		}
		if u.GetKind() == "Deployment" || u.GetKind() == "CustomResourceDefinition" {
			continue
		}
		if u.GetKind() == "ClusterRoleBinding" {
			u.SetName(u.GetName() + "-" + namespace)
			a.t.Cleanup(func() {
				a.on(u).Delete(context.Background(), u.GetName(), metav1.DeleteOptions{})
			})
		}
		if subjects, found, _ := unstructured.NestedSlice(u.Object, "subjects"); found {
			for _, s := range subjects {
				s.(map[string]any)["namespace"] = namespace
			}
			unstructured.SetNestedSlice(u.Object, subjects, "subjects")
		}
		a.apply(u)
	}
	return namespace
}

// start runs the program with the arguments of deploy.yaml, under its ServiceAccount,
// and waits until it is ready.
func (a *api) start(namespace string, env ...string) *plugin {
	a.t.Helper()
	p := a.launch(namespace, env...)
	waitFor(a.t, "the plugin to be ready", func() bool { return p.probe("/readyz") == http.StatusOK })
	return p
}

func (a *api) launch(namespace string, env ...string) *plugin {
	t := a.t
	t.Helper()
	url, ca, requests := a.recorded()
	p := &plugin{api: a, namespace: namespace, requests: requests}
	for _, address := range []*string{&p.address, &p.http} {
		var err error
		if *address, err = freeAddress(); err != nil {
			t.Fatal(err)
		}
	}
	config := a.asServiceAccount(namespace, "plugin-barman-cloud")
	kubeconfig := clientcmdapi.NewConfig()
	kubeconfig.Clusters["c"] = &clientcmdapi.Cluster{Server: url, CertificateAuthorityData: ca}
	kubeconfig.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: config.BearerToken}
	kubeconfig.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	kubeconfig.CurrentContext = "x"
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*kubeconfig, file); err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(program(t), "operator", "--kubeconfig", file,
		"--server-address", p.address, "--health-probe-bind-address", p.http)
	p.cmd.Env = append(os.Environ(), append(env, "NAMESPACE="+namespace, "SIDECAR_IMAGE= "+testImage+"\n")...)
	var log bytes.Buffer
	p.cmd.Stdout, p.cmd.Stderr = &log, &log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(hang, func() { p.cmd.Process.Kill() })
		defer kill.Stop()
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("the plugin did not end well after SIGTERM: %v", err)
		}
		if t.Failed() {
			t.Logf("log of the plugin:\n%s", &log)
		}
	})
	return p
}

// probe asks the HTTP port, 0 while there is none.
func (p *plugin) probe(path string) int {
	resp, err := http.Get("http://" + p.http + path)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, resp.Body)
	return resp.StatusCode
}

// operatorTLS is what the operator makes of the two Secrets that the Service names:
// all of the server's tls.crt is trusted, and the name to check is the Service's.
func (p *plugin) operatorTLS() *tls.Config {
	p.t.Helper()
	service := p.read("Service", p.namespace, "barman-cloud")
	server := as[corev1.Secret](p.t, p.read("Secret", p.namespace, service.GetAnnotations()["cnpg.io/pluginServerSecret"]))
	client := as[corev1.Secret](p.t, p.read("Secret", p.namespace, service.GetAnnotations()["cnpg.io/pluginClientSecret"]))
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(server.Data["tls.crt"]) {
		p.t.Fatal("no certificate in the server's Secret")
	}
	pair, err := tls.X509KeyPair(client.Data["tls.crt"], client.Data["tls.key"])
	if err != nil {
		p.t.Fatal(err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, ServerName: service.GetName(), RootCAs: pool, Certificates: []tls.Certificate{pair}}
}

// dial connects like the operator.
func (p *plugin) dial(config *tls.Config) *grpc.ClientConn {
	p.t.Helper()
	conn, err := grpc.NewClient(p.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return conn
}

// works makes one call over a new connection.
func (p *plugin) works(config *tls.Config) error {
	conn := p.dial(config)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(p.t.Context(), hang)
	defer cancel()
	_, err := identity.NewIdentityClient(conn).Probe(ctx, &identity.ProbeRequest{})
	return err
}

func (p *plugin) pre(cluster *unstructured.Unstructured) (*reconciler.ReconcilerHooksResult, error) {
	p.t.Helper()
	definition := toJSON(p.t, cluster)
	return reconciler.NewReconcilerHooksClient(p.dial(p.operatorTLS())).Pre(p.t.Context(),
		&reconciler.ReconcilerHooksRequest{ClusterDefinition: definition, ResourceDefinition: definition})
}

// mustProceed is a Pre that lets the operator go on.
func (p *plugin) mustProceed(cluster *unstructured.Unstructured) {
	p.t.Helper()
	if r, err := p.pre(cluster); err != nil || r.Behavior != reconciler.ReconcilerHooksResult_BEHAVIOR_CONTINUE {
		p.t.Fatalf("Pre: %v, %v; want CONTINUE", r, err)
	}
}

// hook calls LifecycleHook and applies the patch as the operator does.
func (p *plugin) hook(verb lifecycle.OperatorOperationType_Type, cluster *unstructured.Unstructured, object []byte) (mutated, patch []byte, err error) {
	p.t.Helper()
	resp, err := lifecycle.NewOperatorLifecycleClient(p.dial(p.operatorTLS())).LifecycleHook(p.t.Context(), &lifecycle.OperatorLifecycleRequest{
		OperationType:     &lifecycle.OperatorOperationType{Type: verb},
		ClusterDefinition: toJSON(p.t, cluster),
		ObjectDefinition:  object,
	})
	if err != nil || len(resp.JsonPatch) == 0 {
		return object, nil, err
	}
	decoded, err := jsonpatch.DecodePatch(resp.JsonPatch)
	if err != nil {
		p.t.Fatalf("%v in patch %s", err, resp.JsonPatch)
	}
	if mutated, err = decoded.Apply(object); err != nil {
		p.t.Fatalf("apply patch %s: %v", resp.JsonPatch, err)
	}
	return mutated, resp.JsonPatch, nil
}

func toJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ---------------------------------------------------------------------------
// Objects
// ---------------------------------------------------------------------------

// storeYAML is an ObjectStore with keys from the Secret <name>-keys; more is added to its spec.
func (a *api) storeYAML(name string, more ...string) *unstructured.Unstructured {
	u := fromYAML(a.t, fmt.Sprintf(`
apiVersion: barmancloud.cnpg.io/v1
kind: ObjectStore
metadata: {name: %s}
spec:
  configuration:
    destinationPath: s3://backups/
    endpointURL: http://minio:9000
    s3Credentials:
      accessKeyId: {name: %[1]s-keys, key: ACCESS_KEY_ID}
      secretAccessKey: {name: %[1]s-keys, key: ACCESS_SECRET_KEY}
`, name))
	u.SetNamespace(a.namespace)
	for _, m := range more {
		merge(u.Object, fromYAML(a.t, "apiVersion: v\nkind: k\nspec:\n"+indent(m)).Object["spec"], "spec")
	}
	return u
}

// keys makes a Secret with what storeYAML's stores want, or with other content.
func (a *api) keys(name string, content ...string) {
	a.t.Helper()
	a.apply(fromYAML(a.t, fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: %s}\nstringData: {%s}", name, a.namespace,
		strings.Join(append(content, "ACCESS_KEY_ID: a", "ACCESS_SECRET_KEY: b")[:max(2, len(content))], ", "))))
}

// events are the messages on the Clusters of the namespace, oldest first.
func (a *api) events() (messages []string) {
	a.t.Helper()
	list, err := a.client.Resource(events).Namespace(a.namespace).List(a.t.Context(), metav1.ListOptions{})
	if err != nil {
		a.t.Fatal(err)
	}
	slices.SortFunc(list.Items, func(x, y unstructured.Unstructured) int { // by age: the versions are one counter
		return cmp.Or(cmp.Compare(len(x.GetResourceVersion()), len(y.GetResourceVersion())), cmp.Compare(x.GetResourceVersion(), y.GetResourceVersion()))
	})
	for _, e := range list.Items {
		event := as[corev1.Event](a.t, &e)
		if event.InvolvedObject.Kind != "Cluster" || event.InvolvedObject.APIVersion == "" || event.InvolvedObject.UID == "" || event.Type != "Warning" {
			a.t.Errorf("event %v", event)
		}
		messages = append(messages, event.Message)
	}
	return messages
}

func indent(s string) string {
	return "  " + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n  ")
}

// merge puts value into target[key], map by map.
func merge(target map[string]any, value any, key string) {
	from, isMap := value.(map[string]any)
	into, hasMap := target[key].(map[string]any)
	if !isMap || !hasMap {
		target[key] = value
		return
	}
	for k, v := range from {
		merge(into, v, k)
	}
}

// cluster is a Cluster as the operator sends it, uid included.
func (a *api) cluster(name, spec string) *unstructured.Unstructured {
	u := fromYAML(a.t, "apiVersion: postgresql.cnpg.io/v1\nkind: Cluster\nmetadata: {name: "+name+"}\nspec:\n"+indent(spec))
	u.SetNamespace(a.namespace)
	u.SetUID("11111111-2222-3333-4444-555555555555")
	return u
}

const (
	archives = `
plugins:
- name: barman-cloud.cloudnative-pg.io
  isWALArchiver: true
  parameters: {barmanObjectName: store-a}
`
	recovers = `
bootstrap: {recovery: {source: origin}}
externalClusters:
- name: origin
  plugin: {name: barman-cloud.cloudnative-pg.io, parameters: {barmanObjectName: store-b, serverName: old}}
`
	replicates = `
replica: {primary: other, source: other}
externalClusters:
- name: other
  plugin: {name: barman-cloud.cloudnative-pg.io, parameters: {barmanObjectName: store-c}}
`
)

// instancePod is a Pod as CloudNativePG 1.30 makes it (pkg/specs/pods.go), shortened.
func (a *api) instancePod(cluster string) []byte {
	return toJSON(a.t, fromYAML(a.t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata:
  name: %[1]s-1
  namespace: %[2]s
  labels: {cnpg.io/cluster: %[1]s, cnpg.io/podRole: instance}
spec:
  hostname: %[1]s-1
  serviceAccountName: %[1]s
  initContainers:
  - name: bootstrap-controller
    image: ghcr.io/cloudnative-pg/cloudnative-pg:1.30.0
    command: [/manager, bootstrap, /controller/manager]
    volumeMounts: [{name: pgdata, mountPath: /var/lib/postgresql/data}, {name: scratch-data, mountPath: /run}, {name: scratch-data, mountPath: /controller}]
  containers:
  - name: postgres
    image: ghcr.io/cloudnative-pg/postgresql:17
    imagePullPolicy: Always
    command: [/controller/manager, instance, run]
    env:
    - {name: PGDATA, value: /var/lib/postgresql/data/pgdata}
    - {name: POD_NAME, value: %[1]s-1}
    - {name: NAMESPACE, value: %[2]s}
    - {name: CLUSTER_NAME, value: %[1]s}
    - {name: PGPORT, value: "5432"}
    - {name: PGHOST, value: /controller/run}
    - {name: TZ, value: Europe/Rome}
    envFrom: [{secretRef: {name: more}}]
    volumeMounts: [{name: pgdata, mountPath: /var/lib/postgresql/data}, {name: scratch-data, mountPath: /run}, {name: scratch-data, mountPath: /controller}, {name: shm, mountPath: /dev/shm}, {name: pg-wal, mountPath: /var/lib/postgresql/wal}]
  volumes:
  - {name: pgdata, persistentVolumeClaim: {claimName: %[1]s-1}}
  - {name: scratch-data, emptyDir: {}}
  - {name: shm, emptyDir: {medium: Memory}}
  - {name: pg-wal, persistentVolumeClaim: {claimName: %[1]s-1-wal}}
  futureField: {unknown: to-us}
`, cluster, a.namespace)))
}

// jobOf is a Job of the given role, as CloudNativePG makes it (pkg/specs/jobs.go), with the instance Pod's template.
func (a *api) jobOf(cluster, role, labelPrefix string) []byte {
	pod := fromYAML(a.t, string(a.instancePod(cluster)))
	spec := pod.Object["spec"].(map[string]any)
	spec["restartPolicy"] = "Never"
	delete(spec, "futureField")
	containers := spec["containers"].([]any)
	containers[0].(map[string]any)["name"] = role
	return toJSON(a.t, map[string]any{
		"apiVersion": "batch/v1", "kind": "Job",
		"metadata": map[string]any{"name": cluster + "-1-" + role, "namespace": a.namespace},
		"spec": map[string]any{"template": map[string]any{
			"metadata": map[string]any{"labels": map[string]any{labelPrefix + "/jobRole": role}},
			"spec":     spec,
		}},
	})
}

func (a *api) serviceAccount(name string) {
	a.t.Helper()
	a.apply(fromYAML(a.t, fmt.Sprintf("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: %s, namespace: %s}", name, a.namespace)))
}

// ---------------------------------------------------------------------------
// Connection and certificates
// ---------------------------------------------------------------------------

func TestAPIHandshake(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	conn := p.dial(p.operatorTLS())
	ctx := t.Context()

	metadata, err := identity.NewIdentityClient(conn).GetPluginMetadata(ctx, &identity.GetPluginMetadataRequest{})
	if err != nil {
		t.Fatal(err)
	}
	service := a.read("Service", p.namespace, "barman-cloud")
	if label := service.GetLabels()["cnpg.io/pluginName"]; metadata.Name != label || label != "barman-cloud.cloudnative-pg.io" {
		t.Errorf("name %q, label of the Service %q: the operator needs them to be equal", metadata.Name, label)
	}
	if metadata.DisplayName != "BarmanCloudInstance" || metadata.License != "APACHE 2.0" || metadata.Maturity != "alpha" ||
		metadata.Vendor != "" || metadata.Description != "" || len(metadata.Manifest) != 0 {
		t.Errorf("metadata %v", metadata)
	}
	capabilities, err := identity.NewIdentityClient(conn).GetPluginCapabilities(ctx, &identity.GetPluginCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range capabilities.Capabilities {
		names = append(names, c.GetService().GetType().String())
	}
	equal(t, "plugin capabilities", names, []string{"TYPE_RECONCILER_HOOKS", "TYPE_LIFECYCLE_SERVICE", "TYPE_INSTANCE_SIDECAR_INJECTION"})

	hooks, err := lifecycle.NewOperatorLifecycleClient(conn).GetCapabilities(ctx, &lifecycle.OperatorLifecycleCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	names = nil
	for _, c := range hooks.LifecycleCapabilities {
		for _, o := range c.OperationTypes {
			names = append(names, c.Group+"/"+c.Kind+" "+o.Type.String())
		}
	}
	equal(t, "lifecycle capabilities", names, []string{"/Pod TYPE_CREATE", "/Pod TYPE_EVALUATE", "batch/Job TYPE_CREATE"})

	kinds, err := reconciler.NewReconcilerHooksClient(conn).GetCapabilities(ctx, &reconciler.ReconcilerHooksCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	names = nil
	for _, c := range kinds.ReconcilerCapabilities {
		names = append(names, c.Kind.String())
	}
	equal(t, "reconciler capabilities", names, []string{"KIND_CLUSTER", "KIND_BACKUP"})
	if got := p.probe("/healthz"); got != http.StatusOK {
		t.Errorf("/healthz answers %d", got)
	}
}

func equal[T comparable](t *testing.T, what string, got, want []T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n got %v\nwant %v", what, got, want)
	}
}

func TestAPIOnlyTheOperatorMayConnect(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	good := p.operatorTLS()
	if err := p.works(good); err != nil {
		t.Fatal(err)
	}
	// Self-signed, and one more by a CA of the same name.
	self, err := issue(certificateTemplate("cnpg-barman-s3 client", time.Hour), nil)
	if err != nil {
		t.Fatal(err)
	}
	server, err := tls.X509KeyPair(p.pair(defaultServerSecret))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*tls.Config){
		"no certificate":               func(c *tls.Config) { c.Certificates = nil },
		"self-signed certificate":      func(c *tls.Config) { c.Certificates = []tls.Certificate{*self} },
		"the server's as the client's": func(c *tls.Config) { c.Certificates = []tls.Certificate{server} },
		"TLS 1.2":                      func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
	} {
		bad := good.Clone()
		change(bad)
		if err := p.works(bad); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: got %v, want a refused connection", name, err)
		}
	}
	other := good.Clone()
	other.ServerName = "other"
	if err := p.works(other); err == nil {
		t.Error("the server's certificate is valid for any name")
	}
}

const (
	defaultCASecret     = "cnpg-barman-s3-ca"
	defaultServerSecret = "cnpg-barman-s3-server-tls"
	defaultClientSecret = "cnpg-barman-s3-client-tls"
)

// pair is the content of a TLS Secret.
func (p *plugin) pair(name string) (cert, key []byte) {
	p.t.Helper()
	s := as[corev1.Secret](p.t, p.read("Secret", p.namespace, name))
	return s.Data["tls.crt"], s.Data["tls.key"]
}

// putPair writes a TLS Secret, with the plugin's label when role is not empty.
func (a *api) putPair(namespace, name, role string, pair *tls.Certificate, behind ...*x509.Certificate) {
	a.t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		a.t.Fatal(err)
	}
	s := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
		"metadata": map[string]any{"name": name, "namespace": namespace},
		"stringData": map[string]any{
			"tls.crt": string(chainPEM(pair.Leaf, behind)),
			"tls.key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		},
	}}
	if role != "" {
		s.SetLabels(map[string]string{certificateLabel: role})
	}
	a.apply(s)
}

func mustIssue(t *testing.T, template *x509.Certificate, parent *tls.Certificate) *tls.Certificate {
	t.Helper()
	c, err := issue(template, parent)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func testCA(t *testing.T, lifetime time.Duration) *tls.Certificate {
	template := certificateTemplate("CA", lifetime)
	template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
	return mustIssue(t, template, nil)
}

func testLeaf(t *testing.T, ca *tls.Certificate, usage x509.ExtKeyUsage, lifetime time.Duration) *tls.Certificate {
	template := certificateTemplate("barman-cloud", lifetime)
	template.DNSNames, template.KeyUsage = []string{"barman-cloud"}, x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{usage}
	return mustIssue(t, template, ca)
}

// A leaf that ends soon is replaced by a running plugin, with no restart, and the
// operator trusts the new one before it has read the Secret again.
func TestAPIRenewsLeaves(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	cert, key := p.pair(defaultCASecret)
	ca, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	before := p.operatorTLS()
	soon := leafRenewBefore / 2
	old := testLeaf(t, &ca, x509.ExtKeyUsageServerAuth, soon)
	a.putPair(p.namespace, defaultServerSecret, "server", old, ca.Leaf)
	a.putPair(p.namespace, defaultClientSecret, "client", testLeaf(t, &ca, x509.ExtKeyUsageClientAuth, soon), ca.Leaf)
	for _, name := range []string{defaultServerSecret, defaultClientSecret} {
		waitFor(t, "a renewed "+name, func() bool {
			pair, err := tls.X509KeyPair(p.pair(name))
			return err == nil && time.Until(pair.Leaf.NotAfter) > leafRenewBefore
		})
	}
	if after, _ := p.pair(defaultCASecret); !bytes.Equal(after, cert) {
		t.Error("the CA was changed with the leaves")
	}
	renewed, _ := p.pair(defaultServerSecret)
	waitFor(t, "the server to present the renewed leaf", func() bool { return bytes.HasPrefix(renewed, chainPEM(p.presented(), nil)) })
	for name, config := range map[string]*tls.Config{"as it was": before, "with the new Secrets": p.operatorTLS()} {
		if err := p.works(config); err != nil {
			t.Errorf("the operator, %s, cannot connect: %v", name, err)
		}
	}
}

// presented is the leaf that the server shows.
func (p *plugin) presented() *x509.Certificate {
	config := p.operatorTLS()
	config.InsecureSkipVerify = true
	config.NextProtos = []string{"h2"}
	conn, err := tls.Dial("tcp", p.address, config)
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0]
}

// A new CA comes long before the old one ends, and for a while both are trusted: an
// operator and another replica with old leaves go on.
func TestAPIRenewsTheCAWithAnOverlap(t *testing.T) {
	a := testAPI(t)
	namespace := a.install()
	ca := testCA(t, caRenewBefore/2)
	server := testLeaf(t, ca, x509.ExtKeyUsageServerAuth, leafLifetime)
	client := testLeaf(t, ca, x509.ExtKeyUsageClientAuth, leafLifetime)
	a.putPair(namespace, defaultCASecret, "ca", ca)
	a.putPair(namespace, defaultServerSecret, "server", server, ca.Leaf)
	a.putPair(namespace, defaultClientSecret, "client", client, ca.Leaf)
	pool := x509.NewCertPool()
	pool.AddCert(server.Leaf)
	pool.AddCert(ca.Leaf)
	p := a.start(namespace)

	if err := p.works(&tls.Config{MinVersion: tls.VersionTLS13, ServerName: "barman-cloud", RootCAs: pool, Certificates: []tls.Certificate{*client}}); err != nil {
		t.Errorf("the operator with the old certificates cannot connect: %v", err)
	}
	bundle, _ := p.pair(defaultCASecret)
	if got := bytes.Count(bundle, []byte("BEGIN")); got != 2 || !bytes.HasSuffix(bundle, chainPEM(ca.Leaf, nil)) {
		t.Errorf("the CA's Secret holds %d certificates, want the new one and then the old one", got)
	}
	chain, _ := p.pair(defaultServerSecret)
	if !bytes.Equal(chain, append(chainPEM(server.Leaf, nil), bundle...)) {
		t.Error("the server's Secret does not hold its leaf and both CA certificates")
	}
	if err := p.works(p.operatorTLS()); err != nil {
		t.Errorf("the operator with the new Secrets cannot connect: %v", err)
	}
}

// What somebody else put there is used and not touched.
func TestAPIUsesForeignCertificates(t *testing.T) {
	a := testAPI(t)
	namespace := a.install()
	ca := testCA(t, time.Hour)
	a.putPair(namespace, defaultServerSecret, "", testLeaf(t, ca, x509.ExtKeyUsageServerAuth, time.Hour), ca.Leaf)
	a.putPair(namespace, defaultClientSecret, "", testLeaf(t, ca, x509.ExtKeyUsageClientAuth, time.Hour))
	versions := func() []string {
		return []string{
			a.read("Secret", namespace, defaultServerSecret).GetResourceVersion(),
			a.read("Secret", namespace, defaultClientSecret).GetResourceVersion(),
		}
	}
	before := versions()
	p := a.start(namespace)
	if err := p.works(p.operatorTLS()); err != nil {
		t.Error(err)
	}
	equal(t, "resource versions", versions(), before)
	if a.exists("Secret", namespace, defaultCASecret) {
		t.Error("a CA was made that signs nothing")
	}
	stranger := p.operatorTLS()
	stranger.Certificates = []tls.Certificate{*testLeaf(t, ca, x509.ExtKeyUsageClientAuth, time.Hour)}
	if err := p.works(stranger); err == nil {
		t.Error("every client of the foreign issuer is let in")
	}
	// Rotation by the owner is followed without a restart.
	a.putPair(namespace, defaultClientSecret, "", testLeaf(t, ca, x509.ExtKeyUsageClientAuth, time.Hour))
	waitFor(t, "the new foreign client to be let in", func() bool { return p.works(p.operatorTLS()) == nil })
}

// A foreign CA may end sooner than the leaves under it are renewed: they are made once, and not
// again and again, and replaced when the CA is.
func TestAPIForeignCA(t *testing.T) {
	a := testAPI(t)
	namespace := a.install()
	a.putPair(namespace, defaultCASecret, "", testCA(t, leafRenewBefore/2))
	p := a.start(namespace)
	server, _ := p.pair(defaultServerSecret)
	a.putPair(namespace, defaultClientSecret, "", testLeaf(t, testCA(t, time.Hour), x509.ExtKeyUsageClientAuth, time.Hour))
	waitFor(t, "the certificates to be looked at again", func() bool { return p.works(p.operatorTLS()) == nil })
	if now, _ := p.pair(defaultServerSecret); !bytes.Equal(now, server) {
		t.Error("the server's leaf was made again")
	}
	a.putPair(namespace, defaultCASecret, "", testCA(t, leafRenewBefore/2))
	waitFor(t, "a leaf of the next CA", func() bool {
		now, _ := p.pair(defaultServerSecret)
		return !bytes.Equal(now, server) && p.works(p.operatorTLS()) == nil
	})
}

// Replicas that start together agree on one set of certificates and all serve.
func TestAPIReplicasDoNotRace(t *testing.T) {
	a := testAPI(t)
	namespace := a.install()
	replicas := []*plugin{a.launch(namespace), a.launch(namespace), a.launch(namespace)}
	for _, p := range replicas {
		waitFor(t, "the replica to be ready", func() bool { return p.probe("/readyz") == http.StatusOK })
	}
	for i, p := range replicas {
		waitFor(t, fmt.Sprintf("replica %d to serve the certificate in the Secret", i), func() bool { return p.works(p.operatorTLS()) == nil })
	}
	serial := replicas[0].presented().SerialNumber
	for _, p := range replicas[1:] {
		if p.presented().SerialNumber.Cmp(serial) != 0 {
			t.Error("replicas present different certificates")
		}
	}
}

// ---------------------------------------------------------------------------
// Before the reconciliation: RBAC
// ---------------------------------------------------------------------------

func TestAPIPreGrantsWhatTheSidecarNeeds(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	a.create(a.storeYAML("store-a"))
	a.create(a.storeYAML("store-b", `
configuration:
  s3Credentials:
    region: {name: region, key: r}
    sessionToken: {name: store-b-keys, key: t}`))
	cluster := a.cluster("pg", archives+recovers)
	p.mustProceed(cluster)

	role := as[rbacv1.Role](t, a.read("Role", a.namespace, "pg-barman-cloud"))
	stores := []string{"store-a", "store-b"}
	want := []rbacv1.PolicyRule{
		{APIGroups: []string{"barmancloud.cnpg.io"}, Resources: []string{"objectstores"}, ResourceNames: stores, Verbs: []string{"get", "watch", "list"}},
		{APIGroups: []string{"barmancloud.cnpg.io"}, Resources: []string{"objectstores/status"}, ResourceNames: stores, Verbs: []string{"update", "patch"}},
		{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"region", "store-a-keys", "store-b-keys"}, Verbs: []string{"get", "watch", "list"}},
	}
	if got := toJSON(t, role.Rules); !bytes.Equal(got, toJSON(t, want)) {
		t.Errorf("rules:\n got %s\nwant %s", got, toJSON(t, want))
	}
	binding := as[rbacv1.RoleBinding](t, a.read("RoleBinding", a.namespace, "pg-barman-cloud"))
	equal(t, "subjects", binding.Subjects, []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: a.namespace, Name: "pg"}})
	if binding.RoleRef != (rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "Role", Name: "pg-barman-cloud"}) {
		t.Errorf("role reference %v", binding.RoleRef)
	}
	for _, m := range []metav1.ObjectMeta{role.ObjectMeta, binding.ObjectMeta} {
		if owner := metav1.GetControllerOf(&m); owner == nil || owner.Kind != "Cluster" || owner.APIVersion != "postgresql.cnpg.io/v1" ||
			owner.Name != "pg" || owner.UID != cluster.GetUID() || owner.BlockOwnerDeletion == nil || !*owner.BlockOwnerDeletion {
			t.Errorf("%s is controlled by %v, not by the Cluster", m.Name, owner)
		}
		if m.Labels["barmancloud.cnpg.io/cluster"] != "pg" {
			t.Errorf("labels %v", m.Labels)
		}
	}

	// Nothing changed, nothing is written.
	p.mustProceed(cluster)
	if v := a.read("Role", a.namespace, "pg-barman-cloud").GetResourceVersion(); v != role.ResourceVersion {
		t.Error("a second Pre wrote the Role")
	}
	if v := a.read("RoleBinding", a.namespace, "pg-barman-cloud").GetResourceVersion(); v != binding.ResourceVersion {
		t.Error("a second Pre wrote the RoleBinding")
	}

	// And the cluster's token can do exactly this.
	a.serviceAccount("pg")
	for _, name := range []string{"store-a-keys", "other"} {
		a.apply(fromYAML(t, fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: %s}\nstringData: {k: v}", name, a.namespace)))
	}
	sidecar, err := dynamic.NewForConfig(a.asServiceAccount(a.namespace, "pg"))
	if err != nil {
		t.Fatal(err)
	}
	in := func(gvr schema.GroupVersionResource) dynamic.ResourceInterface {
		return sidecar.Resource(gvr).Namespace(a.namespace)
	}
	waitFor(t, "the authorizer to see the Role", func() bool {
		_, err := in(secrets).Get(t.Context(), "store-a-keys", metav1.GetOptions{})
		return err == nil
	})
	store, err := in(objectStores).Get(t.Context(), "store-a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	unstructured.SetNestedField(store.Object, "2026-01-02T03:04:05Z", "status", "serverRecoveryWindow", "pg", "firstRecoverabilityPoint")
	if _, err := in(objectStores).UpdateStatus(t.Context(), store, metav1.UpdateOptions{}); err != nil {
		t.Errorf("cannot update the status: %v", err)
	}
	if _, err := in(objectStores).Patch(t.Context(), "store-a", "application/merge-patch+json", []byte(`{"status":{"serverRecoveryWindow":{}}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Errorf("cannot patch the status: %v", err)
	}
	w, err := in(secrets).Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=store-a-keys"})
	if err != nil {
		t.Errorf("cannot watch the Secret by name: %v", err)
	} else {
		w.Stop()
	}
	for what, err := range map[string]error{
		"read another Secret":   second(in(secrets).Get(t.Context(), "other", metav1.GetOptions{})),
		"list Secrets":          second(in(secrets).List(t.Context(), metav1.ListOptions{})),
		"list ObjectStores":     second(in(objectStores).List(t.Context(), metav1.ListOptions{})),
		"change an ObjectStore": second(in(objectStores).Update(t.Context(), store, metav1.UpdateOptions{})),
	} {
		if !apierrors.IsForbidden(err) {
			t.Errorf("the sidecar may %s: %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestAPIPreShapes(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	a.create(a.storeYAML("store-a"))
	iam := a.storeYAML("store-iam")
	unstructured.SetNestedMap(iam.Object, map[string]any{"inheritFromIAMRole": true}, "spec", "configuration", "s3Credentials")
	a.create(iam)

	t.Run("a role of the workload: no rule on Secrets", func(t *testing.T) {
		p.mustProceed(a.cluster("iam", strings.ReplaceAll(archives, "store-a", "store-iam")))
		for _, rule := range as[rbacv1.Role](t, a.read("Role", a.namespace, "iam-barman-cloud")).Rules {
			if len(rule.ResourceNames) == 0 || slices.Contains(rule.Resources, "secrets") {
				t.Errorf("rule %v", rule)
			}
		}
	})
	t.Run("another ServiceAccount", func(t *testing.T) {
		p.mustProceed(a.cluster("shared", archives+"serviceAccountName: team\n"))
		binding := as[rbacv1.RoleBinding](t, a.read("RoleBinding", a.namespace, "shared-barman-cloud"))
		equal(t, "subjects", binding.Subjects, []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: a.namespace, Name: "team"}})
	})
	t.Run("another API group", func(t *testing.T) {
		cluster := a.cluster("branded", archives)
		cluster.SetAPIVersion("postgresql.example.com/v1")
		p.mustProceed(cluster)
		if owner := a.read("Role", a.namespace, "branded-barman-cloud").GetOwnerReferences(); len(owner) != 1 || owner[0].APIVersion != "postgresql.example.com/v1" {
			t.Errorf("owners %v", owner)
		}
	})
	t.Run("disabled, or another plugin", func(t *testing.T) {
		p.mustProceed(a.cluster("disabled", "plugins: [{name: barman-cloud.cloudnative-pg.io, enabled: false, parameters: {barmanObjectName: store-a}}]"))
		p.mustProceed(a.cluster("disabled", "plugins: [{name: other.example.com, parameters: {barmanObjectName: store-a}}]"))
		if a.exists("Role", a.namespace, "disabled-barman-cloud") {
			t.Error("a Role was made")
		}
	})
	t.Run("a Backup", func(t *testing.T) {
		cluster := a.cluster("backup", archives)
		r, err := reconciler.NewReconcilerHooksClient(p.dial(p.operatorTLS())).Pre(t.Context(), &reconciler.ReconcilerHooksRequest{
			ClusterDefinition: toJSON(t, cluster), ResourceDefinition: []byte(`{"apiVersion":"postgresql.cnpg.io/v1","kind":"Backup"}`)})
		if err != nil || r.Behavior != reconciler.ReconcilerHooksResult_BEHAVIOR_CONTINUE || a.exists("Role", a.namespace, "backup-barman-cloud") {
			t.Errorf("%v, %v", r, err)
		}
	})
	t.Run("foreign labels and subjects stay, a cluster made again owns its Role", func(t *testing.T) {
		cluster := a.cluster("again", archives)
		p.mustProceed(cluster)
		binding := a.read("RoleBinding", a.namespace, "again-barman-cloud")
		binding.SetLabels(map[string]string{"team": "db"})
		unstructured.SetNestedSlice(binding.Object, []any{map[string]any{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "anna"}}, "subjects")
		if _, err := a.on(binding).Update(t.Context(), binding, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		cluster.SetUID("99999999-2222-3333-4444-555555555555")
		waitFor(t, "the RoleBinding to be whole again", func() bool {
			p.mustProceed(cluster)
			return len(as[rbacv1.RoleBinding](t, a.read("RoleBinding", a.namespace, "again-barman-cloud")).Subjects) == 2
		})
		binding = a.read("RoleBinding", a.namespace, "again-barman-cloud")
		if owners := binding.GetOwnerReferences(); len(owners) != 1 || owners[0].UID != cluster.GetUID() || binding.GetLabels()["team"] != "db" {
			t.Errorf("owners %v, labels %v", owners, binding.GetLabels())
		}
	})
	t.Run("a RoleBinding that refers elsewhere is a loud error", func(t *testing.T) {
		a.create(fromYAML(t, fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: stray-barman-cloud, namespace: %s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
`, a.namespace)))
		_, err := p.pre(a.cluster("stray", archives))
		mentions(t, err, "stray-barman-cloud", `"view"`, "delete it")
	})
	t.Run("Azure", func(t *testing.T) {
		a.withOldRules(func() {
			store := a.storeYAML("store-azure", "configuration: {azureCredentials: {inheritFromAzureAD: true}}")
			unstructured.RemoveNestedField(store.Object, "spec", "configuration", "s3Credentials")
			a.create(store)
		})
		cluster := a.cluster("azure", strings.ReplaceAll(archives, "store-a", "store-azure"))
		_, err := p.pre(cluster)
		mentions(t, err, a.namespace+"/store-azure", "S3 only", "S3-compatible endpoint")
		_, _, err = p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, cluster, a.instancePod("azure"))
		mentions(t, err, a.namespace+"/store-azure", "S3 only", "S3-compatible endpoint")
	})
}

// mentions checks that an error says what it has to.
func mentions(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not mention %q", err, w)
		}
	}
}

func TestAPIMissingObjectStore(t *testing.T) {
	a := testAPI(t)
	a.keys("store-a-keys")
	p := a.start(a.install())
	cluster := a.cluster("pg", archives)
	for range 3 {
		r, err := p.pre(cluster)
		if err != nil || r.Behavior != reconciler.ReconcilerHooksResult_BEHAVIOR_REQUEUE {
			t.Fatalf("%v, %v; want REQUEUE and no error", r, err)
		}
	}
	if got := a.events(); len(got) != 1 || !strings.Contains(got[0], "ObjectStore "+a.namespace+"/store-a not found") || !strings.Contains(got[0], "create it") {
		t.Errorf("events %q", got)
	}
	_, _, err := p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, cluster, a.instancePod("pg"))
	mentions(t, err, "ObjectStore "+a.namespace+"/store-a not found", "create it", "barmanObjectName")
	if status.Code(err) != codes.NotFound {
		t.Errorf("code %v", status.Code(err))
	}

	// A store that was created this moment is found, whatever the informer knows.
	a.create(a.storeYAML("store-a"))
	p.mustProceed(cluster)

	// Gone again: a new transition, a new Event.
	a.remove("ObjectStore", a.namespace, "store-a")
	waitFor(t, "the plugin to notice", func() bool {
		r, err := p.pre(cluster)
		return err == nil && r.Behavior == reconciler.ReconcilerHooksResult_BEHAVIOR_REQUEUE
	})
	if got := a.events(); len(got) != 2 {
		t.Errorf("events %q, want a second one", got)
	}
}

// A bootstrapped cluster does not need the store that it came from, and without the one that
// it follows it can still be promoted: neither keeps the operator from it.
func TestAPIMissingObjectStoreAfterBootstrap(t *testing.T) {
	a := testAPI(t)
	a.keys("store-a-keys")
	p := a.start(a.install())
	a.create(a.storeYAML("store-a"))
	behaviour := func(cluster *unstructured.Unstructured) reconciler.ReconcilerHooksResult_Behavior {
		t.Helper()
		r, err := p.pre(cluster)
		if err != nil {
			t.Fatal(err)
		}
		return r.Behavior
	}
	for i, c := range []struct {
		spec, role, store string
		tells             bool
	}{
		{archives + recovers, "recovery source", "store-b", false},
		{archives + replicates, "replica source", "store-c", true},
		{archives + strings.Replace(replicates, "primary: other", "primary: pg", 1), "replica source", "store-c", false}, // it leads now
		{recovers, "recovery source", "store-b", false},
	} {
		cluster := a.cluster("pg", c.spec)
		cluster.SetUID(types.UID(fmt.Sprintf("11111111-2222-3333-4444-%012d", i)))
		before := len(a.events())
		if got := behaviour(cluster); got != reconciler.ReconcilerHooksResult_BEHAVIOR_REQUEUE {
			t.Errorf("%s missing during the bootstrap: %v", c.role, got)
		}
		if got := a.events(); len(got) != before+1 {
			t.Errorf("%s missing during the bootstrap: events %q", c.role, got)
		}
		unstructured.SetNestedField(cluster.Object, "pg-1", "status", "currentPrimary")
		cluster.SetUID(types.UID(fmt.Sprintf("22222222-2222-3333-4444-%012d", i))) // the Event above was of another cluster's bootstrap
		before = len(a.events())
		for range 2 {
			if got := behaviour(cluster); got != reconciler.ReconcilerHooksResult_BEHAVIOR_CONTINUE {
				t.Errorf("%s missing after the bootstrap: %v", c.role, got)
			}
		}
		if got := a.events()[before:]; (len(got) == 1) != c.tells || len(got) > 1 {
			t.Errorf("%s missing after the bootstrap: events %q", c.role, got)
		}
		_, patch, err := p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, cluster, a.instancePod("pg"))
		if err != nil || !strings.Contains(string(patch), sidecarName) {
			t.Errorf("%s missing after the bootstrap: %s, %v; want the sidecar", c.role, patch, err)
		}
		if c.spec == recovers {
			continue // no store at all, no Role
		}
		if rules := fmt.Sprint(as[rbacv1.Role](t, a.read("Role", a.namespace, "pg-barman-cloud")).Rules); !strings.Contains(rules, c.store) {
			t.Errorf("the Role does not let the sidecar notice %s when it comes: %s", c.store, rules)
		}
	}

	// The archive is needed for ever.
	a.remove("ObjectStore", a.namespace, "store-a")
	cluster := a.cluster("pg", archives)
	unstructured.SetNestedField(cluster.Object, "pg-1", "status", "currentPrimary")
	waitFor(t, "the plugin to notice", func() bool {
		return behaviour(cluster) == reconciler.ReconcilerHooksResult_BEHAVIOR_REQUEUE
	})
}

// ready is the condition of an ObjectStore, once it was judged.
func (a *api) ready(name string) metav1.Condition {
	a.t.Helper()
	var c *metav1.Condition
	waitFor(a.t, "a verdict about "+name, func() bool {
		store := as[ObjectStore](a.t, a.read("ObjectStore", a.namespace, name))
		c = meta.FindStatusCondition(store.Status.Conditions, "Ready")
		return c != nil && c.ObservedGeneration == store.Generation
	})
	return *c
}

// Whatever can be told to be wrong without asking the object store is in the condition
// Ready, in words that name the object to mend.
func TestAPIJudgesObjectStores(t *testing.T) {
	a := testAPI(t)
	a.keys("keys")
	a.keys("half", "ACCESS_KEY_ID: a", "SOMETHING: b")
	a.keys("ca", "ca.crt: no certificate", "other: thing")
	selector := func(secret string) string {
		return fmt.Sprintf("configuration: {s3Credentials: {accessKeyId: {name: %s, key: ACCESS_KEY_ID}, secretAccessKey: {name: %[1]s, key: ACCESS_SECRET_KEY}}}", secret)
	}
	type verdict struct {
		spec   string
		reason string
		words  []string
	}
	cases := map[string]verdict{
		"valid":         {"", "Valid", nil},
		"no-secret":     {selector("gone"), "SecretNotFound", []string{"Secret NS/gone", "create it"}},
		"no-key":        {selector("half"), "SecretKeyNotFound", []string{"missing key ACCESS_SECRET_KEY", "secret half", "SOMETHING"}},
		"no-region":     {"configuration: {s3Credentials: {region: {name: keys, key: where}}}", "SecretKeyNotFound", []string{"missing key where", "secret keys"}},
		"no-ca":         {"configuration: {endpointCA: {name: gone, key: ca.crt}}", "SecretNotFound", []string{"endpointCA", "Secret NS/gone"}},
		"no-ca-key":     {"configuration: {endpointCA: {name: ca, key: tls.crt}}", "SecretKeyNotFound", []string{"endpointCA", "missing key tls.crt", "secret ca"}},
		"no-pem":        {"configuration: {endpointCA: {name: ca, key: ca.crt}}", "InvalidConfiguration", []string{"endpointCA (key ca.crt of Secret ca) holds no PEM certificate"}},
		"argument":      {"configuration: {data: {additionalCommandArgs: [--frobnicate=1]}}", "InvalidConfiguration", []string{"data.additionalCommandArgs", "frobnicate"}},
		"wal-argument":  {"configuration: {wal: {restoreAdditionalCommandArgs: [--read-timeout=soon]}}", "InvalidConfiguration", []string{"wal.restoreAdditionalCommandArgs", "soon"}},
		"sidecar-args":  {"instanceSidecarConfiguration: {additionalContainerArgs: [--log-format=json, --frobnicate]}", "InvalidConfiguration", []string{"additionalContainerArgs", "frobnicate"}},
		"sidecar-word":  {"instanceSidecarConfiguration: {additionalContainerArgs: [frobnicate]}", "InvalidConfiguration", []string{"additionalContainerArgs", "frobnicate", "no flag"}},
		"endpoint":      {"configuration: {endpointURL: 'minio:9000'}", "InvalidConfiguration", []string{"endpointURL", "minio:9000", "http://"}},
		"old-xz":        {"configuration: {data: {compression: xz}}", "InvalidConfiguration", []string{"data.compression: xz is for WAL only"}},
		"old-codec":     {"configuration: {wal: {compression: rar}}", "InvalidConfiguration", []string{"wal.compression", "rar"}},
		"old-azure":     {"configuration: {azureCredentials: {inheritFromAzureAD: true}}", "InvalidConfiguration", []string{"S3 only"}},
		"old-server":    {"configuration: {serverName: x}", "InvalidConfiguration", []string{"serverName"}},
		"old-directory": {"configuration: {destinationPath: /backups}", "InvalidConfiguration", []string{"/backups", "s3://bucket"}},
	}
	store := func(name string) *unstructured.Unstructured {
		return a.storeYAML(name, selector("keys"), cmp.Or(cases[name].spec, "{}"))
	}
	a.withOldRules(func() {
		for name := range cases {
			if strings.HasPrefix(name, "old-") {
				a.create(store(name))
			}
		}
	})
	for name := range cases {
		if !strings.HasPrefix(name, "old-") {
			a.create(store(name))
		}
	}
	role := store("role")
	unstructured.SetNestedMap(role.Object, map[string]any{"inheritFromIAMRole": true}, "spec", "configuration", "s3Credentials")
	a.create(role)
	cases["role"] = verdict{reason: "Valid"}

	p := a.start(a.install())
	for name, c := range cases {
		got := a.ready(name)
		if got.Reason != c.reason || (got.Status == metav1.ConditionTrue) != (c.reason == "Valid") {
			t.Errorf("%s: %s, %s: %s; want %s", name, got.Status, got.Reason, got.Message, c.reason)
		}
		for _, w := range c.words {
			if w = strings.ReplaceAll(w, "NS", a.namespace); !strings.Contains(got.Message, w) {
				t.Errorf("%s: %q does not mention %q", name, got.Message, w)
			}
		}
	}
	table, err := a.table("objectstores")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"valid s3://backups/ True", "no-secret s3://backups/ False"} {
		if !strings.Contains(table, want) {
			t.Errorf("kubectl get shows\n%s\nwithout %q", table, want)
		}
	}

	// The columns say what is true of all servers.
	for _, windows := range []string{
		`{"a":{"firstRecoverabilityPoint":"2026-01-01T00:00:00Z","lastSuccessfulBackupTime":"2026-03-01T00:00:00Z"},"none":{}}`,
		`{"b":{"firstRecoverabilityPoint":"2026-02-01T00:00:00Z","lastSuccessfulBackupTime":"2026-02-02T00:00:00Z"}}`,
	} {
		a.putStatus(a.read("ObjectStore", a.namespace, "role"), `{"serverRecoveryWindow":`+windows+`}`)
	}
	waitFor(t, "the columns", func() bool {
		s := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "role")).Status
		return s.LastBackup != nil && s.LastBackup.UTC().String()[:10] == "2026-02-02" && s.FirstRecoverabilityPoint.UTC().String()[:10] == "2026-02-01"
	})

	// Each has cost its Secrets and one write; what does not change its worth costs nothing.
	quiet := len(p.requests.since(0))
	a.change("ObjectStore", a.namespace, "no-secret", func(store map[string]any) {
		unstructured.SetNestedField(store, "x", "metadata", "labels", "a")
	})
	if _, err := a.client.Resource(objectStores).Namespace(a.namespace).Patch(t.Context(), "valid", types.MergePatchType,
		[]byte(`{"status":{"serverRecoveryWindow":{"pg":{"lastFailedBackupTime":"2026-01-02T03:04:05Z"}}}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	a.keys("unrelated")
	a.keys("gone") // a last one that is seen
	waitFor(t, "the Secret to be noticed", func() bool { return a.ready("no-secret").Status == metav1.ConditionTrue })
	for _, r := range p.requests.since(quiet) {
		if r.name == "valid" || r.name == "unrelated" {
			t.Errorf("a request for nothing: %+v", r)
		}
	}
	if got := a.ready("no-ca"); got.Reason != "SecretKeyNotFound" {
		t.Errorf("the CA's Secret came without the key: %+v", got)
	}
}

// The schema admits quantities that cannot be read. Such an ObjectStore is of no use, and does no harm to others.
func TestAPIUnreadableObjectStore(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	a.create(a.storeYAML("store-a", "instanceSidecarConfiguration: {resources: {limits: {memory: '1e99999999999999999999'}}}"))
	a.create(a.storeYAML("store-b"))
	waitFor(t, "the other ObjectStore to be judged", func() bool { return a.ready("store-b").Reason == "SecretNotFound" })
	_, err := p.pre(a.cluster("main", archives))
	mentions(t, err, "get ObjectStore "+a.namespace+"/store-a", "quantit")
	a.patch("ObjectStore", "store-a", `{"spec":{"instanceSidecarConfiguration":null}}`)
	waitFor(t, "it to be judged when it is corrected", func() bool { return a.ready("store-a").Reason == "SecretNotFound" })
}

// table is what kubectl get shows, a line for each object, its columns joined by blanks.
func (a *api) table(resource string) (string, error) {
	config := rest.CopyConfig(a.config)
	config.GroupVersion, config.APIPath = &schema.GroupVersion{Group: objectStores.Group, Version: "v1"}, "/apis"
	config.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return "", err
	}
	body, err := client.Get().Namespace(a.namespace).Resource(resource).SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").DoRaw(a.t.Context())
	var table metav1.Table
	if err == nil {
		err = json.Unmarshal(body, &table)
	}
	text := ""
	for _, row := range table.Rows {
		for i, cell := range row.Cells {
			if cell != nil && table.ColumnDefinitions[i].Priority == 0 {
				text += fmt.Sprint(cell) + " "
			}
		}
		text += "\n"
	}
	return text, err
}

// However many replicas there are, a transition is written once, and each Cluster that uses
// the store hears of it once.
func TestAPITransitionsAreToldOnce(t *testing.T) {
	a := testAPI(t)
	namespace := a.install()
	a.keys("store-a-keys")
	a.create(a.storeYAML("store-a"))
	replicas := []*plugin{a.start(namespace), a.start(namespace), a.start(namespace)}
	for i, name := range []string{"pg-1", "pg-2"} {
		cluster := a.cluster(name, archives)
		cluster.SetUID(types.UID("uid-of-" + name))
		replicas[i].mustProceed(cluster)
	}
	a.create(a.storeYAML("store-b")) // nobody's
	a.ready("store-b")
	for range 2 {
		before, since := a.ready("store-a"), len(a.events())
		if before.Status != metav1.ConditionTrue {
			t.Fatalf("%+v", before)
		}
		a.remove("Secret", a.namespace, "store-a-keys")
		waitFor(t, "the store to be unusable", func() bool { return a.ready("store-a").Status == metav1.ConditionFalse })
		waitFor(t, "both Clusters to be told", func() bool { return len(a.events()) >= since+2 })
		a.keys("store-a-keys")
		waitFor(t, "the store to be usable", func() bool { return a.ready("store-a").Status == metav1.ConditionTrue })
		if got := a.events()[since:]; len(got) != 2 || !strings.Contains(got[0], "Secret "+a.namespace+"/store-a-keys: not found: create it") {
			t.Errorf("events %q", got)
		}
	}
	written := 0
	for _, p := range replicas {
		for _, r := range p.requests.since(0) {
			if r.verb == "patch" && r.name == "store-a" && r.code == http.StatusOK {
				written++
			}
		}
	}
	if written != 5 { // ready, and two times away and back
		t.Errorf("the condition was written %d times", written)
	}
	// A Cluster that comes to a store that is not ready hears of it from Pre, once.
	since := len(a.events())
	newcomer := a.cluster("new", strings.ReplaceAll(archives, "store-a", "store-b"))
	for range 3 {
		replicas[2].mustProceed(newcomer)
	}
	if got := a.events()[since:]; len(got) != 1 || !strings.Contains(got[0], "Secret "+a.namespace+"/store-b-keys") {
		t.Errorf("events %q", got)
	}
}

// The Role follows the ObjectStores without any reconciliation of the Cluster.
func TestAPIRoleFollowsTheObjectStores(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	a.create(a.storeYAML("store-a"))
	a.create(a.storeYAML("store-b"))
	p.mustProceed(a.cluster("pg", archives+recovers))
	grants := func(resource string) (names []string) {
		for _, rule := range as[rbacv1.Role](t, a.read("Role", a.namespace, "pg-barman-cloud")).Rules {
			if slices.Contains(rule.Resources, resource) {
				names = rule.ResourceNames
			}
		}
		return names
	}
	wait := func(what string, want ...string) {
		t.Helper()
		waitFor(t, what, func() bool { return slices.Equal(grants("secrets"), want) })
		equal(t, "ObjectStores after "+what, grants("objectstores"), []string{"store-a", "store-b"})
	}
	wait("the start", "store-a-keys", "store-b-keys")

	a.change("ObjectStore", a.namespace, "store-b", func(store map[string]any) {
		unstructured.SetNestedField(store, "new", "spec", "configuration", "s3Credentials", "secretAccessKey", "name")
	})
	wait("a change of the store", "new", "store-a-keys", "store-b-keys")
	a.remove("ObjectStore", a.namespace, "store-b")
	wait("its deletion", "store-a-keys")
	a.create(a.storeYAML("store-b"))
	wait("its return", "store-a-keys", "store-b-keys")

	role := a.read("Role", a.namespace, "pg-barman-cloud")
	unstructured.RemoveNestedField(role.Object, "rules")
	unstructured.SetNestedSlice(role.Object, []any{map[string]any{
		"apiGroups": []any{"barmancloud.cnpg.io"}, "resources": []any{"objectstores"},
		"resourceNames": []any{"store-a", "store-b"}, "verbs": []any{"get"},
	}}, "rules")
	if _, err := a.on(role).Update(t.Context(), role, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	wait("somebody's edit of the Role", "store-a-keys", "store-b-keys")
}

// ---------------------------------------------------------------------------
// Injection
// ---------------------------------------------------------------------------

// sidecarOf is the injected container and the rest of the Pod's spec.
func sidecarOf(t *testing.T, spec *corev1.PodSpec) *corev1.Container {
	t.Helper()
	for i := range spec.InitContainers {
		if spec.InitContainers[i].Name == "plugin-barman-cloud" {
			return &spec.InitContainers[i]
		}
	}
	t.Fatal("no container plugin-barman-cloud among the init containers")
	return nil
}

// evaluated is the Pod after EVALUATE; CREATE on the result must change nothing.
func (p *plugin) evaluated(cluster *unstructured.Unstructured, pod []byte) *corev1.Pod {
	p.t.Helper()
	mutated, patch, err := p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, cluster, pod)
	if err != nil {
		p.t.Fatal(err)
	}
	if _, again, err := p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, cluster, pod); err != nil || !bytes.Equal(again, patch) {
		p.t.Errorf("the same question has two answers:\n%s\n%s (%v)", patch, again, err)
	}
	var result corev1.Pod
	if err := json.Unmarshal(mutated, &result); err != nil {
		p.t.Fatal(err)
	}
	// The operator decodes into its own types and encodes again in between.
	result.Kind, result.APIVersion = "Pod", "v1"
	if _, patch, err := p.hook(lifecycle.OperatorOperationType_TYPE_CREATE, cluster, toJSON(p.t, result)); err != nil || patch != nil {
		p.t.Errorf("CREATE of the evaluated Pod is patched again: %s (%v)", patch, err)
	}
	return &result
}

// admitted asks the API server whether it would take the object.
func (a *api) admitted(v any) {
	a.t.Helper()
	u := &unstructured.Unstructured{}
	if err := json.Unmarshal(toJSON(a.t, v), &u.Object); err != nil {
		a.t.Fatal(err)
	}
	if _, err := a.on(u).Create(a.t.Context(), u, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
		a.t.Errorf("the API server refuses the mutated %s: %v", u.GetKind(), err)
	}
}

func TestAPIInjection(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	a.create(a.storeYAML("store-a", `
instanceSidecarConfiguration:
  logLevel: debug
  additionalContainerArgs: [--pprof-server=:6061]
  resources: {requests: {memory: 64Mi, cpu: 250m}, limits: {memory: 512Mi}}
  env:
  - {name: TZ, value: UTC}
  - {name: AWS_MAX_ATTEMPTS, value: "5"}
  - {name: POD_NAME, value: not-mine}
configuration:
  endpointCA: {name: ca-a, key: ca.crt}`))
	a.create(a.storeYAML("store-b", `
instanceSidecarConfiguration:
  logLevel: trace
  resources: {limits: {memory: 100Mi}}
  env: [{name: AWS_MAX_ATTEMPTS, value: "9"}, {name: FROM_B, value: b}]
configuration:
  endpointCA: {name: ca-b, key: bundle}`))
	a.create(a.storeYAML("store-c"))
	a.serviceAccount("pg")
	cluster := a.cluster("pg", archives+recovers)

	t.Run("the whole sidecar", func(t *testing.T) {
		pod := p.evaluated(cluster, a.instancePod("pg"))
		a.admitted(pod)
		if first := pod.Spec.InitContainers[0].Name; len(pod.Spec.InitContainers) != 2 || first != "bootstrap-controller" {
			t.Fatalf("%d init containers, the first is %s", len(pod.Spec.InitContainers), first)
		}
		sidecar := sidecarOf(t, &pod.Spec)
		if sidecar.Image != testImage || sidecar.ImagePullPolicy != corev1.PullIfNotPresent {
			t.Errorf("image %q, pull policy %q", sidecar.Image, sidecar.ImagePullPolicy)
		}
		if sidecar.RestartPolicy == nil || *sidecar.RestartPolicy != corev1.ContainerRestartPolicyAlways {
			t.Error("not a native sidecar")
		}
		if sidecar.TerminationMessagePolicy != corev1.TerminationMessageFallbackToLogsOnError {
			t.Error("kubectl describe would not show why a sidecar could not start")
		}
		if sidecar.Command != nil {
			t.Errorf("command %q instead of the image's entrypoint", sidecar.Command)
		}
		equal(t, "arguments", sidecar.Args, []string{"sidecar", "--log-level=debug", "--pprof-server=:6061"})
		equal(t, "startup probe", sidecar.StartupProbe.Exec.Command, []string{"/cnpg-barman-s3", "healthcheck"})
		if sidecar.StartupProbe.PeriodSeconds != 1 || sidecar.LivenessProbe != nil || sidecar.ReadinessProbe != nil {
			t.Errorf("probes %v %v %v", sidecar.StartupProbe, sidecar.LivenessProbe, sidecar.ReadinessProbe)
		}
		var env []string
		for _, e := range sidecar.Env {
			env = append(env, e.Name+"="+e.Value)
		}
		equal(t, "environment", env, []string{
			"PGDATA=/var/lib/postgresql/data/pgdata", "POD_NAME=pg-1", "NAMESPACE=" + a.namespace, "CLUSTER_NAME=pg",
			"PGPORT=5432", "PGHOST=/controller/run", "TZ=UTC",
			"SPOOL_DIRECTORY=/controller/wal-restore-spool", "CUSTOM_CNPG_GROUP=postgresql.cnpg.io", "CUSTOM_CNPG_VERSION=v1",
			"GOMEMLIMIT=483183819", "AWS_MAX_ATTEMPTS=5", "FROM_B=b",
		})
		if len(sidecar.EnvFrom) != 1 || sidecar.EnvFrom[0].SecretRef.Name != "more" {
			t.Errorf("envFrom %v", sidecar.EnvFrom)
		}
		if got := string(toJSON(t, sidecar.Resources)); got != `{"limits":{"memory":"512Mi"},"requests":{"cpu":"250m","memory":"64Mi"}}` {
			t.Errorf("resources %s", got)
		}
		var mounts []string
		for _, m := range sidecar.VolumeMounts {
			mounts = append(mounts, m.Name+":"+m.MountPath)
		}
		equal(t, "mounts", mounts, []string{
			"pgdata:/var/lib/postgresql/data", "scratch-data:/run", "scratch-data:/controller", "shm:/dev/shm",
			"pg-wal:/var/lib/postgresql/wal", "plugins:/plugins", "barman-certificates:/barman-certificates",
		})
		postgres := pod.Spec.Containers[0]
		if !slices.ContainsFunc(postgres.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == "plugins" && m.MountPath == "/plugins" }) ||
			slices.ContainsFunc(postgres.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == "barman-certificates" }) {
			t.Errorf("mounts of postgres %v", postgres.VolumeMounts)
		}
		volume := pod.Spec.Volumes[len(pod.Spec.Volumes)-1]
		if got := string(toJSON(t, volume)); got != `{"name":"barman-certificates","projected":{"sources":[`+
			`{"secret":{"name":"ca-a","items":[{"key":"ca.crt","path":"store-a/barman-ca.crt"}]}},`+
			`{"secret":{"name":"ca-b","items":[{"key":"bundle","path":"store-b/barman-ca.crt"}]}}]}}` {
			t.Errorf("certificates %s", got)
		}
		sc := sidecar.SecurityContext
		if *sc.AllowPrivilegeEscalation || *sc.Privileged || !*sc.RunAsNonRoot || !*sc.ReadOnlyRootFilesystem || sc.RunAsUser != nil ||
			sc.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault || !slices.Equal(sc.Capabilities.Drop, []corev1.Capability{"ALL"}) {
			t.Errorf("security context %s", toJSON(t, sc))
		}
	})

	t.Run("fields that this version does not know survive", func(t *testing.T) {
		mutated, _, err := p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, cluster, a.instancePod("pg"))
		if err != nil || !bytes.Contains(mutated, []byte(`"futureField":{"unknown":"to-us"}`)) {
			t.Errorf("%v in %s", err, mutated)
		}
	})

	t.Run("which clusters get one", func(t *testing.T) {
		for name, c := range map[string]struct {
			spec     string
			level    string // of the ruling store; empty when there is no sidecar
			projects int
		}{
			"archive":             {archives, "debug", 1},
			"recovery only":       {recovers, "trace", 1},
			"replica source only": {replicates, "info", 0},
			"archive and replica": {archives + replicates, "debug", 1},
			"disabled":            {"plugins: [{name: barman-cloud.cloudnative-pg.io, enabled: false, parameters: {barmanObjectName: store-a}}]", "", 0},
			"another plugin":      {"plugins: [{name: other.example.com, parameters: {barmanObjectName: store-a}}]", "", 0},
			"none":                {"instances: 1", "", 0},
		} {
			cluster := a.cluster("pg", c.spec)
			// The sidecar stays for life: a primary that runs changes nothing.
			for _, primary := range []string{"", "pg-1"} {
				unstructured.SetNestedField(cluster.Object, primary, "status", "currentPrimary")
				if c.level == "" {
					if _, patch, err := p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, cluster, a.instancePod("pg")); err != nil || patch != nil {
						t.Errorf("%s: patch %s, %v", name, patch, err)
					}
					continue
				}
				pod := p.evaluated(cluster, a.instancePod("pg"))
				if got := sidecarOf(t, &pod.Spec).Args[1]; got != "--log-level="+c.level {
					t.Errorf("%s: %s, want %s", name, got, c.level)
				}
				var projected []corev1.VolumeProjection
				for _, v := range pod.Spec.Volumes {
					if v.Name == "barman-certificates" {
						projected = v.Projected.Sources
					}
				}
				if len(projected) != c.projects {
					t.Errorf("%s: %d certificates projected, want %d", name, len(projected), c.projects)
				}
			}
		}
	})

	t.Run("another API group", func(t *testing.T) {
		branded := a.cluster("pg", archives)
		branded.SetAPIVersion("postgresql.example.com/v1alpha1")
		env := map[string]string{}
		for _, e := range sidecarOf(t, &p.evaluated(branded, a.instancePod("pg")).Spec).Env {
			env[e.Name] = e.Value
		}
		if env["CUSTOM_CNPG_GROUP"] != "postgresql.example.com" || env["CUSTOM_CNPG_VERSION"] != "v1alpha1" {
			t.Errorf("environment %v", env)
		}
	})

	t.Run("a Pod that bootstraps itself", func(t *testing.T) {
		pod := fromYAML(t, string(a.instancePod("pg")))
		init, _, _ := unstructured.NestedSlice(pod.Object, "spec", "initContainers")
		unstructured.SetNestedSlice(pod.Object, append(init, map[string]any{"name": "bootstrap-instance", "image": "x"}), "spec", "initContainers")
		var names []string
		for _, c := range p.evaluated(a.cluster("pg", recovers), toJSON(t, pod)).Spec.InitContainers {
			names = append(names, c.Name)
		}
		equal(t, "init containers", names, []string{"bootstrap-controller", "plugin-barman-cloud", "bootstrap-instance"})
	})

	t.Run("beside another plugin", func(t *testing.T) {
		pod := fromYAML(t, string(a.instancePod("pg")))
		spec := pod.Object["spec"].(map[string]any)
		spec["volumes"] = append(spec["volumes"].([]any), map[string]any{"name": "plugins", "emptyDir": map[string]any{"sizeLimit": "1Mi"}})
		postgres := spec["containers"].([]any)[0].(map[string]any)
		postgres["volumeMounts"] = append(postgres["volumeMounts"].([]any), map[string]any{"name": "plugins", "mountPath": "/plugins"})
		result := p.evaluated(cluster, toJSON(t, pod))
		a.admitted(result)
		count := 0
		for _, v := range result.Spec.Volumes {
			if v.Name == "plugins" {
				count++
			}
		}
		if count != 1 || len(result.Spec.Containers[0].VolumeMounts) != 6 {
			t.Errorf("%d volumes called plugins, mounts %v", count, result.Spec.Containers[0].VolumeMounts)
		}
	})

	t.Run("an outdated sidecar is replaced where it stands", func(t *testing.T) {
		pod := p.evaluated(cluster, a.instancePod("pg"))
		want := toJSON(t, pod)
		pod.Spec.InitContainers[1].Image = "old"
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, corev1.Container{Name: "later", Image: "x"})
		for i, v := range pod.Spec.Volumes {
			if v.Name == "barman-certificates" {
				pod.Spec.Volumes[i].Projected.Sources = v.Projected.Sources[:1]
			}
		}
		pod = p.evaluated(cluster, toJSON(t, pod))
		if last := pod.Spec.InitContainers[2]; last.Name != "later" {
			t.Errorf("the last init container is %s", last.Name)
		}
		pod.Spec.InitContainers = pod.Spec.InitContainers[:2]
		if got := toJSON(t, pod); !bytes.Equal(got, want) {
			t.Errorf("got %s\nwant %s", got, want)
		}
		// Without a private CA the volume and its mount go.
		for _, v := range p.evaluated(a.cluster("pg", replicates), want).Spec.Volumes {
			if v.Name == "barman-certificates" {
				t.Error("the certificates' volume stays")
			}
		}
	})

	t.Run("Jobs", func(t *testing.T) {
		for _, role := range []string{"full-recovery", "snapshot-recovery", "initdb", "join", "pgbasebackup", "import", "major-upgrade"} {
			for _, prefix := range []string{"cnpg.io", "k8s.example.com"} {
				mutated, patch, err := p.hook(lifecycle.OperatorOperationType_TYPE_CREATE, cluster, a.jobOf("pg", role, prefix))
				if err != nil {
					t.Fatal(err)
				}
				if !strings.HasSuffix(role, "-recovery") {
					if patch != nil {
						t.Errorf("Job %s is patched: %s", role, patch)
					}
					continue
				}
				var job batchv1.Job
				if err := json.Unmarshal(mutated, &job); err != nil {
					t.Fatal(err)
				}
				a.admitted(&job)
				sidecar := sidecarOf(t, &job.Spec.Template.Spec)
				// Its settings are those of the store that it reads.
				equal(t, role, sidecar.Args, []string{"sidecar", "--log-level=trace"})
				if sidecar.Resources.Limits.Memory().String() != "100Mi" || sidecar.RestartPolicy == nil {
					t.Errorf("%s: %s", role, toJSON(t, sidecar))
				}
			}
		}
		if _, patch, err := p.hook(lifecycle.OperatorOperationType_TYPE_CREATE, a.cluster("pg", archives), a.jobOf("pg", "full-recovery", "cnpg.io")); err != nil || patch != nil {
			t.Errorf("a recovery by another plugin is patched: %s, %v", patch, err)
		}
	})

	t.Run("errors", func(t *testing.T) {
		_, _, err := p.hook(lifecycle.OperatorOperationType_TYPE_CREATE, cluster, []byte(`{"apiVersion":"v1","kind":"Pod","spec":{"containers":[{"name":"x"}]}}`))
		mentions(t, err, "main container not found", "postgres")
		_, _, err = p.hook(lifecycle.OperatorOperationType_TYPE_CREATE, cluster, []byte(`{"apiVersion":"v1","kind":"Service"}`))
		mentions(t, err, "Service")
	})
}

// ---------------------------------------------------------------------------
// What the plugin and the sidecars may do
// ---------------------------------------------------------------------------

// used are the requests of a recorder that were let through, as GROUP/RESOURCE VERB.
func (r *recorder) used() map[string]bool {
	used := map[string]bool{}
	for _, q := range r.since(0) {
		if q.code < 300 && q.resource != "" {
			used[q.group+"/"+q.resource+" "+q.verb] = true
		}
	}
	return used
}

// rights are rules in the same terms.
func rights(rules []rbacv1.PolicyRule) map[string]bool {
	held := map[string]bool{}
	for _, rule := range rules {
		for _, group := range rule.APIGroups {
			for _, resource := range rule.Resources {
				for _, verb := range rule.Verbs {
					held[group+"/"+resource+" "+verb] = true
				}
			}
		}
	}
	return held
}

// Nobody holds a verb that this walk through all that is done does not use, but for those
// that have their reason here; and nobody lacks one.
func TestAPIRightsAreUsed(t *testing.T) {
	a := testAPI(t)
	namespace := a.install()
	a.keys("store-a-keys")
	a.create(a.storeYAML("store-a"))
	a.create(a.storeYAML("store-b"))
	// An older API server is asked for lists, this one sends them as part of the watch.
	lists := a.start(namespace, "KUBE_FEATURE_WatchListClient=false")
	p := a.start(namespace)
	cluster := a.cluster("pg", archives)
	p.mustProceed(cluster)
	waitFor(t, "the Role in the informer", func() bool {
		changed := a.cluster("pg", archives+recovers+"serviceAccountName: team\n")
		p.mustProceed(changed)
		return len(as[rbacv1.RoleBinding](t, a.read("RoleBinding", a.namespace, "pg-barman-cloud")).Subjects) == 2
	})
	for _, stray := range []string{ // what no informer of ours sees: found at the creation, read, and made ours
		"kind: Role", "kind: RoleBinding\nroleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: stray-barman-cloud}",
	} {
		a.create(fromYAML(t, "apiVersion: rbac.authorization.k8s.io/v1\nmetadata: {name: stray-barman-cloud, namespace: "+a.namespace+"}\n"+stray))
	}
	p.mustProceed(a.cluster("stray", archives))
	if _, err := p.pre(a.cluster("lost", strings.ReplaceAll(archives, "store-a", "nowhere"))); err != nil {
		t.Fatal(err)
	}
	a.ready("store-a")
	cert, key := p.pair(defaultCASecret)
	ca, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	a.putPair(namespace, defaultServerSecret, "server", testLeaf(t, &ca, x509.ExtKeyUsageServerAuth, time.Hour), ca.Leaf)
	waitFor(t, "a renewed leaf", func() bool {
		pair, err := tls.X509KeyPair(p.pair(defaultServerSecret))
		return err == nil && time.Until(pair.Leaf.NotAfter) > leafRenewBefore
	})

	granted := rights(as[rbacv1.Role](t, a.read("Role", a.namespace, "pg-barman-cloud")).Rules)
	needed := map[string]bool{
		"postgresql.cnpg.io/clusters/finalizers update": true, // an admission plugin asks for it, where it runs
	}
	maps.Copy(needed, granted) // nobody can grant what they do not have
	maps.Copy(needed, lists.requests.used())
	maps.Copy(needed, p.requests.used())
	held := map[string]bool{}
	for _, u := range documents(t, "deploy.yaml") {
		if u.GetName() == "plugin-barman-cloud" || u.GetName() == "plugin-barman-cloud-certificates" {
			switch u.GetKind() {
			case "ClusterRole":
				maps.Copy(held, rights(as[rbacv1.ClusterRole](t, u).Rules))
			case "Role":
				maps.Copy(held, rights(as[rbacv1.Role](t, u).Rules))
			}
		}
	}
	equal(t, "the rights of deploy.yaml", slices.Sorted(maps.Keys(held)), slices.Sorted(maps.Keys(needed)))
	for _, r := range p.requests.since(0) {
		if r.resource == "secrets" && (r.verb == "create" || r.verb == "update") && r.namespace != namespace {
			t.Errorf("a Secret is written in another namespace: %+v", r)
		}
	}

	// a sidecar, with its Cluster's token
	a.serviceAccount("pg")
	needed = map[string]bool{
		objectStores.Group + "/objectstores/status update": true, // by the original's sidecar, until its Pod is rolled
	}
	for _, streams := range []bool{true, false} {
		clientfeaturestesting.SetFeatureDuringTest(t, clientfeatures.WatchListClient, streams)
		config, requests := a.asServiceAccount(a.namespace, "pg"), &recorder{}
		config.Wrap(func(rt http.RoundTripper) http.RoundTripper { requests.RoundTripper = rt; return requests })
		source, err := kubeSourceFor(t.Context(), config, a.namespace, "pg")
		if err != nil {
			t.Fatal(err)
		}
		ref := StoreRef{"store-a", "pg"}
		waitFor(t, "the authorizer to see the Role", func() bool { return second(source.Store(t.Context(), ref)) == nil })
		waitFor(t, "the watches", func() bool {
			used := requests.used()
			return used["/secrets watch"] && used[objectStores.Group+"/objectstores watch"]
		})
		if err := source.UpdateStatus(t.Context(), ref, func(w *RecoveryWindow, _ *ServerStatus) { now := metav1.Now(); w.LastFailedBackupTime = &now }); err != nil {
			t.Fatal(err)
		}
		maps.Copy(needed, requests.used())
	}
	equal(t, "the rights of a Cluster's Role", slices.Sorted(maps.Keys(granted)), slices.Sorted(maps.Keys(needed)))
}

// ---------------------------------------------------------------------------
// Clusters as CloudNativePG's own schema admits them
// ---------------------------------------------------------------------------

// What CloudNativePG takes, in every shape that concerns the plugin, goes through the
// reconciliation and the injection as it comes back from the API server.
func TestAPIClusterShapes(t *testing.T) {
	a := testAPI(t)
	p := a.start(a.install())
	a.cloudNativePG("any")
	for _, name := range []string{"store-a", "store-b", "store-c"} {
		a.keys(name + "-keys")
		a.create(a.storeYAML(name))
	}
	const streams = `
replica: {enabled: true, source: other}
externalClusters:
- name: other
  connectionParameters: {host: pg-other-rw, user: streaming_replica, sslmode: verify-full}
  sslKey: {name: other-replication, key: tls.key}
  plugin: {name: barman-cloud.cloudnative-pg.io, parameters: {barmanObjectName: store-c, serverName: other}}
`
	shapes := map[string]struct {
		spec   string
		stores []string // in its Role; none: the plugin leaves it alone
	}{
		"archives":       {archives, []string{"store-a"}},
		"renamed":        {strings.ReplaceAll(archives, "store-a", "store-a, serverName: elsewhere"), []string{"store-a"}},
		"recovers":       {recovers, []string{"store-b"}},
		"both":           {archives + recovers, []string{"store-a", "store-b"}},
		"to-a-time":      {strings.ReplaceAll(recovers, "source: origin", `source: origin, recoveryTarget: {targetTime: "2026-11-22T12:00:00Z", backupID: 20261122T100000}`), []string{"store-b"}},
		"follows":        {archives + replicates, []string{"store-a", "store-c"}},
		"streams":        {archives + streams, []string{"store-a", "store-c"}},
		"distributed":    {archives + strings.ReplaceAll(replicates, "primary: other", "self: distributed, primary: other"), []string{"store-a", "store-c"}},
		"wal-storage":    {archives + "walStorage: {size: 1Gi}\ntablespaces: [{name: more, storage: {size: 1Gi}}]\n", []string{"store-a"}},
		"own-account":    {archives + "serviceAccountName: team\n", []string{"store-a"}},
		"with-env":       {archives + "env: [{name: TZ, value: Europe/Rome}]\nenvFrom: [{secretRef: {name: more}}]\n", []string{"store-a"}},
		"disabled":       {strings.ReplaceAll(archives, "isWALArchiver: true", "enabled: false"), nil},
		"off-in-part":    {strings.ReplaceAll(archives, "isWALArchiver: true", "enabled: false") + recovers, []string{"store-b"}},
		"source-off":     {archives + strings.ReplaceAll(recovers, "plugin: {", "plugin: {enabled: false, "), []string{"store-a"}},
		"not-the-source": {archives + strings.ReplaceAll(replicates, "replica: {primary: other, source: other}", ""), []string{"store-a"}},
		"other-plugin":   {strings.ReplaceAll(archives, "barman-cloud.cloudnative-pg.io", "other.example.com"), nil},
		"none":           {"instances: 1", nil},
	}
	for name, shape := range shapes {
		cluster := a.cluster(name, "instances: 3\nstorage: {size: 1Gi}\n"+strings.TrimPrefix(shape.spec, "instances: 1"))
		cluster.SetUID("")
		cluster.SetAnnotations(map[string]string{"cnpg.io/skipEmptyWalArchiveCheck": "enabled"})
		cluster = a.create(cluster)
		var first []byte
		for _, primary := range []string{"", name + "-1", name + "-2"} {
			cluster = a.putStatus(cluster, fmt.Sprintf(`{"currentPrimary": %q, "targetPrimary": %[1]q, "instancesStatus": {"healthy": [%[1]q]}}`, primary))
			asked := cluster.DeepCopy() // with what a later CloudNativePG may add
			unstructured.SetNestedField(asked.Object, map[string]any{"x": int64(1)}, "spec", "later")
			unstructured.SetNestedField(asked.Object, []any{"y"}, "status", "later")
			p.mustProceed(asked)
			if !a.exists("Role", a.namespace, name+"-barman-cloud") {
				if shape.stores != nil {
					t.Errorf("%s has no Role", name)
				}
			} else if got := storesNamed(as[rbacv1.Role](t, a.read("Role", a.namespace, name+"-barman-cloud"))); !slices.Equal(got, shape.stores) {
				t.Errorf("%s: the Role gives access to %q", name, got)
			}
			pod, patch, err := p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, asked, a.instancePod(name))
			if err != nil || (patch != nil) != (shape.stores != nil) {
				t.Errorf("%s, primary %q: patch %s, %v", name, primary, patch, err)
			}
			if first == nil {
				first = pod
			}
			if !bytes.Equal(pod, first) {
				t.Errorf("%s: the Pod changes with the primary, and would be rolled", name)
			}
		}
	}
	// The operator always says what it sends; a Cluster without it could not own its Role.
	nameless := a.cluster("archives", archives)
	unstructured.RemoveNestedField(nameless.Object, "apiVersion")
	_, _, err := p.hook(lifecycle.OperatorOperationType_TYPE_EVALUATE, nameless, a.instancePod("archives"))
	mentions(t, err, "apiVersion")
}

// ---------------------------------------------------------------------------
// Many of them
// ---------------------------------------------------------------------------

// number is a size of the test from the environment.
func number(t *testing.T, name string, otherwise int) int {
	n, err := strconv.Atoi(cmp.Or(os.Getenv(name), strconv.Itoa(otherwise)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// summary says how long calls took.
func summary(took []time.Duration) string {
	slices.Sort(took)
	at := func(q int) time.Duration { return took[(len(took)-1)*q/100].Round(10 * time.Microsecond) }
	return fmt.Sprintf("p50 %s, p99 %s, longest %s", at(50), at(99), at(100))
}

// The answers to the operator cost no request to the API server, but for the two writes of
// a new Cluster's Role and RoleBinding. `make bench-api` prints the figures.
func TestAPIManyClusters(t *testing.T) {
	clusters, stores := number(t, "API_CLUSTERS", 30), number(t, "API_STORES", 10)
	a := testAPI(t)
	p := a.start(a.install())
	name := func(i int) string { return fmt.Sprintf("store-%d", i%stores) }
	for i := range stores {
		a.keys(name(i) + "-keys")
		a.create(a.storeYAML(name(i)))
	}
	for i := range stores {
		if c := a.ready(name(i)); c.Status != metav1.ConditionTrue {
			t.Fatalf("%s: %+v", name(i), c)
		}
	}
	conn := p.dial(p.operatorTLS())
	definitions := make([][]byte, clusters)
	for i := range definitions {
		cluster := a.cluster(fmt.Sprintf("pg-%d", i), strings.ReplaceAll(archives, "store-a", name(i))+strings.ReplaceAll(recovers, "store-b", name(i+1)))
		cluster.SetUID(types.UID(fmt.Sprintf("uid-%d", i)))
		definitions[i] = toJSON(t, cluster)
	}
	pre := func(i int) (time.Duration, error) {
		start := time.Now()
		r, err := reconciler.NewReconcilerHooksClient(conn).Pre(t.Context(), &reconciler.ReconcilerHooksRequest{ClusterDefinition: definitions[i], ResourceDefinition: definitions[i]})
		if err == nil && r.Behavior != reconciler.ReconcilerHooksResult_BEHAVIOR_CONTINUE {
			err = fmt.Errorf("Pre: %v", r)
		}
		return time.Since(start), err
	}
	pod := a.instancePod("pg")
	hook := func(i int) (time.Duration, error) {
		start := time.Now()
		r, err := lifecycle.NewOperatorLifecycleClient(conn).LifecycleHook(t.Context(), &lifecycle.OperatorLifecycleRequest{
			OperationType:     &lifecycle.OperatorOperationType{Type: lifecycle.OperatorOperationType_TYPE_EVALUATE},
			ClusterDefinition: definitions[i], ObjectDefinition: pod})
		if err == nil && len(r.JsonPatch) == 0 {
			err = errors.New("no patch")
		}
		return time.Since(start), err
	}
	// by ten workers, as many as the operator reconciles Clusters at once
	all := func(call func(int) (time.Duration, error)) []time.Duration {
		took := make([]time.Duration, clusters)
		g := errgroup.Group{}
		g.SetLimit(10)
		for i := range clusters {
			g.Go(func() (err error) { took[i], err = call(i); return err })
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		return took
	}
	before := len(p.requests.since(0))
	first := all(pre)
	counts := map[string]int{}
	for _, r := range p.requests.since(before) {
		counts[r.verb+" "+r.resource]++
	}
	if len(counts) != 2 || counts["create roles"] != clusters || counts["create rolebindings"] != clusters {
		t.Errorf("requests of the first Pre of %d Clusters: %v", clusters, counts)
	}
	waitFor(t, "the informers to know it all", func() bool {
		before := len(p.requests.since(0))
		all(pre)
		return len(p.requests.since(before)) == 0
	})
	before = len(p.requests.since(0))
	again, hooks := all(pre), all(hook)
	if made := p.requests.since(before); len(made) != 0 {
		t.Errorf("requests for what is known: %+v", made)
	}
	memory, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d Clusters, %d ObjectStores, ten calls at a time", clusters, stores)
	t.Logf("first Pre:     %s", summary(first))
	t.Logf("Pre:           %s", summary(again))
	t.Logf("LifecycleHook: %s", summary(hooks))
	t.Logf("memory:        %q", regexp.MustCompile(`(VmHWM|VmRSS):\s+(\d+ kB)`).FindAllString(string(memory), -1))
}

// ---------------------------------------------------------------------------
// crd.yaml
// ---------------------------------------------------------------------------

// withOldRules runs f while no rule and no enumeration is in force, as if the objects
// that it makes had been stored long ago.
func (a *api) withOldRules(f func()) {
	a.t.Helper()
	a.installCRD("crd.yaml", func(crd *unstructured.Unstructured) {
		var strip func(any)
		strip = func(v any) {
			switch v := v.(type) {
			case map[string]any:
				maps.DeleteFunc(v, func(k string, _ any) bool { return k == "x-kubernetes-validations" || k == "enum" || k == "pattern" })
				for _, child := range v {
					strip(child)
				}
			case []any:
				for _, child := range v {
					strip(child)
				}
			}
		}
		strip(crd.Object["spec"])
	})
	bad := a.storeYAML("probe", "configuration: {destinationPath: none}")
	wait := func(inForce bool) {
		a.t.Helper()
		waitFor(a.t, fmt.Sprintf("rules in force: %v", inForce), func() bool {
			_, err := a.on(bad).Create(a.t.Context(), bad, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return (err != nil) == inForce
		})
	}
	wait(false)
	f()
	a.installCRD("crd.yaml", nil)
	wait(true)
}

func TestAPIManifests(t *testing.T) {
	a := testAPI(t)
	const keys = `
    s3Credentials:
      accessKeyId: {name: s, key: a}
      secretAccessKey: {name: s, key: b}`
	tries := 0
	try := func(spec string) error {
		tries++
		u := fromYAML(t, fmt.Sprintf("apiVersion: barmancloud.cnpg.io/v1\nkind: ObjectStore\nmetadata: {name: s%d, namespace: %s}\nspec:\n%s", tries, a.namespace, spec))
		// Strict, like kubectl: a field that the schema does not know is an error.
		_, err := a.on(u).Create(t.Context(), u, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict})
		return err
	}
	for name, spec := range map[string]string{
		"bucket":        "  configuration:\n    destinationPath: s3://bucket" + keys,
		"trailing /":    "  configuration:\n    destinationPath: s3://bucket/" + keys,
		"path":          "  configuration:\n    destinationPath: s3://bucket/a/b c/" + keys,
		"IAM role":      "  configuration:\n    destinationPath: s3://b\n    s3Credentials: {inheritFromIAMRole: true}",
		"role and keys": "  configuration:\n    destinationPath: s3://b" + keys + "\n      inheritFromIAMRole: true",
		"everything": `
  retentionPolicy: 30d
  instanceSidecarConfiguration:
    retentionPolicyIntervalSeconds: 1800
    logLevel: trace
    additionalContainerArgs: [--pprof-server=0.0.0.0:6061]
    resources:
      requests: {memory: 64Mi, cpu: 250m}
      limits: {memory: 512Mi, cpu: 1}
      claims: [{name: c, request: r}]
    env:
    - {name: AWS_REQUEST_CHECKSUM_CALCULATION, value: when_required}
    - {name: A, valueFrom: {secretKeyRef: {name: s, key: k, optional: true}}}
    - {name: B, valueFrom: {configMapKeyRef: {name: s, key: k}}}
    - {name: C, valueFrom: {fieldRef: {fieldPath: status.podIP, apiVersion: v1}}}
    - {name: D, valueFrom: {resourceFieldRef: {resource: limits.memory, containerName: c, divisor: 1Mi}}}
    - {name: E, valueFrom: {fileKeyRef: {path: p, key: k, volumeName: v}}}
  configuration:
    destinationPath: s3://backups/
    endpointURL: https://minio:9000
    endpointCA: {name: ca, key: ca.crt}
    tags: {a: b, "c,d": "e=f"}
    historyTags: {a: b}
    wal:
      compression: zstd
      encryption: aws:kms
      maxParallel: 8
      archiveAdditionalCommandArgs: [--read-timeout=60]
      restoreAdditionalCommandArgs: [--read-timeout, "60"]
    data:
      compression: bzip2
      encryption: AES256
      jobs: 2
      immediateCheckpoint: true
      additionalCommandArgs: [--min-chunk-size=5MB, --read-timeout=60]
      restoreAdditionalCommandArgs: [-vv]
    s3Credentials:
      accessKeyId: {name: s, key: a}
      secretAccessKey: {name: s, key: b}
      region: {name: s, key: r}
      sessionToken: {name: s, key: t}
      inheritFromIAMRole: false`,
	} {
		if err := try(spec); err != nil {
			t.Errorf("%s is refused: %v", name, err)
		}
	}
	for _, compression := range []string{"bzip2", "gzip", "lz4", "snappy", "xz", "zstd"} {
		if err := try("  configuration:\n    destinationPath: s3://b\n    wal: {compression: " + compression + "}" + keys); err != nil {
			t.Errorf("WAL compression: %v", err)
		}
		if err := try("  configuration:\n    destinationPath: s3://b\n    data: {compression: " + compression + "}" + keys); (err != nil) != (compression == "xz") {
			t.Errorf("data compression %s: %v", compression, err)
		}
	}
	for name, c := range map[string]struct{ spec, message string }{
		"no configuration":    {"  retentionPolicy: 1d", "spec.configuration: Required value"},
		"no destination":      {"  configuration:" + keys, "spec.configuration.destinationPath: Required value"},
		"empty destination":   {"  configuration:\n    destinationPath: ''" + keys, "destinationPath"},
		"not S3":              {"  configuration:\n    destinationPath: https://a.example.com/c" + keys, "must be s3://bucket or s3://bucket/path"},
		"no bucket":           {"  configuration:\n    destinationPath: s3:///a" + keys, "must be s3://bucket or s3://bucket/path"},
		"query":               {"  configuration:\n    destinationPath: s3://a?b=c" + keys, "must be s3://bucket or s3://bucket/path"},
		"server name":         {"  configuration:\n    destinationPath: s3://b\n    serverName: x" + keys, "use the 'serverName' plugin parameter in the Cluster resource"},
		"no credentials":      {"  configuration:\n    destinationPath: s3://b", "no credentials defined: set s3Credentials"},
		"empty credentials":   {"  configuration:\n    destinationPath: s3://b\n    s3Credentials: {}", "no credentials defined"},
		"role denied":         {"  configuration:\n    destinationPath: s3://b\n    s3Credentials: {inheritFromIAMRole: false}", "no credentials defined"},
		"access key alone":    {"  configuration:\n    destinationPath: s3://b\n    s3Credentials: {accessKeyId: {name: a, key: b}}", "set both accessKeyId and secretAccessKey"},
		"secret key alone":    {"  configuration:\n    destinationPath: s3://b\n    s3Credentials: {secretAccessKey: {name: a, key: b}}", "set both accessKeyId and secretAccessKey"},
		"selector, no key":    {"  configuration:\n    destinationPath: s3://b\n    endpointCA: {name: a}" + keys, "endpointCA.key: Required value"},
		"Azure":               {"  configuration:\n    destinationPath: s3://b\n    azureCredentials: {connectionString: {name: a, key: b}}", "S3 only: use an S3-compatible endpoint"},
		"Google":              {"  configuration:\n    destinationPath: s3://b\n    googleCredentials: {gkeEnvironment: true}", "S3 only: use an S3-compatible endpoint"},
		"Azure beside S3":     {"  configuration:\n    destinationPath: s3://b\n    azureCredentials: {inheritFromAzureAD: true}" + keys, "S3 only: use an S3-compatible endpoint"},
		"compression":         {"  configuration:\n    destinationPath: s3://b\n    wal: {compression: rar}" + keys, `Unsupported value: "rar"`},
		"encryption":          {"  configuration:\n    destinationPath: s3://b\n    data: {encryption: rot13}" + keys, `Unsupported value: "rot13"`},
		"jobs":                {"  configuration:\n    destinationPath: s3://b\n    data: {jobs: 0}" + keys, "greater than or equal to 1"},
		"maxParallel":         {"  configuration:\n    destinationPath: s3://b\n    wal: {maxParallel: 0}" + keys, "greater than or equal to 1"},
		"retention":           {"  retentionPolicy: 30y\n  configuration:\n    destinationPath: s3://b" + keys, "spec.retentionPolicy"},
		"retention of zero":   {"  retentionPolicy: 0d\n  configuration:\n    destinationPath: s3://b" + keys, "spec.retentionPolicy"},
		"log level":           {"  instanceSidecarConfiguration: {logLevel: loud}\n  configuration:\n    destinationPath: s3://b" + keys, `Unsupported value: "loud"`},
		"log level as an arg": {"  instanceSidecarConfiguration: {additionalContainerArgs: [--log-level=debug]}\n  configuration:\n    destinationPath: s3://b" + keys, "use spec.instanceSidecarConfiguration.logLevel"},
		"unknown field":       {"  configuration:\n    destinationPath: s3://b\n    endpointUrl: x" + keys, `unknown field "spec.configuration.endpointUrl"`},
	} {
		err := try(c.spec)
		if err == nil {
			t.Errorf("%s is admitted", name)
		} else if !strings.Contains(err.Error(), c.message) {
			t.Errorf("%s: %v\ndoes not say %q", name, err, c.message)
		}
	}
}

func TestAPIManifestDefaults(t *testing.T) {
	a := testAPI(t)
	bare := as[ObjectStore](t, a.create(a.storeYAML("bare")))
	if c := bare.Spec.InstanceSidecarConfiguration; c.LogLevel != "" || c.RetentionPolicyIntervalSeconds != 0 {
		t.Errorf("defaults without the stanza: %v", c)
	}
	stanza := as[ObjectStore](t, a.create(a.storeYAML("stanza", "instanceSidecarConfiguration: {env: []}")))
	if c := stanza.Spec.InstanceSidecarConfiguration; c.LogLevel != "info" || c.RetentionPolicyIntervalSeconds != 1800 {
		t.Errorf("defaults within the stanza: %v", c)
	}
}

// A store that was made before the rules goes on: its status is written, its other
// fields may change; a new mistake in the same place is refused.
func TestAPIOldObjectsBreakNewRules(t *testing.T) {
	a := testAPI(t)
	broken := map[string]string{
		"azure":   "configuration: {azureCredentials: {inheritFromAzureAD: true, storageAccount: {name: a, key: b}}}",
		"google":  "configuration: {googleCredentials: {gkeEnvironment: true, applicationCredentials: {name: a, key: b}}}",
		"server":  "configuration: {serverName: x}",
		"scheme":  "configuration: {destinationPath: 'https://a/b'}",
		"args":    "instanceSidecarConfiguration: {additionalContainerArgs: ['--log-level=debug']}",
		"data-xz": "configuration: {data: {compression: xz}}",
	}
	a.withOldRules(func() {
		for name, spec := range broken {
			a.create(a.storeYAML(name, spec))
		}
		keys := a.storeYAML("half-keys")
		unstructured.RemoveNestedField(keys.Object, "spec", "configuration", "s3Credentials", "secretAccessKey")
		a.create(keys)
		none := a.storeYAML("no-keys")
		unstructured.RemoveNestedField(none.Object, "spec", "configuration", "s3Credentials")
		a.create(none)
	})
	for _, name := range append(slices.Sorted(maps.Keys(broken)), "half-keys", "no-keys") {
		store := a.read("ObjectStore", a.namespace, name)
		for _, status := range []map[string]any{
			{"serverRecoveryWindow": map[string]any{"pg": map[string]any{"lastFailedBackupTime": "2026-01-02T03:04:05Z"}}},
			{
				"conditions": []any{map[string]any{"type": "Ready", "status": "False", "reason": "R", "message": "m", "lastTransitionTime": "2026-01-02T03:04:05Z"}},
				"servers": map[string]any{"pg": map[string]any{"missingWAL": int64(1), "conditions": []any{
					map[string]any{"type": "Archiving", "status": "True", "reason": "R", "message": "m", "lastTransitionTime": "2026-01-02T03:04:05Z"}}}},
			},
		} {
			store.Object["status"] = status
			updated, err := a.on(store).UpdateStatus(t.Context(), store, metav1.UpdateOptions{})
			if err != nil {
				t.Errorf("%s: the status cannot be written: %v", name, err)
				continue
			}
			if got, want := toJSON(t, updated.Object["status"]), toJSON(t, status); !bytes.Equal(got, want) {
				t.Errorf("%s: the status is kept as %s, was %s", name, got, want)
			}
			store = updated
		}
		unstructured.SetNestedField(store.Object, "7d", "spec", "retentionPolicy")
		store, err := a.on(store).Update(t.Context(), store, metav1.UpdateOptions{})
		if err != nil {
			t.Errorf("%s: another field cannot be changed: %v", name, err)
			continue
		}
		unstructured.SetNestedField(store.Object, "http://elsewhere", "spec", "configuration", "destinationPath")
		if _, err := a.on(store).Update(t.Context(), store, metav1.UpdateOptions{}); err == nil {
			t.Errorf("%s: a new mistake is admitted", name)
		}
	}
}

// ---------------------------------------------------------------------------
// The command line
// ---------------------------------------------------------------------------

func TestOperatorNeedsItsSettings(t *testing.T) {
	for _, c := range []struct {
		env  []string
		args []string
		want string
	}{
		{nil, nil, "missing required SIDECAR_IMAGE environment variable"},
		{[]string{"SIDECAR_IMAGE= "}, nil, "missing required SIDECAR_IMAGE environment variable"},
		{[]string{"SIDECAR_IMAGE=x", "SIDECAR_IMAGE_PULL_POLICY=Sometimes"}, nil, "set Always, IfNotPresent or Never"},
		{[]string{"SIDECAR_IMAGE=x", "NAMESPACE="}, nil, "set NAMESPACE"},
		{nil, []string{"extra"}, "takes 0 arguments"},
	} {
		r := runProgram(t, append([]string{"SIDECAR_IMAGE="}, c.env...), append([]string{"operator"}, c.args...)...)
		if r.Code == 0 || !strings.Contains(r.Stdout+r.Stderr, c.want) {
			t.Errorf("%v %v: exit code %d, %s%s; want %q", c.env, c.args, r.Code, r.Stdout, r.Stderr, c.want)
		}
	}
}

// A port that is taken ends the program with an error, instead of a process that waits for ever.
func TestOperatorPortTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	mustWrite(t, kubeconfig, "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\n"+
		"contexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n")
	for what, flags := range map[string][]string{
		"serve gRPC":       {"--health-probe-bind-address=0", "--server-address", taken.Addr().String()},
		"serve the probes": {"--health-probe-bind-address", taken.Addr().String()},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), hang)
		defer cancel()
		cmd := exec.CommandContext(ctx, program(t), append([]string{"operator", "--kubeconfig", kubeconfig}, flags...)...)
		cmd.Env = append(os.Environ(), "SIDECAR_IMAGE=x", "NAMESPACE=n")
		if r := run(t, cmd); r.Code != exitFailed || !strings.Contains(r.Stderr, what) {
			t.Errorf("%s: exit code %d, %s", what, r.Code, r.Stderr)
		}
	}
}

// ---------------------------------------------------------------------------
// deploy.yaml and the image
// ---------------------------------------------------------------------------

// What takes the place of the original's objects has their names and selectors; the
// program, its flags, the Service and the Role agree about the Secrets.
func TestDeployManifest(t *testing.T) {
	all := map[string]*unstructured.Unstructured{}
	for _, u := range documents(t, "deploy.yaml") {
		all[u.GetKind()+" "+u.GetName()] = u
	}
	decode := func(name string, into any) {
		t.Helper()
		if all[name] == nil {
			t.Fatalf("deploy.yaml has no %s", name)
		}
		if err := fromUnstructured(all[name], into); err != nil {
			t.Fatal(err)
		}
	}
	var deployment appsv1.Deployment
	var service corev1.Service
	var certificates rbacv1.Role
	decode("Deployment barman-cloud", &deployment)
	decode("Service barman-cloud", &service)
	decode("Role plugin-barman-cloud-certificates", &certificates)

	if got := deployment.Spec.Selector.MatchLabels; !maps.Equal(got, map[string]string{"app": "barman-cloud"}) || !maps.Equal(service.Spec.Selector, got) {
		t.Errorf("selectors %v and %v: a Deployment's cannot be changed, and the original's is app=barman-cloud", got, service.Spec.Selector)
	}
	if service.Spec.Ports[0].Port != 9090 || service.Annotations["cnpg.io/pluginPort"] != "9090" {
		t.Errorf("the Service's ports %v, annotations %v", service.Spec.Ports, service.Annotations)
	}
	equal(t, "Secrets of the Role", certificates.Rules[0].ResourceNames, []string{defaultCASecret, defaultServerSecret, defaultClientSecret})
	equal(t, "Secrets of the Service", []string{service.Annotations["cnpg.io/pluginServerSecret"], service.Annotations["cnpg.io/pluginClientSecret"]},
		[]string{defaultServerSecret, defaultClientSecret})

	container := deployment.Spec.Template.Spec.Containers[0]
	env := map[string]string{}
	for _, e := range container.Env {
		env[e.Name] = e.Value
	}
	if env["SIDECAR_IMAGE"] != container.Image || env["SIDECAR_IMAGE_PULL_POLICY"] != "IfNotPresent" || container.ImagePullPolicy != "IfNotPresent" {
		t.Errorf("image %q, sidecar %q: a side-loaded image must do for both", container.Image, env["SIDECAR_IMAGE"])
	}
	if sc := container.SecurityContext; !*deployment.Spec.Template.Spec.SecurityContext.RunAsNonRoot || !*sc.ReadOnlyRootFilesystem || *sc.AllowPrivilegeEscalation {
		t.Errorf("security context %v", sc)
	}

	other := mustRun(t, exec.Command("make", "-s", "--no-print-directory", "deploy-manifest", "IMAGE=registry.example.com/x:9", "NAMESPACE=elsewhere"))
	ours, err := os.ReadFile("deploy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	image := regexp.MustCompile(`localhost/cnpg-barman-s3:\S+`)
	want := image.ReplaceAllString(strings.ReplaceAll(string(ours), "namespace: cnpg-system", "namespace: elsewhere"), "registry.example.com/x:9")
	if got := strings.Count(want, "registry.example.com/x:9"); other != want || got != 2 {
		t.Errorf("make deploy-manifest is not deploy.yaml with another image, named twice (%d), and namespace", got)
	}
}

// The archive is an OCI image layout and a docker archive of the same blobs, and the
// same binary gives the same bytes.
func TestImageArchive(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "binary")
	if err := os.WriteFile(binary, bytes.Repeat([]byte("program"), 10_000), 0o700); err != nil {
		t.Fatal(err)
	}
	archives := [2][]byte{}
	for i := range archives {
		file := filepath.Join(dir, fmt.Sprintf("image-%d.tar", i))
		cmd := exec.Command("./image.sh", binary, "arm64", "localhost/x:1", file)
		cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1700000000")
		mustRun(t, cmd)
		var err error
		if archives[i], err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(binary, time.Time{}, time.Unix(int64(i), 0)); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two builds differ")
	}
	files := untar(t, bytes.NewReader(archives[0]))
	for name, content := range files {
		if digest, isBlob := strings.CutPrefix(name, "blobs/sha256/"); isBlob && digest != fmt.Sprintf("%x", sha256.Sum256(content)) {
			t.Errorf("%s holds something else", name)
		}
	}
	type descriptor struct {
		Digest      string
		Size        int
		Annotations map[string]string
		Platform    struct{ Architecture, OS string }
	}
	var index struct{ Manifests []descriptor }
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	var config struct {
		Architecture string
		Config       struct {
			User       string
			Entrypoint []string
		}
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	var docker []struct {
		Config           string
		RepoTags, Layers []string
	}
	blob := func(d descriptor) []byte {
		content := files["blobs/sha256/"+strings.TrimPrefix(d.Digest, "sha256:")]
		if len(content) != d.Size {
			t.Errorf("%s: %d bytes, should be %d", d.Digest, len(content), d.Size)
		}
		return content
	}
	parse := func(content []byte, into any) {
		t.Helper()
		if err := json.Unmarshal(content, into); err != nil {
			t.Fatal(err)
		}
	}
	parse(files["index.json"], &index)
	parse(blob(index.Manifests[0]), &manifest)
	parse(blob(manifest.Config), &config)
	parse(files["manifest.json"], &docker)
	if m := index.Manifests[0]; m.Annotations["io.containerd.image.name"] != "localhost/x:1" || m.Platform.Architecture != "arm64" || config.Architecture != "arm64" {
		t.Errorf("index %s, config %s", files["index.json"], blob(manifest.Config))
	}
	if config.Config.User != "65532:65532" || !slices.Equal(config.Config.Entrypoint, []string{sidecarBinary}) {
		t.Errorf("the image runs %v as %s", config.Config.Entrypoint, config.Config.User)
	}
	if d := docker[0]; d.RepoTags[0] != "localhost/x:1" || "sha256:"+filepath.Base(d.Config) != manifest.Config.Digest || "sha256:"+filepath.Base(d.Layers[0]) != manifest.Layers[0].Digest {
		t.Errorf("docker's manifest %s", files["manifest.json"])
	}
	layer, err := gzip.NewReader(bytes.NewReader(blob(manifest.Layers[0])))
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(layer)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256(content)); got != config.RootFS.DiffIDs[0] {
		t.Errorf("the layer is %s, the config says %s", got, config.RootFS.DiffIDs[0])
	}
	if rootfs := untar(t, bytes.NewReader(content)); len(rootfs) != 1 || len(rootfs["cnpg-barman-s3"]) != 70_000 {
		t.Errorf("the image holds %v", slices.Collect(maps.Keys(rootfs)))
	}
}

func untar(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if files[h.Name], err = io.ReadAll(tr); err != nil {
				t.Fatal(err)
			}
		}
	}
}
