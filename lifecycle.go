// This file is what runs beside the CloudNativePG operator: the mTLS server that the
// operator calls before it reconciles a Cluster and before it creates a Pod or a Job,
// the certificates of that connection, the injection of the sidecar and the RBAC that
// lets each cluster's sidecar read its own ObjectStores and Secrets, and nothing else.
//
// It never touches S3; of a credential it only looks whether it is there. Any number of
// replicas may run: all of them answer, and writes are idempotent and guarded by resource
// versions.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloudnative-pg/cnpg-i/pkg/identity"
	"github.com/cloudnative-pg/cnpg-i/pkg/lifecycle"
	"github.com/cloudnative-pg/cnpg-i/pkg/reconciler"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"
)

var (
	objectStores = schema.GroupVersionResource{Group: "barmancloud.cnpg.io", Version: "v1", Resource: "objectstores"}
	secrets      = schema.GroupVersionResource{Version: "v1", Resource: "secrets"}
	events       = schema.GroupVersionResource{Version: "v1", Resource: "events"}
	roles        = schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "roles"}
	roleBindings = schema.GroupVersionResource{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"}
)

const (
	sidecarName    = "plugin-barman-cloud" // users run kubectl logs -c with it
	sidecarBinary  = "/cnpg-barman-s3"     // the image's entrypoint, see image.sh
	clusterLabel   = "barmancloud.cnpg.io/cluster"
	fieldManager   = "plugin-barman-cloud"
	requeueSeconds = 10
	projectURL     = "https://github.com/cnpg-barman-s3/cnpg-barman-s3"
)

// operator is the state of the mode `operator`.
type operator struct {
	namespace, serverAddress, probeAddress string
	service                                string // of the plugin: the name that the operator checks the server's certificate against
	caSecret, serverSecret, clientSecret   string
	sidecarImage, imagePullPolicy          string

	client dynamic.Interface
	// versions holds the Secrets of all namespaces without their content.
	stores, roles, bindings, versions cache.SharedIndexInformer
	// queue holds what may have to be done, as RESOURCE/NAMESPACE/NAME; certificatesKey is the exception.
	queue workqueue.TypedRateLimitingInterface[string]
	tls   atomic.Pointer[tls.Config] // nil until the certificates are there
	// judged is what the last judgement of each ObjectStore was based on; only the queue's worker uses it.
	judged map[string]string
	// reported is the last Event on each Cluster, by its UID: an Event marks a transition.
	reported sync.Map
}

// runOperator is the subcommand `operator`: it serves the CloudNativePG operator until ctx ends.
func runOperator(ctx context.Context, args []string) error {
	o := &operator{}
	fs := flag.NewFlagSet("operator", flag.ContinueOnError)
	logFlags(fs)
	fs.StringVar(&o.serverAddress, "server-address", ":9090", "`address` of the gRPC server")
	fs.StringVar(&o.probeAddress, "health-probe-bind-address", ":8081", "`address` of /healthz and /readyz; 0 serves none")
	fs.StringVar(&o.service, "service", "barman-cloud", "`name` of the plugin's Service, or its annotation cnpg.io/pluginServerName")
	fs.StringVar(&o.caSecret, "ca-secret", "cnpg-barman-s3-ca", "`name` of the Secret that keeps the certificate authority")
	fs.StringVar(&o.serverSecret, "server-secret", "cnpg-barman-s3-server-tls", "`name` in the Service's annotation cnpg.io/pluginServerSecret")
	fs.StringVar(&o.clientSecret, "client-secret", "cnpg-barman-s3-client-tls", "`name` in the Service's annotation cnpg.io/pluginClientSecret")
	fs.StringVar(&o.sidecarImage, "sidecar-image", os.Getenv("SIDECAR_IMAGE"), "`image` of the sidecars, normally this one (default: $SIDECAR_IMAGE)")
	fs.StringVar(&o.imagePullPolicy, "sidecar-image-pull-policy", cmp.Or(os.Getenv("SIDECAR_IMAGE_PULL_POLICY"), "IfNotPresent"),
		"`policy` of the kubelet for it: Always, IfNotPresent or Never (default: $SIDECAR_IMAGE_PULL_POLICY)")
	fs.StringVar(&o.namespace, "namespace", os.Getenv("NAMESPACE"), "`name` of the operator's namespace (default: $NAMESPACE, or that of the Pod)")
	kubeconfig := fs.String("kubeconfig", "", "`file` to reach the API server with, when not in a Pod")
	if err := parseFlags(fs, args); err != nil {
		return err
	}
	if o.sidecarImage = strings.TrimSpace(o.sidecarImage); o.sidecarImage == "" {
		return errors.New("missing required SIDECAR_IMAGE environment variable: set it to the image of this plugin")
	}
	if !slices.Contains([]string{"Always", "IfNotPresent", "Never"}, o.imagePullPolicy) {
		return fmt.Errorf("SIDECAR_IMAGE_PULL_POLICY is %q: set Always, IfNotPresent or Never", o.imagePullPolicy)
	}
	if o.namespace == "" {
		b, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
		if err != nil {
			return fmt.Errorf("set NAMESPACE to the CloudNativePG operator's namespace: %w", err)
		}
		o.namespace = strings.TrimSpace(string(b))
	}
	config, err := rest.InClusterConfig()
	if *kubeconfig != "" {
		config, err = clientcmd.BuildConfigFromFlags("", *kubeconfig)
	}
	if err != nil {
		return fmt.Errorf("configure the Kubernetes client: %w", err)
	}
	return o.run(ctx, config)
}

// run serves until ctx ends.
func (o *operator) run(ctx context.Context, config *rest.Config) error {
	klog.SetSlogLogger(slog.Default()) // client-go logs through klog
	// The client's own limit of 5 requests a second would make the first pass over some
	// hundred clusters take minutes; the API server's priority and fairness governs.
	config.QPS = -1
	config.UserAgent = "cnpg-barman-s3/" + version
	var err error
	if o.client, err = dynamic.NewForConfig(config); err != nil {
		return fmt.Errorf("configure the Kubernetes client: %w", err)
	}
	metadataClient, err := metadata.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("configure the Kubernetes client: %w", err)
	}
	o.queue = workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](50*time.Millisecond, time.Minute))

	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	context.AfterFunc(ctx, o.queue.ShutDown) // without it o.work would keep a failed start from ending
	synced := o.startInformers(ctx, &background, metadataClient)
	o.queue.Add(certificatesKey)
	background.Go(func() { o.work(ctx) })

	if o.probeAddress != "" && o.probeAddress != "0" {
		listener, err := net.Listen("tcp", o.probeAddress)
		if err != nil {
			return fmt.Errorf("serve the probes: %w", err)
		}
		mux := http.NewServeMux()
		mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
		mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
			if o.tls.Load() == nil || !synced() {
				http.Error(w, "waiting for the TLS Secrets or the API server's lists", http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		})
		probes := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
		background.Go(func() {
			if err := probes.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				slog.Error("Serving the probes ended", "error", err)
			}
		})
		context.AfterFunc(ctx, func() { probes.Close() })
	}

	listener, err := net.Listen("tcp", o.serverAddress)
	if err != nil {
		return fmt.Errorf("serve gRPC: %w", err)
	}
	server := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13,
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
				if c := o.tls.Load(); c != nil {
					return c, nil
				}
				return nil, errors.New("the TLS Secrets are not there yet")
			},
		})),
		grpc.ChainUnaryInterceptor(logRequests, recoverPanics))
	// The injection of a sidecar is announced because without it the instance manager does
	// not ask the sidecar for metrics.
	identity.RegisterIdentityServer(server, announce(
		identity.PluginCapability_Service_TYPE_RECONCILER_HOOKS,
		identity.PluginCapability_Service_TYPE_LIFECYCLE_SERVICE,
		identity.PluginCapability_Service_TYPE_INSTANCE_SIDECAR_INJECTION))
	lifecycle.RegisterOperatorLifecycleServer(server, operatorLifecycle{operator: o})
	reconciler.RegisterReconcilerHooksServer(server, reconcilerHooks{operator: o})

	slog.Info("Serving the CloudNativePG operator", "address", listener.Addr().String(),
		"version", version, "sidecarImage", o.sidecarImage)
	// Handlers answer within milliseconds; whoever holds on longer is cut off.
	if err := serveGRPC(ctx, server, listener, 5*time.Second); err != nil {
		return fmt.Errorf("serve gRPC: %w", err)
	}
	return nil
}

