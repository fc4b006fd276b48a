package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cloudnative-pg/cnpg-i/pkg/backup"
	"github.com/cloudnative-pg/cnpg-i/pkg/identity"
	"github.com/cloudnative-pg/cnpg-i/pkg/metrics"
	restorejob "github.com/cloudnative-pg/cnpg-i/pkg/restore/job"
	"github.com/cloudnative-pg/cnpg-i/pkg/wal"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// ---------------------------------------------------------------------------
// A running sidecar
// ---------------------------------------------------------------------------

// sidecar is the program in the mode `sidecar`, configured by a file.
type sidecar struct {
	t      testing.TB
	socket string
	cmd    *exec.Cmd
	log    *bytes.Buffer
	ended  chan struct{}
}

// startSidecar runs the program as PostgreSQL's user, so that it can read its files.
func startSidecar(t testing.TB, socket, storeFile, pgdata string, env ...string) *sidecar {
	t.Helper()
	cmd := asPostgres(t, program(t), "sidecar", "--socket", socket, "--objectstore", storeFile, "--pgdata", pgdata)
	cmd.Env = append(os.Environ(), append(env, "POD_NAME=main-1")...)
	return startSidecarCommand(t, socket, cmd)
}

func startSidecarCommand(t testing.TB, socket string, cmd *exec.Cmd) *sidecar {
	t.Helper()
	s := &sidecar{t: t, socket: socket, cmd: cmd, log: &bytes.Buffer{}, ended: make(chan struct{})}
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { s.cmd.Wait(); close(s.ended) }()
	t.Cleanup(func() {
		s.cmd.Process.Kill()
		<-s.ended
		if t.Failed() {
			t.Logf("log of the sidecar:\n%s", s.log)
		}
	})
	waitFor(t, "the socket", func() bool {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return s
}

func (s *sidecar) dial() *grpc.ClientConn {
	s.t.Helper()
	conn, err := grpc.NewClient("unix://"+s.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return conn
}

// kill ends the process as the kernel does when memory runs out.
func (s *sidecar) kill() {
	s.cmd.Process.Kill()
	<-s.ended
}

// mainCluster is the Cluster `main`, which archives to ObjectStore `store`.
const mainCluster = `{"metadata":{"name":"main","uid":"u-1"},"spec":{"plugins":[{"name":"barman-cloud.cloudnative-pg.io","isWALArchiver":true,
	"parameters":{"barmanObjectName":"store"}}]},"status":{"currentPrimary":"main-1"}}`

// The handshake of OPERATOR 1.3, in its order, on a socket that a killed predecessor left behind.
// A sidecar serves as soon as it runs: PostgreSQL's own start waits for it. `make bench-api`
// prints how long that takes.
func TestSidecarStart(t *testing.T) {
	file := storeFile(t, testS3(t), "bucket")
	var took []time.Duration
	for range 20 {
		dir := testDir(t)
		socket := filepath.Join(dir, PluginName)
		cmd := exec.Command(program(t), "sidecar", "--socket", socket, "--objectstore", file, "--pgdata", dir)
		start := time.Now()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for {
			if c, err := net.Dial("unix", socket); err == nil {
				c.Close()
				break
			}
			if time.Since(start) > hang {
				t.Fatal("no socket")
			}
			time.Sleep(500 * time.Microsecond)
		}
		took = append(took, time.Since(start))
		cmd.Process.Kill()
		cmd.Wait()
	}
	t.Logf("from exec to the socket: %s", summary(took))
}

func TestSidecarHandshake(t *testing.T) {
	dir := testDir(t)
	socket := filepath.Join(dir, PluginName)
	stale, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	s := startSidecar(t, socket, storeFile(t, testS3(t), newBucket(t)), dir)
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("the operator takes every name beside the socket for a plugin: %v, %v", entries, err)
	}
	conn, ctx := s.dial(), t.Context()

	id := identity.NewIdentityClient(conn)
	meta, err := id.GetPluginMetadata(ctx, &identity.GetPluginMetadataRequest{})
	if err != nil || meta.Name != PluginName || meta.DisplayName != "BarmanCloudInstance" || meta.License != "APACHE 2.0" || meta.Version == "" {
		t.Errorf("metadata %v, %v", meta, err)
	}
	caps, err := id.GetPluginCapabilities(ctx, &identity.GetPluginCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var announced []string
	for _, c := range caps.Capabilities {
		announced = append(announced, c.GetService().Type.String())
	}
	if want := []string{"TYPE_WAL_SERVICE", "TYPE_BACKUP_SERVICE", "TYPE_RESTORE_JOB", "TYPE_METRICS"}; !slices.Equal(announced, want) {
		t.Errorf("announced %q, not %q", announced, want)
	}
	if w, err := wal.NewWALClient(conn).GetCapabilities(ctx, &wal.WALCapabilitiesRequest{}); err != nil || len(w.Capabilities) != 2 {
		t.Errorf("WAL: %v, %v", w, err)
	}
	if b, err := backup.NewBackupClient(conn).GetCapabilities(ctx, &backup.BackupCapabilitiesRequest{}); err != nil ||
		b.Capabilities[0].GetRpc().Type != backup.BackupCapability_RPC_TYPE_BACKUP {
		t.Errorf("Backup: %v, %v", b, err)
	}
	if r, err := restorejob.NewRestoreJobHooksClient(conn).GetCapabilities(ctx, &restorejob.RestoreJobHooksCapabilitiesRequest{}); err != nil ||
		r.Capabilities[0].Kind != restorejob.RestoreJobHooksCapability_KIND_RESTORE {
		t.Errorf("RestoreJobHooks: %v, %v", r, err)
	}
	if m, err := metrics.NewMetricsClient(conn).GetCapabilities(ctx, &metrics.MetricsCapabilitiesRequest{}); err != nil ||
		m.Capabilities[0].GetRpc().Type != metrics.MetricsCapability_RPC_TYPE_METRICS {
		t.Errorf("Metrics: %v, %v", m, err)
	}
	if p, err := id.Probe(ctx, &identity.ProbeRequest{}); err != nil || !p.Ready {
		t.Errorf("Probe: %v, %v", p, err)
	}
	for _, c := range []struct {
		socket string
		code   int
	}{{socket, 0}, {socket + "-gone", 1}} {
		if r := runProgram(t, nil, "healthcheck", "--socket", c.socket); r.Code != c.code {
			t.Errorf("healthcheck of %s ends with %d: %s", c.socket, r.Code, r.Stderr)
		}
	}
	// Status and SetFirstRequired have no caller
	if _, err := wal.NewWALClient(conn).Status(ctx, &wal.WALStatusRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("Status: %v", err)
	}
}

// The life of a cluster through the socket: WAL, a base backup, metrics, a restore.
func TestSidecarArchivesBacksUpRestores(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket, "wal: {compression: gzip}", "data: {compression: gzip, immediateCheckpoint: true}")
	clusterFile := filepath.Join(testDir(t), "cluster.json")
	if err := os.WriteFile(clusterFile, []byte(mainCluster), 0o644); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(testDir(t), "s")
	p := startPostgres(t, pgOptions{ArchiveCommand: fmt.Sprintf("%s --socket %s --cluster %s archive %%p", socketClient(t), socket, clusterFile)})
	s := startSidecar(t, socket, file, p.Dir, p.Env()...)
	conn, ctx := s.dial(), t.Context()

	p.Exec("CREATE TABLE t AS SELECT i, md5(i::text) AS x FROM generate_series(1, 20000) AS i")
	result, err := backup.NewBackupClient(conn).Backup(ctx, &backup.BackupRequest{ClusterDefinition: []byte(mainCluster), BackupDefinition: []byte(`{}`)})
	if err != nil {
		t.Fatal(err)
	}
	if !backupIDForm.MatchString(result.BackupId) || !regexp.MustCompile(`^backup-\d{14}$`).MatchString(result.BackupName) ||
		result.InstanceId != "main-1" || !result.Online || result.StartedAt == 0 || result.StoppedAt < result.StartedAt ||
		result.Metadata["clusterUID"] != "u-1" || result.Metadata["pluginName"] != PluginName || result.Metadata["timeline"] != "1" {
		t.Errorf("result %v", result)
	}
	p.Exec("INSERT INTO t SELECT i, md5(i::text) FROM generate_series(20001, 30000) AS i")
	want := p.Query("SELECT count(*), md5(string_agg(x, '' ORDER BY i)) FROM t")
	p.WaitArchived(p.SwitchWAL())

	m := metrics.NewMetricsClient(conn)
	defined, err := m.Define(ctx, &metrics.DefineMetricsRequest{ClusterDefinition: []byte(mainCluster)})
	if err != nil {
		t.Fatal(err)
	}
	collected, err := m.Collect(ctx, &metrics.CollectMetricsRequest{ClusterDefinition: []byte(mainCluster)})
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, c := range collected.Metrics {
		if !slices.ContainsFunc(defined.Metrics, func(d *metrics.Metric) bool { return d.FqName == c.FqName }) {
			t.Errorf("%s is collected and not defined: the whole scrape would fail", c.FqName)
		}
		values[c.FqName] = c.Value
	}
	segments, _ := strconv.ParseFloat(p.Query("SELECT archived_count FROM pg_stat_archiver"), 64)
	for name, want := range map[string]func(float64) bool{
		"archived_wal_files_total":            func(v float64) bool { return v >= segments },
		"archived_wal_bytes_total":            func(v float64) bool { return v >= (segments-1)*(16<<20) }, // one is a .backup file
		"archive_failures_total":              func(v float64) bool { return v == 0 },
		"archive_seconds_total":               func(v float64) bool { return v > 0 },
		"last_archived_wal_timestamp_seconds": func(v float64) bool { return v >= float64(result.StartedAt) },
		"waiting_wal_files":                   func(v float64) bool { return v == 0 },
		"oldest_waiting_wal_age_seconds":      func(v float64) bool { return v == 0 },
		"last_backup_duration_seconds": func(v float64) bool {
			return v == float64(result.StoppedAt-result.StartedAt) || v == float64(result.StoppedAt-result.StartedAt)-1
		},
		"last_backup_bytes":                       func(v float64) bool { return v > 20<<20 },
		"last_backup_stored_bytes":                func(v float64) bool { return v > 1<<20 && v < values[metricPrefix+"last_backup_bytes"] },
		"bad_pages":                               func(v float64) bool { return v == 0 },
		"condition_failed":                        func(v float64) bool { return v == 0 },
		"s3_certificate_expiry_timestamp_seconds": func(v float64) bool { return v == 0 }, // plain HTTP
	} {
		if v, ok := values[metricPrefix+name]; !ok || !want(v) {
			t.Errorf("%s is %v (%t) after %v segments", name, v, ok, segments)
		}
	}
	if at := float64(result.StoppedAt); values[metricPrefix+"first_recoverability_point"] != at ||
		values[metricPrefix+"last_available_backup_timestamp"] != at || values[metricPrefix+"last_failed_backup_timestamp"] != 0 {
		t.Errorf("metrics %v after a backup that ended at %v", values, at)
	}

	// a new cluster from it, through a sidecar of its own
	pgdata := filepath.Join(testDir(t), "pgdata")
	newCluster := `{"metadata":{"name":"new"},"spec":{"bootstrap":{"recovery":{"source":"origin"}},"externalClusters":[{"name":"origin",
		"plugin":{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store","serverName":"main"}}}]}}`
	job := startSidecar(t, filepath.Join(testDir(t), "s"), file, pgdata)
	reply, err := restorejob.NewRestoreJobHooksClient(job.dial()).Restore(ctx, &restorejob.RestoreRequest{ClusterDefinition: []byte(newCluster)})
	if err != nil {
		t.Fatal(err)
	}
	if want := "recovery_target_action = promote\nrestore_command = '/controller/manager wal-restore --log-destination /controller/log/postgres.json %f %p'"; strings.TrimSpace(reply.RestoreConfig) != want {
		t.Errorf("restore_config %q", reply.RestoreConfig)
	}
	newFile := filepath.Join(testDir(t), "new.json")
	if err := os.WriteFile(newFile, []byte(newCluster), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(pgdata, "recovery.signal"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p.verifyBackup(pgdata, "--ignore=recovery.signal")
	restored := startRestored(t, pgdata, fmt.Sprintf("restore_command=%s --socket %s --cluster %s restore %%f %%p", socketClient(t), job.socket, newFile))
	if got := restored.Query("SELECT count(*), md5(string_agg(x, '' ORDER BY i)) FROM t"); got != want {
		t.Errorf("restored %s, not %s", got, want)
	}
}

// socketClient is the program that plays the instance manager's archive and restore commands.
func socketClient(t testing.TB) string {
	t.Helper()
	path := filepath.Join(testRoot, "socketclient")
	if !fileExists(path) {
		cmd := exec.Command("go", "build", "-C", "tools", "-o", path, "./socketclient")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		mustRun(t, cmd)
	}
	return path
}

// kill -9 in the middle of a backup and of a WAL file: nothing that says DONE and is not,
// the server goes on archiving through the next sidecar, and the next backup is good.
func TestSidecarKilled(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	file := storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, "data: {immediateCheckpoint: true}")
	clusterFile := filepath.Join(testDir(t), "cluster.json")
	if err := os.WriteFile(clusterFile, []byte(mainCluster), 0o644); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(testDir(t), "s")
	p := startPostgres(t, pgOptions{ArchiveCommand: fmt.Sprintf("%s --socket %s --cluster %s archive %%p", socketClient(t), socket, clusterFile)})
	p.Exec("CREATE TABLE t AS SELECT i, md5(i::text) AS x FROM generate_series(1, 100000) AS i")
	want := p.Query("SELECT count(*), md5(string_agg(x, '' ORDER BY i)) FROM t")
	s := startSidecar(t, socket, file, p.Dir, p.Env()...)

	stall := proxy.add(fault{Method: http.MethodPut, Path: regexp.MustCompile(`/base/.*partNumber=`), Do: stallRequest, Times: 1})
	failed := make(chan error, 1)
	conn := s.dial()
	go func() {
		_, err := backup.NewBackupClient(conn).Backup(context.Background(), &backup.BackupRequest{ClusterDefinition: []byte(mainCluster)})
		failed <- err
	}()
	waitFor(t, "the upload of the data", func() bool { return proxy.hits(stall) == 1 })
	walStall := proxy.add(fault{Method: http.MethodPut, Path: regexp.MustCompile(`/wals/`), Do: stallRequest, Times: 1})
	segment := p.SwitchWAL()
	waitFor(t, "the upload of the WAL file", func() bool { return proxy.hits(walStall) == 1 })
	s.kill()
	if err := <-failed; err == nil {
		t.Fatal("a backup whose sidecar was killed was reported as good")
	}
	proxy.clear()

	s = startSidecar(t, socket, file, p.Dir, p.Env()...)
	p.WaitArchived(segment)
	store := openTestStore(t, file)
	catalog, err := store.Catalog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range catalog.Backups {
		if b.Done() {
			t.Errorf("backup %s says %s", b.ID, b.Status)
		}
	}
	result, err := backup.NewBackupClient(s.dial()).Backup(t.Context(), &backup.BackupRequest{ClusterDefinition: []byte(mainCluster)})
	if err != nil {
		t.Fatal(err)
	}
	pgdata := filepath.Join(testDir(t), "pgdata")
	r := run(t, asPostgres(t, program(t), "restore", "--objectstore", file, "--server-name", "main", pgdata))
	if r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	if got := startRestored(t, pgdata).Query("SELECT count(*), md5(string_agg(x, '' ORDER BY i)) FROM t"); got != want {
		t.Errorf("backup %s restored as %s, not %s", result.BackupId, got, want)
	}
}

// A server under load archives through a sidecar that is killed again and again, over a
// network that loses, breaks and delays requests, and is backed up meanwhile. Nothing that
// was acknowledged is missing or different, every backup that says DONE restores, and
// recovery to the end has every row, in tables and indexes without a fault. Restores are killed
// too. SOAK_ROUNDS sets the number of kills of the sidecar; half as many are of a restore.
func TestSoak(t *testing.T) {
	rounds := 8
	if n, err := strconv.Atoi(os.Getenv("SOAK_ROUNDS")); err == nil {
		rounds = n
	}
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	configuration := []string{"wal: {compression: zstd, maxParallel: 4}", "data: {compression: zstd, immediateCheckpoint: true}"}
	file, direct := storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, configuration...), storeFile(t, server, bucket, configuration...)
	clusterFile := filepath.Join(testDir(t), "cluster.json")
	if err := os.WriteFile(clusterFile, []byte(mainCluster), 0o644); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(testDir(t), "s")
	p := startPostgres(t, pgOptions{WALSegmentMB: 1, ArchiveCommand: fmt.Sprintf("%s --socket %s --cluster %s archive %%p", socketClient(t), socket, clusterFile)})
	p.pgbenchTables(2)
	backUp := func(s *sidecar) error {
		_, err := backup.NewBackupClient(s.dial()).Backup(context.Background(), &backup.BackupRequest{ClusterDefinition: []byte(mainCluster)})
		return err
	}
	s := startSidecar(t, socket, file, p.Dir, p.Env()...)
	if err := backUp(s); err != nil {
		t.Fatal(err)
	}
	stop := p.pgbenchLoad()

	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d, %d rounds", seed, rounds)
	r := rand.New(rand.NewPCG(seed, 0))
	faults := []fault{
		{Do: loseReply}, {Do: resetRequest}, {Do: delayRequest, Delay: 300 * time.Millisecond}, {Do: delayReply, Delay: 300 * time.Millisecond},
		{Do: answerError, HTTP: 500, Code: "InternalError"}, {Do: answerError, HTTP: 503, Code: "SlowDown"},
		{Method: http.MethodPut, Do: answerError, HTTP: 412, Code: "PreconditionFailed"},
		{Method: http.MethodPut, Do: loseReply}, {Method: http.MethodPost, Do: loseReply}, {Method: http.MethodPut, Do: stallRequest},
	}
	good := 1
	for round := range rounds {
		finish := round%3 == 0 // let the backup come to its end, whatever that is
		for range 8 {
			f := faults[r.IntN(len(faults))]
			if f.Do == stallRequest && finish {
				continue // a stall is as long as the round
			}
			f.Skip, f.Times = r.IntN(20), 1+r.IntN(3)
			proxy.add(f)
		}
		ended := make(chan error, 1)
		go func() { ended <- backUp(s) }()
		var err error
		if finish {
			err = <-ended
		}
		time.Sleep(time.Duration(r.IntN(2500)) * time.Millisecond)
		s.kill()
		if !finish {
			err = <-ended
		}
		if err == nil {
			good++
		}
		proxy.clear()
		s = startSidecar(t, socket, file, p.Dir, p.Env()...)
	}
	stop()
	const checksum = `SELECT (SELECT md5(string_agg(a::text, '' ORDER BY aid)) FROM pgbench_accounts AS a),
		(SELECT count(*)::text || md5(string_agg(h::text, '' ORDER BY h::text)) FROM pgbench_history AS h)`
	want := p.Query(checksum)
	p.WaitArchived(p.SwitchWAL())

	store := openTestStore(t, direct)
	status := filepath.Join(p.Dir, "pg_wal", "archive_status")
	entries, err := os.ReadDir(status)
	if err != nil {
		t.Fatal(err)
	}
	compared := 0
	for _, e := range entries {
		if name, done := strings.CutSuffix(e.Name(), ".done"); done {
			content, err := os.ReadFile(filepath.Join(p.Dir, "pg_wal", name))
			if err != nil {
				continue // recycled meanwhile
			}
			mustFetch(t, store, name, content)
			compared++
		}
	}
	catalog, err := store.Catalog(t.Context())
	if err != nil || len(catalog.Unreadable) > 0 {
		t.Fatal(catalog, err)
	}
	catalog.Backups = slices.DeleteFunc(catalog.Backups, func(b *BackupInfo) bool { return !b.Done() })
	if len(catalog.Backups) < good {
		t.Errorf("%d backups were reported as good, and %d are", good, len(catalog.Backups))
	}
	t.Logf("%d backups are done, %d were reported; %d segments compared", len(catalog.Backups), good, compared)
	interrupted := 0
	defer func() { t.Logf("%d restores were killed before their end", interrupted) }()
	// Recovery goes through a sidecar too, over the same network.
	newFile := filepath.Join(testDir(t), "new.json")
	if err := os.WriteFile(newFile, []byte(strings.Replace(mainCluster, "main-1", "", 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, b := range []*BackupInfo{catalog.Backups[0], catalog.Backups[len(catalog.Backups)-1]} {
		pgdata := filepath.Join(testDir(t), "pgdata")
		restore := func() *exec.Cmd {
			return asPostgres(t, program(t), "restore", "--objectstore", direct, "--server-name", "main", "--backup-id", b.ID, pgdata)
		}
		for range rounds / 4 {
			cmd := restore()
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(r.IntN(500)) * time.Millisecond)
			cmd.Process.Kill()
			cmd.Wait()
			if fileExists(filepath.Join(pgdata, controlFile)) { // the kill came too late
				if fileExists(filepath.Join(pgdata, incompleteFile)) {
					t.Error("a restore that was killed left half of a database")
				}
				if err := os.RemoveAll(pgdata); err != nil {
					t.Fatal(err)
				}
			} else {
				interrupted++
			}
		}
		if r := run(t, restore()); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		for range 30 {
			f := []fault{{Do: loseReply}, {Do: resetRequest}, {Do: truncateBody, Bytes: 1000}, {Do: answerError, HTTP: 503, Code: "SlowDown"},
				{Do: delayReply, Delay: 300 * time.Millisecond}, {Path: regexp.MustCompile("/wals/0"), Do: answerError, HTTP: 404, Code: "NoSuchKey"},
				{Do: answerError, HTTP: 403, Code: "AccessDenied"}}[r.IntN(7)]
			f.Method, f.Skip, f.Times = http.MethodGet, r.IntN(200), 1+r.IntN(3)
			proxy.add(f)
		}
		job := startSidecar(t, filepath.Join(testDir(t), "s"), file, pgdata, "SPOOL_DIRECTORY="+testDir(t))
		restored := startRestored(t, pgdata, fmt.Sprintf("restore_command=%s --socket %s --cluster %s restore %%f %%p", socketClient(t), job.socket, newFile))
		if got := restored.Query(checksum); got != want {
			t.Errorf("backup %s restored as %s, not %s", b.ID, got, want)
		}
		stop := restored.pgbenchLoad()
		restored.amcheck()
		stop()
		restored.balanced()
		restored.Stop("immediate")
		proxy.clear()
	}
}

// ---------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------

// memoryLimit is what README promises for the whole process.
const memoryLimit = 64 << 20

// limited makes a command run in a memory cgroup of its own, as a container with that limit
// does: when it needs more, the kernel kills it. Where no such cgroup can be made the test is skipped.
func limited(t testing.TB, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	dir, limit := fmt.Sprintf("/sys/fs/cgroup/memory/cnpg-barman-s3-%d-%d", os.Getpid(), buckets.Add(1)), "memory.limit_in_bytes"
	if fileExists("/sys/fs/cgroup/cgroup.controllers") { // version 2
		dir, limit = strings.Replace(dir, "/memory/", "/", 1), "memory.max"
		os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+memory"), 0o644)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("NOTHING SAYS HERE THAT THE MEMORY IS BOUNDED: no memory cgroup can be made, which takes root: %v", err)
	}
	t.Cleanup(func() { waitFor(t, "the cgroup to be empty", func() bool { return os.Remove(dir) == nil }) })
	procs := filepath.Join(dir, "cgroup.procs")
	if err := os.WriteFile(filepath.Join(dir, limit), []byte(strconv.Itoa(memoryLimit)), 0o644); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(filepath.Join(dir, "memory.swap.max"), []byte("0"), 0o644)
	giveToPostgres(t, dir)
	cmd.Args = append([]string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, procs, cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	return cmd
}

// peakMemory is the largest resident set that a running process has had, in KiB, without the
// pages of its program file: how many of these are mapped depends on how the kernel happens to
// cache the file, here from 24 to 32 MiB, and the cgroup does not have to keep them.
func peakMemory(pid int) (kib int) {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	value := func(name string) (kib int) {
		if _, after, found := strings.Cut(string(text), name+":"); found {
			fmt.Sscan(after, &kib)
		}
		return kib
	}
	return value("VmHWM") - value("RssFile")
}

// Of the 64 MiB of README, programFile are for the pages that peakMemory leaves out.
const programFile = 26 << 20

// runLimited runs a command to its end in a memory cgroup and returns its peak memory in KiB.
func runLimited(t testing.TB, cmd *exec.Cmd) (kib int) {
	t.Helper()
	var out bytes.Buffer
	limited(t, cmd)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := every(20*time.Millisecond, func() { kib = max(kib, peakMemory(cmd.Process.Pid)) })
	err := cmd.Wait()
	stop()
	if err != nil {
		t.Errorf("%q: %v\n%s", cmd.Args, err, out.String())
	}
	return kib
}

// The sidecar archives within 64 MiB: a thousand segments, of which the last need no more
// than the first, and large ones in every codec with everything that maxParallel allows.
func TestMemoryArchive(t *testing.T) {
	server := testS3(t)
	archiver := func(t *testing.T, configuration string, content int64) (archive func(size int64, count uint64), peak func() int) {
		file := storeFile(t, server, newBucket(t), configuration)
		socket, pgWAL := filepath.Join(testDir(t), "s"), filepath.Join(testDir(t), "pg_wal")
		cmd := limited(t, asPostgres(t, program(t), "sidecar", "--socket", socket, "--objectstore", file, "--pgdata", filepath.Dir(pgWAL)))
		cmd.Env = append(os.Environ(), "POD_NAME=main-1")
		s := startSidecarCommand(t, socket, cmd)
		client := wal.NewWALClient(s.dial())
		if err := os.MkdirAll(filepath.Join(pgWAL, "archive_status"), 0o755); err != nil {
			t.Fatal(err)
		}
		next := uint64(1)
		return func(size int64, count uint64) {
			t.Helper()
			for n := next; n < next+count; n++ {
				path := filepath.Join(pgWAL, segmentName(1, n, size))
				if err := os.Link(memorySegment(t, size, content, n), path); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(pgWAL, "archive_status", filepath.Base(path)+".ready"), nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			for last := next + count; next < last; next++ {
				name := segmentName(1, next, size)
				_, err := client.Archive(t.Context(), &wal.WALArchiveRequest{ClusterDefinition: []byte(mainCluster), SourceFileName: filepath.Join(pgWAL, name)})
				if err == nil {
					err = archived(pgWAL, name)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}, func() int { return peakMemory(s.cmd.Process.Pid) }
	}
	t.Run("1000", func(t *testing.T) {
		archive, peak := archiver(t, "wal: {compression: lz4, maxParallel: 8}", mib)
		archive(mib, 250)
		first := peak()
		archive(mib, 750)
		t.Logf("1,000 segments of 1 MiB: %d KiB after 250, %d KiB after all", first, peak())
		if peak() > first+8<<10 {
			t.Error("memory grows with the number of segments")
		}
	})
	for _, codec := range codecs {
		t.Run(cmp.Or(codec.name, "none"), func(t *testing.T) {
			count, content := uint64(10), int64(16*mib)
			if slow := codec.name == "xz" || codec.name == "bzip2"; slow {
				count, content = 3, 2*mib
			}
			archive, peak := archiver(t, fmt.Sprintf("wal: {compression: %q, maxParallel: 8}", codec.name), content)
			archive(16*mib, count)
			t.Logf("%d segments of 16 MiB, maxParallel 8: %d KiB", count, peak())
			if peak() > 50<<10 {
				t.Error("that is more than README says")
			}
		})
	}
	t.Run("256 MiB", func(t *testing.T) {
		archive, peak := archiver(t, "wal: {compression: lz4}", 256*mib)
		archive(256*mib, 1)
		t.Logf("a segment of 256 MiB: %d KiB", peak())
		if peak() > (memoryLimit-programFile)>>10 {
			t.Error("that is more than README says")
		}
	})
}

// A database of 400 MB in many files is backed up, and restored, within 64 MiB. MEMORY_FILES
// sets their number: 200,000 are what README speaks of, and take some minutes on a slow disk.
func TestMemoryBackupRestore(t *testing.T) {
	files := 40_000
	if n, err := strconv.Atoi(os.Getenv("MEMORY_FILES")); err == nil {
		files = n
	}
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket, "data: {compression: gzip, immediateCheckpoint: true}")
	p := startPostgres(t, pgOptions{Checksums: true, ArchiveCommand: archivingTo(t, file)})
	p.pgbenchTables(10)
	p.Exec("CHECKPOINT")
	accounts, err := os.ReadFile(filepath.Join(p.Dir, p.Query("SELECT pg_relation_filepath('pgbench_accounts')")))
	if err != nil {
		t.Fatal(err)
	}
	// What PostgreSQL does not know does not bother it, and is stored like a relation.
	dir := filepath.Join(p.Dir, "base", p.Query("SELECT oid FROM pg_database WHERE datname = 'postgres'"))
	name := func(dir string, n int) string { return filepath.Join(dir, strconv.Itoa(1_000_000+n)) }
	for n := range files {
		var err error
		switch {
		case n < 2:
			err = os.WriteFile(name(dir, n), accounts, 0o644)
		case n < 100:
			err = os.WriteFile(name(dir, n), accounts[:n], 0o644)
		default: // a link is made, and removed, faster than a file
			err = os.Link(name(dir, 2+n%98), name(dir, n))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	socket := filepath.Join(testDir(t), "s")
	cmd := limited(t, asPostgres(t, program(t), "sidecar", "--socket", socket, "--objectstore", file, "--pgdata", p.Dir))
	cmd.Env = append(append(os.Environ(), p.Env()...), "POD_NAME=main-1")
	s := startSidecarCommand(t, socket, cmd)
	if _, err := backup.NewBackupClient(s.dial()).Backup(t.Context(), &backup.BackupRequest{ClusterDefinition: []byte(mainCluster)}); err != nil {
		t.Fatal(err)
	}
	restored := filepath.Join(testDir(t), "pgdata") // on a disk: what lies on a tmpfs counts as the memory of whoever writes it
	backupPeak, restorePeak := peakMemory(s.cmd.Process.Pid), runLimited(t, asPostgres(t, program(t), "restore", "--objectstore", file, "--server-name", "main", restored))
	t.Logf("backup %d KiB, restore %d KiB", backupPeak, restorePeak)
	if max(backupPeak, restorePeak) > (memoryLimit-programFile)>>10 {
		t.Error("that is more than README says")
	}
	for _, n := range []int{1, 99, files - 1} {
		was, err := os.Stat(name(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(name(filepath.Join(restored, "base", filepath.Base(dir)), n)); err != nil || info.Size() != was.Size() {
			t.Errorf("file %d: %v, %v", n, info, err)
		}
	}
}

// memorySegment is the file of a segment with so many bytes of content, of which there are a few.
func memorySegment(t testing.TB, size, content int64, n uint64) string {
	t.Helper()
	name := segmentName(1, n%4, size)
	path := filepath.Join(testRoot, fmt.Sprintf("%d-%d-%s", size, content, name))
	if !fileExists(path) {
		b := segment(name, size, 7, n%4)
		clear(b[content:])
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// SIGTERM: a WAL file in flight gets done, a backup is cancelled and says FAILED.
func TestSidecarStops(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	file := storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, "data: {immediateCheckpoint: true}")
	p := startPostgres(t, pgOptions{ArchiveCommand: "true"})
	s := startSidecar(t, filepath.Join(testDir(t), "s"), file, p.Dir, p.Env()...)
	conn := s.dial()
	stall := proxy.add(fault{Method: http.MethodPut, Path: regexp.MustCompile(`/base/.*partNumber=`), Do: stallRequest, Times: 1})
	slow := proxy.add(fault{Method: http.MethodPut, Path: regexp.MustCompile(`/wals/`), Do: delayRequest, Delay: 2 * time.Second, Times: 1})

	backedUp, archived := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := backup.NewBackupClient(conn).Backup(context.Background(), &backup.BackupRequest{ClusterDefinition: []byte(mainCluster)})
		backedUp <- err
	}()
	waitFor(t, "the upload of the data", func() bool { return proxy.hits(stall) == 1 })
	path := writeWAL(t, seg5, segment(seg5, mib, 7, 1))
	go func() {
		_, err := wal.NewWALClient(conn).Archive(context.Background(), &wal.WALArchiveRequest{ClusterDefinition: []byte(mainCluster), SourceFileName: path})
		archived <- err
	}()
	waitFor(t, "the upload of the WAL file", func() bool { return proxy.hits(slow) == 1 })
	s.cmd.Process.Signal(syscall.SIGTERM)
	if err := <-archived; err != nil {
		t.Errorf("the WAL file in flight: %v", err)
	}
	if err := <-backedUp; err == nil {
		t.Error("the cancelled backup was reported as good")
	}
	<-s.ended
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	store := openTestStore(t, file)
	mustFetch(t, store, seg5, segment(seg5, mib, 7, 1))
	catalog, err := store.Catalog(t.Context())
	if err != nil || len(catalog.Backups) != 1 || catalog.Backups[0].Status != statusFailed || len(catalog.Incomplete) != 0 {
		t.Errorf("catalog %+v, %v", catalog, err)
	}
	if left := server.uploads(t, bucket); len(left) != 0 {
		t.Errorf("unfinished uploads stay: %q", left)
	}
}

// ---------------------------------------------------------------------------
// Configuration from files
// ---------------------------------------------------------------------------

func TestFileSourceErrors(t *testing.T) {
	const store = "apiVersion: barmancloud.cnpg.io/v1\nkind: ObjectStore\nmetadata: {name: store}\nspec:\n  configuration:\n    destinationPath: s3://b/\n"
	const keys = "    s3Credentials:\n      accessKeyId: {name: keys, key: ID}\n      secretAccessKey: {name: keys, key: SECRET}\n"
	const secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: keys}\nstringData: {ID: a, SECRET: b}\n"
	for name, c := range map[string]struct {
		manifest string
		words    []string // none: no error
	}{
		"good":                 {store + keys + secret, nil},
		"no ObjectStore":       {secret, []string{"holds no ObjectStore"}},
		"no YAML":              {"{", []string{"document 1"}},
		"azure":                {store + "    azureCredentials: {connectionString: {name: a, key: b}}\n", []string{"S3 only", "azureCredentials"}},
		"google":               {store + "    googleCredentials: {gkeEnvironment: true}\n", []string{"S3 only", "googleCredentials"}},
		"no credentials":       {store, []string{"no credentials defined", "s3Credentials"}},
		"half the keys":        {store + "    s3Credentials:\n      accessKeyId: {name: keys, key: ID}\n" + secret, []string{"missing secret access key"}},
		"no Secret":            {store + keys, []string{"Secret keys", "not found"}},
		"no key in the Secret": {store + keys + strings.Replace(secret, "SECRET", "SECRETS", 1), []string{"missing key SECRET, inside secret keys", "ID, SECRETS"}},
		"serverName":           {store + "    serverName: x\n" + keys + secret, []string{"plugin parameter serverName"}},
		"not s3":               {strings.Replace(store, "s3://b/", "gs://b/", 1) + keys + secret, []string{`destinationPath "gs://b/"`}},
		"no bucket":            {strings.Replace(store, "s3://b/", "s3:///x", 1) + keys + secret, []string{"s3://bucket[/path]"}},
		"unknown argument":     {store + "    data: {additionalCommandArgs: [--snapshot-instance=x]}\n" + keys + secret, []string{"data.additionalCommandArgs", "snapshot-instance"}},
		"unknown compression":  {store + "    wal: {compression: rar}\n" + keys + secret, []string{`"rar"`}},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(testDir(t), "store.yaml")
			if err := os.WriteFile(file, []byte(c.manifest), 0o600); err != nil {
				t.Fatal(err)
			}
			source, err := newFileSource(file)
			if err == nil {
				_, err = source.Store(t.Context(), StoreRef{"store", "main"})
			}
			if c.words == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			mustSay(t, err, nil, c.words...)
		})
	}
	source, err := newFileSource(storeFile(t, testS3(t), "b"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = source.Store(t.Context(), StoreRef{"stor", "main"})
	mustSay(t, err, errNoObject, "ObjectStore stor", "which holds store")
	for _, bad := range []string{"", "a/b"} {
		_, err = source.Store(t.Context(), StoreRef{"store", bad})
		mustSay(t, err, nil, "serverName")
	}
	_, err = newFileSource("/no/such/file")
	mustSay(t, err, os.ErrNotExist, "/no/such/file")
}

// A store keeps its connections while its configuration stays, and is opened anew when a key changes.
func TestFileSourceFollowsTheFile(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	wrong := *server
	wrong.SecretKey = "rotated away"
	file := storeFile(t, &wrong, bucket)
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	ref := StoreRef{"store", "main"}
	first, err := source.Store(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := source.Store(t.Context(), ref); again != first {
		t.Error("the store was opened twice")
	}
	if other, _ := source.Store(t.Context(), StoreRef{"store", "other"}); other == first {
		t.Error("two server names share one store")
	}
	_, err = first.Catalog(t.Context())
	mustSay(t, err, errDenied)
	good, err := os.ReadFile(storeFile(t, server, bucket))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Minute)
	if err := os.Chtimes(file, later, later); err != nil {
		t.Fatal(err)
	}
	second, err := source.Store(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Catalog(t.Context()); err != nil {
		t.Error(err)
	}
}

// ---------------------------------------------------------------------------
// Configuration from Kubernetes
// ---------------------------------------------------------------------------

// faultyAPI counts requests to the API server and can take it away.
type faultyAPI struct {
	http.RoundTripper
	requests atomic.Int64
	away     atomic.Bool
}

func (f *faultyAPI) RoundTrip(r *http.Request) (*http.Response, error) {
	f.requests.Add(1)
	if f.away.Load() {
		return nil, errors.New("the API server is away")
	}
	return f.RoundTripper.RoundTrip(r)
}

// The sidecar under the cluster's own token: it sees what the Role names as soon as it
// may, follows changes without asking again, and goes on while the API server is away.
func TestAPISidecarConfiguration(t *testing.T) {
	a := testAPI(t)
	server, bucket := testS3(t), newBucket(t)
	a.serviceAccount("main")
	config := a.asServiceAccount(a.namespace, "main")
	faulty := &faultyAPI{}
	config.Wrap(func(rt http.RoundTripper) http.RoundTripper { faulty.RoundTripper = rt; return faulty })
	source, err := kubeSourceFor(t.Context(), config, a.namespace, "main")
	if err != nil {
		t.Fatal(err)
	}
	ref := StoreRef{"store-a", "main"}
	w := testWALService(t, source, "main-1", testDir(t))
	definition := []byte(strings.Replace(mainCluster, `"store"`, `"store-a"`, 1))
	archive := func(name string) error {
		_, err := w.Archive(t.Context(), &wal.WALArchiveRequest{ClusterDefinition: definition, SourceFileName: writeWAL(t, name, segment(name, mib, 7, 1))})
		return err
	}

	// no Role yet
	if err := archive(seg5); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "store-a") || !strings.Contains(err.Error(), "Role") {
		t.Errorf("without a Role: %v", err)
	}
	a.create(a.storeYAML("store-a", fmt.Sprintf("configuration: {destinationPath: 's3://%s', endpointURL: '%s'}", bucket, server.Endpoint)))
	a.start(a.install()).mustProceed(a.cluster("main", archives))
	waitFor(t, "the authorizer to see the Role", func() bool { return !errors.Is(second(source.Store(t.Context(), ref)), errForbidden) })
	if err := archive(seg5); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "Secret "+a.namespace+"/store-a-keys") {
		t.Errorf("without the Secret: %v", err)
	}
	keys := func(secret string) {
		a.apply(fromYAML(t, fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: store-a-keys, namespace: %s}\nstringData: {ACCESS_KEY_ID: %s, ACCESS_SECRET_KEY: %s}",
			a.namespace, server.AccessKey, secret)))
	}
	keys("wrong")
	waitFor(t, "the Secret", func() bool { return status.Code(archive(seg5)) == codes.PermissionDenied })
	keys(server.SecretKey) // rotated, and in use without a restart
	waitFor(t, "the new key", func() bool { return archive(seg5) == nil })

	// no API request on the path of a segment
	before := faulty.requests.Load()
	for n := range 20 {
		if err := archive(segmentName(1, uint64(100+n), mib)); err != nil {
			t.Fatal(err)
		}
	}
	if n := faulty.requests.Load() - before; n != 0 {
		t.Errorf("20 segments made %d requests to the API server", n)
	}

	// the recovery window of one server leaves the others alone
	if _, err := a.client.Resource(objectStores).Namespace(a.namespace).Patch(t.Context(), "store-a", types.MergePatchType,
		[]byte(`{"status":{"serverRecoveryWindow":{"other":{"lastFailedBackupTime":"2026-01-02T03:04:05Z"}}}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	end := metav1.NewTime(time.Date(2026, 11, 22, 15, 45, 17, 0, time.UTC))
	if err := source.UpdateStatus(t.Context(), ref, func(w *RecoveryWindow, _ *ServerStatus) {
		w.FirstRecoverabilityPoint, w.LastSuccessfulBackupTime = &end, &end
	}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the status to come back", func() bool {
		st, err := source.Status(t.Context(), "store-a")
		return err == nil && st.ServerRecoveryWindow["main"].LastSuccessfulBackupTime.Equal(&end)
	})
	if err := source.UpdateStatus(t.Context(), ref, func(w *RecoveryWindow, _ *ServerStatus) { now := metav1.Now(); w.LastFailedBackupTime = &now }); err != nil {
		t.Fatal(err)
	}
	windows := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status.ServerRecoveryWindow
	if m := windows["main"]; !m.FirstRecoverabilityPoint.Equal(&end) || !m.LastSuccessfulBackupTime.Equal(&end) || m.LastFailedBackupTime == nil ||
		windows["other"].LastFailedBackupTime == nil {
		t.Errorf("windows %+v", windows)
	}

	faulty.away.Store(true)
	if err := archive(seg6); err != nil {
		t.Errorf("while the API server is away: %v", err)
	}
	faulty.away.Store(false)

	// a deleted store is an error that names it
	a.remove("ObjectStore", a.namespace, "store-a")
	waitFor(t, "the deletion", func() bool {
		err := archive("000000010000000000000007")
		return status.Code(err) == codes.FailedPrecondition && strings.Contains(err.Error(), "ObjectStore "+a.namespace+"/store-a: not found")
	})
}

// ---------------------------------------------------------------------------
// Looking after the archive
// ---------------------------------------------------------------------------

// cloudNativePG installs the operator's CustomResourceDefinitions, and gives a ServiceAccount
// what of CloudNativePG's own Role for instances (its pkg/specs/roles.go) the sidecar uses.
func (a *api) cloudNativePG(account string) {
	a.t.Helper()
	var module struct{ Dir string }
	if err := json.Unmarshal([]byte(mustRun(a.t, exec.Command("go", "mod", "download", "-json", "github.com/cloudnative-pg/cloudnative-pg@v1.30.0"))), &module); err != nil {
		a.t.Fatal(err)
	}
	for _, kind := range []string{"clusters", "backups"} {
		crd := filepath.Join(testDir(a.t), kind+".yaml")
		content, err := os.ReadFile(filepath.Join(module.Dir, "config/crd/bases/postgresql.cnpg.io_"+kind+".yaml"))
		if err != nil {
			a.t.Fatal(err)
		}
		mustWrite(a.t, crd, strings.TrimPrefix(string(content), "---\n"))
		a.installCRD(crd, nil)
	}
	a.serviceAccount(account)
	a.apply(fromYAML(a.t, fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: %s, namespace: %s}
rules:
- {apiGroups: [postgresql.cnpg.io], resources: [clusters], resourceNames: [%[1]s], verbs: [get, list, watch]}
- {apiGroups: [postgresql.cnpg.io], resources: [backups], verbs: [list, get, delete]}
- {apiGroups: [postgresql.cnpg.io], resources: [backups/status], verbs: [get, patch, update]}
- {apiGroups: [""], resources: [events], verbs: [create, patch]}`, account, a.namespace)))
	a.apply(fromYAML(a.t, fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: %s, namespace: %s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: %[1]s}
subjects: [{kind: ServiceAccount, name: %[1]s}]`, account, a.namespace)))
}

// putStatus sets the status of an object.
func (a *api) putStatus(u *unstructured.Unstructured, status string) *unstructured.Unstructured {
	a.t.Helper()
	updated, err := a.on(u).Patch(a.t.Context(), u.GetName(), types.MergePatchType, []byte(`{"status":`+status+`}`), metav1.PatchOptions{}, "status")
	if err != nil {
		a.t.Fatal(err)
	}
	return updated
}

// patch changes an object of the namespace.
func (a *api) patch(kind, name, patch string) {
	a.t.Helper()
	if _, err := a.client.Resource(resources[kind]).Namespace(a.namespace).Patch(a.t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		a.t.Fatal(err)
	}
}

// told lists the Events on the Clusters of the namespace, as TYPE REASON.
func (a *api) told() (told []string) {
	a.t.Helper()
	list, err := a.client.Resource(events).Namespace(a.namespace).List(a.t.Context(), metav1.ListOptions{})
	if err != nil {
		a.t.Fatal(err)
	}
	for _, u := range list.Items {
		e := as[corev1.Event](a.t, &u)
		if e.Reason == "ObjectStoreNotReady" {
			continue // said by the operator mode
		}
		told = append(told, e.Type+" "+e.Reason)
		if e.InvolvedObject.Kind != "Cluster" || e.InvolvedObject.UID == "" || e.Message == "" {
			a.t.Errorf("the Event %s is about %s %s: %q", e.Reason, e.InvolvedObject.Kind, e.InvolvedObject.UID, e.Message)
		}
	}
	slices.Sort(told)
	return told
}

// maintained is a Cluster main with its store-a, its primary's sidecar, and what that may do.
func (a *api) maintained(server *s3Server, bucket string) (*report, *kubeSource, *Store) {
	t := a.t
	t.Helper()
	a.cloudNativePG("main")
	a.create(a.storeYAML("store-a", fmt.Sprintf("configuration: {destinationPath: 's3://%s', endpointURL: '%s'}", bucket, server.Endpoint)))
	a.apply(fromYAML(t, fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: store-a-keys, namespace: %s}\nstringData: {ACCESS_KEY_ID: %s, ACCESS_SECRET_KEY: %s}",
		a.namespace, server.AccessKey, server.SecretKey)))
	cluster := a.create(a.cluster("main", archives+"instances: 1\nstorage: {size: 1Gi}\n"))
	cluster = a.putStatus(cluster, `{"currentPrimary":"main-1"}`)
	a.start(a.install()).mustProceed(cluster)
	source, err := kubeSourceFor(t.Context(), a.asServiceAccount(a.namespace, "main"), a.namespace, "main")
	if err != nil {
		t.Fatal(err)
	}
	var store *Store
	waitFor(t, "the authorizer to see the Roles", func() bool {
		var err error
		store, err = source.Store(t.Context(), StoreRef{"store-a", "main"})
		_, err2 := source.ownCluster(t.Context())
		return err == nil && err2 == nil
	})
	return newReport(source, testDir(t)), source, store
}

func (a *api) conditions(server string) map[string]string {
	a.t.Helper()
	found := map[string]string{}
	for _, c := range as[ObjectStore](a.t, a.read("ObjectStore", a.namespace, "store-a")).Status.Servers[server].Conditions {
		found[c.Type] = string(c.Status) + " " + c.Reason
	}
	return found
}

// The primary's sidecar keeps the recovery window and the Backup objects in step with the
// bucket. It deletes no Backup whose backup may lie in another place.
func TestAPIMaintenance(t *testing.T) {
	a := testAPI(t)
	server, bucket := testS3(t), newBucket(t)
	r, kube, store := a.maintained(server, bucket)
	ref := StoreRef{"store-a", "main"}
	var ends []time.Time
	for _, id := range []string{"20260101T100000", "20260201T100000"} {
		b := testBackup(t, server, bucket, store, map[string][]byte{"data.tar": {}}, func(b *BackupInfo) {
			b.ID = id
			at, _ := time.Parse(backupIDLayout, id)
			b.BeginTime, b.EndTime = at, at.Add(time.Minute)
		})
		ends = append(ends, b.EndTime)
	}
	server.write(t, bucket, "main/base/20260301T100000/data.tar", []byte("deletion was interrupted"))
	info, err := store.ReadBackupInfo(t.Context(), "20260201T100000")
	if err != nil {
		t.Fatal(err)
	}
	uid := string(a.read("Cluster", a.namespace, "main").GetUID())
	here := server.Endpoint + " s3://" + bucket + "/main"
	for name, c := range map[string]struct{ id, wal, uid, place, phase, cluster string }{
		"here-there":        {"20260101T100000", info.BeginWAL, uid, here, "completed", "main"},
		"here-gone":         {"20250101T100000", info.BeginWAL, uid, here, "completed", "main"},
		"here-half-gone":    {"20260301T100000", info.BeginWAL, uid, here, "completed", "main"},
		"elsewhere":         {"20250101T100000", info.BeginWAL, uid, "http://old s3://" + bucket + "/main", "completed", "main"},
		"original-there":    {"20260201T100000", info.BeginWAL, uid, "", "completed", "main"},
		"original-like":     {"20260101T100000", "0000000100000000000000FF", uid, "", "completed", "main"},
		"original-gone":     {"20250101T100000", info.BeginWAL, uid, "", "completed", "main"},
		"another-life":      {"20250101T100000", info.BeginWAL, "another uid", here, "completed", "main"},
		"of-another":        {"20250101T100000", info.BeginWAL, uid, here, "completed", "other"},
		"still-in-progress": {"", "", uid, here, "running", "main"},
	} {
		b := a.create(fromYAML(t, fmt.Sprintf("apiVersion: postgresql.cnpg.io/v1\nkind: Backup\nmetadata: {name: %s, namespace: %s}\nspec: {cluster: {name: %s}, method: plugin}",
			name, a.namespace, c.cluster)))
		metadata := map[string]string{"pluginName": PluginName, "clusterUID": c.uid}
		if c.place != "" {
			metadata["place"] = c.place
		}
		a.putStatus(b, string(toJSON(t, map[string]any{"phase": c.phase, "backupId": c.id, "beginWal": c.wal, "pluginMetadata": metadata})))
	}
	maintain := func(instance string, acts bool) error {
		t.Helper()
		pause, err := r.maintain(t.Context(), kube, instance)
		if acts != (pause > 0) {
			t.Errorf("maintenance in %s: %v, %v", instance, pause, err)
		}
		return errors.Join(err, r.tell(t.Context()))
	}
	left := func() (names []string) {
		list, err := a.client.Resource(resources["Backup"]).Namespace(a.namespace).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range list.Items {
			names = append(names, b.GetName())
		}
		return names
	}
	all := left()

	// not on a standby, and not before it is known whose archive this is
	if err := maintain("main-2", false); err != nil {
		t.Error(err)
	}
	marker := filepath.Join(r.pgdata, emptyArchiveMarker)
	mustWrite(t, marker, "")
	if err := maintain("main-1", false); err != nil {
		t.Error(err)
	}
	equal(t, "Backups", left(), all)
	os.Remove(marker)

	if err := maintain("main-1", true); err != nil {
		t.Fatal(err)
	}
	equal(t, "Backups", left(), slices.DeleteFunc(slices.Clone(all), func(n string) bool { return strings.HasPrefix(n, "here-") && n != "here-there" }))
	windows := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status.ServerRecoveryWindow
	if w := windows["main"]; !w.FirstRecoverabilityPoint.Time.Equal(ends[0]) || !w.LastSuccessfulBackupTime.Time.Equal(ends[1]) || w.LastFailedBackupTime != nil || len(windows) != 1 {
		t.Errorf("recovery window %+v", windows)
	}
	if got := a.conditions("main"); got[conditionRetention] != "True Succeeded" {
		t.Errorf("conditions %q", got)
	}

	// what was seen here and goes, goes with its object
	server.remove(t, bucket, "main/base/20260201T100000/backup.info")
	server.remove(t, bucket, "main/base/20260201T100000/data.tar")
	if err := maintain("main-1", true); err != nil {
		t.Fatal(err)
	}
	equal(t, "Backups", left(), slices.DeleteFunc(slices.Clone(all), func(n string) bool {
		return strings.HasPrefix(n, "here-") && n != "here-there" || n == "original-there"
	}))

	// WAL that is missing behind the first segment, 3, of the backup
	server.write(t, bucket, store.walPrefix("000000010000000000000006"), nil)
	mustWrite(t, filepath.Join(r.pgdata, "pg_wal", "archive_status", "000000010000000000000004.ready"), "")
	if err := maintain("main-1", true); err != nil {
		t.Fatal(err)
	}
	st := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status.Servers["main"]
	if st.MissingWAL != 1 || !slices.Equal(st.WALGaps, []string{"000000010000000000000005"}) || a.conditions("main")[conditionWAL] != "False WALGap" {
		t.Errorf("gaps %q, %d segments, conditions %q", st.WALGaps, st.MissingWAL, a.conditions("main"))
	}
	equal(t, "Events", a.told(), []string{"Warning WALGap"})
	server.write(t, bucket, store.walPrefix("000000010000000000000005"), nil)
	if err := maintain("main-1", true); err != nil {
		t.Fatal(err)
	}
	equal(t, "Events", a.told(), []string{"Normal WALComplete", "Warning WALGap"})

	// a failure is told once, and once that it is over
	keys := a.read("Secret", a.namespace, "store-a-keys")
	a.remove("Secret", a.namespace, "store-a-keys")
	waitFor(t, "the sidecar to see it", func() bool { return errors.Is(second(kube.Store(t.Context(), ref)), errNoObject) })
	for range 2 {
		mustSay(t, maintain("main-1", true), errNoObject, "Secret "+a.namespace+"/store-a-keys")
	}
	equal(t, "Events", a.told(), []string{"Normal WALComplete", "Warning RetentionPolicyFailed", "Warning WALGap"})
	if got := a.conditions("main"); got[conditionRetention] != "False RetentionPolicyFailed" {
		t.Errorf("conditions %q", got)
	}
	// the next process knows that it is told
	r = newReport(kube, r.pgdata)
	waitFor(t, "the status to come back", func() bool {
		st, err := kube.Status(t.Context(), "store-a")
		return err == nil && meta.IsStatusConditionFalse(st.Servers["main"].Conditions, conditionRetention)
	})
	maintain("main-1", true)
	equal(t, "Events", a.told(), []string{"Normal WALComplete", "Warning RetentionPolicyFailed", "Warning WALGap"})
	keys.SetResourceVersion("")
	a.create(keys)
	waitFor(t, "the sidecar to see it", func() bool { return second(kube.Store(t.Context(), ref)) == nil })
	if err := maintain("main-1", true); err != nil {
		t.Fatal(err)
	}
	equal(t, "Events", a.told(), []string{"Normal RetentionApplied", "Normal WALComplete", "Warning RetentionPolicyFailed", "Warning WALGap"})
}

// The housekeeping of a running sidecar: at once, and woken by what goes wrong.
func TestAPIHousekeeping(t *testing.T) {
	a := testAPI(t)
	server, bucket := testS3(t), newBucket(t)
	r, _, store := a.maintained(server, bucket)
	ref := StoreRef{"store-a", "main"}
	b := testBackup(t, server, bucket, store, map[string][]byte{"data.tar": {}})
	r.killed = true
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); r.housekeep(ctx, "main-1") }()
	status := func() ObjectStoreStatus {
		return as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status
	}
	waitFor(t, "the recovery window", func() bool {
		w := status().ServerRecoveryWindow["main"]
		return w.FirstRecoverabilityPoint != nil && w.FirstRecoverabilityPoint.Time.Equal(b.EndTime)
	})
	waitFor(t, "the Event of a sidecar that was killed", func() bool { return slices.Contains(a.told(), "Warning SidecarKilled") })
	r.archived(&Cluster{}, ref, "000000010000000000000001", time.Second, errDenied)
	waitFor(t, "the Event of archiving that fails", func() bool { return slices.Contains(a.told(), "Warning AccessDenied") })
	waitFor(t, "the conditions", func() bool {
		c := a.conditions("main")
		return c[conditionArchiving] == "False AccessDenied" && c[conditionRetention] == "True Succeeded" && c[conditionWAL] == "True Succeeded"
	})
	// as a failed restore does, while the housekeeper has been woken to do the same
	r.found(ref, conditionRestored, "RestoreFailed", errServer)
	if err := r.tell(t.Context()); err != nil {
		t.Error(err)
	}
	stop()
	<-ended
	for _, event := range []string{"Warning SidecarKilled", "Warning RestoreFailed"} {
		if n := len(slices.DeleteFunc(a.told(), func(e string) bool { return e != event })); n != 1 {
			t.Errorf("the Event %s was written %d times", event, n)
		}
	}
}

// What fails and works by turns, many times a second, gives few Events.
func TestAPIFewEvents(t *testing.T) {
	a := testAPI(t)
	server, bucket := testS3(t), newBucket(t)
	r, _, _ := a.maintained(server, bucket)
	archived := func(err error) { r.archived(&Cluster{}, StoreRef{"store-a", "main"}, seg5, time.Second, err) }
	archived(errDenied)
	if err := r.tell(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 15*time.Second)
	defer stop()
	go func() {
		for n := 0; sleep(ctx, 50*time.Millisecond) == nil; n++ {
			archived([]error{nil, errDenied}[n%2])
		}
	}()
	r.housekeep(ctx, "main-2")
	if n := len(a.told()); n == 0 || n > 6 {
		t.Errorf("%d Events in 15 seconds", n)
	}
}

// Each Pod tells what it has found until the status shows it. Then another Pod may have newer
// words, after a failover or a backup of another instance, and those stay.
func TestAPIFormerPrimary(t *testing.T) {
	a := testAPI(t)
	server, bucket := testS3(t), newBucket(t)
	former, kube, _ := a.maintained(server, bucket)
	primary, ref := newReport(kube, testDir(t)), StoreRef{"store-a", "main"}
	expect := func(what string, r *report, archiving, backup, last string) {
		t.Helper()
		for range 2 { // the second time it sees what it has written
			if err := r.tell(t.Context()); err != nil {
				t.Fatal(err)
			}
			waitFor(t, what, func() bool {
				now := a.read("ObjectStore", a.namespace, "store-a")
				st, err := kube.Status(t.Context(), "store-a")
				return err == nil && reflect.DeepEqual(st, as[ObjectStore](t, now).Status)
			})
		}
		c := a.conditions("main")
		if st, err := kube.Status(t.Context(), "store-a"); err != nil || c[conditionArchiving] != archiving || c[conditionBackup] != backup || st.Servers["main"].LastArchivedWAL != last {
			t.Errorf("%s: %q, %+v, %v", what, c, st.Servers["main"], err)
		}
	}
	first, second := segmentName(1, 5, mib), segmentName(2, 7, mib)
	former.archived(&Cluster{}, ref, first, time.Second, nil)
	former.archived(&Cluster{}, ref, segmentName(1, 6, mib), time.Second, errDenied)
	former.found(ref, conditionBackup, "BackupFailed", errServer)
	expect("the former primary", former, "False AccessDenied", "False BackupFailed", first)
	primary.archived(&Cluster{}, ref, second, time.Second, nil)
	primary.found(ref, conditionBackup, "BackupFailed", nil)
	expect("the primary", primary, "True Succeeded", "True Succeeded", second)
	former.written = time.Time{}
	expect("the former primary goes on", former, "True Succeeded", "True Succeeded", second)
	former.found(ref, conditionBackup, "BackupFailed", errServer)
	expect("a backup of the former primary", former, "True Succeeded", "False BackupFailed", second)
	equal(t, "Events", a.told(), []string{"Normal Archiving", "Normal LastBackupSucceeded", "Warning AccessDenied", "Warning BackupFailed", "Warning BackupFailed"})
}

// In a Pod the subcommands find store, keys and server name by themselves. What a Pod has of
// the API server, its token and CA, is put in its place in a mount namespace.
func TestAPISubcommandsInAPod(t *testing.T) {
	a := testAPI(t)
	if r := run(t, exec.Command("unshare", "--mount", "true")); r.Code != 0 {
		t.Skipf("cannot make a mount namespace: %s", r.Stderr)
	}
	server, bucket := testS3(t), newBucket(t)
	_, _, store := a.maintained(server, bucket)
	testBackup(t, server, bucket, store, map[string][]byte{"data.tar": makeTar(t, plain()...)})
	config, pod := a.asServiceAccount(a.namespace, "main"), testDir(t)
	ca := config.CAData
	if len(ca) == 0 {
		var err error
		if ca, err = os.ReadFile(config.CAFile); err != nil {
			t.Fatal(err)
		}
	}
	mustWrite(t, pod+"/token", config.BearerToken)
	mustWrite(t, pod+"/ca.crt", string(ca))
	api, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	inPod := func(code int, args ...string) string {
		t.Helper()
		cmd := exec.Command("unshare", append([]string{"--mount", "sh", "-c", `mount -t tmpfs none /run && d=/var/run/secrets/kubernetes.io/serviceaccount &&
			mkdir -p $d && cp "$0"/* $d && exec "$@"`, pod, program(t)}, args...)...)
		cmd.Env = append(os.Environ(), "NAMESPACE="+a.namespace, "CLUSTER_NAME=main", "KUBERNETES_SERVICE_HOST="+api.Hostname(), "KUBERNETES_SERVICE_PORT="+api.Port())
		r := run(t, cmd)
		if r.Code != code {
			t.Errorf("%q: exit code %d, not %d: %s%s", args, r.Code, code, r.Stdout, r.Stderr)
		}
		return r.Stdout + r.Stderr
	}
	if out := inPod(0, "check"); !strings.Contains(out, "s3://"+bucket+"/main") || !strings.Contains(out, "ok      delete") {
		t.Error(out)
	}
	if out := inPod(0, "list"); !strings.Contains(out, "20260101T100000") {
		t.Error(out)
	}
	inPod(exitUsage, "restore", pod+"/restored")
	inPod(exitFailed, "verify") // its WAL is an empty file
	if v := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status.Servers["main"].LastVerification; v == nil || v.OK || v.Backups != 1 || len(v.Problems) == 0 {
		t.Errorf("last verification %+v", v)
	}

	// what client-go has to say has the shape of every other line of the log
	a.change("Role", a.namespace, "main", func(role map[string]any) {
		for _, rule := range role["rules"].([]any) {
			rule.(map[string]any)["verbs"] = []any{"get"}
		}
	})
	if out := inPod(0, "check"); !regexp.MustCompile(`(?m)^\{.*forbidden`).MatchString(out) || regexp.MustCompile(`(?m)^[IWEF]\d{4} `).MatchString(out) {
		t.Error(out)
	}
}

// What is wrong with an archive is on the Cluster, as an Event, and in the status of the
// ObjectStore: once for each transition, in words that name the object to mend.
func TestAPISaysWhatIsWrong(t *testing.T) {
	a := testAPI(t)
	server, bucket := testS3(t), newBucket(t)
	r, kube, _ := a.maintained(server, bucket)
	w := testWALService(t, kube, "main-1", r.pgdata)
	w.report = r
	definition := []byte(strings.Replace(mainCluster, `"store"`, `"store-a"`, 1))
	n := uint64(100)
	archive := func() error {
		n++
		_, err := w.Archive(t.Context(), &wal.WALArchiveRequest{ClusterDefinition: definition, SourceFileName: writeWAL(t, segmentName(1, n, mib), segment(segmentName(1, n, mib), mib, 7, 1))})
		return err
	}
	tell := func() {
		t.Helper()
		if err := r.tell(t.Context()); err != nil {
			t.Error(err)
		}
	}
	var events []string
	expect := func(what, server, condition, state, message string, more ...string) {
		t.Helper()
		for range 2 { // level-triggered: the second time there is nothing to do
			tell()
		}
		waitFor(t, "the status to come back to the sidecar", func() bool {
			st, err := kube.Status(t.Context(), "store-a")
			c := meta.FindStatusCondition(st.Servers[server].Conditions, condition)
			return err == nil && c != nil && string(c.Status)+" "+c.Reason == state
		})
		st := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status.Servers[server]
		if c := meta.FindStatusCondition(st.Conditions, condition); !strings.Contains(c.Message, message) {
			t.Errorf("%s: condition %+v does not say %q", what, c, message)
		}
		if c := meta.FindStatusCondition(st.Conditions, condition); c.Status == metav1.ConditionFalse && (st.LastFailure == nil || st.LastFailure.Reason != c.Reason) {
			t.Errorf("%s: last failure %+v", what, st.LastFailure)
		}
		events = append(events, more...)
		slices.Sort(events)
		if told := a.told(); !slices.Equal(told, events) {
			t.Errorf("%s: Events %q, not %q", what, told, events)
		}
	}
	store := func(path, value string) {
		t.Helper()
		a.patch("ObjectStore", "store-a", fmt.Sprintf(`{"spec":{"configuration":{"%s":"%s"}}}`, path, value))
	}
	failing := func(what string, kind codes.Code) {
		t.Helper()
		waitFor(t, what, func() bool { return status.Code(archive()) == kind })
	}

	if err := archive(); err != nil {
		t.Fatal(err)
	}
	expect("all is well", "main", conditionArchiving, "True Succeeded", "")
	if st := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status.Servers["main"]; st.LastArchivedWAL != segmentName(1, n, mib) || st.LastArchivedTime == nil || st.LastFailure != nil {
		t.Errorf("status %+v", st)
	}
	before := a.read("ObjectStore", a.namespace, "store-a").GetResourceVersion()
	for range 20 {
		if err := archive(); err != nil {
			t.Fatal(err)
		}
		tell()
	}
	if a.read("ObjectStore", a.namespace, "store-a").GetResourceVersion() != before {
		t.Error("a segment wrote the status")
	}

	a.patch("Secret", "store-a-keys", `{"stringData":{"ACCESS_SECRET_KEY":"wrong"}}`)
	failing("wrong keys", codes.PermissionDenied)
	expect("wrong keys", "main", conditionArchiving, "False AccessDenied", "Secret store-a-keys", "Warning AccessDenied")
	a.patch("Secret", "store-a-keys", `{"stringData":{"ACCESS_SECRET_KEY":null},"data":{"ACCESS_SECRET_KEY":null}}`)
	failing("a missing key", codes.FailedPrecondition)
	expect("a missing key", "main", conditionArchiving, "False ObjectNotFound", "missing key ACCESS_SECRET_KEY, inside secret store-a-keys", "Warning ObjectNotFound")
	a.patch("Secret", "store-a-keys", fmt.Sprintf(`{"stringData":{"ACCESS_SECRET_KEY":"%s"}}`, server.SecretKey))
	failing("the keys", codes.OK)
	expect("the keys", "main", conditionArchiving, "True Succeeded", "", "Normal Archiving")
	store("destinationPath", "s3://no-such-bucket")
	failing("a missing bucket", codes.FailedPrecondition)
	expect("a missing bucket", "main", conditionArchiving, "False BucketNotFound", `bucket "no-such-bucket" does not exist`, "Warning BucketNotFound")
	store("destinationPath", "s3://"+bucket)
	failing("the bucket", codes.OK)
	expect("the bucket", "main", conditionArchiving, "True Succeeded", "", "Normal Archiving")
	tls := testS3TLS(t)
	store("endpointURL", tls.Endpoint)
	waitFor(t, "a certificate of an unknown CA", func() bool { return strings.Contains(fmt.Sprint(archive()), "endpointCA") })
	expect("a certificate of an unknown CA", "main", conditionArchiving, "False CertificateNotTrusted", "endpointCA of ObjectStore "+a.namespace+"/store-a", "Warning CertificateNotTrusted")
	store("endpointURL", "http://127.0.0.1:1")
	failing("no server", codes.Unavailable)
	tell()
	if told := a.told(); !slices.Equal(told, events) {
		t.Errorf("a failure that may pass is told at once: %q", told)
	}
	r.findings[findingKey{StoreRef{"store-a", "main"}, conditionArchiving}].since = time.Now().Add(-passingPatience)
	expect("no server, and it does not pass", "main", conditionArchiving, "False StoreUnreachable", "is http://127.0.0.1:1 reachable", "Warning StoreUnreachable")
	store("endpointURL", server.Endpoint)
	failing("the server", codes.OK)
	expect("the server", "main", conditionArchiving, "True Succeeded", "", "Normal Archiving")

	// Somebody else's archive: the status under that server name is somebody else's too.
	server.write(t, bucket, "theirs/wals/0000000100000000/000000010000000000000001", nil)
	definition = []byte(strings.Replace(string(definition), `"store-a"`, `"store-a","serverName":"theirs"`, 1))
	mustWrite(t, filepath.Join(r.pgdata, emptyArchiveMarker), "")
	failing("the archive of another cluster", codes.FailedPrecondition)
	expect("the archive of another cluster", "main", conditionArchiving, "False ArchiveNotEmpty", "s3://"+bucket+"/theirs/wals/", "Warning ArchiveNotEmpty")
	if st := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status.Servers; len(st) != 1 {
		t.Errorf("the status of another cluster was written: %+v", st)
	}

	// A restore that fails: its Pod is gone in a moment.
	restore := func(spec string) {
		t.Helper()
		service := &restoreJobService{source: kube, pgdata: filepath.Join(testDir(t), "pgdata"), report: r}
		if _, err := service.Restore(t.Context(), &restorejob.RestoreRequest{ClusterDefinition: []byte(fmt.Sprintf(`{"metadata":{"name":"main"},"spec":{"bootstrap":{"recovery":{"source":"origin"}},
			"externalClusters":[{"name":"origin","plugin":{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store-a","serverName":"theirs"}}}]%s}}`, spec))}); err == nil {
			t.Error("restored from nothing")
		}
	}
	restore("")
	expect("no backup", "main", conditionRestored, "False RestoreFailed", "no target backup found", "Warning RestoreFailed")
	restore(`,"plugins":[{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store-a","serverName":"theirs"}}]`)
	expect("into its own source", "main", conditionRestored, "False ArchiveNotEmpty", "the very place that it is restored from", "Warning ArchiveNotEmpty")

	// Damaged pages do not fail a backup, and are not a secret either.
	service := &backupService{source: kube, instance: "main-1", report: r}
	info := &BackupInfo{ID: "20260101T100000", BadPageCount: 2, BadPages: []string{"base/5/16384:7", "base/5/16384:8"}}
	service.record(t.Context(), StoreRef{"store-a", "main"}, info, nil)
	expect("damaged pages", "main", conditionPages, "False BadPages", "base/5/16384:7 base/5/16384:8", "Warning BadPages")
	// Those of a later backup take their place, but not with every message that PostgreSQL's retries bring.
	long := metav1.NewTime(time.Now().Add(-2 * progressLife).Truncate(time.Second))
	if err := kube.UpdateStatus(t.Context(), StoreRef{"store-a", "main"}, func(_ *RecoveryWindow, s *ServerStatus) { s.LastFailure.Time = long }); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the status to come back to the sidecar", func() bool {
		st, err := kube.Status(t.Context(), "store-a")
		return err == nil && st.Servers["main"].LastFailure.Time.Equal(&long)
	})
	for _, page := range []string{"base/5/2619:3", "base/5/2619:4"} {
		service.record(t.Context(), StoreRef{"store-a", "main"}, &BackupInfo{ID: info.ID, BadPageCount: 2, BadPages: []string{page}}, nil)
		expect("other damaged pages", "main", conditionPages, "False BadPages", "base/5/2619:3")
	}
	service.record(t.Context(), StoreRef{"store-a", "main"}, nil, errServer)
	expect("a backup that failed", "main", conditionBackup, "False BackupFailed", "PostgreSQL", "Warning BackupFailed")
	st := as[ObjectStore](t, a.read("ObjectStore", a.namespace, "store-a")).Status
	if b := st.Servers["main"].LastBackup; b == nil || b.ID != info.ID || b.BadPages != 2 || b.Instance != "main-1" || st.ServerRecoveryWindow["main"].LastFailedBackupTime == nil {
		t.Errorf("status %+v", st)
	}
}

// ---------------------------------------------------------------------------
// The command line
// ---------------------------------------------------------------------------

// Logs have the shape of CloudNativePG's own (FEATURES K9).
func TestLogShape(t *testing.T) {
	file := storeFile(t, testS3(t), "no-such-bucket")
	r := runProgram(t, []string{"POD_NAME=main-1"}, "wal-archive", "--log-level", "debug", "--objectstore", file, "--server-name", "main",
		writeWAL(t, seg5, segment(seg5, mib, 7, 1)))
	if r.Code != exitFailed {
		t.Errorf("exit code %d", r.Code)
	}
	lines := strings.Split(strings.TrimSpace(r.Stderr), "\n")
	var entry map[string]any
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &entry); err != nil {
		t.Fatalf("%v in %q", err, r.Stderr)
	}
	for key, want := range map[string]string{"level": "^error$", "ts": `^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z$`, "msg": "wal-archive failed",
		"logger": PluginName, "logging_pod": "^main-1$", "caller": `^\w+\.go:\d+$`, "error": "no-such-bucket"} {
		if text, _ := entry[key].(string); !regexp.MustCompile(want).MatchString(text) {
			t.Errorf("%s is %q, not %q, in %s", key, text, want, lines[len(lines)-1])
		}
	}
}

func TestCommandLineErrors(t *testing.T) {
	file := storeFile(t, testS3(t), "b")
	for _, c := range []struct {
		args  []string
		code  int
		words string
	}{
		{nil, exitUsage, ""},
		{[]string{"frobnicate"}, exitUsage, `no subcommand "frobnicate"`},
		{[]string{"--help"}, 0, ""},
		{[]string{"backup", "--help"}, 0, "Usage: cnpg-barman-s3 backup"},
		{[]string{"version"}, 0, ""},
		{[]string{"list", "--server-name", "x"}, exitUsage, "--objectstore FILE is missing"},
		{[]string{"list", "--objectstore", file}, exitUsage, "--server-name NAME is missing"},
		{[]string{"list", "--objectstore", "/no/such/file", "--server-name", "x"}, exitFailed, "/no/such/file"},
		{[]string{"list", "--objectstore", file, "--server-name", "x", "-o", "xml"}, exitUsage, "table or json"},
		{[]string{"list", "--frobnicate"}, exitUsage, "frobnicate"},
		{[]string{"wal-archive", "--objectstore", file, "--server-name", "x"}, exitUsage, "takes 1 arguments"},
		{[]string{"sidecar", "--log-level", "loud"}, exitUsage, `"loud" is not one of`},
		{[]string{"sidecar", "--pgdata", "/tmp"}, exitUsage, "NAMESPACE"},
		{[]string{"sidecar", "--pgdata", "/tmp", "--pprof-server=0.0.0.0:6061", "--log-destination", "/x"}, exitUsage, "NAMESPACE"}, // the original's
	} {
		cmd := exec.Command(program(t), c.args...)
		cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "NAMESPACE=") || strings.HasPrefix(e, "PGDATA=") })
		if r := run(t, cmd); r.Code != c.code || !strings.Contains(r.Stderr, c.words) {
			t.Errorf("%q: exit code %d, not %d, with %q", c.args, r.Code, c.code, r.Stderr)
		}
	}
}

// check says of each thing that a store must do whether it works, and leaves nothing behind.
func TestCheck(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	untrusted := testS3TLS(t).Endpoint
	wrong := *server
	wrong.SecretKey = "wrong"
	proxy := startFaultProxy(t, server)
	proxied := func(file string, faults ...fault) func() string {
		return func() string {
			proxy.clear()
			for _, f := range faults {
				proxy.add(f)
			}
			return file
		}
	}
	at := storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket+"/some/path")
	for name, c := range map[string]struct {
		file func() string
		code int
		says []string
	}{
		"good":       {proxied(at), 0, []string{"path-style addressing", "ok      access, list", "ok      clock", "ok      write", "ok      read", "ok      conditional write", "ok      multipart upload", "ok      list uploads", "ok      delete"}},
		"wrong keys": {func() string { return storeFile(t, &wrong, bucket) }, 1, []string{"FAILED  access, list", "Secret keys"}},
		"no bucket":  {func() string { return storeFile(t, server, "no-such-bucket") }, 1, []string{"FAILED  access, list", `bucket "no-such-bucket" does not exist`}},
		"unknown CA": {func() string { return storeFileAt(t, server, untrusted, "s3://"+bucket) }, 1, []string{"FAILED  access, list", `/main/: Get "https://127.0.0.1:`, "set endpointCA"}},
		"wrong style": {func() string {
			return storeFileAt(t, server, strings.Replace(server.Endpoint, "127.0.0.1", "localhost", 1), "s3://"+bucket, "wal: {archiveAdditionalCommandArgs: [--addressing-style=virtual]}")
		}, 1,
			[]string{"virtual-host addressing", "FAILED  access, list", "add --addressing-style=path"}},
		"read only": {proxied(at, fault{Method: http.MethodPut, Do: answerError, HTTP: 403, Code: "AccessDenied"}), 1,
			[]string{"ok      access, list", "FAILED  write", "s3:PutObject", "ok      delete"}},
		"no conditional write": {proxied(at, fault{Method: http.MethodPut, Path: regexp.MustCompile(`/check-\w+(\?|$)`), Skip: 1, Times: 2, Do: answerError, HTTP: 501, Code: "NotImplemented"}), 0,
			[]string{"ok      conditional write this server overwrites"}},
		"no parts": {proxied(at, fault{Method: http.MethodPost, Path: regexp.MustCompile("uploads"), Do: answerError, HTTP: 403, Code: "AccessDenied"}), 1,
			[]string{"FAILED  multipart upload", "s3:AbortMultipartUpload", "ok      delete"}},
		"no deletion": {proxied(at, fault{Method: http.MethodPost, Path: regexp.MustCompile(`\?delete`), Do: answerError, HTTP: 403, Code: "AccessDenied"}), 1,
			[]string{"ok      multipart upload", "FAILED  delete", "s3:DeleteObject"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := runProgram(t, nil, "check", "--objectstore", c.file(), "--server-name", "main")
			if r.Code != c.code {
				t.Errorf("exit code %d, not %d: %s%s", r.Code, c.code, r.Stdout, r.Stderr)
			}
			for _, words := range c.says {
				if !strings.Contains(r.Stdout, words) {
					t.Errorf("does not say %q:\n%s", words, r.Stdout)
				}
			}
			if name == "no deletion" {
				for _, key := range server.keys(t, bucket, "") {
					server.remove(t, bucket, key)
				}
			}
			if left := append(server.keys(t, bucket, ""), server.uploads(t, bucket)...); len(left) != 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// list shows what can be recovered, and what of the WAL is missing.
func TestListShowsTheWAL(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket)
	store := testStoreFile(t, file, "main")
	b := testBackup(t, server, bucket, store, map[string][]byte{"data.tar": {}})
	server.write(t, bucket, store.walPrefix("000000010000000000000005"), nil)
	for output, says := range map[string][]string{
		"table": {"Recovery is possible from " + timestamp(b.EndTime) + " on", "WAL of timeline 1: 000000010000000000000003 to 000000010000000000000005, 2 segments, 1 missing", "  missing: 000000010000000000000004"},
		"json":  {`"firstRecoverabilityPoint": "` + timestamp(b.EndTime), `"missing": 1`, `"000000010000000000000004"`},
	} {
		r := runProgram(t, nil, "list", "--objectstore", file, "--server-name", "main", "-o", output)
		for _, words := range says {
			if r.Code != 0 || !strings.Contains(r.Stdout, words) {
				t.Errorf("%s: exit code %d, does not say %q:\n%s%s", output, r.Code, words, r.Stdout, r.Stderr)
			}
		}
	}
}

// The alerts of examples/ are about metrics that there are, and each one fires when it should.
func TestAlerts(t *testing.T) {
	content, err := os.ReadFile("examples/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defined, err := (&metricsService{}).Define(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile(metricPrefix+`\w+`).FindAllString(string(content), -1) {
		if !slices.ContainsFunc(defined.Metrics, func(m *metrics.Metric) bool { return m.FqName == name }) {
			t.Errorf("there is no metric %s", name)
		}
	}
	dir := testDir(t)
	rules, err := yaml.Marshal(fromYAML(t, string(content)).Object["spec"])
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(dir, "rules.yaml"), string(rules))
	// Two instances of one Cluster; the clock of the test begins in 1970.
	var test strings.Builder
	test.WriteString("rule_files: [rules.yaml]\nevaluation_interval: 5m\ntests:\n")
	for _, c := range []struct{ alert, series, values, labels, at string }{
		{"BarmanWALNotArchived", "oldest_waiting_wal_age_seconds", "0 300 600 900 1200", `pod="pg-1", severity="critical"`, "20m"},
		{"BarmanConditionFailed", `condition_failed{type="Archiving",`, "0 1x6", `cluster="pg", severity="warning", type="Archiving"`, "30m"},
		{"BarmanBackupTooOld", "last_available_backup_timestamp", "600x500", `cluster="pg", severity="warning"`, "37h"},
		{"BarmanNoBackup", "last_available_backup_timestamp", "0x300", `cluster="pg", severity="warning"`, "24h"},
		{"BarmanWALMissing", "missing_wal_segments", "0 0 2 2", `cluster="pg", severity="critical"`, "10m"},
		{"BarmanBadPages", "bad_pages", "0 0 2 2", `cluster="pg", severity="critical"`, "10m"},
		{"BarmanBackupFailed", "last_failed_backup_timestamp", "0 0 500 500", `cluster="pg", severity="warning"`, "10m"},
		{"BarmanStoreCertificateEnds", "s3_certificate_expiry_timestamp_seconds", "0 0 100000 100000", `pod="pg-1", severity="warning"`, "10m"},
		{"BarmanStoreErrors", `s3_errors_total{code="SlowDown",`, "0+60x20", `code="SlowDown", pod="pg-1", severity="warning"`, "30m"},
	} {
		if !strings.Contains(c.series, "{") {
			c.series += "{"
		}
		fmt.Fprintf(&test, "- interval: 5m\n  input_series:\n  - {series: '%s%snamespace=\"db\", pod=\"pg-1\"}', values: '%s'}\n", metricPrefix, c.series, c.values)
		if c.alert == "BarmanBackupFailed" {
			fmt.Fprintf(&test, "  - {series: '%slast_available_backup_timestamp{namespace=\"db\", pod=\"pg-1\"}', values: '10x10'}\n", metricPrefix)
		}
		fmt.Fprintf(&test, "  promql_expr_test:\n  - {expr: 'count(ALERTS{alertname=\"%s\", alertstate=\"firing\", namespace=\"db\", %s})', eval_time: %s, exp_samples: [{labels: '{}', value: 1}]}\n", c.alert, c.labels, c.at)
		fmt.Fprintf(&test, "  - {expr: 'count(ALERTS{alertname=\"%s\", alertstate=\"firing\"})', eval_time: 5m, exp_samples: []}\n", c.alert)
	}
	mustWrite(t, filepath.Join(dir, "test.yaml"), test.String())
	mustRun(t, exec.Command("promtool", "check", "rules", filepath.Join(dir, "rules.yaml")))
	mustRun(t, exec.Command("promtool", "test", "rules", filepath.Join(dir, "test.yaml")))
}

// What the requests to a store tell: when its certificate ends, and what failed.
func TestMetricsOfTheStore(t *testing.T) {
	server := testS3TLS(t)
	bucket := server.newBucket(t)
	wrong := *server
	wrong.SecretKey = "wrong"
	collect := func(s *s3Server, request func(*Store)) map[string]float64 {
		t.Helper()
		source, err := newFileSource(storeFile(t, s, bucket))
		if err != nil {
			t.Fatal(err)
		}
		store, err := source.Store(t.Context(), StoreRef{"store", "main"})
		if err != nil {
			t.Fatal(err)
		}
		request(store)
		service := &metricsService{source: source, report: newReport(source, testDir(t))}
		if err := source.UpdateStatus(t.Context(), StoreRef{"store", "main"}, func(_ *RecoveryWindow, st *ServerStatus) {
			st.MissingWAL = 3
			meta.SetStatusCondition(&st.Conditions, metav1.Condition{Type: conditionWAL, Status: metav1.ConditionFalse, Reason: "WALGap"})
		}); err != nil {
			t.Fatal(err)
		}
		reply, err := service.Collect(t.Context(), &metrics.CollectMetricsRequest{ClusterDefinition: []byte(mainCluster)})
		if err != nil {
			t.Fatal(err)
		}
		values := map[string]float64{}
		for _, m := range reply.Metrics {
			values[strings.TrimPrefix(m.FqName, metricPrefix)+strings.Join(m.VariableLabels, ",")] = m.Value
		}
		return values
	}
	quiet := collect(server, func(*Store) {})
	if quiet["s3_certificate_expiry_timestamp_seconds"] != 0 || quiet["missing_wal_segments"] != 3 || quiet["condition_failedWALComplete"] != 1 {
		t.Errorf("before any request: %v", quiet)
	}
	denied := "s3_errors_totalSignatureDoesNotMatch"
	before := quiet[denied]
	after := collect(&wrong, func(s *Store) {
		if _, err := s.Catalog(t.Context()); !errors.Is(err, errDenied) {
			t.Errorf("wrong keys: %v", err)
		}
	})
	if end := after["s3_certificate_expiry_timestamp_seconds"]; end < float64(time.Now().Unix()) || after[denied] != before+1 {
		t.Errorf("certificate ends at %v; errors %v, before %v", end, after[denied], before)
	}
	missing := collect(server, func(s *Store) {
		if _, err := s.Head(t.Context(), "nothing"); !errors.Is(err, errNotFound) {
			t.Errorf("no object: %v", err)
		}
	})
	for name, n := range missing {
		if strings.HasPrefix(name, "s3_errors_total") && n != after[name] {
			t.Errorf("an object that is not there counts as an error: %s %v", name, n)
		}
	}
}
