// The test kit: the real parts that every test here is built on, and the one fake.
//
//   - an S3 server: versitygw on a directory, one per test process, http and https;
//   - a PostgreSQL server: startPostgres, and startRestored for a directory that a restore made;
//   - Barman's own programs, to interoperate with: barman;
//   - this project's program: program, runProgram;
//   - a faulty network in front of the S3 server: startFaultProxy.
//
// All of it listens on loopback or on Unix sockets in a temporary directory, and is
// gone when the tests end. Limits on waiting are only there to turn a hang into a
// failure: no test asserts how long something takes.

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// hang is how long the kit waits before it calls something hung.
const hang = 3 * time.Minute

// testRoot holds everything that the tests of this process write. Unlike t.TempDir,
// every user may pass through it: PostgreSQL does not run as root.
var testRoot string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	var err error
	if testRoot, err = os.MkdirTemp("", "cnpg-barman-s3-"); err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(testRoot)
	if err := os.Chmod(testRoot, 0o755); err != nil {
		log.Fatal(err)
	}
	defer func() {
		for _, s := range s3Servers {
			s.stop()
		}
	}()
	return m.Run()
}

// testDir makes a directory for this test that belongs to the user PostgreSQL runs as.
// Its path is short enough for Unix sockets. It is removed when the test ends.
func testDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(testRoot, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	giveToPostgres(t, dir)
	return dir
}

// waitFor polls until the condition holds, and fails the test if it never does.
func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(hang); !condition(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still waiting for %s after %v", what, hang)
		}
	}
}

// ---------------------------------------------------------------------------
// Programs
// ---------------------------------------------------------------------------

