// bench measures cnpg-barman-s3 side by side with Barman's cloud programs, pgBackRest and
// the AWS SDK alone: the same PostgreSQL, the same S3 server over TLS, one after the other
// in each round. It prints the tables of BENCHMARKS.md; hack/bench.sh calls it.
//
// Seconds are of the wall clock; CPU is user + system of all processes of a tool; memory is
// the peak of their proportional set sizes together (for ours: the sidecar without the
// client, which stands for the instance manager).
package main

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

type bench struct {
	dir      string // everything is in here, the programs too
	pg       string // PostgreSQL's programs
	port     int    // of the S3 server
	rounds   int
	scale    int
	segments int // of the test with many
	only     *regexp.Regexp
	actions  *regexp.Regexp

	servers []*os.Process // what is not part of any tool
	wal     []string      // names of the segments
	pgbytes int64         // size of PGDATA without its WAL, which no backup has
	tables  []*table
}

func main() {
	b := &bench{}
	flag.StringVar(&b.dir, "dir", "", "an empty `directory` that also has the programs")
	flag.StringVar(&b.pg, "pg", "", "the `directory` of PostgreSQL's programs")
	flag.IntVar(&b.rounds, "rounds", 5, "how often each action is measured")
	flag.IntVar(&b.scale, "scale", 135, "of pgbench; 135 is 2 GB")
	flag.IntVar(&b.segments, "segments", 64, "how many WAL segments are archived in a row")
	only := flag.String("only", "", "measure only what matches this `expression`")
	actions := flag.String("actions", "", "in each step, measure only the actions whose names match this `expression`")
	flag.Parse()
	b.only, b.actions = regexp.MustCompile(*only), regexp.MustCompile(*actions)
	err := b.run()
	for _, p := range slices.Backward(b.servers) {
		p.Signal(unix.SIGINT)
		p.Wait()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (b *bench) run() error {
	// Processes that leave their parent, as pgBackRest's asynchronous ones do, become ours.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"the S3 server", b.startS3}, {"the database", b.startPostgreSQL},
		{"start", b.benchStart}, {"one segment", b.benchSegment}, {"many segments", b.benchSegments}, {"base backup", b.benchBase},
	} {
		if strings.HasPrefix(step.what, "the ") || b.only.MatchString(step.what) {
			progress("%s", step.what)
			if err := step.do(); err != nil {
				return fmt.Errorf("%s: %w", step.what, err)
			}
		}
	}
	b.report()
	return nil
}

var began = time.Now()

func progress(format string, a ...any) {
	fmt.Fprintf(os.Stderr, "%6.1f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, a...))
}

func (b *bench) path(parts ...string) string {
	return filepath.Join(append([]string{b.dir}, parts...)...)
}

// walPath is a file of the pg_wal that the segments lie in; no server works there.
func (b *bench) walPath(parts ...string) string {
	return b.path(append([]string{"archiver", "pg_wal"}, parts...)...)
}

// bucket is where the S3 server keeps the objects with this prefix.
func (b *bench) bucket(parts ...string) string {
	return filepath.Join(append([]string{b.dir, "s3", "bench"}, parts...)...)
}

// ---------------------------------------------------------------------------
// Measuring
// ---------------------------------------------------------------------------

// action is one thing to measure.
type action struct {
	name    string
	rounds  int                   // fewer than the others, where it is slow
	work    float64               // seconds are divided by it: how much more it does than the others
	prepare func(round int) error // before the clock starts
	do      func(round int) error
	after   func(round int) error // when it has stopped
	sidecar *sidecar              // ours, when it is not a child that ends
	stored  int64                 // bytes in the bucket, set by after

	wall, cpu []float64
	memory    int64
}

// table is a series of actions measured in turn.
type table struct {
	title   string
	actions []*action
}

// measure runs every action in each round, in an order of its own: the memory that one has
// just freed is cheap for the next, which is not to be always the same. With warmup there is a
// round before them which is not timed, in which memory is watched closely; otherwise it
// is watched loosely in all of them.
func (b *bench) measure(title string, rounds int, warmup bool, actions ...*action) error {
	actions = slices.DeleteFunc(slices.Clone(actions), func(a *action) bool { return !b.actions.MatchString(a.name) })
	b.tables = append(b.tables, &table{title, actions})
	first, interval := 0, 100*time.Millisecond
	if warmup {
		first, interval = -1, 3*time.Millisecond
	}
	for round := first; round < rounds; round++ {
		for _, i := range mathrand.New(mathrand.NewPCG(1, uint64(round))).Perm(len(actions)) {
			a := actions[i]
			if a.rounds > 0 && round >= a.rounds {
				continue
			}
			if err := a.measure(b, round, !warmup || round < 0, interval); err != nil {
				return fmt.Errorf("%s: %s: %w", title, a.name, err)
			}
			if round >= 0 {
				progress("%s, round %d: %s: %.3f s", title, round+1, a.name, a.wall[len(a.wall)-1])
			}
		}
	}
	return nil
}

func (a *action) measure(b *bench, round int, watch bool, interval time.Duration) error {
	if a.prepare != nil {
		if err := a.prepare(round); err != nil {
			return err
		}
	}
	unix.Sync() // what the one before has left is not this one's to write
	stop := func() int64 { return 0 }
	if watch {
		stop = b.watchMemory(a.sidecar, interval)
	}
	cpu, start := b.cpu(a.sidecar), time.Now()
	err := a.do(round)
	wall := time.Since(start)
	b.reap()
	used := b.cpu(a.sidecar) - cpu
	a.memory = max(a.memory, stop())
	if err != nil {
		return err
	}
	if a.after != nil {
		if err := a.after(round); err != nil {
			return err
		}
	}
	if round >= 0 {
		work := cmp.Or(a.work, 1)
		a.wall, a.cpu = append(a.wall, wall.Seconds()/work), append(a.cpu, used.Seconds()/work)
	}
	return nil
}

// cpu is what all children that have ended and the sidecar have used so far.
func (b *bench) cpu(s *sidecar) time.Duration {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_CHILDREN, &u)
	used := time.Duration(u.Utime.Nano() + u.Stime.Nano())
	if s != nil { // clock_getcpuclockid(3): finer than the ticks of /proc/PID/stat
		var t unix.Timespec
		if unix.ClockGettime(int32(^s.process.Pid)<<3|2, &t) == nil {
			used += time.Duration(t.Nano())
		}
	}
	return used
}

// reap waits for children that nobody else waits for, so that their CPU counts.
func (b *bench) reap() {
	for len(b.descendants(os.Getpid())) > 0 {
		if pid, _ := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 {
			time.Sleep(time.Millisecond)
		}
	}
}

// descendants are the processes below one, without the servers.
func (b *bench) descendants(pid int) (all []int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		text, _ := os.ReadFile(task)
		for _, field := range strings.Fields(string(text)) {
			child, _ := strconv.Atoi(field)
			if !slices.ContainsFunc(b.servers, func(p *os.Process) bool { return p.Pid == child }) {
				all = append(append(all, child), b.descendants(child)...)
			}
		}
	}
	return all
}

