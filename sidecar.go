// This file is what runs beside PostgreSQL, in every phase of a Pod: the server on the
// unix socket, the two sources of its configuration, and the metrics.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cloudnative-pg/cnpg-i/pkg/backup"
	"github.com/cloudnative-pg/cnpg-i/pkg/identity"
	"github.com/cloudnative-pg/cnpg-i/pkg/metrics"
	restorejob "github.com/cloudnative-pg/cnpg-i/pkg/restore/job"
	"github.com/cloudnative-pg/cnpg-i/pkg/wal"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	kubeyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// pluginSocket is where the instance manager looks for plugins: the file name is the plugin's name.
const pluginSocket = "/plugins/" + PluginName

// stopGrace is how long requests in flight may go on after SIGTERM. Kubernetes ends a
// native sidecar after PostgreSQL, within what is left of the Pod's grace period.
const stopGrace = 25 * time.Second

// drainGrace is how long, after that, WAL files that PostgreSQL has left behind may take.
const drainGrace = time.Minute

// runSidecar is the subcommand `sidecar`. It returns nil when ctx ends.
func runSidecar(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("sidecar", flag.ContinueOnError)
	logFlags(fs)
	socket := fs.String("socket", pluginSocket, "serve CNPG-I on this unix `socket`")
	pgdata := fs.String("pgdata", os.Getenv("PGDATA"), "the data `directory` of PostgreSQL (default: $PGDATA)")
	spool := fs.String("spool", os.Getenv("SPOOL_DIRECTORY"), "keep prefetched WAL in this `directory` (default: $SPOOL_DIRECTORY; none: no prefetch)")
	manifests := fs.String("objectstore", "", "read ObjectStores and their Secrets from this YAML `file` instead of from Kubernetes")
	if err := parseFlags(fs, args, 0); err != nil {
		return err
	}
	if *pgdata == "" {
		return usageError{errors.New("sidecar: where is the data directory? Set --pgdata or PGDATA")}
	}
	var source configSource
	if *manifests != "" {
		file, err := newFileSource(*manifests)
		if err != nil {
			return err
		}
		source = file
	} else {
		namespace := os.Getenv("NAMESPACE")
		if namespace == "" {
			return usageError{errors.New("sidecar: set NAMESPACE to the namespace of the Cluster, or use --objectstore FILE outside Kubernetes")}
		}
		kube, err := newKubeSource(ctx, namespace)
		if err != nil {
			return err
		}
		source = kube
	}
	life, end := context.WithCancel(context.Background()) // longer than ctx: work in flight gets done
	defer end()
	walFiles, err := newWALService(life, source, os.Getenv("POD_NAME"), *pgdata, *spool)
	if err != nil {
		return err
	}
	if err := serveSidecar(ctx, *socket, walFiles); err != nil {
		return err
	}
	drain, cancel := context.WithTimeout(life, drainGrace)
	defer cancel()
	walFiles.archiver.drain(drain)
	end()
	walFiles.wait()
	slog.Info("Stopped")
	return nil
}

// serveSidecar answers CNPG-I requests on a unix socket until ctx ends. Then backups are
// cancelled (they clean up and record that they failed), and WAL files in flight may finish.
func serveSidecar(ctx context.Context, socket string, walFiles *walService) error {
	source, instance, pgdata := walFiles.source, walFiles.instance, walFiles.pgdata
	// A socket left behind by a killed predecessor would refuse connections for ever.
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the stale socket: %w", err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return fmt.Errorf("listen on the plugin socket: %w", err)
	}
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(logRequests, recoverPanics, cancelBackups(ctx)))
	identity.RegisterIdentityServer(server, &sidecarIdentity{})
	wal.RegisterWALServer(server, walFiles)
	backup.RegisterBackupServer(server, &backupService{source: source, instance: instance, pgdata: pgdata})
	restorejob.RegisterRestoreJobHooksServer(server, &restoreJobService{source: source, pgdata: pgdata})
	metrics.RegisterMetricsServer(server, &metricsService{source: source})
	grpc_health_v1.RegisterHealthServer(server, health.NewServer()) // SERVING from the start

	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		hard := time.AfterFunc(stopGrace, server.Stop)
		defer hard.Stop()
		server.GracefulStop()
	}()
	slog.Info("Serving", "socket", socket, "pgdata", pgdata, "version", version)
	if err := server.Serve(listener); err != nil {
		return fmt.Errorf("serve %s: %w", socket, err)
	}
	<-stopped
	return nil
}