// serveGRPC serves until ctx ends; then requests in flight may go on for the grace.
func serveGRPC(ctx context.Context, server *grpc.Server, listener net.Listener, grace time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	var stopped sync.WaitGroup
	defer stopped.Wait()
	defer cancel()
	stopped.Go(func() {
		<-ctx.Done()
		hard := time.AfterFunc(grace, server.Stop)
		defer hard.Stop()
		server.GracefulStop()
	})
	return server.Serve(listener)
}

// recoverPanics turns a panic in a handler into an error of that one call.
func recoverPanics(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			slog.Error("Panic in a request", "method", info.FullMethod, "panic", fmt.Sprint(p), "stacktrace", string(debug.Stack()))
			err = status.Errorf(codes.Internal, "%s: panic: %v", info.FullMethod, p)
		}
	}()
	return handler(ctx, req)
}

// ---------------------------------------------------------------------------
// Identity
// ---------------------------------------------------------------------------

// pluginMetadata is the same for the operator's and the sidecars' side, and what
// `kubectl cnpg status` and the Cluster's status show.
func pluginMetadata() *identity.GetPluginMetadataResponse {
	return &identity.GetPluginMetadataResponse{
		Name:          PluginName,
		Version:       version,
		DisplayName:   "BarmanCloudInstance",
		ProjectUrl:    projectURL,
		RepositoryUrl: projectURL,
		License:       "APACHE 2.0",
		LicenseUrl:    projectURL + "/LICENSE",
		Maturity:      "alpha",
	}
}

// pluginIdentity serves the handshake, which comes before each WAL file too: its answers are constants.
type pluginIdentity struct {
	identity.UnimplementedIdentityServer
	capabilities identity.GetPluginCapabilitiesResponse
}

// announce is an identity with these services; the caller then asks each for its own capabilities.
func announce(services ...identity.PluginCapability_Service_Type) *pluginIdentity {
	i := &pluginIdentity{}
	for _, s := range services {
		i.capabilities.Capabilities = append(i.capabilities.Capabilities, &identity.PluginCapability{
			Type: &identity.PluginCapability_Service_{Service: &identity.PluginCapability_Service{Type: s}},
		})
	}
	return i
}

func (*pluginIdentity) GetPluginMetadata(context.Context, *identity.GetPluginMetadataRequest) (*identity.GetPluginMetadataResponse, error) {
	return pluginMetadata(), nil
}

func (i *pluginIdentity) GetPluginCapabilities(context.Context, *identity.GetPluginCapabilitiesRequest) (*identity.GetPluginCapabilitiesResponse, error) {
	return &i.capabilities, nil
}

func (*pluginIdentity) Probe(context.Context, *identity.ProbeRequest) (*identity.ProbeResponse, error) {
	return &identity.ProbeResponse{Ready: true}, nil
}

// ---------------------------------------------------------------------------
// Reconciler hooks: before and after the operator reconciles a Cluster
// ---------------------------------------------------------------------------

// reconcilerHooks and operatorLifecycle exist because both services have a method GetCapabilities.
type reconcilerHooks struct {
	*operator
	reconciler.UnimplementedReconcilerHooksServer
}

func (h reconcilerHooks) GetCapabilities(context.Context, *reconciler.ReconcilerHooksCapabilitiesRequest) (*reconciler.ReconcilerHooksCapabilitiesResult, error) {
	return &reconciler.ReconcilerHooksCapabilitiesResult{ReconcilerCapabilities: []*reconciler.ReconcilerHooksCapability{
		{Kind: reconciler.ReconcilerHooksCapability_KIND_CLUSTER},
		{Kind: reconciler.ReconcilerHooksCapability_KIND_BACKUP},
	}}, nil
}

// Pre gives the cluster's ServiceAccount its rights before any Pod or Job of the
// cluster exists. While an ObjectStore is missing it asks to be called again.
func (h reconcilerHooks) Pre(ctx context.Context, req *reconciler.ReconcilerHooksRequest) (*reconciler.ReconcilerHooksResult, error) {
	var resource metav1.TypeMeta
	if err := json.Unmarshal(req.GetResourceDefinition(), &resource); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "decode the resource of the request: %v", err)
	}
	proceed := &reconciler.ReconcilerHooksResult{Behavior: reconciler.ReconcilerHooksResult_BEHAVIOR_CONTINUE}
	if resource.Kind != "Cluster" {
		return proceed, nil
	}
	cluster, err := DecodeCluster(req.GetClusterDefinition())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	stores, absent, err := h.storesOf(ctx, cluster)
	if reason, message := faultOf(stores, absent, err); reason == "" {
		h.reported.Delete(cluster.UID)
	} else if err := h.event(ctx, cluster.reference(), reason, message); err != nil {
		slog.Error("Trying again at the next reconciliation", "error", err)
	}
	switch {
	case absent != nil && err != nil:
		// A plain requeue would be rate limited by the operator up to many minutes.
		return &reconciler.ReconcilerHooksResult{
			Behavior:     reconciler.ReconcilerHooksResult_BEHAVIOR_REQUEUE,
			RequeueAfter: requeueSeconds,
		}, nil
	case err != nil:
		return nil, err
	case len(stores) == 0:
		return proceed, nil
	}
	if err := h.ensureRBAC(ctx, cluster, stores); err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return proceed, nil
}

func (h reconcilerHooks) Post(context.Context, *reconciler.ReconcilerHooksRequest) (*reconciler.ReconcilerHooksResult, error) {
	return &reconciler.ReconcilerHooksResult{Behavior: reconciler.ReconcilerHooksResult_BEHAVIOR_CONTINUE}, nil
}

// storesOf returns the ObjectStores that the cluster refers to, each once, in the order
// archive, recovery, replica source. Without its archive a cluster must not go on, nor while
// it is being bootstrapped without any of them: err is then absent, or a gRPC status.
// Later the recovery source may be gone like any old backup, and a replica source that is
// gone must not keep the cluster from being promoted: it is only reported as absent.
func (o *operator) storesOf(ctx context.Context, c *Cluster) (stores []*ObjectStore, absent, err error) {
	bootstrap := c.Status.CurrentPrimary == ""
	for i, r := range []struct {
		role string
		ref  *StoreRef
	}{
		{"archive", c.ArchiveStore()},
		{"recovery source", c.RecoveryStore()},
		{"replica source", c.ReplicaSourceStore()},
	} {
		if r.ref == nil || slices.ContainsFunc(stores, func(s *ObjectStore) bool { return s.Name == r.ref.ObjectStore }) {
			continue
		}
		needed := bootstrap || i == 0
		store, err := o.store(ctx, c.Namespace, r.ref.ObjectStore)
		switch missing := apierrors.IsNotFound(err); {
		case missing && !needed && (r.role == "recovery source" || !c.IsReplica()):
			continue
		case missing:
			absent = status.Errorf(codes.NotFound, "ObjectStore %s/%s not found, which Cluster %s names as its %s: create it, or correct barmanObjectName in the Cluster",
				c.Namespace, r.ref.ObjectStore, c.Name, r.role)
			if needed {
				return nil, absent, absent
			}
			continue
		case err != nil:
			return nil, nil, status.Errorf(codes.Unavailable, "get ObjectStore %s/%s: %v", c.Namespace, r.ref.ObjectStore, err)
		}
		// Everything but the Secrets, which only the sidecar may and does read.
		if _, err := ResolveStore(store, r.ref.ServerName, func(corev1.SecretKeySelector) ([]byte, error) { return nil, nil }); err != nil && needed {
			return nil, nil, status.Error(codes.FailedPrecondition, err.Error())
		}
		stores = append(stores, store)
	}
	return stores, absent, nil
}