// watchMemory watches the memory of the sidecar, or else of all processes that come, and
// returns a function that ends this and tells the peak in bytes.
func (b *bench) watchMemory(s *sidecar, interval time.Duration) func() int64 {
	if s != nil { // the kernel keeps its peak, of resident pages
		os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.process.Pid), []byte("5"), 0)
		return func() int64 { return procField(s.process.Pid, "status", "VmHWM:") }
	}
	var peak int64
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			var sum int64
			for _, pid := range b.descendants(os.Getpid()) {
				sum += procField(pid, "smaps_rollup", "Pss:")
			}
			peak = max(peak, sum)
			select {
			case <-end:
				return
			case <-time.After(interval):
			}
		}
	}()
	return func() int64 { close(end); <-ended; return peak }
}

// procField reads a field, in kB, of a file of /proc/PID.
func procField(pid int, file, field string) int64 {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == field {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n << 10
		}
	}
	return 0
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// ---------------------------------------------------------------------------
// Processes
// ---------------------------------------------------------------------------

// command makes a command. Ours gets nothing of what the others find in AWS_*: all is in its ObjectStore.
func command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	if filepath.Base(name) == "cnpg-barman-s3" {
		cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "AWS_") })
	}
	return cmd
}

// call runs a command to its end; what it printed is part of the error.
func (b *bench) call(name string, args ...string) error {
	out, err := command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(name), err, bytes.TrimSpace(out[max(0, len(out)-2000):]))
	}
	return nil
}