// logRequests tells of every request that failed and, at debug level, of the others. An
// error goes to the caller; here it is told with the name of the method.
func logRequests(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	start := time.Now()
	reply, err := handle(ctx, request)
	switch {
	case err == nil:
		slog.Debug("Request", "method", info.FullMethod, "seconds", time.Since(start).Seconds())
	case status.Code(err) == codes.NotFound: // the daily bread of a standby
		slog.Info("Not found", "method", info.FullMethod, "error", status.Convert(err).Message())
	default:
		slog.Error("Request failed", "method", info.FullMethod, "code", status.Code(err).String(),
			"error", status.Convert(err).Message(), "seconds", time.Since(start).Seconds())
	}
	return reply, err
}

// cancelBackups ends the context of a running backup with ctx: unlike a WAL file it does
// not get done within the grace period, and it needs that time to clean up.
func cancelBackups(ctx context.Context) grpc.UnaryServerInterceptor {
	return func(requestContext context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		if info.FullMethod != backup.Backup_Backup_FullMethodName && info.FullMethod != restorejob.RestoreJobHooks_Restore_FullMethodName {
			return handle(requestContext, request)
		}
		requestContext, cancel := context.WithCancel(requestContext)
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		return handle(requestContext, request)
	}
}

// ---------------------------------------------------------------------------
// Identity
// ---------------------------------------------------------------------------

// sidecarIdentity serves the handshake, which comes before each WAL file: its answers are constants.
type sidecarIdentity struct {
	identity.UnimplementedIdentityServer
}

var (
	sidecarMetadata     = sync.OnceValue(pluginMetadata)
	sidecarCapabilities = pluginCapabilities(
		identity.PluginCapability_Service_TYPE_WAL_SERVICE,
		identity.PluginCapability_Service_TYPE_BACKUP_SERVICE,
		identity.PluginCapability_Service_TYPE_RESTORE_JOB,
		identity.PluginCapability_Service_TYPE_METRICS)
	sidecarReady = &identity.ProbeResponse{Ready: true}
)

// GetPluginMetadata says who this is.
func (*sidecarIdentity) GetPluginMetadata(context.Context, *identity.GetPluginMetadataRequest) (*identity.GetPluginMetadataResponse, error) {
	return sidecarMetadata(), nil
}

// GetPluginCapabilities says which services there are.
func (*sidecarIdentity) GetPluginCapabilities(context.Context, *identity.GetPluginCapabilitiesRequest) (*identity.GetPluginCapabilitiesResponse, error) {
	return sidecarCapabilities, nil
}

// Probe says that the process is alive.
func (*sidecarIdentity) Probe(context.Context, *identity.ProbeRequest) (*identity.ProbeResponse, error) {
	return sidecarReady, nil
}

// ---------------------------------------------------------------------------
// Metrics
// ---------------------------------------------------------------------------

// metricsService gives the instance manager's exporter the three metrics of the
// original. They come from the status of the ObjectStore, so every instance has them.
type metricsService struct {
	metrics.UnimplementedMetricsServer
	source configSource
}

const metricPrefix = "barman_cloud_cloudnative_pg_io_"