// program builds this project's binary once, where every user can run it.
func program(t testing.TB) string {
	t.Helper()
	path, err := buildProgram()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var buildProgram = sync.OnceValues(func() (string, error) {
	path := filepath.Join(testRoot, "cnpg-barman-s3")
	cmd := exec.Command("go", "build", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// result is what a program left behind.
type result struct {
	Code           int // exit code; -1 if it was killed
	Stdout, Stderr string
}

// run runs a command to its end; an exit code other than 0 is for the caller to judge.
func run(t testing.TB, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("run %q: %v", cmd.Args, err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// mustRun is run for a command that has to succeed; it returns its standard output.
func mustRun(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	r := run(t, cmd)
	if r.Code != 0 {
		t.Fatalf("%q: exit code %d\n%s%s", cmd.Args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// runProgram runs this project's binary with extra environment variables (NAME=VALUE).
func runProgram(t testing.TB, env []string, args ...string) result {
	t.Helper()
	cmd := exec.Command(program(t), args...)
	cmd.Env = append(os.Environ(), env...)
	return run(t, cmd)
}

// barman runs one of Debian's barman-cloud-* programs against the S3 server:
// barman(t, s, nil, "barman-cloud-wal-archive", "--gzip", "s3://"+bucket, "main", path).
func barman(t testing.TB, s *s3Server, env []string, name string, args ...string) result {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v: install it with `make deps` (Debian package barman-cli-cloud)", err)
	}
	cmd := exec.Command(path, append([]string{"--cloud-provider", "aws-s3", "--endpoint-url", s.Endpoint}, args...)...)
	cmd.Env = append(os.Environ(), barmanEnv(s)...)
	cmd.Env = append(cmd.Env, env...)
	return run(t, cmd)
}

// barmanEnv is what Barman has to find in its environment.
func barmanEnv(s *s3Server) []string {
	env := []string{
		"AWS_ACCESS_KEY_ID=" + s.AccessKey, "AWS_SECRET_ACCESS_KEY=" + s.SecretKey, "AWS_DEFAULT_REGION=us-east-1",
		"AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null", "AWS_EC2_METADATA_DISABLED=true",
		// newer versions of boto3 send checksums that not every server takes
		"AWS_REQUEST_CHECKSUM_CALCULATION=when_required", "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"}
	if s.CAFile != "" {
		env = append(env, "AWS_CA_BUNDLE="+s.CAFile)
	}
	return env
}

// ---------------------------------------------------------------------------
// The S3 server
// ---------------------------------------------------------------------------

// s3Server is a running versitygw. Each bucket is a directory below Dir, each object a
// file in it.
type s3Server struct {
	Endpoint             string // http://127.0.0.1:PORT or https://...
	AccessKey, SecretKey string
	CAFile               string // PEM; "" for http
	Dir                  string

	client *s3.Client
	cmd    *exec.Cmd
}

var (
	s3Servers   []*s3Server // to be stopped at the end
	s3ServersMu sync.Mutex
	httpServer  = sync.OnceValues(func() (*s3Server, error) { return startS3(false) })
	httpsServer = sync.OnceValues(func() (*s3Server, error) { return startS3(true) })
	buckets     atomic.Int64
)

// testS3 is the S3 server of this test process, over http.
func testS3(t testing.TB) *s3Server {
	t.Helper()
	s, err := httpServer()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// testS3TLS is a second one, over https, with a certificate of the private authority in CAFile.
func testS3TLS(t testing.TB) *s3Server {
	t.Helper()
	s, err := httpsServer()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newBucket makes a bucket in the http server and removes it when the test ends.
func newBucket(t testing.TB) string {
	t.Helper()
	return testS3(t).newBucket(t)
}

func (s *s3Server) newBucket(t testing.TB) string {
	t.Helper()
	bucket := fmt.Sprintf("bucket-%d", buckets.Add(1))
	if _, err := s.client.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: &bucket}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Join(s.Dir, bucket)) })
	return bucket
}

// startS3 starts a versitygw; its data outlive no test process.
func startS3(useTLS bool) (*s3Server, error) {
	binary, err := versitygw()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(testRoot, "s3-")
	if err != nil {
		return nil, err
	}
	s := &s3Server{AccessKey: "testaccess", SecretKey: "testsecret", Dir: filepath.Join(dir, "data")}
	if err := os.Mkdir(s.Dir, 0o755); err != nil {
		return nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	s.Endpoint = "http://" + address
	args := []string{"--port", address, "--quiet"}
	transport := &http.Transport{}
	if useTLS {
		pki, err := newPKI(dir)
		if err != nil {
			return nil, err
		}
		s.Endpoint, s.CAFile = "https://"+address, pki.caFile
		args = append(args, "--cert", pki.certFile, "--key", pki.keyFile)
		transport.TLSClientConfig = &tls.Config{RootCAs: pki.pool}
	}
	var output bytes.Buffer
	s.cmd = exec.Command(binary, append(args, "posix", s.Dir)...)
	s.cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+s.AccessKey, "ROOT_SECRET_ACCESS_KEY="+s.SecretKey)
	s.cmd.Stdout, s.cmd.Stderr = &output, &output
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start versitygw: %w", err)
	}
	s3ServersMu.Lock()
	s3Servers = append(s3Servers, s)
	s3ServersMu.Unlock()
	s.client = s3.New(s3.Options{
		BaseEndpoint: &s.Endpoint, Region: "us-east-1", UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(s.AccessKey, s.SecretKey, ""),
		HTTPClient:  &http.Client{Transport: transport},
	})
	for deadline := time.Now().Add(hang); ; time.Sleep(20 * time.Millisecond) {
		if _, err = s.client.ListBuckets(context.Background(), &s3.ListBucketsInput{}); err == nil {
			return s, nil
		}
		if time.Now().After(deadline) {
			s.stop()
			return nil, fmt.Errorf("versitygw does not answer: %w\n%s", err, output.Bytes())
		}
	}
}

func (s *s3Server) stop() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// versitygw finds the S3 server in bin/, and builds it if it is not there.
func versitygw() (string, error) {
	path, err := filepath.Abs("bin/versitygw")
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	cmd := exec.Command("go", "build", "-C", "tools", "-o", path, "github.com/versity/versitygw/cmd/versitygw")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build bin/versitygw (`make tools` does the same): %w\n%s", err, out)
	}
	return path, nil
}

// keys lists the object keys that begin with prefix, in order.
func (s *s3Server) keys(t testing.TB, bucket, prefix string) []string {
	t.Helper()
	var keys []string
	pages := s3.NewListObjectsV2Paginator(s.client, &s3.ListObjectsV2Input{Bucket: &bucket, Prefix: &prefix})
	for pages.HasMorePages() {
		page, err := pages.NextPage(t.Context())
		if err != nil {
			t.Fatalf("list s3://%s/%s: %v", bucket, prefix, err)
		}
		for _, object := range page.Contents {
			keys = append(keys, *object.Key)
		}
	}
	return keys
}

// read returns an object's content and its user metadata.
func (s *s3Server) read(t testing.TB, bucket, key string) ([]byte, map[string]string) {
	t.Helper()
	object, err := s.client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: &bucket, Key: &key})
	if err != nil {
		t.Fatalf("read s3://%s/%s: %v", bucket, key, err)
	}
	defer object.Body.Close()
	content, err := io.ReadAll(object.Body)
	if err != nil {
		t.Fatalf("read s3://%s/%s: %v", bucket, key, err)
	}
	return content, object.Metadata
}

// exists says whether the object is there.
func (s *s3Server) exists(t testing.TB, bucket, key string) bool {
	t.Helper()
	return slices.Contains(s.keys(t, bucket, key), key)
}

// write puts an object, without any metadata, as another program would.
func (s *s3Server) write(t testing.TB, bucket, key string, content []byte) {
	t.Helper()
	_, err := s.client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: bytes.NewReader(content)})
	if err != nil {
		t.Fatalf("write s3://%s/%s: %v", bucket, key, err)
	}
}

// remove deletes an object that has to be there.
func (s *s3Server) remove(t testing.TB, bucket, key string) {
	t.Helper()
	if !s.exists(t, bucket, key) {
		t.Fatalf("remove s3://%s/%s: there is no such object", bucket, key)
	}
	if _, err := s.client.DeleteObject(t.Context(), &s3.DeleteObjectInput{Bucket: &bucket, Key: &key}); err != nil {
		t.Fatalf("remove s3://%s/%s: %v", bucket, key, err)
	}
}