// store reads an ObjectStore from the informer, or from the API server when it was
// created only just now.
func (o *operator) store(ctx context.Context, namespace, name string) (*ObjectStore, error) {
	var store ObjectStore
	if found, err := cached(o.stores, namespace, name, &store); found || err != nil {
		return &store, err
	}
	return &store, o.get(ctx, objectStores, namespace, name, &store)
}

// faultOf says in an Event's reason and message what is wrong with a Cluster's ObjectStores;
// an API server that is away is no fault of theirs.
func faultOf(stores []*ObjectStore, absent, err error) (reason, message string) {
	switch {
	case absent != nil:
		return "ObjectStoreNotFound", status.Convert(absent).Message()
	case status.Code(err) == codes.FailedPrecondition:
		return "ObjectStoreNotReady", status.Convert(err).Message()
	}
	for _, s := range stores {
		if c := meta.FindStatusCondition(s.Status.Conditions, conditionReady); c != nil && c.Status == metav1.ConditionFalse {
			return "ObjectStoreNotReady", c.Message
		}
	}
	return "", ""
}

// event writes a Warning on a Cluster, for kubectl describe, unless it was the last one.
func (o *operator) event(ctx context.Context, on corev1.ObjectReference, reason, message string) error {
	if last, _ := o.reported.Load(on.UID); last == message {
		return nil
	}
	if err := write(ctx, o.client, events, true, clusterEvent(on, corev1.EventTypeWarning, reason, message)); err != nil {
		return fmt.Errorf("write the Event %s on Cluster %s/%s: %w", reason, on.Namespace, on.Name, err)
	}
	slog.Warn(message, "reason", reason, "namespace", on.Namespace, "cluster", on.Name)
	o.reported.Store(on.UID, message)
	return nil
}

// maxEventMessage is what the API server takes, in bytes.
const maxEventMessage = 1024

// clip shortens a message to n bytes.
func clip(message string, n int) string {
	if len(message) > n {
		return strings.ToValidUTF8(message[:n-3], "") + "..."
	}
	return message
}

func clusterEvent(on corev1.ObjectReference, eventType, reason, message string) *corev1.Event {
	now := metav1.Now()
	return &corev1.Event{
		TypeMeta:       metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta:     metav1.ObjectMeta{Namespace: on.Namespace, GenerateName: on.Name + "."},
		InvolvedObject: on,
		Type:           eventType, Reason: reason, Message: clip(message, maxEventMessage),
		Source:         corev1.EventSource{Component: fieldManager},
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}
}

// reference is what an Event is about.
func (c *Cluster) reference() corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: c.APIVersion, Kind: c.Kind, Namespace: c.Namespace, Name: c.Name, UID: c.UID, ResourceVersion: c.ResourceVersion}
}

// ---------------------------------------------------------------------------
// Lifecycle: the sidecar
// ---------------------------------------------------------------------------

type operatorLifecycle struct {
	*operator
	lifecycle.UnimplementedOperatorLifecycleServer
}

// GetCapabilities: the operator evaluates what a Pod would look like whenever it looks
// for drift, and calls again when it creates it. Of a Job only the creation is hooked.
func (l operatorLifecycle) GetCapabilities(context.Context, *lifecycle.OperatorLifecycleCapabilitiesRequest) (*lifecycle.OperatorLifecycleCapabilitiesResponse, error) {
	create := &lifecycle.OperatorOperationType{Type: lifecycle.OperatorOperationType_TYPE_CREATE}
	evaluate := &lifecycle.OperatorOperationType{Type: lifecycle.OperatorOperationType_TYPE_EVALUATE}
	return &lifecycle.OperatorLifecycleCapabilitiesResponse{LifecycleCapabilities: []*lifecycle.OperatorLifecycleCapabilities{
		{Group: "", Kind: "Pod", OperationTypes: []*lifecycle.OperatorOperationType{create, evaluate}},
		{Group: "batch", Kind: "Job", OperationTypes: []*lifecycle.OperatorOperationType{create}},
	}}, nil
}

// LifecycleHook injects the sidecar into instance Pods and restore Jobs. The patch is
// empty when the object already is what it should be: the operator passes the Pod that
// it evaluated once more when it creates it.
func (l operatorLifecycle) LifecycleHook(ctx context.Context, req *lifecycle.OperatorLifecycleRequest) (*lifecycle.OperatorLifecycleResponse, error) {
	cluster, err := DecodeCluster(req.GetClusterDefinition())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	response := &lifecycle.OperatorLifecycleResponse{}
	var object metav1.TypeMeta
	if err := json.Unmarshal(req.GetObjectDefinition(), &object); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "decode the object of the request: %v", err)
	}
	var (
		spec      *corev1.PodSpec
		specPath  string
		container string
		ruling    *StoreRef // whose resources, arguments and log level count
	)
	switch gvk := object.GroupVersionKind(); gvk {
	case corev1.SchemeGroupVersion.WithKind("Pod"):
		var pod corev1.Pod
		err = json.Unmarshal(req.GetObjectDefinition(), &pod)
		spec, specPath, container = &pod.Spec, "/spec", "postgres"
		ruling = cmp.Or(cluster.ArchiveStore(), cluster.RecoveryStore(), cluster.ReplicaSourceStore())
	case batchv1.SchemeGroupVersion.WithKind("Job"):
		var job batchv1.Job
		err = json.Unmarshal(req.GetObjectDefinition(), &job)
		spec, specPath, container = &job.Spec.Template.Spec, "/spec/template/spec", recoveryRole(&job)
		ruling = cluster.RecoveryStore()
	default:
		return nil, status.Errorf(codes.InvalidArgument, "LifecycleHook for a %s, which was not asked for", gvk)
	}
	switch {
	case err != nil:
		return nil, status.Errorf(codes.InvalidArgument, "decode the %s of the request: %v", object.Kind, err)
	case ruling == nil || container == "":
		return response, nil
	}
	stores, _, err := l.storesOf(ctx, cluster)
	if err != nil {
		return nil, err
	}
	config := &InstanceSidecarConfiguration{} // what a store that is gone said of the sidecar is not known any more
	if first := slices.IndexFunc(stores, func(s *ObjectStore) bool { return s.Name == ruling.ObjectStore }); first >= 0 {
		config = &stores[first].Spec.InstanceSidecarConfiguration
	}
	patch, err := l.inject(cluster, stores, config, spec, specPath, container)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "inject the sidecar for Cluster %s/%s: %v", cluster.Namespace, cluster.Name, err)
	}
	if len(patch) > 0 {
		response.JsonPatch, err = json.Marshal(patch)
	}
	return response, err
}

// recoveryRole returns the role of a Job that restores, which is also the name of its
// container, and "" for every other Job. The label's prefix depends on the brand.
func recoveryRole(job *batchv1.Job) string {
	for label, role := range job.Spec.Template.Labels {
		if path.Base(label) == "jobRole" && (role == "full-recovery" || role == "snapshot-recovery") {
			return role
		}
	}
	return ""
}

// patchOperation is one operation of a JSON patch (RFC 6902). The order of the fields
// and of the operations is fixed, so equal inputs give equal bytes.
type patchOperation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

