// This file is what runs beside PostgreSQL, in every phase of a Pod: the server on the
// unix socket, the two sources of its configuration, and the metrics.

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cloudnative-pg/cnpg-i/pkg/backup"
	"github.com/cloudnative-pg/cnpg-i/pkg/identity"
	"github.com/cloudnative-pg/cnpg-i/pkg/metrics"
	restorejob "github.com/cloudnative-pg/cnpg-i/pkg/restore/job"
	"github.com/cloudnative-pg/cnpg-i/pkg/wal"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	kubeyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/pager"
	"k8s.io/klog/v2"
)

// pluginSocket is where the instance manager looks for plugins: the file name is the plugin's name.
const pluginSocket = "/plugins/" + PluginName

// stopGrace is how long requests in flight may go on after SIGTERM. Kubernetes ends a
// native sidecar after PostgreSQL, within what is left of the Pod's grace period.
const stopGrace = 25 * time.Second

// drainGrace is how long, after that, WAL files that PostgreSQL has left behind may take.
const drainGrace = time.Minute

// sidecarFlags are those of the subcommand `sidecar`, without those of logging.
func sidecarFlags() (fs *flag.FlagSet, socket, pgdata, spool, manifests *string) {
	fs = flag.NewFlagSet("sidecar", flag.ContinueOnError)
	socket = fs.String("socket", pluginSocket, "serve CNPG-I on this unix `socket`")
	pgdata = fs.String("pgdata", os.Getenv("PGDATA"), "the data `directory` of PostgreSQL (default: $PGDATA)")
	spool = fs.String("spool", os.Getenv("SPOOL_DIRECTORY"), "keep prefetched WAL in this `directory` (default: $SPOOL_DIRECTORY; none: no prefetch)")
	manifests = fs.String("objectstore", "", "read ObjectStores and their Secrets from this YAML `file` instead of from Kubernetes")
	// The original's, which additionalContainerArgs of old manifests may hold.
	for _, name := range []string{"pprof-server", "log-destination", "log-field-level", "log-field-timestamp"} {
		fs.String(name, "", "accepted, without effect")
	}
	return
}