// corrupt flips one byte of an object behind the server's back, as a failing disk
// does: ETag and metadata stay what they were.
func (s *s3Server) corrupt(t testing.TB, bucket, key string, offset int64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(s.Dir, bucket, key), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, offset); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0xff
	if _, err := f.WriteAt(b, offset); err != nil {
		t.Fatal(err)
	}
}

// truncate cuts an object behind the server's back.
func (s *s3Server) truncate(t testing.TB, bucket, key string, size int64) {
	t.Helper()
	if err := os.Truncate(filepath.Join(s.Dir, bucket, key), size); err != nil {
		t.Fatal(err)
	}
}

// uploads lists the keys of multipart uploads that are neither completed nor aborted.
func (s *s3Server) uploads(t testing.TB, bucket string) []string {
	t.Helper()
	list, err := s.client.ListMultipartUploads(t.Context(), &s3.ListMultipartUploadsInput{Bucket: &bucket})
	if err != nil {
		t.Fatalf("list the uploads of s3://%s: %v", bucket, err)
	}
	var keys []string
	for _, upload := range list.Uploads {
		keys = append(keys, *upload.Key)
	}
	return keys
}

// tags returns an object's tags.
func (s *s3Server) tags(t testing.TB, bucket, key string) map[string]string {
	t.Helper()
	list, err := s.client.GetObjectTagging(t.Context(), &s3.GetObjectTaggingInput{Bucket: &bucket, Key: &key})
	if err != nil {
		t.Fatalf("read the tags of s3://%s/%s: %v", bucket, key, err)
	}
	tags := map[string]string{}
	for _, tag := range list.TagSet {
		tags[*tag.Key] = aws.ToString(tag.Value)
	}
	return tags
}

// storeFile writes what --objectstore takes: an ObjectStore named "store" whose
// destination is s3://bucket, and its Secret. Lines of configuration (YAML, without
// indentation) are added to spec.configuration: storeFile(t, s, bucket, "wal: {compression: gzip}").
func storeFile(t testing.TB, s *s3Server, bucket string, configuration ...string) string {
	t.Helper()
	return storeFileAt(t, s, s.Endpoint, "s3://"+bucket, configuration...)
}