const (
	pluginsVolume      = "plugins"
	pluginsPath        = "/plugins"
	certificatesVolume = "barman-certificates"
	certificateFile    = "barman-ca.crt"
	spoolDirectory     = "/controller/wal-restore-spool"
	// bootstrapController copies the instance manager into the Pod and must stay first.
	bootstrapController = "bootstrap-controller"
)

// inject returns the operations that put the sidecar beside the container called main.
// Only the elements that change are named: what this version of the API types does not
// know of the Pod survives.
func (o *operator) inject(c *Cluster, stores []*ObjectStore, config *InstanceSidecarConfiguration, spec *corev1.PodSpec, at, main string) ([]patchOperation, error) {
	var patch []patchOperation
	named := func(list []corev1.Container, name string) int {
		return slices.IndexFunc(list, func(c corev1.Container) bool { return c.Name == name })
	}
	index := named(spec.Containers, main)
	if index < 0 {
		return nil, fmt.Errorf("main container not found: no container is called %q", main)
	}
	postgres := &spec.Containers[index]

	// The socket's directory, shared with the instance manager. Another plugin may have
	// been first.
	if !slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == pluginsVolume }) {
		patch = append(patch, appendTo(at+"/volumes", len(spec.Volumes), corev1.Volume{
			Name: pluginsVolume, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}},
		}))
		spec.Volumes = append(spec.Volumes, corev1.Volume{Name: pluginsVolume})
	}
	if !slices.ContainsFunc(postgres.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == pluginsPath }) {
		mount := corev1.VolumeMount{Name: pluginsVolume, MountPath: pluginsPath}
		patch = append(patch, appendTo(fmt.Sprintf("%s/containers/%d/volumeMounts", at, index), len(postgres.VolumeMounts), mount))
		postgres.VolumeMounts = append(postgres.VolumeMounts, mount)
	}

	certificates := certificateVolume(stores)
	existing := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == certificatesVolume })
	switch volume := fmt.Sprintf("%s/volumes/%d", at, existing); {
	case certificates != nil && existing < 0:
		patch = append(patch, appendTo(at+"/volumes", len(spec.Volumes), *certificates))
	case certificates != nil && !equality.Semantic.DeepEqual(&spec.Volumes[existing], certificates):
		patch = append(patch, patchOperation{Op: "replace", Path: volume, Value: certificates})
	case certificates == nil && existing >= 0:
		patch = append(patch, patchOperation{Op: "remove", Path: volume})
	}

	sidecar, err := o.sidecar(c, stores, config, postgres)
	if err != nil {
		return nil, err
	}
	if certificates != nil {
		sidecar.VolumeMounts = append(sidecar.VolumeMounts, corev1.VolumeMount{Name: certificatesVolume, MountPath: certificatesDirectory})
	}
	containers := at + "/initContainers"
	switch i := named(spec.InitContainers, sidecarName); {
	case i >= 0 && equality.Semantic.DeepEqual(&spec.InitContainers[i], sidecar):
	case i >= 0:
		patch = append(patch, patchOperation{Op: "replace", Path: fmt.Sprintf("%s/%d", containers, i), Value: sidecar})
	case len(spec.InitContainers) == 0:
		patch = append(patch, appendTo(containers, 0, sidecar))
	default:
		// Right behind the container that copies the manager, or first without one: a
		// later operator bootstraps the instance in an init container, which needs the
		// sidecar running.
		i = named(spec.InitContainers, bootstrapController) + 1
		patch = append(patch, patchOperation{Op: "add", Path: fmt.Sprintf("%s/%d", containers, i), Value: sidecar})
	}
	return patch, nil
}

// appendTo adds value to an array of n elements, which is absent from the document when n is 0.
func appendTo(array string, n int, value any) patchOperation {
	if n == 0 {
		return patchOperation{Op: "add", Path: array, Value: []any{value}}
	}
	return patchOperation{Op: "add", Path: array + "/-", Value: value}
}

// certificateVolume projects the endpointCA of every store to <store>/barman-ca.crt;
// nil when there is none. The kubelet mounts it, so no right on the Secret is needed.
func certificateVolume(stores []*ObjectStore) *corev1.Volume {
	var sources []corev1.VolumeProjection
	for _, s := range slices.SortedFunc(slices.Values(stores), func(a, b *ObjectStore) int { return cmp.Compare(a.Name, b.Name) }) {
		if ca := s.Spec.Configuration.EndpointCA; ca != nil {
			sources = append(sources, corev1.VolumeProjection{Secret: &corev1.SecretProjection{
				LocalObjectReference: corev1.LocalObjectReference{Name: ca.Name},
				Items:                []corev1.KeyToPath{{Key: ca.Key, Path: s.Name + "/" + certificateFile}},
			}})
		}
	}
	if sources == nil {
		return nil
	}
	return &corev1.Volume{Name: certificatesVolume, VolumeSource: corev1.VolumeSource{
		Projected: &corev1.ProjectedVolumeSource{Sources: sources},
	}}
}

// sidecar is the container that runs beside postgres for the whole life of the Pod: an
// init container with restartPolicy Always, started before and stopped after it.
//
// The operator compares image, env (in order), probes, resources, security context and
// mounts with the running Pod, and rolls the cluster when they differ: everything here
// has to be a function of the Cluster, the ObjectStores and the plugin's version only.
func (o *operator) sidecar(c *Cluster, stores []*ObjectStore, config *InstanceSidecarConfiguration, postgres *corev1.Container) (*corev1.Container, error) {
	env, err := sidecarEnv(c, stores, config, postgres)
	if err != nil {
		return nil, err
	}
	return &corev1.Container{
		Name: sidecarName, Image: o.sidecarImage, ImagePullPolicy: corev1.PullPolicy(o.imagePullPolicy), RestartPolicy: new(corev1.ContainerRestartPolicyAlways),
		Args: slices.Concat([]string{"sidecar", "--log-level=" + cmp.Or(config.LogLevel, "info")}, config.AdditionalContainerArgs),
		Env:  env, EnvFrom: postgres.EnvFrom, Resources: config.Resources,
		StartupProbe: &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{sidecarBinary, "healthcheck"}}},
			PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 30,
		},
		// kubectl describe shows why it could not start.
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		// No user: the Pod's is postgres, which peer authentication on the socket needs.
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: new(false), Privileged: new(false), RunAsNonRoot: new(true), ReadOnlyRootFilesystem: new(true),
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		// PGDATA, the WAL volume, tablespaces, the scratch directory with PostgreSQL's socket,
		// and the API server's token where the operator mounts it itself.
		VolumeMounts: slices.DeleteFunc(slices.Clone(postgres.VolumeMounts), func(m corev1.VolumeMount) bool { return m.Name == certificatesVolume }),
	}, nil
}

// sidecarEnv: what postgres has, overridden by what the plugin must set and by what the
// ObjectStores ask for. The order is postgres', then ours, then the stores'.
func sidecarEnv(c *Cluster, stores []*ObjectStore, config *InstanceSidecarConfiguration, postgres *corev1.Container) ([]corev1.EnvVar, error) {
	env := slices.Clone(postgres.Env)
	set := func(v corev1.EnvVar) {
		if i := slices.IndexFunc(env, func(e corev1.EnvVar) bool { return e.Name == v.Name }); i >= 0 {
			env[i] = v
			return
		}
		env = append(env, v)
	}
	group, version, _ := strings.Cut(c.APIVersion, "/")
	if c.APIVersion == "" {
		return nil, errors.New("the Cluster of the request has no apiVersion")
	}
	// These describe the Pod; a store that overrode them would break the sidecar.
	final := map[string]bool{"PGDATA": true, "POD_NAME": true}
	for _, v := range []corev1.EnvVar{
		{Name: "NAMESPACE", Value: c.Namespace},
		{Name: "CLUSTER_NAME", Value: c.Name},
		{Name: "SPOOL_DIRECTORY", Value: spoolDirectory},
		{Name: "CUSTOM_CNPG_GROUP", Value: group},
		{Name: "CUSTOM_CNPG_VERSION", Value: version},
	} {
		set(v)
		final[v.Name] = true
	}
	if limit := config.Resources.Limits.Memory(); !limit.IsZero() {
		// The Go runtime collects harder near this than the kernel would at the limit;
		// the rest is for what it does not count. A reference to limits.memory cannot be scaled.
		set(corev1.EnvVar{Name: "GOMEMLIMIT", Value: strconv.FormatInt(limit.Value()/10*9, 10)})
	}
	for _, s := range stores {
		for _, v := range s.Spec.InstanceSidecarConfiguration.Env {
			if !final[v.Name] { // of several definitions the first counts
				set(v)
				final[v.Name] = true
			}
		}
	}
	return env, nil
}