// recoveryWindowMetrics are gauges in seconds since 1970, 0 when there is no such point.
var recoveryWindowMetrics = []struct {
	name, help string
	value      func(RecoveryWindow) *metav1.Time
}{
	{metricPrefix + "first_recoverability_point", "The first point of recoverability for the cluster as a unix timestamp",
		func(w RecoveryWindow) *metav1.Time { return w.FirstRecoverabilityPoint }},
	{metricPrefix + "last_available_backup_timestamp", "The last available backup as a unix timestamp",
		func(w RecoveryWindow) *metav1.Time { return w.LastSuccessfulBackupTime }},
	{metricPrefix + "last_failed_backup_timestamp", "The last failed backup as a unix timestamp",
		func(w RecoveryWindow) *metav1.Time { return w.LastFailedBackupTime }},
}

// GetCapabilities is part of the handshake.
func (*metricsService) GetCapabilities(context.Context, *metrics.MetricsCapabilitiesRequest) (*metrics.MetricsCapabilitiesResult, error) {
	return &metrics.MetricsCapabilitiesResult{Capabilities: []*metrics.MetricsCapability{
		{Type: &metrics.MetricsCapability_Rpc{Rpc: &metrics.MetricsCapability_RPC{Type: metrics.MetricsCapability_RPC_TYPE_METRICS}}},
	}}, nil
}

// Define lists the metrics. Every name that Collect returns must be among them, or the whole scrape fails.
func (*metricsService) Define(context.Context, *metrics.DefineMetricsRequest) (*metrics.DefineMetricsResult, error) {
	result := &metrics.DefineMetricsResult{}
	for _, m := range recoveryWindowMetrics {
		result.Metrics = append(result.Metrics, &metrics.Metric{FqName: m.name, Help: m.help,
			ValueType: &metrics.MetricType{Type: metrics.MetricType_TYPE_GAUGE}})
	}
	return result, nil
}

// Collect reads the recovery window of the cluster's own server name.
func (m *metricsService) Collect(ctx context.Context, r *metrics.CollectMetricsRequest) (*metrics.CollectMetricsResult, error) {
	cluster, err := DecodeCluster(r.ClusterDefinition)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	result := &metrics.CollectMetricsResult{}
	var window RecoveryWindow
	if ref := cluster.ArchiveStore(); ref != nil {
		st, err := m.source.Status(ctx, ref.ObjectStore)
		if err != nil {
			return nil, grpcError(err)
		}
		window = st.ServerRecoveryWindow[ref.ServerName]
	}
	for _, metric := range recoveryWindowMetrics {
		value := 0.0
		if t := metric.value(window); t != nil {
			value = float64(t.Unix())
		}
		result.Metrics = append(result.Metrics, &metrics.CollectMetric{FqName: metric.name, Value: value})
	}
	return result, nil
}

// ---------------------------------------------------------------------------
// Open stores
// ---------------------------------------------------------------------------

// openStores keeps one open Store, with its warm connections, for each reference, and
// opens it anew when its configuration has changed.
type openStores struct {
	mu     sync.Mutex
	stores map[StoreRef]openStore
}

type openStore struct {
	config StoreConfig
	store  *Store
}

func (o *openStores) open(ctx context.Context, ref StoreRef, c StoreConfig) (*Store, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if known, ok := o.stores[ref]; ok && reflect.DeepEqual(known.config, c) {
		return known.store, nil
	}
	s, err := OpenStore(ctx, c)
	if err != nil {
		return nil, err
	}
	if o.stores == nil {
		o.stores = map[StoreRef]openStore{}
	}
	o.stores[ref] = openStore{c, s}
	return s, nil
}

// ---------------------------------------------------------------------------
// Configuration from manifest files
// ---------------------------------------------------------------------------

// fileSource reads ObjectStores and their Secrets from a YAML file: the plugin without
// Kubernetes. The file is read again when it has changed. Status is kept in memory only.
type fileSource struct {
	path   string
	stores openStores

	mu       sync.Mutex
	modified time.Time
	objects  map[string]*ObjectStore
	secrets  map[string]*corev1.Secret
	status   map[string]ObjectStoreStatus
}