// storeFileAt is storeFile for another endpoint (a fault proxy's) or destination.
func storeFileAt(t testing.TB, s *s3Server, endpoint, destination string, configuration ...string) string {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: barmancloud.cnpg.io/v1
kind: ObjectStore
metadata: {name: store, namespace: default}
spec:
  configuration:
    destinationPath: %s
    endpointURL: %s
    s3Credentials:
      accessKeyId: {name: keys, key: ID}
      secretAccessKey: {name: keys, key: SECRET}
`, destination, endpoint)
	if s.CAFile != "" {
		configuration = append(configuration, "endpointCA: {name: ca, key: ca.crt}")
	}
	for _, lines := range configuration {
		for line := range strings.Lines(lines) {
			fmt.Fprintf(&b, "    %s\n", strings.TrimRight(line, "\n"))
		}
	}
	fmt.Fprintf(&b, `---
apiVersion: v1
kind: Secret
metadata: {name: keys, namespace: default}
stringData: {ID: %s, SECRET: %s}
`, s.AccessKey, s.SecretKey)
	if s.CAFile != "" {
		ca, err := os.ReadFile(s.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Secret\nmetadata: {name: ca, namespace: default}\nstringData:\n  ca.crt: %q\n", ca)
	}
	path := filepath.Join(testDir(t), "store.yaml")
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// freeAddress is a loopback address with a port that was free a moment ago.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// ---------------------------------------------------------------------------
// PostgreSQL
// ---------------------------------------------------------------------------

// postgres is a PostgreSQL server that runs in its own directory and listens on a Unix
// socket only.
type postgres struct {
	Dir       string // PGDATA
	SocketDir string // for PGHOST
	Port      int    // for PGPORT; no TCP port is open
	Version   int    // major
	Bin       string // where initdb, pg_ctl, psql of this version are

	t       testing.TB
	options []string // of the server's command line
	log     *os.File
	cmd     *exec.Cmd
	exited  chan struct{} // closed when cmd ended
}

// pgOptions says what startPostgres makes. The zero value is an ordinary primary.
type pgOptions struct {
	Checksums bool
	// WALSegmentMB is initdb's --wal-segsize; 0 is PostgreSQL's 16.
	WALSegmentMB int
	// ArchiveCommand switches archive_mode on.
	ArchiveCommand string
	// Tablespaces are created, each in a directory of its own: see postgres.tablespace.
	Tablespaces []string
	// StandbyOf makes a streaming standby of that server, by pg_basebackup.
	StandbyOf *postgres
	// Settings are further server settings, as "name=value".
	Settings []string
}

// startPostgres makes a database cluster and starts it. It stops when the test ends;
// its log is printed if the test failed.
func startPostgres(t testing.TB, o pgOptions) *postgres {
	t.Helper()
	p := newPostgres(t, filepath.Join(testDir(t), "pgdata"))
	if up := o.StandbyOf; up != nil {
		args := []string{"--pgdata", p.Dir, "--host", up.SocketDir, "--port", strconv.Itoa(up.Port),
			"--write-recovery-conf", "--checkpoint=fast", "--wal-method=stream", "--no-sync"}
		for _, location := range up.tablespaces() {
			args = append(args, "--tablespace-mapping", location+"="+p.tablespace(filepath.Base(location)))
		}
		mustRun(t, asPostgres(t, p.tool("pg_basebackup"), args...))
	} else {
		args := []string{"--pgdata", p.Dir, "--auth=trust", "--username=postgres", "--locale=C", "--encoding=UTF8", "--no-sync"}
		if o.Checksums {
			args = append(args, "--data-checksums")
		}
		if o.WALSegmentMB != 0 {
			args = append(args, "--wal-segsize", strconv.Itoa(o.WALSegmentMB))
		}
		mustRun(t, asPostgres(t, p.tool("initdb"), args...))
	}
	if o.ArchiveCommand != "" {
		p.options = append(p.options, "-c", "archive_mode=on")
	}
	for _, setting := range o.Settings {
		p.options = append(p.options, "-c", setting)
	}
	p.Start()
	if o.ArchiveCommand != "" {
		// kept in the data directory, where it can be changed; startRestored overrides it
		p.Set("archive_command", o.ArchiveCommand)
	}
	for _, name := range o.Tablespaces {
		location := p.tablespace(name)
		if err := os.MkdirAll(location, 0o755); err != nil {
			t.Fatal(err)
		}
		giveToPostgres(t, filepath.Dir(location))
		p.Exec(fmt.Sprintf("CREATE TABLESPACE %s LOCATION '%s'", name, location))
	}
	return p
}

// startRestored starts PostgreSQL on a directory that a restore made, and waits until
// recovery has ended. It does not archive, unless the settings say so.
func startRestored(t testing.TB, dir string, settings ...string) *postgres {
	t.Helper()
	p := newPostgres(t, dir)
	giveToPostgres(t, dir)
	if err := os.Chmod(dir, 0o700); err != nil { // `mkdir` may have made it wider than PostgreSQL accepts
		t.Fatal(err)
	}
	for _, location := range p.tablespaces() {
		giveToPostgres(t, location)
	}
	p.options = append(p.options, "-c", "archive_mode=off")
	for _, setting := range settings {
		p.options = append(p.options, "-c", setting)
	}
	p.Start()
	p.WaitRecovered()
	return p
}

// newPostgres prepares a server on dir without touching it.
func newPostgres(t testing.TB, dir string) *postgres {
	t.Helper()
	p := &postgres{Dir: dir, SocketDir: testDir(t), Port: 5432, Bin: pgBinDir(t), t: t}
	version := mustRun(t, exec.Command(p.tool("postgres"), "--version"))
	if _, err := fmt.Sscanf(version, "postgres (PostgreSQL) %d", &p.Version); err != nil {
		t.Fatalf("%s --version: %q", p.tool("postgres"), version)
	}
	var err error
	if p.log, err = os.CreateTemp(testDir(t), "log"); err != nil {
		t.Fatal(err)
	}
	p.options = []string{"-D", p.Dir, "-k", p.SocketDir, "-p", strconv.Itoa(p.Port), "-c", "listen_addresses=",
		"-c", "fsync=off", "-c", "shared_buffers=16MB", "-c", "max_connections=20", "-c", "max_wal_size=256MB",
		"-c", "log_destination=stderr", "-c", "logging_collector=off", "-c", "log_checkpoints=on"}
	t.Cleanup(func() {
		p.Stop("immediate")
		if t.Failed() {
			text, _ := os.ReadFile(p.log.Name())
			t.Logf("log of PostgreSQL in %s:\n%s", p.Dir, text)
		}
		p.log.Close()
	})
	return p
}

// pgBinDir is PG_BINDIR, or where Debian has the programs of the newest version installed.
func pgBinDir(t testing.TB) string {
	t.Helper()
	if dir := os.Getenv("PG_BINDIR"); dir != "" {
		return dir
	}
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	dirs = slices.DeleteFunc(dirs, func(dir string) bool { _, err := os.Stat(filepath.Join(dir, "initdb")); return err != nil })
	if len(dirs) == 0 {
		t.Fatal("PostgreSQL's server programs are not in /usr/lib/postgresql/*/bin: install them with `make deps`, or set PG_BINDIR")
	}
	return slices.Max(dirs)
}

// tool is a program of PostgreSQL; those that do not come with the server in PG_BINDIR are on PATH, or Debian's.
func (p *postgres) tool(name string) string {
	path := filepath.Join(p.Bin, name)
	if fileExists(path) {
		return path
	}
	if found, err := exec.LookPath(name); err == nil {
		return found
	}
	if found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name); len(found) > 0 {
		return slices.Max(found)
	}
	return path
}

// tablespace is where startPostgres puts the tablespace of that name: beside PGDATA.
func (p *postgres) tablespace(name string) string {
	return filepath.Join(filepath.Dir(p.Dir), "tblspc", name)
}

// tablespaces lists the locations that PGDATA links to.
func (p *postgres) tablespaces() []string {
	links, _ := filepath.Glob(filepath.Join(p.Dir, "pg_tblspc", "*"))
	var locations []string
	for _, link := range links {
		if location, err := os.Readlink(link); err == nil {
			locations = append(locations, location)
		}
	}
	return locations
}

// Start starts the server and waits until it takes connections, which a server in
// recovery does once it is consistent.
func (p *postgres) Start() {
	p.t.Helper()
	p.cmd = asPostgres(p.t, p.tool("postgres"), p.options...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr.Pdeathsig = syscall.SIGQUIT // immediate shutdown, should the tests be killed
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.exited = make(chan struct{})
	go func(cmd *exec.Cmd, exited chan struct{}) { cmd.Wait(); close(exited) }(p.cmd, p.exited)
	waitFor(p.t, "PostgreSQL to take connections", func() bool {
		p.mustBeRunning()
		return run(p.t, p.psql("SELECT 1")).Code == 0
	})
}

func (p *postgres) mustBeRunning() {
	p.t.Helper()
	select {
	case <-p.exited:
		p.t.Fatalf("PostgreSQL in %s has exited: %v", p.Dir, p.cmd.ProcessState)
	default:
	}
}

// Stop stops the server in pg_ctl's mode smart, fast or immediate. A stopped server stays stopped.
func (p *postgres) Stop(mode string) {
	p.t.Helper()
	signal, ok := map[string]os.Signal{"smart": syscall.SIGTERM, "fast": syscall.SIGINT, "immediate": syscall.SIGQUIT}[mode]
	if !ok {
		p.t.Fatalf("Stop(%q): the modes are smart, fast and immediate", mode)
	}
	if p.cmd == nil {
		return
	}
	p.cmd.Process.Signal(signal)
	select {
	case <-p.exited:
	case <-time.After(hang):
		p.cmd.Process.Kill()
		<-p.exited
		p.t.Errorf("PostgreSQL in %s did not stop (%s)", p.Dir, mode)
	}
}

// Restart stops the server (fast) and starts it again.
func (p *postgres) Restart() {
	p.t.Helper()
	p.Stop("fast")
	p.Start()
}

// Promote ends recovery of a standby.
func (p *postgres) Promote() {
	p.t.Helper()
	if p.Query("SELECT pg_promote()") != "t" {
		p.t.Fatal("pg_promote() has not promoted")
	}
}

// WaitRecovered waits until the server has left recovery.
func (p *postgres) WaitRecovered() {
	p.t.Helper()
	waitFor(p.t, "the end of recovery", func() bool {
		p.mustBeRunning()
		return p.Query("SELECT pg_is_in_recovery()") == "f"
	})
}

// Set changes a setting with ALTER SYSTEM and reloads.
func (p *postgres) Set(name, value string) {
	p.t.Helper()
	p.Exec(fmt.Sprintf("ALTER SYSTEM SET %s = '%s'", name, strings.ReplaceAll(value, "'", "''")))
	p.Exec("SELECT pg_reload_conf()")
	waitFor(p.t, name+" to be in force", func() bool { return p.Query("SHOW "+name) == value })
}

// Exec runs SQL as superuser in database postgres; each statement of a script with
// several is its own transaction only if it says so.
func (p *postgres) Exec(sql string) {
	p.t.Helper()
	mustRun(p.t, p.psql(sql))
}

// Query returns the rows of one SQL statement as psql prints them unaligned: fields
// joined by |, rows by newline.
func (p *postgres) Query(sql string) string {
	p.t.Helper()
	return strings.TrimRight(mustRun(p.t, p.psql(sql)), "\n")
}

func (p *postgres) psql(sql string) *exec.Cmd {
	cmd := exec.Command(p.tool("psql"), "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "--command", sql)
	cmd.Env = append(os.Environ(), p.Env()...)
	return cmd
}

// Env is the environment that leads a client to this server.
func (p *postgres) Env() []string {
	return []string{"PGHOST=" + p.SocketDir, "PGPORT=" + strconv.Itoa(p.Port), "PGUSER=postgres", "PGDATABASE=postgres"}
}

// SwitchWAL ends the current WAL segment, whether or not anything was written to it,
// and returns that segment's name.
func (p *postgres) SwitchWAL() string {
	p.t.Helper()
	p.Exec("SELECT pg_logical_emit_message(false, 'test', 'so that there is something to switch')")
	return p.Query("SELECT pg_walfile_name(pg_switch_wal())")
}

// WaitArchived waits until the server's archiver has reported that file as archived.
func (p *postgres) WaitArchived(wal string) {
	p.t.Helper()
	waitFor(p.t, "PostgreSQL to archive "+wal, func() bool {
		_, err := os.Stat(filepath.Join(p.Dir, "pg_wal", "archive_status", wal+".ready"))
		return errors.Is(err, fs.ErrNotExist) && p.Query("SELECT last_archived_wal >= '"+wal+"' FROM pg_stat_archiver") == "t"
	})
}

// asPostgres is a command that runs as user postgres where the tests run as root,
// since the server refuses root; otherwise as the tests' own user.
func asPostgres(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if os.Geteuid() == 0 {
		uid, gid := postgresUser(t)
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	} else if name := filepath.Base(name); name == "initdb" {
		cmd.Env = append(os.Environ(), "LC_ALL=C")
	}
	return cmd
}

func postgresUser(t testing.TB) (uid, gid int) {
	t.Helper()
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Fatalf("%v: install PostgreSQL with `make deps`", err)
	}
	uid, _ = strconv.Atoi(u.Uid)
	gid, _ = strconv.Atoi(u.Gid)
	return uid, gid
}

// giveToPostgres makes user postgres the owner of everything below dir, where the tests run as root.
func giveToPostgres(t testing.TB, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	uid, gid := postgresUser(t)
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ---------------------------------------------------------------------------
// A private certificate authority
// ---------------------------------------------------------------------------

// pki is a new authority and a certificate of it for 127.0.0.1 and localhost.
type pki struct {
	caFile, certFile, keyFile string
	pool                      *x509.CertPool
}

func newPKI(dir string) (*pki, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	p := &pki{filepath.Join(dir, "ca.crt"), filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), x509.NewCertPool()}
	for file, block := range map[string]*pem.Block{
		p.caFile:   {Type: "CERTIFICATE", Bytes: caDER},
		p.certFile: {Type: "CERTIFICATE", Bytes: leafDER},
		p.keyFile:  {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(p.caFile, 0o644); err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(caDER)
	if err != nil {
		return nil, err
	}
	p.pool.AddCert(parsed)
	return p, nil
}

// ---------------------------------------------------------------------------
// The faulty network
// ---------------------------------------------------------------------------

// faultProxy stands between a client and the S3 server (http) and spoils the requests
// that its rules match. Everything else goes through as it is.
type faultProxy struct {
	Endpoint string // for endpointURL, in place of the server's own

	upstream  *url.URL
	transport *http.Transport
	closed    chan struct{}

	mu       sync.Mutex
	faults   []*fault
	requests []string // "METHOD /bucket/key?query", in order of arrival
}

// fault is one rule. The first rule that matches a request and is not used up applies.
type fault struct {
	Method string         // "" matches every method
	Path   *regexp.Regexp // against /bucket/key?query; nil matches everything
	Header string         // the request must have it; "" matches every request
	Skip   int            // so many matching requests pass unspoilt first
	Times  int            // how many are spoilt then; 0 means all

	Do    faultAction
	Code  string        // of answerError, such as "SlowDown"
	HTTP  int           // status of answerError
	Bytes int64         // of truncateBody, stallBody: how much of the body passes
	Delay time.Duration // of delayRequest, delayReply

	seen, hits int
}

type faultAction int

const (
	loseReply    faultAction = iota // the server does what was asked; the client sees a reset connection instead of the answer
	resetRequest                    // the connection is reset and the server never hears of it
	stallRequest                    // no answer, until the client gives up; the server never hears of it
	stallBody                       // the answer begins, and stops in the middle of the body
	truncateBody                    // the answer begins, and the connection ends in the middle of the body
	answerError                     // an S3 error; the server never hears of it
	delayRequest                    // late, but unspoilt
	delayReply                      // the server does what was asked at once; the client hears of it late
)

// startFaultProxy starts a proxy without rules; it ends with the test.
func startFaultProxy(t testing.TB, s *s3Server) *faultProxy {
	t.Helper()
	upstream, err := url.Parse(s.Endpoint)
	if err != nil || upstream.Scheme != "http" {
		t.Fatalf("fault proxy in front of %s: it speaks http only", s.Endpoint)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &faultProxy{
		Endpoint: "http://" + listener.Addr().String(), upstream: upstream, closed: make(chan struct{}),
		transport: &http.Transport{DisableCompression: true},
	}
	server := &http.Server{Handler: p, ErrorLog: log.New(io.Discard, "", 0)}
	go server.Serve(listener)
	t.Cleanup(func() { close(p.closed); server.Close(); p.transport.CloseIdleConnections() })
	return p
}

// add adds a rule. Assert hits of it, lest the fault never happened.
func (p *faultProxy) add(f fault) *fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = append(p.faults, &f)
	return &f
}

// hits is how many requests this rule has spoilt.
func (p *faultProxy) hits(f *fault) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return f.hits
}

// clear removes all rules.
func (p *faultProxy) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = nil
}

// seen lists the requests so far, as "METHOD /bucket/key?query", that match.
func (p *faultProxy) seen(match *regexp.Regexp) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(p.requests), func(r string) bool { return !match.MatchString(r) })
}

func (p *faultProxy) match(r *http.Request) (fault, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	path := r.URL.Path
	if r.URL.RawQuery != "" {
		path += "?" + r.URL.RawQuery
	}
	p.requests = append(p.requests, r.Method+" "+path)
	for _, f := range p.faults {
		if (f.Method != "" && f.Method != r.Method) || (f.Path != nil && !f.Path.MatchString(path)) || (f.Header != "" && r.Header.Get(f.Header) == "") {
			continue
		}
		if f.seen++; f.seen <= f.Skip || (f.Times != 0 && f.hits == f.Times) {
			continue
		}
		f.hits++
		return *f, true
	}
	return fault{}, false
}

func (p *faultProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f, spoilt := p.match(r)
	if spoilt {
		switch f.Do {
		case resetRequest:
			reset(w)
			return
		case stallRequest:
			io.Copy(io.Discard, r.Body) // all of it is taken, so that the client waits for the answer
			p.wait(r, hang)
			reset(w)
			return
		case delayRequest:
			p.wait(r, f.Delay)
		case answerError:
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(f.HTTP)
			if r.Method != http.MethodHead {
				fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>made by the fault proxy</Message><RequestId>0</RequestId></Error>`, f.Code)
			}
			return
		}
	}

	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host, out.RequestURI = p.upstream.Scheme, p.upstream.Host, ""
	out.Header.Set("Accept-Encoding", "gzip, br") // as some front ends do: nothing that is signed may depend on it
	out.Header.Del("Expect")                      // net/http answers it for us; the signature does not cover it. Host stays: it is signed.
	response, err := p.transport.RoundTrip(out)
	if err != nil {
		reset(w)
		return
	}
	defer response.Body.Close()
	if spoilt && f.Do == loseReply {
		io.Copy(io.Discard, response.Body)
		reset(w)
		return
	}
	if spoilt && f.Do == delayReply {
		p.wait(r, f.Delay)
	}
	for name, values := range response.Header {
		w.Header()[name] = values
	}
	w.WriteHeader(response.StatusCode)
	if spoilt && (f.Do == truncateBody || f.Do == stallBody) {
		io.CopyN(w, response.Body, f.Bytes)
		http.NewResponseController(w).Flush()
		if f.Do == stallBody {
			p.wait(r, hang)
		}
		panic(http.ErrAbortHandler) // ends the connection in the middle of the body
	}
	io.Copy(w, response.Body)
}