// ---------------------------------------------------------------------------
// RBAC per cluster: a Role and a RoleBinding <cluster>-barman-cloud
// ---------------------------------------------------------------------------

// ensureRBAC lets the cluster's ServiceAccount read its ObjectStores and their
// credentials and write their status.
func (o *operator) ensureRBAC(ctx context.Context, c *Cluster, stores []*ObjectStore) error {
	if c.Kind == "" || c.APIVersion == "" || c.UID == "" {
		return fmt.Errorf("Cluster %s/%s came without apiVersion, kind or uid: cannot own its Role", c.Namespace, c.Name)
	}
	owner := *metav1.NewControllerRef(c, schema.FromAPIVersionAndKind(c.APIVersion, c.Kind))
	name := c.Name + "-barman-cloud"
	var names []string // also of stores that are missing, so that their coming is noticed
	for _, ref := range []*StoreRef{c.ArchiveStore(), c.RecoveryStore(), c.ReplicaSourceStore()} {
		if ref != nil {
			names = append(names, ref.ObjectStore)
		}
	}
	err := ensure(ctx, o, roles, o.roles, c.Namespace, name, func(r *rbacv1.Role) error {
		r.TypeMeta = metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "Role"}
		setOwnership(&r.ObjectMeta, owner)
		r.Rules = roleRules(names, stores)
		return nil
	})
	if err != nil {
		return err
	}
	return ensure(ctx, o, roleBindings, o.bindings, c.Namespace, name, func(b *rbacv1.RoleBinding) error {
		b.TypeMeta = metav1.TypeMeta{APIVersion: rbacv1.SchemeGroupVersion.String(), Kind: "RoleBinding"}
		setOwnership(&b.ObjectMeta, owner)
		ref := rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name}
		if b.ResourceVersion != "" && b.RoleRef != ref {
			return fmt.Errorf("it refers to %s %q instead of Role %q, and that cannot be changed: delete it, and it is made anew",
				b.RoleRef.Kind, b.RoleRef.Name, name)
		}
		b.RoleRef = ref
		subject := rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: c.Namespace, Name: cmp.Or(c.Spec.ServiceAccountName, c.Name)}
		if !slices.Contains(b.Subjects, subject) {
			b.Subjects = append(b.Subjects, subject)
		}
		return nil
	})
}

// credentialSecrets are the names of the Secrets that the sidecar has to read; the kubelet mounts endpointCA.
func credentialSecrets(s *ObjectStore) (names []string) {
	c := s.Spec.Configuration.Credentials
	if c == nil || c.InheritFromIAMRole {
		return nil
	}
	for _, selector := range []*corev1.SecretKeySelector{c.AccessKeyID, c.SecretAccessKey, c.Region, c.SessionToken} {
		if selector != nil {
			names = append(names, selector.Name)
		}
	}
	return names
}

// roleRules are the rights on the named stores. A rule without resourceNames would mean
// every object, so a rule about nothing is left out. The plugin's own ClusterRole in
// deploy.yaml holds the same verbs: Kubernetes lets nobody grant more than they have.
//
// names may hold more than stores: a store that is gone keeps its place, so that its
// return is noticed.
func roleRules(names []string, stores []*ObjectStore) []rbacv1.PolicyRule {
	var secretNames []string
	for _, s := range stores {
		secretNames = append(secretNames, credentialSecrets(s)...)
	}
	var rules []rbacv1.PolicyRule
	for _, r := range []struct {
		group, resource string
		verbs, names    []string
	}{
		{objectStores.Group, "objectstores", []string{"get", "watch", "list"}, names},
		// The sidecar patches; update is what the original's does, until its Pod is rolled.
		{objectStores.Group, "objectstores/status", []string{"update", "patch"}, names},
		{"", "secrets", []string{"get", "watch", "list"}, secretNames},
	} {
		if sorted := slices.Compact(slices.Sorted(slices.Values(r.names))); len(sorted) > 0 {
			rules = append(rules, rbacv1.PolicyRule{
				APIGroups: []string{r.group}, Resources: []string{r.resource}, ResourceNames: sorted, Verbs: r.verbs,
			})
		}
	}
	return rules
}

// setOwnership marks an object as ours and as the Cluster's; foreign labels stay. An
// owner of the same name but another UID is a Cluster that was deleted and made again.
func setOwnership(m *metav1.ObjectMeta, owner metav1.OwnerReference) {
	for label, value := range map[string]string{
		clusterLabel:                   owner.Name,
		"app.kubernetes.io/name":       "barman-cloud-plugin",
		"app.kubernetes.io/instance":   owner.Name,
		"app.kubernetes.io/version":    version,
		"app.kubernetes.io/component":  "database",
		"app.kubernetes.io/managed-by": fieldManager,
	} {
		metav1.SetMetaDataLabel(m, label, value)
	}
	m.OwnerReferences = slices.DeleteFunc(m.OwnerReferences, func(r metav1.OwnerReference) bool {
		return r.Kind == owner.Kind && r.Name == owner.Name && r.UID != owner.UID
	})
	if !slices.ContainsFunc(m.OwnerReferences, func(r metav1.OwnerReference) bool { return r.UID == owner.UID }) {
		m.OwnerReferences = append(m.OwnerReferences, owner)
	}
}

// syncRole brings a Role up to date with the ObjectStores that it names.
func (o *operator) syncRole(ctx context.Context, namespace, name string) error {
	var current rbacv1.Role
	if found, err := cached(o.roles, namespace, name, &current); !found || err != nil {
		return err // gone with its Cluster; if not, the next Pre makes it again
	}
	names := storesNamed(&current)
	var stores []*ObjectStore
	for _, n := range names {
		switch s, err := o.store(ctx, namespace, n); {
		case apierrors.IsNotFound(err): // no Secrets to read until it is made again
		case err != nil:
			return fmt.Errorf("get ObjectStore %s/%s: %w", namespace, n, err)
		default:
			stores = append(stores, s)
		}
	}
	return ensure(ctx, o, roles, o.roles, namespace, name, func(r *rbacv1.Role) error {
		if r.ResourceVersion == "" {
			return errGone
		}
		r.Rules = roleRules(names, stores)
		return nil
	})
}

// storesNamed returns the ObjectStores that a Role of ours gives access to.
func storesNamed(r *rbacv1.Role) []string {
	for _, rule := range r.Rules {
		if slices.Contains(rule.Resources, objectStores.Resource) {
			return rule.ResourceNames
		}
	}
	return nil
}

// ---------------------------------------------------------------------------
// The state of an ObjectStore
// ---------------------------------------------------------------------------

// conditionReady says whether the settings of an ObjectStore can be used and its Secrets
// hold the keys. Whether the object store takes them only the sidecars know.
const conditionReady = "Ready"