func newFileSource(path string) (*fileSource, error) {
	f := &fileSource{path: path, status: map[string]ObjectStoreStatus{}}
	return f, f.load()
}

// load reads the file if it is newer than what is known.
func (f *fileSource) load() error {
	info, err := os.Stat(f.path)
	if err != nil {
		return fmt.Errorf("read the ObjectStore: %w", err)
	}
	if info.ModTime().Equal(f.modified) {
		return nil
	}
	file, err := os.Open(f.path)
	if err != nil {
		return fmt.Errorf("read the ObjectStore: %w", err)
	}
	defer file.Close()
	objects, secrets := map[string]*ObjectStore{}, map[string]*corev1.Secret{}
	decoder := kubeyaml.NewYAMLOrJSONDecoder(file, 4096)
	for document := 1; ; document++ {
		var raw json.RawMessage
		if err := decoder.Decode(&raw); err == io.EOF {
			break
		} else if err != nil {
			return fmt.Errorf("%s, document %d: %w", f.path, document, err)
		}
		var head metav1.PartialObjectMetadata
		if len(raw) == 0 || string(raw) == "null" {
			continue
		}
		if err := json.Unmarshal(raw, &head); err != nil {
			return fmt.Errorf("%s, document %d: %w", f.path, document, err)
		}
		var err error
		switch {
		case head.Kind == "ObjectStore" && strings.HasPrefix(head.APIVersion, objectStores.Group+"/"):
			o := &ObjectStore{}
			err = json.Unmarshal(raw, o)
			objects[o.Name] = o
		case head.Kind == "Secret" && head.APIVersion == "v1":
			s := &corev1.Secret{}
			err = json.Unmarshal(raw, s)
			for k, v := range s.StringData {
				if s.Data == nil {
					s.Data = map[string][]byte{}
				}
				s.Data[k] = []byte(v)
			}
			secrets[s.Name] = s
		}
		if err != nil {
			return fmt.Errorf("%s, %s %s: %w", f.path, head.Kind, head.Name, err)
		}
	}
	if len(objects) == 0 {
		return fmt.Errorf("%s holds no ObjectStore of %s", f.path, objectStores.GroupVersion())
	}
	f.objects, f.secrets, f.modified = objects, secrets, info.ModTime()
	return nil
}

func (f *fileSource) Store(ctx context.Context, ref StoreRef) (*Store, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.load(); err != nil {
		return nil, err
	}
	o, ok := f.objects[ref.ObjectStore]
	if !ok {
		return nil, fmt.Errorf("ObjectStore %s: %w in %s, which holds %s", ref.ObjectStore, errNoObject, f.path,
			strings.Join(slices.Sorted(maps.Keys(f.objects)), ", "))
	}
	c, err := ResolveStore(o, ref.ServerName, func(sel SecretKeySelector) ([]byte, error) {
		s, ok := f.secrets[sel.Name]
		if !ok {
			return nil, fmt.Errorf("Secret %s: %w in %s", sel.Name, errNoObject, f.path)
		}
		return secretKey(s, sel)
	})
	if err != nil {
		return nil, err
	}
	return f.stores.open(ctx, ref, c)
}

// names are the ObjectStores of the file.
func (f *fileSource) names() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.objects))
}

func (f *fileSource) Status(_ context.Context, objectStore string) (ObjectStoreStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status[objectStore], nil
}

func (f *fileSource) UpdateRecoveryWindow(_ context.Context, ref StoreRef, change func(*RecoveryWindow)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.status[ref.ObjectStore]
	windows := maps.Clone(st.ServerRecoveryWindow)
	if windows == nil {
		windows = map[string]RecoveryWindow{}
	}
	w := windows[ref.ServerName]
	change(&w)
	windows[ref.ServerName] = w
	f.status[ref.ObjectStore] = ObjectStoreStatus{ServerRecoveryWindow: windows}
	return nil
}