// wait returns after d, or earlier when the client or the proxy goes.
func (p *faultProxy) wait(r *http.Request, d time.Duration) {
	select {
	case <-time.After(d):
	case <-r.Context().Done():
	case <-p.closed:
	}
}

// reset ends the client's connection with a TCP reset.
func reset(w http.ResponseWriter) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
}

// ---------------------------------------------------------------------------
// The kit itself
// ---------------------------------------------------------------------------

// Barman takes a backup of the kit's PostgreSQL into the kit's S3 server, restores it,
// and the kit starts what it restored.
func TestKitBarman(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	p := startPostgres(t, pgOptions{Checksums: true, ArchiveCommand: "cp %p " + testDir(t) + "/%f", Tablespaces: []string{"side"}})
	p.Exec("CREATE TABLE t TABLESPACE side AS SELECT generate_series(1, 1000) AS n")
	standby := startPostgres(t, pgOptions{StandbyOf: p})
	waitFor(t, "the standby to have the table", func() bool {
		return standby.Query("SELECT to_regclass('t') IS NOT NULL") == "t"
	})
	p.WaitArchived(p.SwitchWAL())

	r := barman(t, s, p.Env(), "barman-cloud-backup", "--immediate-checkpoint", "s3://"+bucket, "main")
	if r.Code != 0 {
		t.Fatalf("barman-cloud-backup: exit code %d\n%s", r.Code, r.Stderr)
	}
	keys := s.keys(t, bucket, "main/base/")
	if len(keys) != 3 { // backup.info, data.tar, and the tablespace's
		t.Fatalf("objects of the backup: %q", keys)
	}
	info, _ := s.read(t, bucket, keys[slices.IndexFunc(keys, func(k string) bool { return strings.HasSuffix(k, "/backup.info") })])
	begin := regexp.MustCompile(`begin_wal=(\w{24})`).FindSubmatch(info)
	if begin == nil {
		t.Fatalf("no begin_wal in backup.info:\n%s", info)
	}
	if err := os.Rename(p.Dir+"/pg_wal", p.Dir+"/../pg_wal"); err != nil { // p is not needed any more
		t.Fatal(err)
	}
	p.Stop("immediate")
	r = barman(t, s, nil, "barman-cloud-wal-archive", "s3://"+bucket, "main", p.Dir+"/../pg_wal/"+string(begin[1]))
	if r.Code != 0 {
		t.Fatalf("barman-cloud-wal-archive: exit code %d\n%s", r.Code, r.Stderr)
	}

	dir, side := filepath.Join(testDir(t), "restored"), filepath.Join(testDir(t), "side")
	id := strings.Split(keys[0], "/")[2]
	if r = barman(t, s, nil, "barman-cloud-restore", "--tablespace", "side:"+side, "s3://"+bucket, "main", id, dir); r.Code != 0 {
		t.Fatalf("barman-cloud-restore: exit code %d\n%s", r.Code, r.Stderr)
	}
	segment := filepath.Join(dir, "pg_wal", string(begin[1]))
	if r = barman(t, s, nil, "barman-cloud-wal-restore", "s3://"+bucket, "main", string(begin[1]), segment); r.Code != 0 {
		t.Fatalf("barman-cloud-wal-restore: exit code %d\n%s", r.Code, r.Stderr)
	}
	restored := startRestored(t, dir)
	if n := restored.Query("SELECT count(*) FROM t"); n != "1000" {
		t.Fatalf("the restored table has %s rows", n)
	}
	standby.Promote()
	standby.Exec("INSERT INTO t VALUES (0)")
}