// runSidecar is the subcommand `sidecar`. It returns nil when ctx ends.
func runSidecar(ctx context.Context, args []string) error {
	fs, socket, pgdata, spool, manifests := sidecarFlags()
	logFlags(fs)
	if err := parseFlags(fs, args); err != nil {
		return err
	}
	if *pgdata == "" {
		return usageError{errors.New("sidecar: where is the data directory? Set --pgdata or PGDATA")}
	}
	namespace := os.Getenv("NAMESPACE")
	if *manifests == "" && namespace == "" {
		return usageError{errors.New("sidecar: set NAMESPACE to the namespace of the Cluster, or use --objectstore FILE outside Kubernetes")}
	}
	// First of all: who connects from now on waits for the first answer instead of the socket.
	killed, listener, err := listen(*socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	var source configSource
	if *manifests != "" {
		source, err = newFileSource(*manifests)
	} else {
		source, err = newKubeSource(ctx, namespace)
	}
	if err != nil {
		return err
	}
	life, end := context.WithCancel(context.Background()) // longer than ctx: work in flight gets done
	defer end()
	walFiles, err := newWALService(life, source, os.Getenv("POD_NAME"), *pgdata, *spool)
	if err != nil {
		return err
	}
	defer func() { end(); walFiles.wait() }()
	walFiles.report.killed = killed
	if err := serveSidecar(ctx, listener, walFiles); err != nil {
		return err
	}
	drain, cancel := context.WithTimeout(life, drainGrace)
	defer cancel()
	walFiles.archiver.drain(drain)
	slog.Info("Stopped")
	return nil
}

// listen makes the socket. It says whether a predecessor was killed: what that one left
// behind would refuse connections for ever.
func listen(socket string) (killed bool, listener net.Listener, err error) {
	err = os.Remove(socket)
	if killed = err == nil; !killed && !errors.Is(err, fs.ErrNotExist) {
		return false, nil, fmt.Errorf("remove the stale socket: %w", err)
	}
	if listener, err = net.Listen("unix", socket); err != nil {
		return killed, nil, fmt.Errorf("listen on the plugin socket: %w", err)
	}
	return killed, listener, nil
}

// serveSidecar answers CNPG-I requests on a unix socket until ctx ends. Then backups are
// cancelled (they clean up and record that they failed), and WAL files in flight may finish.
func serveSidecar(ctx context.Context, listener net.Listener, walFiles *walService) error {
	source, pgdata, report := walFiles.source, walFiles.pgdata, walFiles.report
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(logRequests, recoverPanics, cancelBackups(ctx)))
	identity.RegisterIdentityServer(server, announce(
		identity.PluginCapability_Service_TYPE_WAL_SERVICE,
		identity.PluginCapability_Service_TYPE_BACKUP_SERVICE,
		identity.PluginCapability_Service_TYPE_RESTORE_JOB,
		identity.PluginCapability_Service_TYPE_METRICS))
	wal.RegisterWALServer(server, walFiles)
	backup.RegisterBackupServer(server, &backupService{source: source, instance: walFiles.instance, pgdata: pgdata, report: report})
	restorejob.RegisterRestoreJobHooksServer(server, &restoreJobService{source: source, pgdata: pgdata, report: report})
	metrics.RegisterMetricsServer(server, &metricsService{source: source, report: report})
	grpc_health_v1.RegisterHealthServer(server, health.NewServer()) // SERVING from the start

	ctx, cancel := context.WithCancel(ctx)
	var housekeeping sync.WaitGroup
	defer housekeeping.Wait()
	defer cancel()
	housekeeping.Go(func() { report.housekeep(ctx, walFiles.instance) })
	slog.Info("Serving", "socket", listener.Addr().String(), "pgdata", pgdata, "version", version)
	if err := serveGRPC(ctx, server, listener, stopGrace); err != nil {
		return fmt.Errorf("serve %s: %w", listener.Addr(), err)
	}
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
// Saying how things are: conditions of the ObjectStore, Events on the Cluster
// ---------------------------------------------------------------------------

// The conditions in status.servers[SERVER], each with one writer at a time.
const (
	conditionArchiving = "Archiving"           // the Pod that archives
	conditionBackup    = "LastBackupSucceeded" // the Pod that takes the backup
	conditionPages     = "PagesIntact"         // the same
	conditionRetention = "RetentionApplied"    // the primary
	conditionWAL       = "WALComplete"         // the primary
	conditionRestored  = "Restored"            // the restore Job, under the name of the new Cluster
)

const (
	housekeepingTick = 10 * time.Second
	// progressLife is how old lastArchivedWAL and its like may grow in the status: every
	// write goes to all sidecars that watch the ObjectStore.
	progressLife = 5 * time.Minute
	// maxConditionMessage is well below what the schema admits, in bytes: a list of all backups may be long.
	maxConditionMessage = 8 << 10
	// passingPatience is how long a failure that may pass by itself is not told.
	passingPatience = time.Minute
)

// report collects what the services of one sidecar have to say. Who finds something only
// notes it; the housekeeper tells it, so that no segment waits for the API server.
type report struct {
	source configSource
	pgdata string
	wake   chan struct{}

	telling  *semaphore.Weighted // one tells at a time, or both would tell the same
	mu       sync.Mutex
	findings map[findingKey]*finding
	archive  StoreRef // where the last WAL file went
	lastWAL  string
	worked   bool // something was archived, or failed to be, since the progress was written
	done     archivingDone
	written  time.Time // when the progress was

	killed bool // the predecessor in this Pod was, and nobody has heard of it yet
}

// archivingDone is what this sidecar has done since it began.
type archivingDone struct {
	files, failures, bytes int64
	seconds                float64
	lastTime               *metav1.Time // of the last file that was archived
}

type findingKey struct {
	at   StoreRef
	kind string // of condition
}

// finding is one condition as this sidecar sees it.
type finding struct {
	err    error // nil: all is well
	reason string
	since  time.Time
	told   string // what the last Event said
	seen   bool   // in the status: what is found there from then on is another Pod's word, which is newer
}

func newReport(source configSource, pgdata string) *report {
	return &report{source: source, pgdata: pgdata, wake: make(chan struct{}, 1), telling: semaphore.NewWeighted(1), findings: map[findingKey]*finding{}}
}

// found notes that something works (nil) or fails. otherwise is the reason of an error of no known kind.
func (r *report) found(at StoreRef, kind, otherwise string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.findings[findingKey{at, kind}]
	if f == nil {
		f = &finding{}
		r.findings[findingKey{at, kind}] = f
	}
	if f.seen { // what counts as told is then what the status says now
		f.seen, f.told = false, ""
	}
	reason := failureReason(err, otherwise)
	if kind == conditionRetention && err != nil {
		reason = otherwise // the original's, which alerts look for
	}
	if reason == f.reason {
		f.err = err
		return
	}
	if err == nil || f.err == nil {
		f.since = time.Now()
	}
	f.err, f.reason = err, reason
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// archived notes what came of the WAL file at path.
func (r *report) archived(cluster *Cluster, at StoreRef, path string, took time.Duration, err error) {
	own := StoreRef{at.ObjectStore, cluster.Name}
	if errors.Is(err, errArchiveNotEmpty) || errors.Is(err, errDifferent) {
		at = own // that server name is another cluster's, which writes its status
	}
	r.found(at, conditionArchiving, "ArchivingFailed", err)
	info, statErr := os.Stat(path)
	r.mu.Lock()
	r.worked = true
	r.done.seconds += took.Seconds()
	if err != nil {
		r.done.failures++
		r.mu.Unlock()
		return
	}
	r.done.files++
	if statErr == nil {
		r.done.bytes += info.Size()
	}
	r.archive, r.lastWAL, r.done.lastTime = at, filepath.Base(path), new(metav1.Now())
	_, conflict := r.findings[findingKey{own, conditionArchiving}]
	r.mu.Unlock()
	if conflict {
		r.found(own, conditionArchiving, "", nil)
	}
}

// failureReason puts an error into one word.
func failureReason(err error, otherwise string) string {
	for _, c := range []struct {
		kind   error
		reason string
	}{
		{errNoObject, "ObjectNotFound"}, {errForbidden, "PermissionMissing"}, {errNoBucket, "BucketNotFound"}, {errDenied, "AccessDenied"},
		{errUntrusted, "CertificateNotTrusted"}, {errArchiveNotEmpty, "ArchiveNotEmpty"}, {errDifferent, "ArchiveConflict"},
		{errTransient, "StoreUnreachable"},
	} {
		if errors.Is(err, c.kind) {
			return c.reason
		}
	}
	if err == nil {
		return "Succeeded"
	}
	return otherwise
}

// tell brings conditions and Events up to date with the findings. An Event tells a change
// of a condition, not one of its message.
func (r *report) tell(ctx context.Context) error {
	if err := r.telling.Acquire(ctx, 1); err != nil {
		return err // the API server does not answer the one before
	}
	defer r.telling.Release(1)
	var errs []error
	news := map[StoreRef][]metav1.Condition{}
	r.mu.Lock()
	killed := r.killed
	r.killed = false
	for key, f := range r.findings {
		c := metav1.Condition{Type: key.kind, Status: metav1.ConditionTrue, Reason: f.reason}
		if f.err != nil {
			c.Status, c.Message = metav1.ConditionFalse, clip(f.err.Error(), maxConditionMessage)
		}
		// A WAL file is tried again and again, and a Role may be a moment behind its Cluster.
		passing := key.kind == conditionArchiving && (errors.Is(f.err, errTransient) || errors.Is(f.err, errForbidden))
		if !f.seen && (!passing || time.Since(f.since) >= passingPatience) {
			news[key.at] = append(news[key.at], c)
		}
	}
	progress := r.lastWAL != "" && r.worked && time.Since(r.written) >= progressLife
	if progress && news[r.archive] == nil {
		news[r.archive] = []metav1.Condition{}
	}
	r.mu.Unlock()
	if killed {
		errs = append(errs, r.tellKilled(ctx))
	}
	for at, conditions := range news {
		st, err := r.source.Status(ctx, at.ObjectStore)
		known := st.Servers[at.ServerName].Conditions
		for _, c := range conditions {
			errs = append(errs, r.event(ctx, at, c, meta.FindStatusCondition(known, c.Type)))
		}
		if err == nil {
			err = r.source.UpdateStatus(ctx, at, func(_ *RecoveryWindow, s *ServerStatus) {
				changed := progress
				for _, c := range conditions {
					if old := meta.FindStatusCondition(s.Conditions, c.Type); old != nil && old.Status == c.Status && old.Reason == c.Reason &&
						(old.Message == c.Message || s.LastFailure != nil && time.Since(s.LastFailure.Time.Time) < progressLife) {
						continue // PostgreSQL tries again each second, and the next message may differ in a request id only
					}
					changed = true
					meta.SetStatusCondition(&s.Conditions, c)
					if c.Status == metav1.ConditionFalse {
						s.LastFailure = &LastFailure{metav1.Now(), c.Reason, c.Message}
					}
				}
				if changed {
					r.fillProgress(at, s)
				}
			})
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// tellKilled says that the sidecar did not end by itself: its socket was still there. A
// container at its memory limit ends in this way, with nothing in its log.
func (r *report) tellKilled(ctx context.Context) error {
	limit := ""
	if b, err := os.ReadFile("/sys/fs/cgroup/memory.max"); err == nil && !strings.HasPrefix(string(b), "max") {
		limit = fmt.Sprintf(", which is %s bytes (instanceSidecarConfiguration.resources of the ObjectStore)", strings.TrimSpace(string(b)))
	}
	err := r.source.Tell(ctx, corev1.EventTypeWarning, "SidecarKilled", fmt.Sprintf("the sidecar in Pod %s was killed and has started again: "+
		"if kubectl describe pod says OOMKilled, raise its memory limit%s", os.Getenv("POD_NAME"), limit))
	if err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.killed = true
	}
	return err
}

// event tells a transition, once. known is the condition that the status has: what a
// predecessor has told is no news, nor is it one that something new works.
func (r *report) event(ctx context.Context, at StoreRef, c metav1.Condition, known *metav1.Condition) error {
	state := string(c.Status) + " " + c.Reason
	r.mu.Lock()
	f := r.findings[findingKey{at, c.Type}]
	told := f.told
	r.mu.Unlock()
	if told == "" && known != nil {
		told = string(known.Status) + " " + known.Reason
	}
	if told != state && (told != "" || c.Status == metav1.ConditionFalse) {
		eventType, reason, message := corev1.EventTypeWarning, c.Reason, c.Message
		if c.Status == metav1.ConditionTrue {
			eventType, reason, message = corev1.EventTypeNormal, c.Type, fmt.Sprintf("%s of server %s in ObjectStore %s is well again", c.Type, at.ServerName, at.ObjectStore)
		}
		if err := r.source.Tell(ctx, eventType, reason, message); err != nil {
			return err
		}
	}
	r.mu.Lock()
	f.told = state
	f.seen = f.reason == c.Reason && known != nil && string(known.Status)+" "+known.Reason == state
	r.mu.Unlock()
	return nil
}

// fillProgress sets what changes with each segment.
func (r *report) fillProgress(at StoreRef, s *ServerStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if at != r.archive || !r.worked {
		return
	}
	r.written, r.worked = time.Now(), false
	s.LastArchivedWAL, s.LastArchivedTime = r.lastWAL, r.done.lastTime
	s.OldestWaitingWAL, s.OldestWaitingSince, _ = oldestWaiting(r.pgdata)
}

// oldestWaiting is the first WAL file that PostgreSQL has marked as ready to be archived, since when, and how many there are.
func oldestWaiting(pgdata string) (name string, since *metav1.Time, n int) {
	wals := filepath.Join(pgdata, "pg_wal")
	names, _ := waitingWAL(wals)
	for _, name := range names {
		if info, err := os.Stat(filepath.Join(wals, "archive_status", name+".ready")); err == nil {
			return name, new(metav1.NewTime(info.ModTime())), len(names)
		}
	}
	return "", nil, 0
}

// ---------------------------------------------------------------------------
// Maintenance
// ---------------------------------------------------------------------------

// defaultMaintenance is the interval where the ObjectStore has none, and after an error.
const defaultMaintenance = 5 * time.Minute

// housekeep tells what is found, and on the primary looks after the archive every
// retentionPolicyIntervalSeconds, until ctx ends.
func (r *report) housekeep(ctx context.Context, instance string) {
	var both sync.WaitGroup
	both.Go(func() { again(ctx, r.wake, r.tell) })
	if kube, ok := r.source.(*kubeSource); ok { // elsewhere nobody says who is the primary
		var next time.Time
		both.Go(func() {
			again(ctx, nil, func(ctx context.Context) error {
				if time.Now().Before(next) {
					return nil
				}
				pause, err := r.maintain(ctx, kube, instance)
				next = time.Now().Add(pause)
				return err
			})
		})
	}
	both.Wait()
}

// again calls f at once, at every tick and when it is woken, but once between two ticks:
// what fails and works by turns would write without end. Of an error that stays it tells once.
func again(ctx context.Context, wake <-chan struct{}, f func(context.Context) error) {
	tick := time.NewTicker(housekeepingTick)
	defer tick.Stop()
	for said, woken := "", wake; ctx.Err() == nil; {
		err := f(ctx)
		switch {
		case err == nil:
			said = ""
		case err.Error() != said && ctx.Err() == nil:
			said = err.Error()
			slog.Warn("Could not do the housekeeping of the archive; it is tried again", "error", err)
		}
		select {
		case <-tick.C:
			woken = wake
		case <-woken:
			woken = nil
		case <-ctx.Done():
		}
	}
}

// maintain looks after the archive of the cluster once, if this is its primary, and says
// when to do so again; 0 means that it is not for us now.
func (r *report) maintain(ctx context.Context, kube *kubeSource, instance string) (time.Duration, error) {
	cluster, err := kube.ownCluster(ctx)
	if err != nil {
		return 0, err
	}
	ref := cluster.ArchiveStore()
	if ref == nil || cluster.Status.CurrentPrimary != instance || fileExists(filepath.Join(r.pgdata, emptyArchiveMarker)) {
		return 0, nil // with the marker, what lies there may still be another cluster's
	}
	pause := defaultMaintenance
	o, err := kube.objectStore(ctx, ref.ObjectStore)
	if err == nil {
		err = r.lookAfter(ctx, kube, cluster, *ref, o.Spec.RetentionPolicy)
		if seconds := o.Spec.InstanceSidecarConfiguration.RetentionPolicyIntervalSeconds; err == nil && seconds > 0 {
			pause = time.Duration(seconds) * time.Second
		}
	}
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if err != nil {
		err = fmt.Errorf("retention of server %s in ObjectStore %s: %w", ref.ServerName, ref.ObjectStore, err)
	}
	r.found(*ref, conditionRetention, "RetentionPolicyFailed", err)
	return pause, err
}

func (r *report) lookAfter(ctx context.Context, kube *kubeSource, cluster *Cluster, ref StoreRef, policy string) error {
	s, err := kube.Store(ctx, ref)
	if err != nil {
		return err
	}
	backups, err := kube.backups(ctx, cluster)
	if err != nil {
		return err
	}
	retention, err := s.enforceRetention(ctx, retentionOptions{Policy: policy, Now: time.Now(),
		BackupRunning: slices.ContainsFunc(backups, func(b *backupObject) bool { return b.Status.Phase != "completed" && b.Status.Phase != "failed" })})
	if n := len(retention.Problems); err == nil && n > 0 {
		err = fmt.Errorf("%d problems, the first is: %s", n, retention.Problems[0])
	}
	catalog := retention.Catalog
	if catalog == nil {
		return err
	}
	return errors.Join(err,
		kube.dropBackups(ctx, cluster, s, catalog, backups),
		r.source.UpdateStatus(ctx, ref, func(w *RecoveryWindow, _ *ServerStatus) {
			w.FirstRecoverabilityPoint, w.LastSuccessfulBackupTime = catalog.recoverability()
		}),
		r.lookForGaps(ctx, s, ref, catalog))
}

// lookForGaps tells of WAL that backups need and that is not there. What PostgreSQL has
// still to archive, which may be overtaken by what comes after it, is no gap.
func (r *report) lookForGaps(ctx context.Context, s *Store, ref StoreRef, catalog *Catalog) error {
	waiting, err := waitingWAL(filepath.Join(r.pgdata, "pg_wal"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	timelines, err := walCoverage(ctx, s, catalog, waiting...)
	if err != nil {
		return fmt.Errorf("look for gaps in the WAL: %w", err)
	}
	var gaps []string
	missing := 0
	for _, t := range timelines {
		gaps, missing = append(gaps, t.Gaps...), missing+t.Missing
	}
	gaps = gaps[:min(len(gaps), maxGaps)]
	var gap error
	if missing > 0 {
		gap = fmt.Errorf("%d WAL segments are missing in %s: %s: a recovery from a backup before a gap ends there; take a base backup now",
			missing, s.URL(s.key("wals/")), strings.Join(gaps, ", "))
	}
	r.found(ref, conditionWAL, "WALGap", gap)
	return r.source.UpdateStatus(ctx, ref, func(_ *RecoveryWindow, st *ServerStatus) { st.WALGaps, st.MissingWAL = gaps, missing })
}

// backupObject is what we read of a Backup (postgresql.cnpg.io/v1).
type backupObject struct {
	metav1.ObjectMeta `json:"metadata"`

	Spec struct {
		Cluster corev1.LocalObjectReference `json:"cluster"`
	} `json:"spec"`
	Status struct {
		Phase          string            `json:"phase"`
		BackupID       string            `json:"backupId"`
		BeginWAL       string            `json:"beginWal"`
		PluginMetadata map[string]string `json:"pluginMetadata"`
	} `json:"status"`
}

// backups lists the Backup objects of a cluster.
func (k *kubeSource) backups(ctx context.Context, cluster *Cluster) (found []*backupObject, err error) {
	client := k.client.Resource(k.group.WithResource("backups")).Namespace(k.namespace)
	pages := pager.New(func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
		return client.List(ctx, options)
	})
	err = pages.EachListItem(ctx, metav1.ListOptions{}, func(object runtime.Object) error {
		b := &backupObject{}
		if err := fromUnstructured(object, b); err != nil {
			return err
		}
		if b.Spec.Cluster.Name == cluster.Name {
			found = append(found, b)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the Backup objects of Cluster %s/%s: %w", k.namespace, cluster.Name, err)
	}
	return found, nil
}

// dropBackups deletes the Backup objects whose backup has left the catalog, but only those
// that are known to have been taken to this very place: a Cluster may have been switched
// to another store, and the backups in the old one are still there. The original plugin
// does not note the place, so its Backups get it noted while their backup is seen here. One
// without backup.info has left, too: whoever deleted it was killed in the middle, and what is
// left goes when it counts as abandoned.
func (k *kubeSource) dropBackups(ctx context.Context, cluster *Cluster, s *Store, catalog *Catalog, backups []*backupObject) error {
	there := map[string]string{} // backup id to begin WAL
	for _, b := range catalog.all() {
		if !slices.Contains(catalog.Incomplete, b.ID) || catalog.objects[b.ID].info {
			there[b.ID] = b.BeginWAL
		}
	}
	client := k.client.Resource(k.group.WithResource("backups")).Namespace(k.namespace)
	var errs []error
	for _, b := range backups {
		origin := b.Status.PluginMetadata
		if b.Status.Phase != "completed" || b.Status.BackupID == "" || origin["pluginName"] != PluginName || origin["clusterUID"] != string(cluster.UID) {
			continue
		}
		wal, present := there[b.Status.BackupID]
		switch {
		case !present && origin[placeMetadata] == s.place():
			err := client.Delete(ctx, b.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &b.UID}})
			if err == nil {
				slog.Info("Deleted a Backup object, since its backup is not in the catalog any more", "backup", b.Name, "backupID", b.Status.BackupID, "place", s.place())
			} else if !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) { // else gone, or another one by now
				errs = append(errs, fmt.Errorf("delete Backup %s/%s, whose backup %s is gone: %w", k.namespace, b.Name, b.Status.BackupID, err))
			}
		case present && origin[placeMetadata] == "" && wal != "" && wal == b.Status.BeginWAL:
			patch, _ := json.Marshal(map[string]any{"status": map[string]any{"pluginMetadata": map[string]string{placeMetadata: s.place()}}})
			if _, err := client.Patch(ctx, b.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil && !apierrors.IsNotFound(err) {
				errs = append(errs, fmt.Errorf("note in Backup %s/%s where its backup is: %w", k.namespace, b.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// ---------------------------------------------------------------------------
// Metrics
// ---------------------------------------------------------------------------

// metricsService gives the instance manager's exporter the metrics of the original and
// some more. What is about the archive comes from the status of the ObjectStore, so every
// instance has it; what is about the work of a sidecar is its own, since it began. No
// request is made for it.
type metricsService struct {
	metrics.UnimplementedMetricsServer
	source configSource
	report *report
}

const metricPrefix = "barman_cloud_cloudnative_pg_io_"

const counter, gauge = metrics.MetricType_TYPE_COUNTER, metrics.MetricType_TYPE_GAUGE

// metric is one metric, in Prometheus' base units, with what was measured: a value, which
// is 0 when there is no such thing, or where it has a label one for each value of that.
type metric struct {
	name, help string
	kind       metrics.MetricType_Type
	value      float64
	label      string
	values     map[string]float64
}

// statusMetrics come from the status of the ObjectStore. The first three are the original's.
func statusMetrics(window RecoveryWindow, server ServerStatus) []metric {
	last := cmp.Or(server.LastBackup, &LastBackup{})
	failed := map[string]float64{}
	for _, c := range server.Conditions {
		failed[c.Type] = 0
		if c.Status == metav1.ConditionFalse {
			failed[c.Type] = 1
		}
	}
	return []metric{
		{name: "first_recoverability_point", kind: gauge, value: unixTime(window.FirstRecoverabilityPoint),
			help: "The first point of recoverability for the cluster as a unix timestamp"},
		{name: "last_available_backup_timestamp", kind: gauge, value: unixTime(window.LastSuccessfulBackupTime),
			help: "The last available backup as a unix timestamp"},
		{name: "last_failed_backup_timestamp", kind: gauge, value: unixTime(window.LastFailedBackupTime),
			help: "The last failed backup as a unix timestamp"},
		{name: "last_backup_duration_seconds", kind: gauge, value: float64(last.Seconds), help: "How long the last backup took"},
		{name: "last_backup_bytes", kind: gauge, value: float64(last.Bytes), help: "Bytes that the last backup read"},
		{name: "last_backup_stored_bytes", kind: gauge, value: float64(last.StoredBytes), help: "Bytes that the last backup takes in the object store"},
		{name: "bad_pages", kind: gauge, value: float64(last.BadPages), help: "Pages with a wrong checksum in the last backup"},
		{name: "missing_wal_segments", kind: gauge, value: float64(server.MissingWAL), help: "WAL segments that backups need and the archive does not have"},
		{name: "condition_failed", kind: gauge, label: "type", values: failed, help: "1 where a condition of the server in the ObjectStore is false"},
	}
}

// instanceMetrics are about the work of one sidecar.
func instanceMetrics(done archivingDone, pgdata string, certificateEnd int64) []metric {
	_, since, waiting := oldestWaiting(pgdata)
	var age time.Duration
	if since != nil {
		age = time.Since(since.Time)
	}
	return []metric{
		{name: "archived_wal_files_total", kind: counter, value: float64(done.files), help: "WAL files that this instance archived"},
		{name: "archived_wal_bytes_total", kind: counter, value: float64(done.bytes), help: "Bytes of the WAL files that this instance archived, before compression"},
		{name: "archive_failures_total", kind: counter, value: float64(done.failures), help: "Attempts of this instance to archive a WAL file that failed"},
		{name: "archive_seconds_total", kind: counter, value: done.seconds, help: "Time that this instance spent on archiving WAL files"},
		{name: "last_archived_wal_timestamp_seconds", kind: gauge, value: unixTime(done.lastTime), help: "When this instance last archived a WAL file"},
		{name: "waiting_wal_files", kind: gauge, value: float64(waiting), help: "WAL files of this instance that wait to be archived"},
		{name: "oldest_waiting_wal_age_seconds", kind: gauge, value: age.Seconds(), help: "How long the oldest of them has waited"},
		{name: "s3_certificate_expiry_timestamp_seconds", kind: gauge, value: float64(certificateEnd), help: "When the TLS certificate of the object store ends"},
		{name: "s3_errors_total", kind: counter, label: "code", values: s3Errors.all(), help: "Failed requests of this instance to the object store"},
	}
}

func unixTime(t *metav1.Time) float64 {
	if t == nil {
		return 0
	}
	return float64(t.Unix())
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
	for _, m := range append(statusMetrics(RecoveryWindow{}, ServerStatus{}), instanceMetrics(archivingDone{}, "", 0)...) {
		defined := &metrics.Metric{FqName: metricPrefix + m.name, Help: m.help, ValueType: &metrics.MetricType{Type: m.kind}}
		if m.label != "" {
			defined.VariableLabels = []string{m.label}
		}
		result.Metrics = append(result.Metrics, defined)
	}
	return result, nil
}

// Collect measures. Without the ObjectStore it still tells what this sidecar knows itself.
func (m *metricsService) Collect(ctx context.Context, r *metrics.CollectMetricsRequest) (*metrics.CollectMetricsResult, error) {
	cluster, err := DecodeCluster(r.ClusterDefinition)
	if err != nil {
		return nil, grpcError(err)
	}
	var certificateEnd int64
	var st ObjectStoreStatus
	var statusErr error
	ref := cmp.Or(cluster.ArchiveStore(), &StoreRef{})
	if ref.ObjectStore != "" {
		if s, err := m.source.Store(ctx, *ref); err == nil {
			certificateEnd = s.certificateEnd.Load()
		}
		if st, statusErr = m.source.Status(ctx, ref.ObjectStore); statusErr != nil {
			slog.Debug("Metrics without the status of the ObjectStore", "error", statusErr)
		}
	}
	m.report.mu.Lock()
	done := m.report.done
	m.report.mu.Unlock()
	measured := instanceMetrics(done, m.report.pgdata, certificateEnd)
	if statusErr == nil {
		measured = append(measured, statusMetrics(st.ServerRecoveryWindow[ref.ServerName], st.Servers[ref.ServerName])...)
	}
	result := &metrics.CollectMetricsResult{}
	add := func(name string, value float64, labels ...string) {
		result.Metrics = append(result.Metrics, &metrics.CollectMetric{FqName: metricPrefix + name, Value: value, VariableLabels: labels})
	}
	for _, metric := range measured {
		if metric.label == "" {
			add(metric.name, metric.value)
		}
		for label, value := range metric.values {
			add(metric.name, value, label)
		}
	}
	return result, nil
}

// ---------------------------------------------------------------------------
// Retention
// ---------------------------------------------------------------------------

// debrisAge is how long nothing must have been written to a backup without backup.info
// before it counts as abandoned. It also covers the time zones of Barman's backup ids.
const debrisAge = 24 * time.Hour

// maxClockSkew is how far our clock may be from the store's when we delete by the age of things.
const maxClockSkew = time.Hour

// maxWindow in days: more is the same as for ever, and time.Duration ends there.
const maxWindow = 100_000

var retentionPolicyForm = regexp.MustCompile(`^([1-9][0-9]*)([dwm])$`) // the pattern of crd.yaml

// parseRetentionPolicy reads a recovery window. A month has 31 days, as with Barman.
func parseRetentionPolicy(policy string) (time.Duration, error) {
	m := retentionPolicyForm.FindStringSubmatch(policy)
	if m == nil {
		return 0, fmt.Errorf("retentionPolicy %q is not a number and d, w or m, such as 30d: nothing is deleted", policy)
	}
	unit := map[string]int{"d": 1, "w": 7, "m": 31}[m[2]]
	days := maxWindow
	if n, err := strconv.Atoi(m[1]); err == nil && n < maxWindow/unit {
		days = n * unit
	}
	return time.Duration(days) * 24 * time.Hour, nil
}

// retentionFacts are what the decision depends on.
type retentionFacts struct {
	catalog   *Catalog // with the annotations
	active    []string // ids without backup.info to which something was written within debrisAge
	histories timelineHistories
	since     time.Time // the beginning of the recovery window; zero keeps everything
}

// retentionPlan says what goes, and of each backup why.
type retentionPlan struct {
	retentionFacts
	verdicts []verdict // by id, newest first
	// boundary is the first segment of the newest backup from which the whole window can be
	// recovered: WAL after it is not looked at. "" when there is none, and then no WAL goes.
	boundary  string
	timelines []uint32 // that are known; others are not looked at either
	needs     []walNeed
	ranges    [][2]string // first and last segment of each backup that is kept standalone
}

// verdict is what becomes of one backup.
type verdict struct {
	ID     string `json:"id"`
	Status string `json:"status"` // as list has it
	Delete bool   `json:"delete"`
	Why    string `json:"why"`
}

// walNeed is where recovery from a backup begins: that segment, and whatever follows on its
// timeline and on those that lead on from it, stays.
type walNeed struct {
	timeline uint32
	begin    string
	size     int64
	anywhere bool // the true beginning is not known, but it is not before this one: all other timelines stay
}

// planRetention makes the decision. Backups are judged as by Barman's recovery window, from
// the newest id to the oldest: all stay up to and including the first one that ended before
// the window. So the newest good backup always stays. Unlike with Barman, that first one
// must lead to the newest good backup, or the window could not be recovered from it; failed
// backups go when they are older than the window; and WAL goes by what the backups that
// stay need, not by which one was deleted.
func planRetention(f retentionFacts) *retentionPlan {
	p := &retentionPlan{retentionFacts: f}
	incremental := ""
	for _, b := range f.catalog.Backups {
		if b.barmanOnly["parent_backup_id"]+b.barmanOnly["children_backup_ids"] != "" {
			incremental = b.ID
		}
	}
	var newest *BackupInfo // of the good ones
	good := ""             // the id of the boundary
	for _, b := range slices.Backward(f.catalog.Backups) {
		v := verdict{ID: b.ID, Status: cmp.Or(b.Status, "of unknown status")}
		unclear := b.unclear()
		switch {
		case incremental != "":
			v.Why = fmt.Sprintf("%s is part of a chain of incremental backups, which only Barman can prune: all backups and all WAL stay", incremental)
		case b.Status == statusFailed && b.Keep == "":
			id, _ := time.Parse(backupIDLayout, b.ID)
			began := slices.MaxFunc([]time.Time{b.BeginTime, id}, time.Time.Compare)
			v.Delete, v.Why = began.Before(f.since), "it failed, and the window does not reach back to it"
			if !v.Delete {
				v.Why = "it failed within the window"
			}
		case unclear != "":
			v.Why = unclear
			p.needUnclear(b)
		case good == "":
			newest = cmp.Or(newest, b)
			end, _ := parseLSN(b.EndLSN)
			off := ""
			same := b.SystemID == newest.SystemID // otherwise of a former cluster of that name, whose positions say nothing
			if same {
				off = f.histories.offLine(timelineOf(newest.EndWAL, newest.Timeline), timelineOf(b.EndWAL, b.Timeline), end)
			}
			p.need(b)
			switch {
			case !b.EndTime.Before(f.since):
				v.Why = "it ended within the window"
			case off != "":
				v.Why = fmt.Sprintf("it ended before the window, but does not lead to %s: %s", newest.ID, off)
			default:
				good = b.ID
				if same {
					p.boundary = b.BeginWAL
				}
				v.Why = "the newest that ended before the window: recovery to the beginning of the window starts from it"
			}
		case b.Keep == "standalone":
			p.ranges = append(p.ranges, [2]string{b.BeginWAL, b.EndWAL})
			v.Why = "annotated keep: standalone, with the WAL that it needs itself"
		case b.Keep != "":
			p.need(b)
			v.Why = "annotated keep: full, with all WAL that follows"
		default:
			v.Delete, v.Why = true, fmt.Sprintf("the window can be recovered from %s", good)
		}
		p.verdicts = append(p.verdicts, v)
	}
	for id, err := range f.catalog.Unreadable {
		p.verdicts = append(p.verdicts, verdict{ID: id, Status: "UNREADABLE", Why: err.Error()})
		p.needUnclear(&BackupInfo{ID: id})
	}
	for _, id := range f.active {
		p.verdicts = append(p.verdicts, verdict{ID: id, Status: "INCOMPLETE", Why: "it has no backup.info: in progress, or not yet taken for abandoned"})
		p.needUnclear(&BackupInfo{ID: id})
	}
	slices.SortFunc(p.verdicts, func(a, b verdict) int { return strings.Compare(b.ID, a.ID) })
	known := map[uint32]bool{1: true}
	for _, b := range f.catalog.Backups {
		known[timelineOf(b.BeginWAL, b.Timeline)] = true
	}
	for t := range f.histories {
		known[t] = true
	}
	p.timelines = slices.Sorted(maps.Keys(known))
	return p
}

// unclear says why a backup can neither be taken for good nor for failed; "" when it can.
func (b *BackupInfo) unclear() string {
	_, err := parseLSN(b.EndLSN)
	switch {
	case b.barmanOnly["snapshots_info"] != "":
		return "it has disk snapshots, which only Barman can delete"
	case b.Status != statusDone:
		return fmt.Sprintf("its status is %q", b.Status)
	case !b.Done() || err != nil || !b.beginKnown():
		return "its backup.info does not say when and where in the WAL it began and ended"
	}
	return ""
}

// beginKnown says whether backup.info has the first segment that the backup needs.
func (b *BackupInfo) beginKnown() bool {
	w, err := parseWALName(b.BeginWAL)
	return err == nil && w.Kind == walSegment && validSegmentSize(b.WALSegmentSize)
}

// need keeps the WAL from the beginning of a backup.
func (p *retentionPlan) need(b *BackupInfo) {
	p.needs = append(p.needs, walNeed{timeline: timelineOf(b.BeginWAL, b.Timeline), begin: b.BeginWAL, size: b.WALSegmentSize})
}

// needUnclear does so for a backup whose beginning may not be known. It began after the
// backups before it, so the WAL from the newest of those stays; without one, all WAL.
func (p *retentionPlan) needUnclear(b *BackupInfo) {
	if b.beginKnown() {
		p.need(b)
		return
	}
	id, _ := time.Parse(backupIDLayout, b.ID)
	need := walNeed{anywhere: true}
	for _, before := range p.catalog.Backups {
		if before.beginKnown() && !before.BeginTime.IsZero() && before.BeginTime.Before(id.Add(-debrisAge)) {
			need.timeline, need.begin, need.size = timelineOf(before.BeginWAL, 0), before.BeginWAL, before.WALSegmentSize
		}
	}
	p.needs = append(p.needs, need)
}

// firstNeeded is the first segment of a timeline that stays, by name: those before it go
// unless a range holds them. It need not exist; "" when all of the timeline stays.
func (p *retentionPlan) firstNeeded(timeline uint32) string {
	boundary := timelineOf(p.boundary, 0)
	if timeline > boundary {
		return ""
	}
	first := fmt.Sprintf("%08XG", timeline) // after every segment of it
	if timeline == boundary {
		first = p.boundary
	}
	for _, n := range p.needs {
		switch {
		case n.timeline == timeline:
			first = min(first, n.begin)
		case n.anywhere || p.leads(n, timeline):
			return ""
		}
	}
	return first
}

// leads says whether recovery may go on from n to a timeline. It does when that is not known.
func (p *retentionPlan) leads(n walNeed, timeline uint32) bool {
	history, known := p.histories[timeline]
	if timeline < n.timeline || known && !slices.ContainsFunc(history, func(s timelineSwitch) bool { return s.Timeline == n.timeline }) {
		return false
	}
	return !slices.ContainsFunc(history, func(s timelineSwitch) bool {
		return s.Timeline == n.timeline && segmentName(n.timeline, segmentNumber(s.At, n.size), n.size) < n.begin
	})
}

// retained says whether one of the ranges holds a segment.
func (p *retentionPlan) retained(segment string) bool {
	return slices.ContainsFunc(p.ranges, func(r [2]string) bool { return r[0] <= segment && segment <= r[1] })
}

// retentionOptions say how a retention run is made.
type retentionOptions struct {
	Policy        string // of the ObjectStore; "" keeps all backups and all WAL
	Now           time.Time
	DryRun        bool
	BackupRunning bool // a backup of this server is being taken: what looks abandoned is left alone
}

// retentionReport is what a retention run did, or with DryRun would do.
type retentionReport struct {
	ServerName string       `json:"serverName"`
	Policy     string       `json:"policy,omitempty"`
	Since      *time.Time   `json:"recoveryWindowSince,omitempty"`
	DryRun     bool         `json:"dryRun"`
	Backups    []verdict    `json:"backups"` // newest first
	Debris     []string     `json:"debris"`  // ids of abandoned backups, and keys of unfinished uploads
	WAL        []deletedWAL `json:"wal"`
	Objects    int          `json:"objects"` // that went, in all
	Bytes      int64        `json:"bytes"`
	Refused    int          `json:"refused"`            // objects that the server did not let go
	Problems   []string     `json:"problems,omitempty"` // the first of them, and what else is wrong
	Catalog    *Catalog     `json:"-"`                  // as the run left it
}

// deletedWAL is the WAL of one timeline that went.
type deletedWAL struct {
	Timeline    uint32 `json:"timeline"`
	Objects     int    `json:"objects"`
	Bytes       int64  `json:"bytes"`
	First       string `json:"first"`
	Last        string `json:"last"`
	FirstNeeded string `json:"firstNeeded"` // the first segment that stays; it need not exist
}

// maxProblems bounds the list of problems in a report.
const maxProblems = 100

func (r *retentionReport) problem(err error) {
	if len(r.Problems) < maxProblems {
		slog.Warn("Retention goes on after a problem", "server", r.ServerName, "error", err)
		r.Problems = append(r.Problems, err.Error())
	}
}

// enforceRetention deletes the backups and the WAL that the policy gives up, and what killed
// Pods have left behind. It may be interrupted anywhere: backup.info goes first, from when on
// nobody, Barman included, takes what remains for a backup; then that remainder; then the
// WAL, by what is left by then. The next run finds all of it again. What the server refuses
// to delete is reported, and does not end the run. The report is valid up to an error.
func (s *Store) enforceRetention(ctx context.Context, o retentionOptions) (*retentionReport, error) {
	r := &retentionReport{ServerName: s.Config.ServerName, Policy: o.Policy, DryRun: o.DryRun, Debris: []string{}, WAL: []deletedWAL{}}
	var facts retentionFacts
	if o.Policy != "" {
		window, err := parseRetentionPolicy(o.Policy)
		if err != nil {
			return r, fmt.Errorf("ObjectStore %s: %w", s.Config.Name, err)
		}
		facts.since = o.Now.Add(-window)
		r.Since = &facts.since
	}
	uploads, debris, err := s.gatherRetention(ctx, o, r, &facts)
	if err != nil {
		return r, err
	}
	plan := planRetention(facts)
	r.Backups = plan.verdicts

	var infos []string
	for _, v := range r.Backups {
		if v.Delete {
			infos = append(infos, s.baseKey(v.ID, backupInfoFile))
		}
	}
	refused := map[string]error{}
	if !o.DryRun {
		if refused, err = s.DeleteAll(ctx, infos); err != nil {
			return r, err
		}
	}
	for i := range r.Backups {
		v := &r.Backups[i]
		if err := refused[s.baseKey(v.ID, backupInfoFile)]; err != nil {
			if at := slices.IndexFunc(facts.catalog.Backups, func(b *BackupInfo) bool { return b.ID == v.ID && b.Done() }); at >= 0 {
				plan.need(facts.catalog.Backups[at])
			}
			v.Delete, v.Why = false, "the server refuses to delete it"
			r.problem(err)
			r.Refused++
		} else if v.Delete {
			debris = append(debris, v.ID)
			if !o.DryRun {
				slog.Info("Deleting a backup", "backupID", v.ID, "status", v.Status, "why", v.Why, "policy", o.Policy)
				r.Objects++ // the others are counted as they go
			}
			r.Catalog.Backups = slices.DeleteFunc(r.Catalog.Backups, func(b *BackupInfo) bool { return b.ID == v.ID })
		}
	}

	err = s.remove(ctx, r, func(yield func(object, error) bool) {
		for _, id := range debris {
			for object, err := range s.List(ctx, s.baseKey(id, "")) {
				if ours, _ := s.layoutKey(object.Key); (err != nil || ours == id) && !yield(object, err) {
					return
				}
			}
		}
	})
	if err != nil {
		return r, err
	}
	for _, timeline := range plan.timelines {
		if err := s.deleteWAL(ctx, r, plan, timeline); err != nil {
			return r, err
		}
	}
	for _, u := range uploads {
		r.Debris = append(r.Debris, u.key)
		if !o.DryRun {
			slog.Info("Aborting an abandoned upload", "object", s.URL(u.key), "uploadID", u.id, "lastWritten", u.active)
			if err := s.AbortUpload(ctx, u); errors.Is(err, errDenied) {
				r.problem(err)
			} else if err != nil {
				return r, err
			}
		}
	}
	return r, nil
}

// gatherRetention finds out what the decision depends on, and what has been abandoned:
// unfinished uploads, and backups that have neither a backup.info nor a keep annotation.
func (s *Store) gatherRetention(ctx context.Context, o retentionOptions, r *retentionReport, facts *retentionFacts) (uploads []upload, debris []string, err error) {
	clock, err := s.ServerTime(ctx)
	if err != nil {
		return nil, nil, err
	}
	if skew := o.Now.Sub(clock).Abs(); !clock.IsZero() && skew > maxClockSkew {
		return nil, nil, fmt.Errorf("nothing is deleted: it is %s here and %s at %s: correct the clock that is wrong",
			timestamp(o.Now), timestamp(clock), s.URL(""))
	}
	// The uploads come before the catalog: what ends in between is seen there.
	all, err := s.Uploads(ctx, s.key(""))
	uploadsKnown := err == nil
	if err != nil {
		r.problem(fmt.Errorf("what was abandoned stays: %w", err))
	}
	if facts.catalog, err = s.Catalog(ctx); err != nil {
		return nil, nil, err
	}
	left := *facts.catalog
	left.Backups = slices.Clone(left.Backups)
	r.Catalog = &left
	objects := facts.catalog.objects
	for _, u := range all {
		if id, _ := s.layoutKey(u.key); id != "" {
			b := cmp.Or(objects[id], &backupObjects{})
			b.written = slices.MaxFunc([]time.Time{b.written, u.active}, time.Time.Compare)
			objects[id] = b
		}
	}
	abandoned := func(t time.Time) bool { return !t.IsZero() && o.Now.Sub(t) > debrisAge }
	for _, u := range all {
		id, segment := s.layoutKey(u.key)
		if !o.BackupRunning && (id != "" && abandoned(objects[id].written) || segment != "" && abandoned(u.active)) {
			uploads = append(uploads, u)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(objects)) {
		_, unreadable := facts.catalog.Unreadable[id]
		switch b := objects[id]; {
		case unreadable || slices.ContainsFunc(facts.catalog.Backups, func(b *BackupInfo) bool { return b.ID == id }):
		// Not every server lists the uploads of a backup that is slow; and one that lists a
		// backup.info but did not have it just now has lost a request, not the backup.
		case !abandoned(b.written) || o.BackupRunning || b.info:
			facts.active = append(facts.active, id)
		case uploadsKnown && b.ours && b.keep == "":
			debris = append(debris, id)
		}
	}
	r.Debris = append(r.Debris, debris...)
	if facts.histories, err = readHistories(ctx, s, facts.catalog, nil); errors.Is(err, errDamaged) {
		r.problem(err)
	} else if err != nil {
		return nil, nil, err
	}
	for _, err := range facts.catalog.Unreadable {
		r.problem(err)
	}
	return uploads, debris, nil
}

// deleteWAL deletes what no backup needs of a timeline's WAL. Names come in their order, so
// that no more than that has to be listed.
func (s *Store) deleteWAL(ctx context.Context, r *retentionReport, plan *retentionPlan, timeline uint32) error {
	gone := deletedWAL{Timeline: timeline, FirstNeeded: plan.firstNeeded(timeline)}
	if gone.FirstNeeded == "" {
		return nil
	}
	objects, bytes := r.Objects, r.Bytes
	err := s.remove(ctx, r, func(yield func(object, error) bool) {
		for object, err := range s.List(ctx, s.key("wals", fmt.Sprintf("%08X", timeline))) {
			_, segment := s.layoutKey(object.Key)
			switch {
			case err != nil: // remove ends with it
			case segment >= gone.FirstNeeded:
				return
			case segment == "" || plan.retained(segment):
				continue
			default:
				gone.First, gone.Last = cmp.Or(gone.First, segment), segment
			}
			if !yield(object, err) {
				return
			}
		}
	})
	if err != nil || gone.First == "" {
		return err
	}
	gone.Objects, gone.Bytes = r.Objects-objects, r.Bytes-bytes
	r.WAL = append(r.WAL, gone)
	if !r.DryRun {
		slog.Info("Deleted WAL that no backup needs", "timeline", timeline, "first", gone.First, "last", gone.Last, "objects", gone.Objects, "bytes", gone.Bytes)
	}
	return nil
}

// remove deletes what is listed, in batches of which it never holds more than one, and counts it in the report.
func (s *Store) remove(ctx context.Context, r *retentionReport, listed iter.Seq2[object, error]) error {
	var batch []object
	flush := func() error {
		var refused map[string]error
		if !r.DryRun {
			keys := make([]string, len(batch))
			for i, o := range batch {
				keys[i] = o.Key
			}
			var err error
			if refused, err = s.DeleteAll(ctx, keys); err != nil {
				return err
			}
		}
		for _, o := range batch {
			if err := refused[o.Key]; err != nil {
				r.problem(err)
				r.Refused++
				continue
			}
			r.Objects++
			r.Bytes += o.Size
		}
		batch = batch[:0]
		return nil
	}
	for o, err := range listed {
		if err != nil {
			return err
		}
		if batch = append(batch, o); len(batch) == deleteBatch {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// ---------------------------------------------------------------------------
// Open stores
// ---------------------------------------------------------------------------

// openStores keeps one open Store, with its warm connections, for each reference, and
// opens it anew when its configuration has changed.
type openStores struct {
	mu     sync.Mutex
	stores map[StoreRef]*Store
}

// open resolves the secrets of o each time, as ResolveStore does.
func (s *openStores) open(ctx context.Context, ref StoreRef, o *ObjectStore, secret func(corev1.SecretKeySelector) ([]byte, error)) (*Store, error) {
	c, err := ResolveStore(o, ref.ServerName, secret)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.stores[ref]; known != nil && reflect.DeepEqual(known.Config, c) {
		return known, nil
	}
	opened, err := OpenStore(ctx, c)
	if err != nil {
		return nil, err
	}
	if s.stores == nil {
		s.stores = map[StoreRef]*Store{}
	}
	s.stores[ref] = opened
	return opened, nil
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
		var head metav1.PartialObjectMetadata
		err := decoder.Decode(&raw)
		if err == io.EOF {
			break
		}
		if err == nil && len(raw) > 0 {
			err = json.Unmarshal(raw, &head)
		}
		if err != nil {
			return fmt.Errorf("%s, document %d: %w", f.path, document, err)
		}
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
	return f.stores.open(ctx, ref, o, func(sel corev1.SecretKeySelector) ([]byte, error) {
		s, ok := f.secrets[sel.Name]
		if !ok {
			return nil, fmt.Errorf("Secret %s: %w in %s", sel.Name, errNoObject, f.path)
		}
		return secretKey(s, sel)
	})
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

func (f *fileSource) UpdateStatus(_ context.Context, ref StoreRef, change func(*RecoveryWindow, *ServerStatus)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.status[ref.ObjectStore] // readers may have it: its maps are not changed
	st := ObjectStoreStatus{ServerRecoveryWindow: map[string]RecoveryWindow{}, Servers: map[string]ServerStatus{}}
	maps.Copy(st.ServerRecoveryWindow, old.ServerRecoveryWindow)
	maps.Copy(st.Servers, old.Servers)
	w, server := st.ServerRecoveryWindow[ref.ServerName], st.Servers[ref.ServerName]
	server.Conditions = slices.Clone(server.Conditions)
	change(&w, &server)
	st.ServerRecoveryWindow[ref.ServerName], st.Servers[ref.ServerName] = w, server
	f.status[ref.ObjectStore] = st
	return nil
}

// Tell has nobody to tell: what it would say is in the log.
func (f *fileSource) Tell(context.Context, string, string, string) error { return nil }

// secretKey takes one key out of a Secret.
func secretKey(s *corev1.Secret, sel corev1.SecretKeySelector) ([]byte, error) {
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
	cluster   string              // of this Pod
	group     schema.GroupVersion // of the Clusters
	life      context.Context     // of the watches
	stores    openStores
	watches   sync.Map // of *objectWatch by watchKey
}

type watchKey struct {
	resource schema.GroupVersionResource
	name     string
}

func newKubeSource(ctx context.Context, namespace string) (*kubeSource, error) {
	klog.SetSlogLogger(slog.Default()) // client-go logs through klog
	c, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("reach the Kubernetes API: %w; outside Kubernetes use --objectstore FILE", err)
	}
	return kubeSourceFor(ctx, c, namespace, os.Getenv("CLUSTER_NAME"))
}

func kubeSourceFor(ctx context.Context, c *rest.Config, namespace, cluster string) (*kubeSource, error) {
	client, err := dynamic.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("make a Kubernetes client: %w", err)
	}
	group := schema.GroupVersion{Group: cmp.Or(os.Getenv("CUSTOM_CNPG_GROUP"), "postgresql.cnpg.io"), Version: cmp.Or(os.Getenv("CUSTOM_CNPG_VERSION"), "v1")}
	return &kubeSource{client: client, namespace: namespace, cluster: cluster, group: group, life: ctx}, nil
}

// objectWatch follows one object by its name, once that has been seen.
type objectWatch struct {
	mu    sync.Mutex // held while the object is asked for the first time
	store cache.Store
}

// firstRequestTimeout bounds the request that comes before a watch.
const firstRequestTimeout = 15 * time.Second

// get reads an object as it was last seen. Its errors wrap errNoObject, errForbidden or errTransient.
func (k *kubeSource) get(ctx context.Context, resource schema.GroupVersionResource, kind, name string, into any) error {
	known, _ := k.watches.LoadOrStore(watchKey{resource, name}, &objectWatch{})
	w := known.(*objectWatch)
	w.mu.Lock()
	defer w.mu.Unlock()
	var err error
	if w.store == nil {
		w.store, err = k.follow(ctx, resource, name)
	}
	var object any // nil when there is none
	if err == nil {
		object, _, err = w.store.GetByKey(k.namespace + "/" + name)
	}
	what := fmt.Sprintf("%s %s/%s", kind, k.namespace, name)
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s: %w to the Pod's service account: the plugin's Deployment grants it in a Role; is it running, and does it know of this reference? (%w)",
			what, errForbidden, err)
	case err != nil && !apierrors.IsNotFound(err):
		return fmt.Errorf("%s: %w: ask the Kubernetes API: %w", what, errTransient, err)
	case object == nil:
		return fmt.Errorf("%s: %w: create it, or correct its name where it is referred to", what, errNoObject)
	}
	if err := fromUnstructured(object, into); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// follow asks for an object, and from then on watches it for the life of the source. A watch
// alone would hide a missing object or permission behind its retries.
func (k *kubeSource) follow(ctx context.Context, resource schema.GroupVersionResource, name string) (cache.Store, error) {
	ctx, cancel := context.WithTimeout(ctx, firstRequestTimeout)
	defer cancel()
	client := k.client.Resource(resource).Namespace(k.namespace)
	first, err := client.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	i := informer(client, metav1.SingleObject(metav1.ObjectMeta{Name: name}), nil)
	if err := i.GetStore().Add(first); err != nil { // what is known until the watch is there
		return nil, err
	}
	go i.RunWithContext(k.life)
	return i.GetStore(), nil
}

func (k *kubeSource) objectStore(ctx context.Context, name string) (*ObjectStore, error) {
	o := &ObjectStore{}
	return o, k.get(ctx, objectStores, "ObjectStore", name, o)
}

func (k *kubeSource) Store(ctx context.Context, ref StoreRef) (*Store, error) {
	o, err := k.objectStore(ctx, ref.ObjectStore)
	if err != nil {
		return nil, err
	}
	return k.stores.open(k.life, ref, o, func(sel corev1.SecretKeySelector) ([]byte, error) {
		if ca := o.Spec.Configuration.EndpointCA; ca != nil && *ca == sel {
			return os.ReadFile(filepath.Join(certificatesDirectory, o.Name, "barman-ca.crt"))
		}
		s := &corev1.Secret{}
		if err := k.get(ctx, secrets, "Secret", sel.Name, s); err != nil {
			return nil, err
		}
		return secretKey(s, sel)
	})
}

func (k *kubeSource) Status(ctx context.Context, objectStore string) (ObjectStoreStatus, error) {
	o, err := k.objectStore(ctx, objectStore)
	return o.Status, err
}

// UpdateStatus writes what has changed of one server by a merge patch of its own keys:
// clusters that share a store never conflict.
func (k *kubeSource) UpdateStatus(ctx context.Context, ref StoreRef, change func(*RecoveryWindow, *ServerStatus)) error {
	st, err := k.Status(ctx, ref.ObjectStore)
	if err != nil {
		return err
	}
	own := func(w RecoveryWindow, s ServerStatus) []byte {
		b, _ := json.Marshal(map[string]any{"status": ObjectStoreStatus{ // which can be marshalled
			ServerRecoveryWindow: map[string]RecoveryWindow{ref.ServerName: w}, Servers: map[string]ServerStatus{ref.ServerName: s}}})
		return b
	}
	w, server := st.ServerRecoveryWindow[ref.ServerName], st.Servers[ref.ServerName]
	before := own(w, server)
	change(&w, &server)
	patch, err := jsonpatch.CreateMergePatch(before, own(w, server))
	if err != nil || string(patch) == "{}" {
		return err
	}
	if _, err = k.client.Resource(objectStores).Namespace(k.namespace).Patch(ctx, ref.ObjectStore, types.MergePatchType, patch,
		metav1.PatchOptions{}, "status"); err != nil {
		return fmt.Errorf("write the status of server %s into ObjectStore %s/%s: %w", ref.ServerName, k.namespace, ref.ObjectStore, err)
	}
	return nil
}

// ownCluster is the Cluster that this Pod belongs to, as it was last seen.
func (k *kubeSource) ownCluster(ctx context.Context) (*Cluster, error) {
	c := &Cluster{}
	return c, k.get(ctx, k.group.WithResource("clusters"), "Cluster", k.cluster, c)
}

// Tell writes an Event on the Cluster. CloudNativePG's own Role for the instances admits it.
func (k *kubeSource) Tell(ctx context.Context, eventType, reason, message string) error {
	c, err := k.ownCluster(ctx)
	if err != nil {
		return err
	}
	if err := write(ctx, k.client, events, true, clusterEvent(c.reference(), eventType, reason, message)); err != nil {
		return fmt.Errorf("write the Event %s on Cluster %s/%s: %w", reason, k.namespace, k.cluster, err)
	}
	return nil
}