// secretKey takes one key out of a Secret.
func secretKey(s *corev1.Secret, sel SecretKeySelector) ([]byte, error) {
	v, ok := s.Data[sel.Key]
	if !ok {
		return nil, fmt.Errorf("missing key %s, inside secret %s: %w (it has %s)", sel.Key, sel.Name, errNoObject,
			strings.Join(slices.Sorted(maps.Keys(s.Data)), ", "))
	}
	return v, nil
}

// ---------------------------------------------------------------------------
// Configuration from Kubernetes
// ---------------------------------------------------------------------------

// certificatesDirectory is where the injector projects endpointCA, as STORE/barman-ca.crt.
// The kubelet reads that Secret for us, so no permission on it is needed.
const certificatesDirectory = "/barman-certificates"

// kubeSource reads ObjectStores and Secrets from the API server. The Role of the cluster
// admits the objects that it names and no others, so each is asked for, and then
// watched, by its name. Once an object has been seen, no request to the API server is
// made for it again, and archiving goes on while the API server is away.
type kubeSource struct {
	client    dynamic.Interface
	namespace string
	life      context.Context // of the watches
	stores    openStores

	mu      sync.Mutex
	watches map[watchKey]*objectWatch
}

type watchKey struct {
	resource schema.GroupVersionResource
	name     string
}

func newKubeSource(ctx context.Context, namespace string) (*kubeSource, error) {
	c, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("reach the Kubernetes API: %w; outside Kubernetes use --objectstore FILE", err)
	}
	return kubeSourceFor(ctx, c, namespace)
}

func kubeSourceFor(ctx context.Context, c *rest.Config, namespace string) (*kubeSource, error) {
	client, err := dynamic.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("make a Kubernetes client: %w", err)
	}
	return &kubeSource{client: client, namespace: namespace, life: ctx, watches: map[watchKey]*objectWatch{}}, nil
}

// objectWatch follows one object by its name.
type objectWatch struct {
	mu     sync.Mutex // held while the object is asked for the first time
	store  cache.Store
	synced func() bool
	first  *unstructured.Unstructured // what the first request returned
}

// firstRequestTimeout bounds the request that comes before a watch.
const firstRequestTimeout = 15 * time.Second

// get returns an object as it is now. Its errors wrap errNoObject, errForbidden or errTransient.
func (k *kubeSource) get(ctx context.Context, resource schema.GroupVersionResource, kind, name string) (*unstructured.Unstructured, error) {
	key := watchKey{resource, name}
	k.mu.Lock()
	w, ok := k.watches[key]
	if !ok {
		w = &objectWatch{}
		k.watches[key] = w
	}
	k.mu.Unlock()

	w.mu.Lock()
	defer w.mu.Unlock()
	if w.store != nil && w.synced() {
		if o, ok, _ := w.store.GetByKey(k.namespace + "/" + name); ok {
			return o.(*unstructured.Unstructured), nil
		}
		return nil, fmt.Errorf("%s %s/%s: %w: create it, or correct its name where it is referred to", kind, k.namespace, name, errNoObject)
	}
	// Ask directly first: a watch would hide a missing object or permission behind its retries.
	ctx, cancel := context.WithTimeout(ctx, firstRequestTimeout)
	defer cancel()
	o, err := k.client.Resource(resource).Namespace(k.namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case err == nil:
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("%s %s/%s: %w: create it, or correct its name where it is referred to", kind, k.namespace, name, errNoObject)
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("%s %s/%s: %w to the Pod's service account: the plugin's Deployment grants it in a Role; is it running, and does it know of this reference? (%w)",
			kind, k.namespace, name, errForbidden, err)
	case w.first != nil:
		return w.first, nil // the watch is not there yet and the API server is away: what we know
	default:
		return nil, fmt.Errorf("%s %s/%s: %w: ask the Kubernetes API: %w", kind, k.namespace, name, errTransient, err)
	}
	w.first = o
	if w.store == nil {
		k.follow(w, resource, name)
	}
	return o, nil
}