// Each fault is what it says, seen from a client without retries, and what it does to the object is known.
func TestKitFaultProxy(t *testing.T) {
	for _, s := range []*s3Server{testS3(t), testS3TLS(t)} { // the servers themselves
		bucket := s.newBucket(t)
		s.write(t, bucket, "a/b", []byte("content"))
		if content, _ := s.read(t, bucket, "a/b"); string(content) != "content" {
			t.Fatalf("%s: read %q", s.Endpoint, content)
		}
		s.corrupt(t, bucket, "a/b", 0)
		if content, _ := s.read(t, bucket, "a/b"); string(content) == "content" || len(content) != 7 {
			t.Fatalf("%s: read %q after corrupt", s.Endpoint, content)
		}
		s.remove(t, bucket, "a/b")
	}

	s := testS3(t)
	big := bytes.Repeat([]byte("0123456789abcdef"), 256<<10) // 4 MiB, so that the client says Expect: 100-continue
	for _, c := range []struct {
		name   string
		f      fault
		stored bool // whether the object is there after the PUT
		fails  bool // whether the client sees an error
	}{
		{"lose the reply", fault{Method: "PUT", Do: loseReply}, true, true},
		{"reset", fault{Method: "PUT", Do: resetRequest}, false, true},
		{"503", fault{Method: "PUT", Do: answerError, HTTP: 503, Code: "SlowDown"}, false, true},
		{"stall", fault{Method: "PUT", Do: stallRequest}, false, true},
		{"delay", fault{Method: "PUT", Do: delayRequest, Delay: time.Millisecond}, true, false},
		{"skip", fault{Method: "PUT", Skip: 1, Do: resetRequest}, true, false},
		{"another path", fault{Path: regexp.MustCompile("other"), Do: resetRequest}, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			bucket, proxy := newBucket(t), startFaultProxy(t, s)
			f := proxy.add(c.f)
			patience := hang
			if c.f.Do == stallRequest {
				patience = time.Second
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := proxy.client(s).PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: aws.String("key"), Body: bytes.NewReader(big)})
			if (err != nil) != c.fails {
				t.Errorf("PUT: %v", err)
			}
			if want := map[bool]int{true: 1, false: 0}[c.fails || c.f.Do == delayRequest]; proxy.hits(f) != want {
				t.Errorf("%d requests were spoilt, want %d", proxy.hits(f), want)
			}
			if s.exists(t, bucket, "key") != c.stored {
				t.Errorf("the object is there: %v, want %v", !c.stored, c.stored)
			}
			if c.stored {
				if content, _ := s.read(t, bucket, "key"); !bytes.Equal(content, big) {
					t.Errorf("the object has %d bytes, want %d, or they differ", len(content), len(big))
				}
			}
			if seen := proxy.seen(regexp.MustCompile(`^PUT /` + bucket + `/key`)); len(seen) != 1 {
				t.Errorf("the proxy saw %q", seen)
			}
		})
	}
	for _, action := range []faultAction{truncateBody, stallBody} {
		bucket, proxy := newBucket(t), startFaultProxy(t, s)
		s.write(t, bucket, "key", big)
		proxy.add(fault{Method: "GET", Path: regexp.MustCompile(bucket + "/key"), Times: 1, Do: action, Bytes: 1000})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // ends the stall
		defer cancel()
		object, err := proxy.client(s).GetObject(ctx, &s3.GetObjectInput{Bucket: &bucket, Key: aws.String("key")})
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, object.Body); n != 1000 || err == nil {
			t.Errorf("action %d: %d bytes and error %v, want 1000 and an error", action, n, err)
		}
	}
}

// client is an S3 client that talks through the proxy and never tries twice.
func (p *faultProxy) client(s *s3Server) *s3.Client {
	options := s.client.Options()
	options.BaseEndpoint, options.Retryer = &p.Endpoint, aws.NopRetryer{}
	options.APIOptions = append(options.APIOptions, withoutAcceptEncoding)
	return s3.New(options)
}