// syncStore writes into the status of an ObjectStore what it is worth and the columns that
// kubectl shows, and tells the Clusters that use it when it has become unusable.
//
// It is judged anew when its generation, a backup or a version of its Secrets is another, by
// every replica. The write is guarded by the version of the ObjectStore that was judged: one
// replica wins, the others find nothing left to do. A difference in words alone between
// two versions of the plugin is written once by each, not back and forth.
func (o *operator) syncStore(ctx context.Context, namespace, name string) error {
	var store ObjectStore
	key := namespace + "/" + name
	if found, err := cached(o.stores, namespace, name, &store); !found || err != nil {
		delete(o.judged, key)
		return err
	}
	status := &store.Status
	last, first := status.ofAllServers()
	basis := fmt.Sprint(store.UID, store.Generation, last, first)
	for _, s := range secretsOf(&store) {
		if obj, found, _ := o.versions.GetStore().GetByKey(namespace + "/" + s); found {
			basis += " " + obj.(metav1.Object).GetResourceVersion()
		} else {
			basis += " none"
		}
	}
	if o.judged[key] == basis {
		return nil
	}
	verdict, err := o.judge(ctx, &store)
	if err != nil {
		return err
	}
	turned := meta.SetStatusCondition(&status.Conditions, verdict)
	if turned || !status.LastBackup.Equal(last) || !status.FirstRecoverabilityPoint.Equal(first) {
		patch, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"resourceVersion": store.ResourceVersion},
			"status":   map[string]any{"conditions": status.Conditions, "lastBackup": last, "firstRecoverabilityPoint": first},
		})
		if err != nil {
			return err
		}
		_, err = o.client.Resource(objectStores).Namespace(namespace).Patch(ctx, name, types.MergePatchType, patch,
			metav1.PatchOptions{FieldManager: fieldManager}, "status")
		if err != nil {
			return fmt.Errorf("write the condition of ObjectStore %s: %w", key, err)
		}
	}
	if turned {
		slog.Info("ObjectStore judged", "objectStore", key, "ready", verdict.Status, "reason", verdict.Reason, "message", verdict.Message)
		if err := o.tellClusters(ctx, key, verdict); err != nil {
			slog.Error("The condition of an ObjectStore gives no Event", "objectStore", key, "error", err)
		}
	}
	o.judged[key] = basis
	return nil
}

// secretsOf are all Secrets that an ObjectStore names.
func secretsOf(s *ObjectStore) []string {
	names := credentialSecrets(s)
	if ca := s.Spec.Configuration.EndpointCA; ca != nil {
		names = append(names, ca.Name)
	}
	return names
}

// judge makes the condition. An error says that there is no verdict, because the API server is away.
func (o *operator) judge(ctx context.Context, store *ObjectStore) (metav1.Condition, error) {
	verdict := metav1.Condition{Type: conditionReady, Status: metav1.ConditionFalse, ObservedGeneration: store.Generation}
	var failed error
	config, err := ResolveStore(store, "any", func(sel corev1.SecretKeySelector) ([]byte, error) {
		s, err := o.secret(ctx, store.Namespace, sel.Name)
		switch {
		case err != nil:
			failed = err
			return nil, err
		case s == nil:
			verdict.Reason = "SecretNotFound"
			return nil, fmt.Errorf("Secret %s/%s: %w: create it, or correct its name in the ObjectStore", store.Namespace, sel.Name, errNoObject)
		}
		value, err := secretKey(s, sel)
		if err != nil {
			verdict.Reason = "SecretKeyNotFound"
		}
		return value, err
	})
	if err == nil {
		_, err = newStore(config)
	}
	if err == nil {
		fs, _, _, _, _ := sidecarFlags()
		fs.SetOutput(io.Discard)
		fs.String("log-level", "", "") // those of logging, without their effect on this process
		fs.String("log-format", "", "")
		if err = fs.Parse(store.Spec.InstanceSidecarConfiguration.AdditionalContainerArgs); err == nil && fs.NArg() > 0 {
			err = fmt.Errorf("%q is no flag", fs.Arg(0))
		}
		if err != nil {
			err = fmt.Errorf("ObjectStore %s: additionalContainerArgs: %w: no sidecar starts with that", store.Name, err)
		}
	}
	if err != nil {
		verdict.Reason, verdict.Message = cmp.Or(verdict.Reason, "InvalidConfiguration"), err.Error()
	} else {
		verdict.Status, verdict.Reason = metav1.ConditionTrue, "Valid"
		verdict.Message = "The configuration is valid, and its Secrets hold the keys that it names"
	}
	return verdict, failed
}

// tellClusters writes an Event on each Cluster that uses an ObjectStore that is not ready.
func (o *operator) tellClusters(ctx context.Context, store string, verdict metav1.Condition) error {
	users, err := o.roles.GetIndexer().ByIndex(byStore, store)
	for _, obj := range users {
		owner := metav1.GetControllerOf(obj.(metav1.Object))
		if owner == nil {
			continue
		}
		cluster := corev1.ObjectReference{APIVersion: owner.APIVersion, Kind: owner.Kind, Name: owner.Name, UID: owner.UID,
			Namespace: obj.(metav1.Object).GetNamespace()}
		o.reported.Delete(owner.UID) // this is a transition, whatever this replica said of the last one
		if verdict.Status == metav1.ConditionFalse {
			err = errors.Join(err, o.event(ctx, cluster, "ObjectStoreNotReady", verdict.Message))
		}
	}
	return err
}

// ---------------------------------------------------------------------------
// Certificates of the connection from the operator
// ---------------------------------------------------------------------------

const (
	// certificateLabel marks the Secrets that this plugin made. One without it is
	// somebody else's (cert-manager's, say): used as it is and never written.
	certificateLabel = "barmancloud.cnpg.io/certificate"

	// A CA is replaced a year before it ends and stays trusted until then, while a leaf
	// lives 90 days: every leaf is renewed under the new CA long before the old one ends.
	caLifetime      = 10 * 365 * 24 * time.Hour
	caRenewBefore   = 365 * 24 * time.Hour
	leafLifetime    = 90 * 24 * time.Hour
	leafRenewBefore = 30 * 24 * time.Hour
	clockSkew       = time.Hour // tolerated between the nodes
	checkInterval   = time.Hour

	certificatesKey = "certificates" // in the queue
)

// authority is the CA's Secret: tls.crt holds the current CA certificate and, after a
// renewal, its predecessors until they end; tls.key belongs to the current one.
type authority struct {
	bundle  []*x509.Certificate
	current tls.Certificate
}

// syncCertificates makes what is missing, renews what ends soon and loads the result.
//
// The operator trusts all of the server Secret's tls.crt, so this holds the leaf and
// every CA certificate: a renewed leaf is trusted before the operator has read it.
func (o *operator) syncCertificates(ctx context.Context) error {
	server, serverErr := o.secret(ctx, o.namespace, o.serverSecret)
	client, clientErr := o.secret(ctx, o.namespace, o.clientSecret)
	if err := cmp.Or(serverErr, clientErr); err != nil {
		return err
	}
	trusted := x509.NewCertPool()
	if !foreign(server) || !foreign(client) {
		ca, err := o.authority(ctx)
		if err != nil {
			return err
		}
		if server, err = o.ensureLeaf(ctx, ca, o.serverSecret, server, x509.ExtKeyUsageServerAuth); err != nil {
			return err
		}
		if client, err = o.ensureLeaf(ctx, ca, o.clientSecret, client, x509.ExtKeyUsageClientAuth); err != nil {
			return err
		}
		trusted = pool(ca.bundle)
	}
	pair, err := keyPair(server)
	if err != nil {
		return err
	}
	if foreign(client) {
		// Exactly this client, not everything else that its issuer signs.
		certificate, err := keyPair(client)
		if err != nil {
			return err
		}
		trusted.AddCert(certificate.Leaf)
	}
	if old := o.tls.Load(); old == nil || !bytes.Equal(old.Certificates[0].Certificate[0], pair.Certificate[0]) {
		slog.Info("Loaded the server's certificate", "secret", o.serverSecret, "notAfter", pair.Leaf.NotAfter)
	}
	o.tls.Store(&tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{*pair},
		// Not RequireAndVerifyClientCert: with ClientCAs the server announces their names,
		// and a client whose leaf is trusted itself, but was issued by a name that is not
		// announced, sends no certificate at all. The verification is the same.
		ClientAuth: tls.RequireAnyClientCert,
		VerifyConnection: func(state tls.ConnectionState) error {
			_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
				Roots: trusted, Intermediates: pool(state.PeerCertificates[1:]), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			})
			return err
		},
		// A resumed session would outlive the trust in its client's certificate.
		SessionTicketsDisabled: true,
	})
	return nil
}