// start starts a server that runs until the end of the benchmark or until stop.
func (b *bench) start(name string, args ...string) (*os.Process, error) {
	log, err := os.OpenFile(b.path(filepath.Base(name)+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	b.servers = append(b.servers, cmd.Process)
	return cmd.Process, nil
}

func (b *bench) stop(p *os.Process) {
	p.Signal(unix.SIGINT)
	p.Wait()
	b.servers = slices.DeleteFunc(b.servers, func(other *os.Process) bool { return other == p })
}

// until polls for at most two minutes.
func until(what string, pause time.Duration, ready func() bool) error {
	for end := time.Now().Add(2 * time.Minute); !ready(); time.Sleep(pause) {
		if time.Now().After(end) {
			return fmt.Errorf("gave up waiting for %s", what)
		}
	}
	return nil
}

func connects(network, address string) bool {
	conn, err := net.Dial(network, address)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// ---------------------------------------------------------------------------
// The S3 server
// ---------------------------------------------------------------------------

const accessKey, secretKey = "bench", "benchbenchbench"

func (b *bench) url() string { return fmt.Sprintf("https://localhost:%d", b.port) }

func (b *bench) startS3() error {
	if err := b.makeCertificates(); err != nil {
		return err
	}
	if err := os.MkdirAll(b.bucket(), 0o755); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	b.port = listener.Addr().(*net.TCPAddr).Port
	listener.Close()
	for name, value := range map[string]string{
		"ROOT_ACCESS_KEY_ID": accessKey, "ROOT_SECRET_ACCESS_KEY": secretKey,
		// of Barman, and of the SDK alone
		"AWS_ACCESS_KEY_ID": accessKey, "AWS_SECRET_ACCESS_KEY": secretKey, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
		"AWS_CA_BUNDLE": b.path("ca.pem"), "AWS_ENDPOINT_URL": b.url(),
		"PGBACKREST_REPO1_TYPE": "s3", "PGBACKREST_REPO1_S3_BUCKET": "bench", "PGBACKREST_REPO1_S3_REGION": "us-east-1",
		"PGBACKREST_REPO1_S3_KEY": accessKey, "PGBACKREST_REPO1_S3_KEY_SECRET": secretKey, "PGBACKREST_REPO1_S3_URI_STYLE": "path",
		"PGBACKREST_REPO1_S3_ENDPOINT": "localhost", "PGBACKREST_REPO1_STORAGE_PORT": strconv.Itoa(b.port), "PGBACKREST_REPO1_STORAGE_CA_FILE": b.path("ca.pem"),
		"PGBACKREST_STANZA": "pg", "PGBACKREST_LOG_PATH": b.dir, "PGBACKREST_LOCK_PATH": b.path("lock"), "PGBACKREST_SPOOL_PATH": b.path("spool"),
		"PGBACKREST_LOG_LEVEL_FILE": "off", "PGBACKREST_LOG_LEVEL_CONSOLE": "warn", "PGBACKREST_CONFIG": "/dev/null",
		"PGBACKREST_PG1_PATH": b.path("pgdata"), "PGBACKREST_PG1_SOCKET_PATH": b.dir, "PGBACKREST_PG1_USER": "postgres",
		"PGHOST": b.dir, "PGPORT": "5432", "PGUSER": "postgres", "PGDATABASE": "postgres", "TMPDIR": b.dir,
	} {
		os.Setenv(name, value)
	}
	// Without --keep-alive this server would close every connection after one request, which no other does.
	if _, err := b.start(b.path("versitygw"), "--port", fmt.Sprintf("127.0.0.1:%d", b.port), "--cert", b.path("server.pem"), "--key", b.path("server.key"),
		"--keep-alive", "--quiet", "posix", b.path("s3")); err != nil {
		return err
	}
	return until("the S3 server", 10*time.Millisecond, func() bool { return connects("tcp", fmt.Sprintf("127.0.0.1:%d", b.port)) })
}

// makeCertificates makes a CA and, signed by it, the certificate of the server.
func (b *bench) makeCertificates() error {
	template := func(n int64, name string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(n), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	}
	ca, server := template(1, "bench CA"), template(2, "localhost")
	ca.IsCA, ca.KeyUsage = true, x509.KeyUsageCertSign
	server.DNSNames, server.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	server.KeyUsage, server.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serverKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return err
	}
	serverDER, err := x509.CreateCertificate(rand.Reader, server, ca, &serverKey.PublicKey, caKey)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(serverKey)
	if err != nil {
		return err
	}
	for name, block := range map[string]*pem.Block{
		"ca.pem": {Type: "CERTIFICATE", Bytes: caDER}, "server.pem": {Type: "CERTIFICATE", Bytes: serverDER}, "server.key": {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(b.path(name), pem.EncodeToMemory(block), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// ---------------------------------------------------------------------------
// PostgreSQL, its data and its WAL
// ---------------------------------------------------------------------------

func (b *bench) sql(statement string) error {
	return b.call(filepath.Join(b.pg, "psql"), "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--command", statement)
}

// startPostgreSQL makes the database, and collects WAL segments of pgbench. Checkpoints
// are frequent, so that the share of full pages is much the same at any scale.
func (b *bench) startPostgreSQL() error {
	data, keep := b.path("pgdata"), b.walPath()
	if err := os.MkdirAll(filepath.Join(keep, "archive_status"), 0o700); err != nil {
		return err
	}
	if err := b.call(filepath.Join(b.pg, "initdb"), "--pgdata", data, "--auth", "trust", "--username", "postgres", "--locale", "C", "--encoding", "UTF8", "--data-checksums"); err != nil {
		return err
	}
	server, err := b.start(filepath.Join(b.pg, "postgres"), "-D", data, "-k", b.dir, "-c", "listen_addresses=", "-c", "shared_buffers=256MB",
		"-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "archive_mode=on", "-c", "max_wal_size=4GB", "-c", "autovacuum=off")
	if err != nil {
		return err
	}
	if err := until("PostgreSQL", 50*time.Millisecond, func() bool { return b.sql("SELECT 1") == nil }); err != nil {
		return err
	}
	archive := func(command string) error {
		if err := b.sql("ALTER SYSTEM SET archive_command = '" + command + "'"); err != nil {
			return err
		}
		return server.Signal(unix.SIGHUP)
	}
	if err := archive("true"); err != nil {
		return err
	}
	if err := b.call(filepath.Join(b.pg, "pgbench"), "--initialize", "--scale", strconv.Itoa(b.scale), "--quiet"); err != nil {
		return err
	}
	progress("loaded pgbench, scale %d", b.scale)
	if err := b.sql("CHECKPOINT"); err != nil {
		return err
	}
	if err := archive(fmt.Sprintf("cp %%p %s/%%f.part && mv %[1]s/%%f.part %[1]s/%%f", keep)); err != nil {
		return err
	}
	load := exec.Command(filepath.Join(b.pg, "pgbench"), "--client", "8", "--jobs", "2", "--time", "600", "--random-seed", "1")
	if err := load.Start(); err != nil {
		return err
	}
	err = until("WAL", time.Second, func() bool {
		b.sql("CHECKPOINT")
		b.wal = b.wal[:0]
		entries, _ := os.ReadDir(keep)
		for _, e := range entries {
			if len(e.Name()) == 24 {
				b.wal = append(b.wal, e.Name())
			}
		}
		return len(b.wal) > b.segments
	})
	load.Process.Signal(unix.SIGTERM) // a job in the background may have been started with SIGINT ignored
	load.Wait()
	if err != nil {
		return err
	}
	if err := archive("true"); err != nil {
		return err
	}
	if err := b.sql("CHECKPOINT"); err != nil {
		return err
	}
	b.wal = b.wal[:b.segments]
	// pgBackRest works only on what looks like a data directory
	if err := errors.Join(os.Mkdir(b.path("archiver", "global"), 0o700), b.call("cp", filepath.Join(data, "global", "pg_control"), b.path("archiver", "global"))); err != nil {
		return err
	}
	b.pgbytes = diskUsage(data) - diskUsage(filepath.Join(data, "pg_wal"))
	progress("%d WAL segments; PGDATA has %d MB", len(b.wal), b.pgbytes/1e6)
	return b.stanzas()
}

// stanzas makes what pgBackRest wants to have before the first WAL file.
func (b *bench) stanzas() error {
	for _, codec := range pgbackrestCodecs {
		if err := b.pgbackrest(codec, "stanza-create"); err != nil {
			return err
		}
	}
	return nil
}

// diskUsage is the size of all files in a directory.
func diskUsage(dir string) (sum int64) {
	filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if info, err := e.Info(); err == nil {
				sum += info.Size()
			}
		}
		return nil
	})
	return sum
}

// ---------------------------------------------------------------------------
// The tools
// ---------------------------------------------------------------------------

var (
	codecs           = []string{"none", "lz4", "zstd", "gzip"}
	pgbackrestCodecs = []string{"none", "lz4", "zst", "gz"}
)

// sidecar is ours, for one compression.
type sidecar struct {
	b       *bench
	name    string
	process *os.Process
}

// startSidecar starts one for an ObjectStore; its log tells what it does. The name is the server's too.
func (b *bench) startSidecar(name, path, codec string, parallel int) (*sidecar, error) {
	if err := b.writeObjectStore(name, path, codec, parallel); err != nil {
		return nil, err
	}
	return b.execSidecar(name)
}

// writeObjectStore writes what the sidecar and the client of this name read.
func (b *bench) writeObjectStore(name, path, codec string, parallel int) error {
	if codec == "none" {
		codec = `""`
	}
	ca, err := os.ReadFile(b.path("ca.pem"))
	if err != nil {
		return err
	}
	store := fmt.Sprintf(`apiVersion: barmancloud.cnpg.io/v1
kind: ObjectStore
metadata: {name: store, namespace: default}
spec:
  configuration:
    destinationPath: s3://bench/%s
    endpointURL: %s
    endpointCA: {name: keys, key: ca}
    s3Credentials:
      accessKeyId: {name: keys, key: id}
      secretAccessKey: {name: keys, key: secret}
    wal: {compression: %s, maxParallel: %d}
    data: {compression: %[3]s, immediateCheckpoint: true}
---
apiVersion: v1
kind: Secret
metadata: {name: keys, namespace: default}
stringData: {id: %[5]s, secret: %[6]s, ca: %[7]q}
`, path, b.url(), codec, parallel, accessKey, secretKey, ca)
	cluster := `{"apiVersion": "postgresql.cnpg.io/v1", "kind": "Cluster", "metadata": {"name": "pg", "namespace": "default"},
 "spec": {"plugins": [{"name": "barman-cloud.cloudnative-pg.io", "isWALArchiver": true, "parameters": {"barmanObjectName": "store"}}]},
 "status": {"currentPrimary": "pg-1"}}`
	return errors.Join(os.WriteFile(b.path(name+".yaml"), []byte(store), 0o600), os.WriteFile(b.path(name+".json"), []byte(cluster), 0o600))
}

func (b *bench) execSidecar(name string) (*sidecar, error) {
	process, err := b.start(b.path("cnpg-barman-s3"), "sidecar", "--objectstore", b.path(name+".yaml"), "--socket", b.path(name+".sock"),
		"--pgdata", b.path("pgdata"), "--spool", b.path("spool-"+name))
	if err != nil {
		return nil, err
	}
	s := &sidecar{b: b, name: name, process: process}
	return s, until("the sidecar", 200*time.Microsecond, func() bool { return connects("unix", b.path(name+".sock")) })
}

// call makes one request, as a new process on a new connection, as the instance manager does.
func (s *sidecar) call(args ...string) error {
	return s.b.call(s.b.path("socketclient"), append([]string{"--socket", s.b.path(s.name + ".sock"), "--cluster", s.b.path(s.name + ".json")}, args...)...)
}

func (b *bench) barman(command string, options []string, args ...string) error {
	return b.call("barman-cloud-"+command, append(append([]string{"--endpoint-url", b.url()}, options...), args...)...)
}

func (b *bench) pgbackrest(codec string, args ...string) error {
	return b.call("pgbackrest", append([]string{"--repo1-path=/pgbackrest-" + codec}, args...)...)
}

func (b *bench) sdk(args ...string) error {
	return b.call(b.path("sdkalone"), append([]string{args[0], "bench"}, args[1:]...)...)
}

// sdkPlain is sdk that sends no checksums, as ours with parts to whatever is not AWS.
func (b *bench) sdkPlain(args ...string) error {
	return b.call("env", append([]string{"AWS_REQUEST_CHECKSUM_CALCULATION=when_required", b.path("sdkalone"), args[0], "bench"}, args[1:]...)...)
}

const (
	ours, barman, pgbackrest = "cnpg-barman-s3 ", "Barman ", "pgBackRest "
	sdk, sdkPlain            = "SDK alone", "SDK without checksums"
)

var barmanOption = map[string][]string{"none": nil, "gzip": {"--gzip"}, "bzip2": {"--bzip2"}}

// ---------------------------------------------------------------------------
// What is measured
// ---------------------------------------------------------------------------

// benchStart: from exec to a socket that answers, and what an idle sidecar takes.
func (b *bench) benchStart() error {
	var s *sidecar
	a := &action{name: ours + "sidecar"}
	a.after = func(int) error {
		time.Sleep(time.Second)
		a.memory = procField(s.process.Pid, "status", "VmRSS:")
		b.stop(s.process)
		return nil
	}
	a.prepare = func(int) error { return b.writeObjectStore("start", "start", "gzip", 1) }
	a.do = func(int) (err error) { s, err = b.execSidecar("start"); return err }
	return b.measure("Sidecar: from exec to socket; idle", b.rounds, false, a)
}

// benchSegment: a segment at a time.
func (b *bench) benchSegment() error {
	const title = "One WAL segment of 16 MiB"
	var archive, restore []*action
	segment := func(round int) string { return b.walPath(b.wal[round+1]) } // the first one is for the warm-up
	fetched := b.path("fetched")
	add := func(name string, rounds int, s *sidecar, dir string, put, get func(round int) error) {
		var a *action
		a = &action{name: name, rounds: rounds, sidecar: s, do: put,
			prepare: func(round int) error { _, err := os.ReadFile(segment(round)); return err }, // into the page cache
			after: func(round int) error {
				if round > 0 { // other segments, and not all actions have them
					return nil
				}
				a.stored = 0
				filepath.WalkDir(b.bucket(dir), func(path string, e os.DirEntry, err error) error {
					if err == nil && strings.HasPrefix(e.Name(), filepath.Base(segment(round))) && !e.IsDir() {
						info, _ := e.Info()
						a.stored += info.Size()
					}
					return nil
				})
				return nil
			}}
		archive = append(archive, a)
		restore = append(restore, &action{name: name, rounds: rounds, sidecar: s, do: get,
			after: func(round int) error {
				defer os.Remove(fetched)
				want, err := os.ReadFile(segment(round))
				if err != nil {
					return err
				}
				if got, err := os.ReadFile(fetched); err != nil || !bytes.Equal(got, want) {
					return fmt.Errorf("%s is not what was archived: %v", segment(round), err)
				}
				return nil
			}})
	}
	for _, codec := range codecs {
		s, err := b.startSidecar("one-"+codec, "one-"+codec, codec, 1)
		if err != nil {
			return err
		}
		defer b.stop(s.process)
		add(ours+codec, 0, s, "one-"+codec, func(n int) error { return s.call("archive", segment(n)) },
			func(n int) error { return s.call("restore", filepath.Base(segment(n)), fetched) })
	}
	for _, codec := range []string{"none", "gzip", "bzip2"} {
		add(barman+codec, b.rounds, nil, "barman-"+codec,
			func(n int) error {
				return b.barman("wal-archive", barmanOption[codec], "s3://bench/barman-"+codec, "pg", segment(n))
			},
			func(n int) error {
				return b.barman("wal-restore", nil, "s3://bench/barman-"+codec, "pg", filepath.Base(segment(n)), fetched)
			})
	}
	for _, codec := range pgbackrestCodecs {
		add(pgbackrest+codec, 0, nil, "pgbackrest-"+codec,
			func(n int) error { return b.pgbackrest(codec, "archive-push", "--compress-type="+codec, segment(n)) },
			func(n int) error { return b.pgbackrest(codec, "archive-get", filepath.Base(segment(n)), fetched) })
	}
	add(sdk, 0, nil, "sdk", func(n int) error { return b.sdk("put", "sdk/"+filepath.Base(segment(n)), segment(n)) },
		func(n int) error { return b.sdk("get", "sdk/"+filepath.Base(segment(n)), fetched) })

	rounds := min(2*b.rounds+1, len(b.wal)-1)
	if err := b.measure(title+": archive", rounds, true, archive...); err != nil {
		return err
	}
	for _, a := range restore {
		a.rounds = len(archive[slices.IndexFunc(archive, func(other *action) bool { return other.name == a.name })].wall)
	}
	return b.measure(title+": restore", rounds, true, restore...)
}

// barmanShare is how much less Barman does where it works with many segments: each is a process of its own.
const barmanShare = 4

// benchSegments: a backlog, as PostgreSQL's archiver works it off, and as recovery reads it.
func (b *bench) benchSegments() error {
	title := fmt.Sprintf("%d WAL segments", len(b.wal))
	segment := func(n int) string { return b.walPath(b.wal[n]) }
	fetched := b.path("fetched")
	inOrder := func(do func(n int) error) func(int) error {
		return func(int) error {
			for n := range b.wal {
				if err := do(n); err != nil {
					return err
				}
			}
			return nil
		}
	}
	put := func(do func(n int) error) func(int) error {
		return inOrder(func(n int) error {
			if err := do(n); err != nil {
				return err
			}
			status := b.walPath("archive_status", b.wal[n])
			return os.Rename(status+".ready", status+".done")
		})
	}
	get := func(do func(n int) error) func(int) error {
		return inOrder(func(n int) error {
			if err := do(n); err != nil {
				return err
			}
			info, err := os.Stat(fetched)
			if err != nil || info.Size() != 16<<20 {
				return fmt.Errorf("%s: %v", segment(n), err)
			}
			return os.Remove(fetched)
		})
	}
	// before each run: all files in the page cache, all waiting, none in the bucket
	prepare := func(dirs ...string) func(int) error {
		return func(int) error {
			for _, dir := range dirs {
				if err := os.RemoveAll(dir); err != nil {
					return err
				}
			}
			for n, name := range b.wal {
				os.Remove(b.walPath("archive_status", name+".done"))
				_, err := os.ReadFile(segment(n))
				if err := errors.Join(err, os.WriteFile(b.walPath("archive_status", name+".ready"), nil, 0o600)); err != nil {
					return err
				}
			}
			return nil
		}
	}
	var archive, restore []*action
	for _, codec := range codecs {
		s, err := b.startSidecar("many-"+codec, "many-"+codec, codec, 8)
		if err != nil {
			return err
		}
		defer b.stop(s.process)
		archive = append(archive, &action{name: ours + codec + ", maxParallel 8", sidecar: s, prepare: prepare(b.bucket("many-" + codec)),
			do: put(func(n int) error { return s.call("archive", segment(n)) })})
		restore = append(restore, &action{name: ours + codec + ", maxParallel 8", sidecar: s,
			do: get(func(n int) error { return s.call("restore", b.wal[n], fetched) })})
	}
	for _, codec := range pgbackrestCodecs {
		fewer := 0
		if codec == "none" || codec == "gz" {
			fewer = min(2, b.rounds)
		}
		async := []string{"--archive-async", "--process-max=8", "--pg1-path=" + b.path("archiver")}
		archive = append(archive, &action{name: pgbackrest + codec + ", asynchronous, 8 processes", rounds: fewer,
			prepare: prepare(b.path("spool"), b.bucket("pgbackrest-"+codec, "archive", "pg", "15-1", b.wal[0][:16])),
			do: put(func(n int) error {
				return b.pgbackrest(codec, append(async, "archive-push", "--compress-type="+codec, segment(n))...)
			})})
		restore = append(restore, &action{name: pgbackrest + codec + ", asynchronous, 8 processes", rounds: fewer,
			prepare: func(int) error { return os.RemoveAll(b.path("spool")) },
			do:      get(func(n int) error { return b.pgbackrest(codec, append(async, "archive-get", b.wal[n], fetched)...) })})
	}
	atOnce := func(do func(n int) error) func(int) error {
		return func(int) error {
			var group errgroup.Group
			group.SetLimit(8)
			for n := range b.wal[:len(b.wal)/barmanShare] {
				group.Go(func() error { return do(n) })
			}
			return group.Wait()
		}
	}
	archive = append(archive, &action{name: barman + "none, 8 at once", work: 1. / barmanShare, prepare: prepare(b.bucket("barman-many")),
		do: atOnce(func(n int) error { return b.barman("wal-archive", nil, "s3://bench/barman-many", "pg", segment(n)) })})
	restore = append(restore, &action{name: barman + "none, 8 at once", work: 1. / barmanShare,
		do: atOnce(func(n int) error {
			return b.barman("wal-restore", nil, "s3://bench/barman-many", "pg", b.wal[n], b.path("fetched-"+b.wal[n]))
		}),
		after: func(int) error {
			for _, name := range b.wal {
				os.Remove(b.path("fetched-" + name))
			}
			return nil
		}})
	if err := b.measure(title+": archive", b.rounds, false, archive...); err != nil {
		return err
	}
	return b.measure(title+": restore", b.rounds, false, restore...)
}

// benchBase: base backups, and restores that are on disk when they end.
func (b *bench) benchBase() error {
	const title = "Base backup"
	wal, err := b.startSidecar("wal", "base", "lz4", 1)
	if err != nil {
		return err
	}
	if err := b.sql(fmt.Sprintf("ALTER SYSTEM SET archive_command = '%s --socket %s --cluster %s archive %%p'",
		b.path("socketclient"), b.path("wal.sock"), b.path("wal.json"))); err != nil {
		return err
	}
	if err := b.sql("SELECT pg_reload_conf()"); err != nil {
		return err
	}
	sidecars := []*sidecar{wal}
	var backup, restore []*action
	// Only the objects of the last round stay, for the restores.
	add := func(name, dir string, rounds int, s *sidecar, do func(int) error, get func(string) error) {
		var a *action
		last := cmp.Or(rounds, b.rounds) - 1
		a = &action{name: name, rounds: rounds, sidecar: s, do: do,
			prepare: func(int) error { return b.sql("CHECKPOINT") },
			after: func(round int) error {
				a.stored = diskUsage(b.bucket(dir))
				if round < last {
					return os.RemoveAll(b.bucket(dir))
				}
				return nil
			}}
		backup = append(backup, a)
		if get == nil {
			return
		}
		target := b.path("restored")
		restore = append(restore, &action{name: name, rounds: cmp.Or(min(2*rounds, b.rounds), b.rounds), do: func(int) error { return get(target) },
			after: func(int) error {
				version, err := os.ReadFile(filepath.Join(target, "PG_VERSION"))
				if err != nil || len(version) == 0 || diskUsage(target) < b.pgbytes*9/10 {
					return fmt.Errorf("%s is not the database: %d of %d bytes, %v", target, diskUsage(target), b.pgbytes, err)
				}
				return os.RemoveAll(target)
			}})
	}
	data := b.path("pgdata")
	sync := func(err error, dir string) error {
		if err != nil {
			return err
		}
		return b.call("sync", "--file-system", dir)
	}
	backup = append(backup, &action{name: "floor: tar of PGDATA to nowhere", do: func(int) error {
		return b.call("sh", "-c", "tar -C "+data+" --exclude=./pg_wal/'*' -cf - . | cat >/dev/null")
	}})
	restore = append(restore, &action{name: "floor: cp of PGDATA, and sync", do: func(int) error {
		return sync(b.call("sh", "-c", "mkdir "+b.path("restored")+" && cd "+data+" && cp --archive --reflink=never $(ls | grep -v ^pg_wal$) "+b.path("restored")), b.path("restored"))
	}, after: func(int) error { return os.RemoveAll(b.path("restored")) }})
	for _, codec := range codecs {
		name := "base-" + codec
		s, err := b.startSidecar(name, "base", codec, 1)
		if err != nil {
			return err
		}
		sidecars = append(sidecars, s)
		id := ""
		do := func(int) error {
			out, err := exec.Command(b.path("socketclient"), "--socket", b.path(name+".sock"), "--cluster", b.path(name+".json"), "backup").Output()
			var reply struct {
				ID string `json:"backup_id"`
			}
			if err = errors.Join(err, json.Unmarshal(out, &reply)); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			id = reply.ID
			// where the others have theirs, so that it is measured and removed alike
			return os.Rename(b.bucket("base", "pg", "base", id), b.bucket(name))
		}
		add(ours+codec, name, 0, s, do, func(dir string) error {
			return b.call(b.path("cnpg-barman-s3"), "restore", "--objectstore", b.path(name+".yaml"), "--server-name", "pg", "--backup-id", id, dir)
		})
		a := restore[len(restore)-1]
		a.prepare = func(int) error { return os.Rename(b.bucket(name), b.bucket("base", "pg", "base", id)) }
		after := a.after
		a.after = func(round int) error {
			return errors.Join(after(round), os.Rename(b.bucket("base", "pg", "base", id), b.bucket(name)))
		}
	}
	for _, codec := range pgbackrestCodecs {
		rounds := 0
		if codec == "none" || codec == "gz" {
			rounds = min(2, b.rounds)
		}
		add(pgbackrest+codec, "pgbackrest-"+codec+"/backup/pg", rounds, nil, func(int) error {
			return b.pgbackrest(codec, "backup", "--type=full", "--compress-type="+codec, "--process-max=2", "--start-fast", "--no-archive-check", "--repo1-retention-full=9")
		}, func(dir string) error {
			return b.pgbackrest(codec, "restore", "--process-max=2", "--pg1-path="+dir)
		})
		a := backup[len(backup)-1]
		a.prepare = func(int) error {
			return errors.Join(b.sql("CHECKPOINT"), os.RemoveAll(b.bucket("pgbackrest-"+codec)), b.pgbackrest(codec, "stanza-create"))
		}
	}
	for _, codec := range []string{"none", "gzip"} {
		rounds := 0
		if codec == "gzip" {
			rounds = 1
		}
		add(barman+codec, "barman-base-"+codec, rounds, nil, func(int) error {
			return b.barman("backup", barmanOption[codec], "--immediate-checkpoint", "s3://bench/barman-base-"+codec, "pg")
		}, func(dir string) error {
			ids, err := os.ReadDir(b.bucket("barman-base-"+codec, "pg", "base"))
			if err != nil || len(ids) == 0 {
				return fmt.Errorf("no backup: %v", err)
			}
			return sync(b.barman("restore", nil, "s3://bench/barman-base-"+codec, "pg", ids[0].Name(), dir), dir)
		})
	}
	tar := b.path("data.tar")
	if err := b.call("tar", "-C", data, "--exclude=./pg_wal/*", "-cf", tar, "."); err != nil {
		return err
	}
	const oneFile = ", the same bytes as one file"
	add(sdk+oneFile, "sdk-base", 0, nil, func(int) error { return b.sdk("put", "sdk-base/data.tar", tar) }, nil)
	add(sdkPlain+oneFile, "sdk-plain-base", 0, nil, func(int) error { return b.sdkPlain("put", "sdk-plain-base/data.tar", tar) }, nil)
	restore = append(restore, &action{name: sdk + oneFile, do: func(int) error {
		return sync(b.sdk("get", "sdk-base/data.tar", b.path("restored")), b.path("restored"))
	}, after: func(int) error { return os.Remove(b.path("restored")) }})

	if err := b.measure(fmt.Sprintf("%s of %d MB", title, b.pgbytes/1e6), b.rounds, false, backup...); err != nil {
		return err
	}
	for _, s := range sidecars { // their program file is the restore's too, which would look smaller than it is
		b.stop(s.process)
	}
	return b.measure("Restore of that, synced to disk", b.rounds, false, restore...)
}

// ---------------------------------------------------------------------------
// The tables
// ---------------------------------------------------------------------------

func (b *bench) report() {
	output := func(name string, args ...string) string {
		out, _ := command(name, args...).CombinedOutput()
		return strings.TrimSpace(strings.ReplaceAll(string(out), "\n", " "))
	}
	fmt.Printf("\n%s: %d rounds, pgbench of scale %d (PGDATA: %d MB), %.0f minutes.\n\n", time.Now().UTC().Format("2006-01-02"),
		b.rounds, b.scale, b.pgbytes/1e6, time.Since(began).Minutes())
	fmt.Printf("- machine: %d cores (%s), %s, %s, Linux %s\n", runtime.NumCPU(), output("sed", "-n", "0,/^model name/s/^model name.*: //p", "/proc/cpuinfo"),
		output("awk", `/MemTotal/ {printf "%.0f GiB", $2/1048576}`, "/proc/meminfo"), output("findmnt", "-n", "-o", "FSTYPE", "-T", b.dir), output("uname", "-r"))
	fmt.Printf("- versions: cnpg-barman-s3 %s; %s; %s; %s; versitygw of `tools/go.mod`; %s\n", output(b.path("cnpg-barman-s3"), "version"),
		output(filepath.Join(b.pg, "postgres"), "--version"), output("barman-cloud-backup", "--version"), output("pgbackrest", "version"), runtime.Version())
	b.targets()
	for _, t := range b.tables {
		fmt.Printf("\n### %s\n\n| | seconds: median (range) | rounds | CPU s | peak MiB | in the bucket MB |\n|---|---|---|---|---|---|\n", t.title)
		for _, a := range t.actions {
			memory, stored := "", ""
			if a.memory > 0 {
				memory = strconv.FormatInt(a.memory>>20, 10)
			}
			if a.stored > 0 {
				stored = fmt.Sprintf("%.1f", float64(a.stored)/1e6)
			}
			fmt.Printf("| %s | %.3f (%.3f-%.3f) | %d | %.3f | %s | %s |\n", a.name, median(a.wall), slices.Min(a.wall), slices.Max(a.wall), len(a.wall), median(a.cpu), memory, stored)
		}
	}
	fmt.Println()
}

// targets compares what was measured with what the project has set itself.
func (b *bench) targets() {
	// the fastest action of a table whose name begins so
	find := func(title, name string) *action {
		var best *action
		for _, t := range b.tables {
			for _, a := range t.actions {
				if strings.Contains(t.title, title) && strings.HasPrefix(a.name, name) && (best == nil || median(a.wall) < median(best.wall)) {
					best = a
				}
			}
		}
		return best
	}
	fmt.Print("\n### Targets\n\n| target | measured | limit | |\n|---|---|---|---|\n")
	behind := 0
	verdict := func(what, unit string, measured, limit float64) {
		word := "met"
		if measured > limit {
			word, behind = "**behind**", behind+1
		}
		fmt.Printf("| %s | %.3f %s | %.3f %s | %s |\n", what, measured, unit, limit, unit, word)
	}
	seconds := func(a *action) float64 { return median(a.wall) }
	cpu := func(a *action) float64 { return median(a.cpu) }
	bytes := func(a *action) float64 { return float64(a.stored) / 1e6 }
	// one target: ours is at most factor x the peer's, or least where that is more
	compare := func(title, own, peer string, factor float64, unit string, value func(*action) float64, least float64) {
		a, p := find(title, ours+own), find(title, peer)
		if a == nil || p == nil {
			return
		}
		what := fmt.Sprintf("%s, %s: %.3g x %s", title, own, factor, p.name)
		limit := factor * value(p)
		if limit < least {
			what, limit = what+", or 1.2 x the floor", least
		}
		verdict(what, unit, value(a), limit)
	}
	peers := map[string]string{"none": pgbackrest + "none", "lz4": pgbackrest + "lz4", "zstd": pgbackrest + "zst", "gzip": pgbackrest + "gz"}
	compressed := []string{"lz4", "zstd", "gzip"}

	const archive, restore = "One WAL segment of 16 MiB: archive", "One WAL segment of 16 MiB: restore"
	for _, codec := range compressed[:2] {
		compare(archive, codec, barman, 0.15, "s", seconds, 0)
		compare(archive, codec, peers[codec], 0.8, "s", seconds, 0)
		compare(archive, codec, barman, 0.15, "CPU s", cpu, 0)
	}
	compare(archive, "none", sdk, 1.1, "s", seconds, 0)
	for _, codec := range codecs {
		compare(restore, codec, barman, 0.1, "s", seconds, 0)
		compare(restore, codec, peers[codec], 0.9, "s", seconds, 0)
		compare(restore, codec, barman, 0.15, "CPU s", cpu, 0)
	}
	for _, codec := range codecs {
		many := fmt.Sprintf("%d WAL segments: ", b.segments)
		compare(many+"archive", codec, peers[codec], 1, "s", seconds, 0)
		compare(many+"archive", codec, barman, 1./7, "s", seconds, 0)
		compare(many+"restore", codec, peers[codec], 1, "s", seconds, 0)
	}
	floor := func(title string) float64 {
		if a := find(title, "floor"); a != nil {
			return 1.2 * seconds(a)
		}
		return 0
	}
	for _, codec := range compressed {
		compare("Base backup", codec, barman+"none", 0.3, "s", seconds, floor("Base backup"))
		compare("Base backup", codec, barman+"gzip", 0.1, "s", seconds, floor("Base backup"))
		compare("Base backup", codec, peers[codec], 0.6, "s", seconds, floor("Base backup"))
	}
	compare("Base backup", "none", sdk, 1.1, "s", seconds, 0)
	compare("Base backup", "none", sdkPlain, 1.1, "s", seconds, 0)
	for _, codec := range codecs {
		compare("Restore", codec, barman, 0.7, "s", seconds, floor("Restore"))
		compare("Restore", codec, peers[codec], 0.7, "s", seconds, floor("Restore"))
	}
	for _, title := range []string{archive, "Base backup"} {
		for _, codec := range codecs {
			compare(title, codec, peers[codec], 1.1, "MB", bytes, 0)
		}
		compare(title, "gzip", barman+"gzip", 1.1, "MB", bytes, 0)
	}
	if a := find("Sidecar", ""); a != nil {
		verdict("sidecar: socket ready after exec", "s", seconds(a), 0.05)
		verdict("sidecar: resident when idle", "MiB", float64(a.memory)/(1<<20), 32)
	}
	progress("%d targets are missed", behind)
}