// follow starts the watch of one object, for the life of the source.
func (k *kubeSource) follow(w *objectWatch, resource schema.GroupVersionResource, name string) {
	byName := fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
	client := k.client.Resource(resource).Namespace(k.namespace)
	store, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.FieldSelector = byName
				return client.List(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = byName
				return client.Watch(ctx, o)
			},
		},
		ObjectType: &unstructured.Unstructured{},
		Handler:    cache.ResourceEventHandlerFuncs{},
		Transform: func(o any) (any, error) { // what only kubectl reads need not stay in memory
			if u, ok := o.(*unstructured.Unstructured); ok {
				u.SetManagedFields(nil)
			}
			return o, nil
		},
	})
	w.store, w.synced = store, controller.HasSynced
	go controller.RunWithContext(k.life)
}

func (k *kubeSource) objectStore(ctx context.Context, name string) (*ObjectStore, error) {
	u, err := k.get(ctx, objectStores, "ObjectStore", name)
	if err != nil {
		return nil, err
	}
	o := &ObjectStore{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, o); err != nil {
		return nil, fmt.Errorf("ObjectStore %s/%s: %w", k.namespace, name, err)
	}
	return o, nil
}

func (k *kubeSource) Store(ctx context.Context, ref StoreRef) (*Store, error) {
	o, err := k.objectStore(ctx, ref.ObjectStore)
	if err != nil {
		return nil, err
	}
	c, err := ResolveStore(o, ref.ServerName, func(sel SecretKeySelector) ([]byte, error) {
		if ca := o.Spec.Configuration.EndpointCA; ca != nil && *ca == sel {
			return os.ReadFile(filepath.Join(certificatesDirectory, o.Name, "barman-ca.crt"))
		}
		u, err := k.get(ctx, secrets, "Secret", sel.Name)
		if err != nil {
			return nil, err
		}
		s := &corev1.Secret{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, s); err != nil {
			return nil, fmt.Errorf("Secret %s/%s: %w", k.namespace, sel.Name, err)
		}
		return secretKey(s, sel)
	})
	if err != nil {
		return nil, err
	}
	return k.stores.open(k.life, ref, c)
}

func (k *kubeSource) Status(ctx context.Context, objectStore string) (ObjectStoreStatus, error) {
	o, err := k.objectStore(ctx, objectStore)
	if err != nil {
		return ObjectStoreStatus{}, err
	}
	return o.Status, nil
}

// UpdateRecoveryWindow writes the window of one server by a merge patch of its own key:
// clusters that share a store never conflict.
func (k *kubeSource) UpdateRecoveryWindow(ctx context.Context, ref StoreRef, change func(*RecoveryWindow)) error {
	st, err := k.Status(ctx, ref.ObjectStore)
	if err != nil {
		return err
	}
	w := st.ServerRecoveryWindow[ref.ServerName]
	change(&w)
	// A merge patch removes what is null, so every field is spelt out.
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"serverRecoveryWindow": map[string]any{ref.ServerName: map[string]any{
		"firstRecoverabilityPoint": w.FirstRecoverabilityPoint,
		"lastSuccessfulBackupTime": w.LastSuccessfulBackupTime,
		"lastFailedBackupTime":     w.LastFailedBackupTime,
	}}}})
	if err != nil {
		return err
	}
	if _, err = k.client.Resource(objectStores).Namespace(k.namespace).Patch(ctx, ref.ObjectStore, types.MergePatchType, patch,
		metav1.PatchOptions{}, "status"); err != nil {
		return fmt.Errorf("write the recovery window of %s into ObjectStore %s/%s: %w", ref.ServerName, k.namespace, ref.ObjectStore, err)
	}
	return nil
}