// secret asks the API server for a Secret; nil when there is none.
func (o *operator) secret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	var s corev1.Secret
	if err := o.get(ctx, secrets, namespace, name, &s); apierrors.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("get Secret %s/%s: %w", namespace, name, err)
	}
	return &s, nil
}

// foreign says that a Secret is there and not made by this plugin.
func foreign(s *corev1.Secret) bool {
	return s != nil && s.Labels[certificateLabel] == ""
}

// keyPair reads the certificate chain and the key of a Secret.
func keyPair(s *corev1.Secret) (*tls.Certificate, error) {
	pair, err := tls.X509KeyPair(s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return nil, fmt.Errorf("Secret %s/%s holds no usable key pair in tls.crt and tls.key: %w: correct it, or delete it to have one made",
			s.Namespace, s.Name, err)
	}
	return &pair, nil
}

// authority reads the CA's Secret, makes it, or renews the CA in it.
func (o *operator) authority(ctx context.Context) (*authority, error) {
	s, err := o.secret(ctx, o.namespace, o.caSecret)
	if err != nil {
		return nil, err
	}
	ca := &authority{}
	if s != nil {
		pair, err := keyPair(s)
		if err != nil {
			return nil, err
		}
		ca.current = *pair
		certificates, err := x509.ParseCertificates(slices.Concat(pair.Certificate...))
		if err != nil {
			return nil, fmt.Errorf("Secret %s/%s: tls.crt: %w", s.Namespace, s.Name, err)
		}
		ca.bundle = slices.DeleteFunc(certificates, func(c *x509.Certificate) bool { return c != certificates[0] && time.Now().After(c.NotAfter) })
		if foreign(s) || time.Until(pair.Leaf.NotAfter) > caRenewBefore {
			return ca, nil
		}
	}
	template := certificateTemplate("cnpg-barman-s3 CA", caLifetime)
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign
	next, err := issue(template, nil)
	if err != nil {
		return nil, err
	}
	ca.current = *next
	ca.bundle = append([]*x509.Certificate{next.Leaf}, ca.bundle...)
	_, err = o.writePair(ctx, o.caSecret, "ca", s, next, ca.bundle[1:])
	return ca, err
}

// ensureLeaf returns the Secret with a leaf that ca vouches for, and all CA
// certificates behind it. A leaf that is still good is kept when only the CA changed.
func (o *operator) ensureLeaf(ctx context.Context, ca *authority, name string, s *corev1.Secret, usage x509.ExtKeyUsage) (*corev1.Secret, error) {
	if foreign(s) {
		return s, nil
	}
	role, template := "client", certificateTemplate("cnpg-barman-s3 client", leafLifetime)
	if usage == x509.ExtKeyUsageServerAuth {
		role, template = "server", certificateTemplate(o.service, leafLifetime)
		template.DNSNames = []string{o.service, o.service + "." + o.namespace, o.service + "." + o.namespace + ".svc"}
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{usage}

	if s != nil {
		pair, err := keyPair(s)
		if err == nil {
			// Under a foreign CA that ends sooner, a new leaf would be no better than this one.
			until := slices.MinFunc([]time.Time{time.Now().Add(leafRenewBefore), ca.current.Leaf.NotAfter}, time.Time.Compare)
			_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: pool(ca.bundle), KeyUsages: template.ExtKeyUsage, CurrentTime: until})
		}
		if err == nil && len(template.DNSNames) > 0 {
			err = pair.Leaf.VerifyHostname(o.service)
		}
		if err == nil {
			if bytes.Equal(s.Data[corev1.TLSCertKey], chainPEM(pair.Leaf, ca.bundle)) {
				return s, nil
			}
			return o.writePair(ctx, name, role, s, pair, ca.bundle)
		}
		slog.Info("Renewing a certificate", "secret", name, "reason", err.Error())
	}
	pair, err := issue(template, &ca.current)
	if err != nil {
		return nil, err
	}
	return o.writePair(ctx, name, role, s, pair, ca.bundle)
}

func pool(certificates []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certificates {
		p.AddCert(c)
	}
	return p
}

func certificateTemplate(commonName string, lifetime time.Duration) *x509.Certificate {
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: commonName},
		NotBefore: time.Now().Add(-clockSkew),
		NotAfter:  time.Now().Add(lifetime),
	}
}

// issue makes a key and a certificate for it, signed by the parent or by itself.
func issue(template *x509.Certificate, parent *tls.Certificate) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	signer := tls.Certificate{Leaf: template, PrivateKey: key}
	if parent != nil {
		signer = *parent
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.Leaf, key.Public(), signer.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", template.Subject.CommonName, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", template.Subject.CommonName, err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

func chainPEM(leaf *x509.Certificate, bundle []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range append([]*x509.Certificate{leaf}, bundle...) {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Buffer takes everything
	}
	return b.Bytes()
}

// writePair creates the Secret, or updates the one that was read. Of several replicas
// one succeeds; the others get an error, try again and find the winner's.
func (o *operator) writePair(ctx context.Context, name, role string, old *corev1.Secret, pair *tls.Certificate, behind []*x509.Certificate) (*corev1.Secret, error) {
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("encode the key for Secret %s/%s: %w", o.namespace, name, err)
	}
	s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: o.namespace, Name: name}}
	if old != nil {
		s = old.DeepCopy()
	}
	s.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}
	s.Type = corev1.SecretTypeTLS
	metav1.SetMetaDataLabel(&s.ObjectMeta, certificateLabel, role)
	metav1.SetMetaDataLabel(&s.ObjectMeta, "app.kubernetes.io/managed-by", fieldManager)
	s.Data = map[string][]byte{
		corev1.TLSCertKey:       chainPEM(pair.Leaf, behind),
		corev1.TLSPrivateKeyKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	}
	if err := write(ctx, o.client, secrets, old == nil, s); err != nil {
		return nil, fmt.Errorf("write Secret %s/%s: %w", o.namespace, name, err)
	}
	slog.Info("Wrote a certificate", "secret", name, "notAfter", pair.Leaf.NotAfter)
	return s, nil
}

// ---------------------------------------------------------------------------
// The API server: informers, one queue of work, reads and guarded writes
// ---------------------------------------------------------------------------

// The indices of Roles by NAMESPACE/NAME of the ObjectStores they name, and of ObjectStores
// by that of the Secrets they name.
const (
	byStore  = "store"
	bySecret = "secret"
)

// index makes an index of an informer's objects of type T; names are in the object's namespace.
func index[T any](name string, names func(*T) []string) cache.Indexers {
	return cache.Indexers{name: func(obj any) ([]string, error) {
		var v T
		if fromUnstructured(obj, &v) != nil {
			return nil, nil // an error would end the program; what is wrong is told where the object is used
		}
		var keys []string
		for _, n := range names(&v) {
			keys = append(keys, obj.(metav1.Object).GetNamespace()+"/"+n)
		}
		return keys, nil
	}}
}

// startInformers watches the ObjectStores, our Roles and RoleBindings, and which Secrets
// there are in which version. synced says whether all of it is known.
func (o *operator) startInformers(ctx context.Context, background *sync.WaitGroup, metadataClient metadata.Interface) (synced func() bool) {
	ours := metav1.ListOptions{LabelSelector: clusterLabel}
	o.stores = informer(o.client.Resource(objectStores), metav1.ListOptions{}, index(bySecret, secretsOf))
	o.roles = informer(o.client.Resource(roles), ours, index(byStore, storesNamed))
	o.bindings = informer(o.client.Resource(roleBindings), ours, nil)
	versions := metadataClient.Resource(secrets)
	notOfHelm := metav1.ListOptions{FieldSelector: "type!=helm.sh/release.v1"}
	o.versions = newInformer(versions.List, versions.Watch, notOfHelm, &metav1.PartialObjectMetadata{}, nil)
	o.judged = map[string]string{}
	all := []cache.SharedIndexInformer{o.stores, o.roles, o.bindings, o.versions}
	synced = func() bool {
		return !slices.ContainsFunc(all, func(i cache.SharedIndexInformer) bool { return !i.HasSynced() })
	}
	for _, i := range all {
		background.Go(func() { i.RunWithContext(ctx) })
	}
	background.Go(func() {
		// A Role is judged by the ObjectStores and these by the Secrets: all have to be known first.
		if !cache.WaitForCacheSync(ctx.Done(), synced) {
			return
		}
		handle(o.roles, func(key string) { o.queue.Add("roles/" + key) })
		handle(o.stores, func(key string) {
			o.queue.Add("objectstores/" + key)
			o.queueAll(o.roles, byStore, key, "roles/")
		})
		handle(o.versions, func(key string) {
			if namespace, name, _ := strings.Cut(key, "/"); namespace == o.namespace &&
				slices.Contains([]string{o.caSecret, o.serverSecret, o.clientSecret}, name) {
				o.queue.Add(certificatesKey)
			}
			o.queueAll(o.stores, bySecret, key, "objectstores/")
		})
	})
	return synced
}

// queueAll puts all objects of one key of an index into the queue.
func (o *operator) queueAll(i cache.SharedIndexInformer, index, key, resource string) {
	affected, _ := i.GetIndexer().IndexKeys(index, key) // the only error: there is no such index
	for _, name := range affected {
		o.queue.Add(resource + name)
	}
}

func informer(r dynamic.ResourceInterface, selector metav1.ListOptions, indices cache.Indexers) cache.SharedIndexInformer {
	return newInformer(r.List, r.Watch, selector, &unstructured.Unstructured{}, indices)
}

// newInformer follows the selected objects. What it keeps of an example that is only
// metadata is the name and the version. (client-go's dynamicinformer would do, but it
// links in the typed clients of all of Kubernetes.)
func newInformer[L runtime.Object](list func(context.Context, metav1.ListOptions) (L, error),
	follow func(context.Context, metav1.ListOptions) (watch.Interface, error),
	selector metav1.ListOptions, example runtime.Object, indices cache.Indexers) cache.SharedIndexInformer {
	selected := func(options metav1.ListOptions) metav1.ListOptions {
		options.LabelSelector, options.FieldSelector = selector.LabelSelector, selector.FieldSelector
		return options
	}
	i := cache.NewSharedIndexInformer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			return list(ctx, selected(options))
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			return follow(ctx, selected(options))
		},
	}, example, 0, indices)
	i.SetTransform(func(obj any) (any, error) { // the only error: the informer runs already
		switch o := obj.(type) {
		case *unstructured.Unstructured:
			o.SetManagedFields(nil) // half of a small object, and never read
		case *metav1.PartialObjectMetadata:
			o.ObjectMeta = metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, ResourceVersion: o.ResourceVersion}
		}
		return obj, nil
	})
	return i
}

// handle calls f with the key of every object that appears, changes or goes.
func handle(i cache.SharedIndexInformer, f func(key string)) {
	changed := func(obj any) {
		if key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(obj); err == nil {
			f(key)
		}
	}
	// The only error: the informer has ended, and with it the operator.
	i.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: changed, UpdateFunc: func(_, obj any) { changed(obj) }, DeleteFunc: changed})
}

// work does what the queue asks for, and again with growing pauses while it fails.
func (o *operator) work(ctx context.Context) {
	for {
		key, shutdown := o.queue.Get()
		if shutdown {
			return
		}
		err := o.sync(ctx, key)
		switch {
		case err == nil:
			o.queue.Forget(key)
		case ctx.Err() == nil:
			// Replicas that start together write the same things: one of them is told so.
			level := slog.LevelError
			if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
				level = slog.LevelInfo
			}
			slog.Log(ctx, level, "Trying again", "object", key, "error", err)
			o.queue.AddRateLimited(key)
		}
		o.queue.Done(key)
	}
}

func (o *operator) sync(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	resource, object, _ := strings.Cut(key, "/")
	namespace, name, _ := strings.Cut(object, "/")
	switch resource {
	case "objectstores":
		return o.syncStore(ctx, namespace, name)
	case "roles":
		return o.syncRole(ctx, namespace, name)
	}
	defer o.queue.AddAfter(certificatesKey, checkInterval)
	return o.syncCertificates(ctx)
}

// errGone is what a mutate function returns to have nothing created.
var errGone = errors.New("deleted meanwhile")

// ensure creates an object or changes it, guarded by its resource version, until it is
// what mutate makes of it, and writes nothing when it already is.
func ensure[T any, P interface {
	*T
	metav1.Object
	DeepCopy() *T
}](ctx context.Context, o *operator, gvr schema.GroupVersionResource, known cache.SharedIndexInformer, namespace, name string, mutate func(P) error) error {
	var err error
	for attempt := range 5 {
		before, found := P(new(T)), false
		if attempt == 0 {
			found, err = cached(known, namespace, name, before)
		} else {
			err = o.get(ctx, gvr, namespace, name, before)
			found = err == nil
		}
		if err != nil && !apierrors.IsNotFound(err) {
			break
		}
		after := P(before.DeepCopy())
		after.SetNamespace(namespace)
		after.SetName(name)
		if err = mutate(after); errors.Is(err, errGone) || err == nil && found && equality.Semantic.DeepEqual(before, after) {
			return nil
		} else if err != nil {
			break
		}
		if err = write(ctx, o.client, gvr, !found, after); err == nil {
			slog.Info("Wrote", "resource", gvr.Resource, "namespace", namespace, "name", name)
			return nil
		}
		// The informer was behind, or another replica was faster: look at the API server.
		if !apierrors.IsAlreadyExists(err) && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			break
		}
	}
	return fmt.Errorf("%s %s/%s: %w", gvr.Resource, namespace, name, err)
}

// cached reads an object from an informer; false when it is not there.
func cached(i cache.SharedIndexInformer, namespace, name string, into any) (bool, error) {
	obj, found, err := i.GetStore().GetByKey(namespace + "/" + name)
	if err != nil || !found {
		return false, err
	}
	return true, fromUnstructured(obj, into)
}

// fromUnstructured goes through JSON, like every reader of these types elsewhere.
func fromUnstructured(obj, into any) error {
	b, err := json.Marshal(obj)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

func (o *operator) get(ctx context.Context, gvr schema.GroupVersionResource, namespace, name string, into any) error {
	u, err := o.client.Resource(gvr).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	return fromUnstructured(u, into)
}

// write creates an object, or updates it: that fails with a conflict when the object is no
// longer the one that was read.
func write(ctx context.Context, client dynamic.Interface, gvr schema.GroupVersionResource, create bool, obj metav1.Object) error {
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(obj)
	if err != nil {
		return err
	}
	resource, u := client.Resource(gvr).Namespace(obj.GetNamespace()), &unstructured.Unstructured{Object: content}
	if create {
		_, err = resource.Create(ctx, u, metav1.CreateOptions{FieldManager: fieldManager})
	} else {
		_, err = resource.Update(ctx, u, metav1.UpdateOptions{FieldManager: fieldManager})
	}
	return err
}
