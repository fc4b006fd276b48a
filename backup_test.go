package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloudnative-pg/cnpg-i/pkg/backup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ---------------------------------------------------------------------------
// What the tests here share
// ---------------------------------------------------------------------------

// archivingTo is the archive_command of a server that archives with our own program.
func archivingTo(t testing.TB, file string) string {
	t.Helper()
	return fmt.Sprintf("%s wal-archive --objectstore %s --server-name main %%p", program(t), file)
}

// connection leads takeBackup to a server.
func (p *postgres) connection() string {
	return fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres", p.SocketDir, p.Port)
}

// pgbenchTables makes pgbench's tables, about 15 MB for each unit of scale.
func (p *postgres) pgbenchTables(scale int) {
	p.t.Helper()
	cmd := exec.Command(p.tool("pgbench"), "--initialize", "--quiet", fmt.Sprint("--scale=", scale))
	cmd.Env = p.Env()
	mustRun(p.t, cmd)
}

// pgbenchLoad writes to pgbench's tables until stop is called.
func (p *postgres) pgbenchLoad() (stop func()) {
	p.t.Helper()
	cmd := exec.Command(p.tool("pgbench"), "--client=4", "--time=600", "--no-vacuum", "--rate=300")
	cmd.Env = p.Env()
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	stop = sync.OnceFunc(func() { cmd.Process.Kill(); cmd.Wait() })
	p.t.Cleanup(stop)
	return stop
}

// balanced asserts what pgbench leaves true at every commit, and that it has written something.
func (p *postgres) balanced() {
	p.t.Helper()
	sums := p.Query(`SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches),
		(SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(delta) FROM pgbench_history)`)
	f := strings.Split(sums, "|")
	if f[0] == "" || f[0] != f[1] || f[0] != f[2] || f[0] != f[3] {
		p.t.Errorf("sums of accounts, branches, tellers, history: %s", sums)
	}
}

// verifyBackup has PostgreSQL's own program compare a restored directory with its manifest.
func (p *postgres) verifyBackup(dir string, args ...string) {
	p.t.Helper()
	mustRun(p.t, exec.Command(p.tool("pg_verifybackup"), append(args, "--no-parse-wal", dir)...))
}

// amcheck has PostgreSQL's own program look at every table and index, also while they are in use.
func (p *postgres) amcheck() {
	p.t.Helper()
	cmd := exec.Command(p.tool("pg_amcheck"), "--install-missing", "--heapallindexed", "--all")
	cmd.Env = append(os.Environ(), p.Env()...)
	mustRun(p.t, cmd)
}

// restoreWithBarman restores a backup by Barman's own programs, with tablespaces as
// NAME:LOCATION, and recovers it to the end of the archive.
func restoreWithBarman(t testing.TB, s *s3Server, bucket, id string, tablespaces ...string) *postgres {
	t.Helper()
	dir := restoreFilesWithBarman(t, s, bucket, id, tablespaces...)
	if err := os.WriteFile(filepath.Join(dir, "recovery.signal"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return startRestored(t, dir, fmt.Sprintf("restore_command=env AWS_ACCESS_KEY_ID=%s AWS_SECRET_ACCESS_KEY=%s AWS_DEFAULT_REGION=us-east-1 "+
		"barman-cloud-wal-restore --endpoint-url %s s3://%s main %%f %%p", s.AccessKey, s.SecretKey, s.Endpoint, bucket))
}

// restoreFilesWithBarman restores a backup without starting a server on it.
func restoreFilesWithBarman(t testing.TB, s *s3Server, bucket, id string, tablespaces ...string) (dir string) {
	t.Helper()
	dir = filepath.Join(testDir(t), "restored")
	var args []string
	for _, space := range tablespaces {
		args = append(args, "--tablespace", space)
	}
	if r := barman(t, s, nil, "barman-cloud-restore", append(args, "s3://"+bucket, "main", id, dir)...); r.Code != 0 {
		t.Fatalf("barman-cloud-restore: exit code %d\n%s", r.Code, r.Stderr)
	}
	return dir
}

// mustBackUp takes a backup with a fast checkpoint.
func mustBackUp(t testing.TB, s *Store, p *postgres, o backupOptions) *BackupInfo {
	t.Helper()
	o.Connection, o.FastCheckpoint = p.connection(), true
	info, err := takeBackup(t.Context(), s, o)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// tarNames lists the entries of one stored, uncompressed archive in their order.
func tarNames(t testing.TB, s *s3Server, bucket, key string) (names []string) {
	t.Helper()
	content, _ := s.read(t, bucket, key)
	for r := tar.NewReader(bytes.NewReader(content)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return names
		}
		if err != nil {
			t.Fatalf("%s: %v", key, err)
		}
		names = append(names, h.Name)
	}
}

// logged collects the log of the test.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func captureLog(t testing.TB) *logged {
	l, before := &logged{}, slog.Default()
	slog.SetDefault(slog.New(slog.NewJSONHandler(l, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	return l
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) has(text string) bool { return l.count(text) > 0 }

func (l *logged) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

// assertFailed asserts what a failed backup leaves: a FAILED backup.info without an end,
// no archive, no unfinished upload, and no session.
func assertFailed(t testing.TB, s *s3Server, bucket string, store *Store, p *postgres, text string) {
	t.Helper()
	catalog, err := store.Catalog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(catalog.Backups) != 1 {
		t.Fatalf("the catalog has %d backups, incomplete %q, unreadable %v", len(catalog.Backups), catalog.Incomplete, catalog.Unreadable)
	}
	info := catalog.Backups[0]
	if info.Status != statusFailed || !info.EndTime.IsZero() || info.Done() || !strings.Contains(info.Error, text) {
		t.Errorf("backup.info: status %s, end %v, error %q; want FAILED, no end, %q", info.Status, info.EndTime, info.Error, text)
	}
	if keys := s.keys(t, bucket, "main/base/"); !slices.Equal(keys, []string{"main/base/" + info.ID + "/backup.info"}) {
		t.Errorf("objects left: %q", keys)
	}
	if uploads := s.uploads(t, bucket); len(uploads) > 0 {
		t.Errorf("uploads left: %q", uploads)
	}
	waitFor(t, "the session to be gone", func() bool {
		return p.Query("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'barman_cloud_backup'") == "0"
	})
}

// ---------------------------------------------------------------------------
// Backups that succeed
// ---------------------------------------------------------------------------

// A backup under load restores by Barman, in both codecs, and Barman lists it.
func TestBackupRestoredByBarman(t *testing.T) {
	for _, compression := range []string{"", "gzip"} {
		t.Run("compression="+compression, func(t *testing.T) {
			s, bucket := testS3(t), newBucket(t)
			file := storeFile(t, s, bucket, fmt.Sprintf("data: {compression: %q}\nwal: {compression: %q}", compression, compression))
			p := startPostgres(t, pgOptions{Checksums: true, ArchiveCommand: archivingTo(t, file)})
			p.pgbenchTables(5)
			stop := p.pgbenchLoad()
			info := mustBackUp(t, testStoreFile(t, file, "main"), p, backupOptions{Name: "a-name"})
			stop()
			p.WaitArchived(p.SwitchWAL())

			suffix := map[string]string{"": ".tar", "gzip": ".tar.gz"}[compression]
			dir := "main/base/" + info.ID + "/"
			if keys, want := s.keys(t, bucket, dir), []string{dir + "backup.info", dir + "data" + suffix, dir + "data_0001" + suffix}; !slices.Equal(keys, want) {
				t.Errorf("objects %q, want %q", keys, want)
			}
			if uploads := s.uploads(t, bucket); len(uploads) > 0 {
				t.Errorf("uploads left: %q", uploads)
			}
			var list struct {
				Backups []map[string]any `json:"backups_list"`
			}
			r := barman(t, s, nil, "barman-cloud-backup-list", "--format", "json", "s3://"+bucket, "main")
			if err := json.Unmarshal([]byte(r.Stdout), &list); err != nil || len(list.Backups) != 1 {
				t.Fatalf("barman-cloud-backup-list: %v\n%s%s", err, r.Stdout, r.Stderr)
			}
			for field, want := range map[string]any{"backup_id": info.ID, "status": "DONE", "backup_name": "a-name", "error": nil, "server_name": "cloud",
				"begin_wal": info.BeginWAL, "end_wal": info.EndWAL, "begin_xlog": info.BeginLSN, "end_xlog": info.EndLSN,
				"systemid": p.Query("SELECT system_identifier FROM pg_control_system()"), "timeline": float64(1), "pgdata": p.Dir} {
				if got := list.Backups[0][field]; got != want {
					t.Errorf("%s: Barman reads %v, want %v", field, got, want)
				}
			}
			if _, ok := list.Backups[0]["copy_stats"].(map[string]any)["copy_time_per_item"].(map[string]any)["data"]; !ok {
				t.Errorf("copy_stats: %v", list.Backups[0]["copy_stats"])
			}
			restoreWithBarman(t, s, bucket, info.ID).balanced()
		})
	}
}

// Small archives: every file is in exactly one of them, directories are in the first,
// pg_control and backup_label end the last, and Barman puts it all together again.
func TestBackupSplit(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket, `data: {jobs: 3, additionalCommandArgs: ["--max-archive-size=6MB", "--min-chunk-size=5MB"]}`)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file)})
	p.pgbenchTables(3)
	p.Exec("UPDATE pgbench_accounts SET abalance = 0 WHERE aid % 10 = 0")
	info := mustBackUp(t, testStoreFile(t, file, "main"), p, backupOptions{})

	var data []string
	seen := map[string]int{}
	for _, key := range s.keys(t, bucket, "main/base/"+info.ID+"/data") {
		names := tarNames(t, s, bucket, key)
		for i, name := range names {
			seen[name]++
			if directory := strings.HasSuffix(name, "/"); directory && len(data) > 0 {
				t.Errorf("directory %s is in %s", name, key)
			}
			if i == 0 && len(data) == 0 && name != "./" {
				t.Errorf("%s begins with %q", key, name)
			}
		}
		data = append(data, key)
	}
	if len(data) < 5 {
		t.Fatalf("only %d archives: %q", len(data), data)
	}
	// data.tar sorts before data_0001.tar
	if last := tarNames(t, s, bucket, data[len(data)-1]); !slices.Equal(last[len(last)-3:], []string{"global/pg_control", "backup_manifest", "backup_label"}) {
		t.Errorf("%s ends with %q", data[len(data)-1], last[max(0, len(last)-3):])
	}
	for name, n := range seen {
		if n > 1 {
			t.Errorf("%s is stored %d times", name, n)
		}
	}
	restored := restoreWithBarman(t, s, bucket, info.ID)
	if n := restored.Query("SELECT count(*) FROM pgbench_accounts"); n != "300000" {
		t.Errorf("%s accounts", n)
	}
}

// Tablespaces beside and inside the data directory, one without any table.
func TestBackupTablespaces(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file), Tablespaces: []string{"beside", "empty"}})
	inside := filepath.Join(p.Dir, "spaces", "inside")
	if err := os.MkdirAll(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	giveToPostgres(t, filepath.Join(p.Dir, "spaces"))
	p.Exec("CREATE TABLESPACE inside LOCATION '" + inside + "'")
	for _, space := range []string{"beside", "inside"} {
		p.Exec(fmt.Sprintf("CREATE TABLE in_%s TABLESPACE %s AS SELECT generate_series(1, 1000) AS n", space, space))
	}
	// What a tablespace's directory holds besides is not PostgreSQL's.
	if err := os.WriteFile(filepath.Join(p.tablespace("beside"), "foreign"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	p.pgbenchTables(2)
	p.Exec("ALTER TABLE pgbench_tellers SET TABLESPACE beside; ALTER TABLE pgbench_branches SET TABLESPACE inside")
	stop := p.pgbenchLoad()
	info := mustBackUp(t, testStoreFile(t, file, "main"), p, backupOptions{})

	if len(info.Tablespaces) != 3 {
		t.Fatalf("tablespaces: %v", info.Tablespaces)
	}
	dir := "main/base/" + info.ID + "/"
	for _, space := range info.Tablespaces {
		if !s.exists(t, bucket, fmt.Sprintf("%s%d.tar", dir, space.OID)) {
			t.Errorf("tablespace %s has no archive", space.Name)
		}
		for _, key := range s.keys(t, bucket, fmt.Sprintf("%s%d", dir, space.OID)) {
			for _, name := range tarNames(t, s, bucket, key) {
				if !strings.HasPrefix(name, "PG_") {
					t.Errorf("tablespace %s: %s is stored", space.Name, name)
				}
			}
		}
	}
	for _, key := range s.keys(t, bucket, dir+"data") {
		for _, name := range tarNames(t, s, bucket, key) {
			if strings.HasPrefix(name, "spaces/inside") || strings.HasPrefix(name, "pg_tblspc/") && name != "pg_tblspc/" {
				t.Errorf("the data archives have %s", name)
			}
		}
	}
	stop()
	p.WaitArchived(p.SwitchWAL())
	ours := testDir(t)
	if r := runProgram(t, nil, "restore", "--objectstore", file, "--server-name", "main", "--tablespace", "beside:"+ours+"/beside",
		"--tablespace", "empty:"+ours+"/empty", ours+"/pgdata"); r.Code != 0 {
		t.Fatalf("restore: exit code %d\n%s", r.Code, r.Stderr)
	}
	p.verifyBackup(ours+"/pgdata", "--ignore=spaces") // which it would see a second time, through no tablespace
	to := testDir(t)
	barmans := restoreFilesWithBarman(t, s, bucket, info.ID, "beside:"+to+"/one", "inside:"+to+"/two", "empty:"+to+"/three")
	p.verifyBackup(barmans)
	restored := restoreWithBarman(t, s, bucket, info.ID, "beside:"+to+"/beside", "inside:"+to+"/inside", "empty:"+to+"/empty")
	if n := restored.Query("SELECT (SELECT count(*) FROM in_beside) + (SELECT count(*) FROM in_inside)"); n != "2000" {
		t.Errorf("%s rows in the restored tablespaces", n)
	}
}

// Of an unlogged relation the backup has the init fork only, and of temporary ones nothing:
// the restored server begins with an empty one, and keeps it so after a crash.
func TestBackupLeavesOutUnlogged(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file), Tablespaces: []string{"beside"}})
	p.Exec(`CREATE TABLE kept AS SELECT n, 'x' AS x FROM generate_series(1, 1000) n;
		CREATE UNLOGGED TABLE gone (n int PRIMARY KEY, x text); CREATE UNLOGGED TABLE spaced (n int) TABLESPACE beside;
		INSERT INTO gone SELECT n, 'x' FROM generate_series(1, 1000) n; INSERT INTO spaced SELECT n FROM gone`)
	p.Exec("VACUUM gone")
	p.Exec("CHECKPOINT")
	temporary := p.psql("CREATE TEMP TABLE session AS SELECT generate_series(1, 100000); SELECT pg_sleep(600)")
	if err := temporary.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { temporary.Process.Kill(); temporary.Wait() })
	waitFor(t, "a temporary relation", func() bool {
		found, _ := filepath.Glob(filepath.Join(p.Dir, "base", "*", "t*_*"))
		return len(found) > 0
	})
	foreign := filepath.Join(p.Dir, "base", p.Query("SELECT oid FROM pg_database WHERE datname = 'postgres'"), "foreign")
	for _, dir := range []string{"/foreign", "/base/pgsql_tmp"} {
		if err := os.MkdirAll(p.Dir+dir, 0o755); err != nil {
			t.Fatal(err)
		}
		mustWrite(t, p.Dir+dir+"/pgsql_tmp1.0", "temporary")
		mustWrite(t, p.Dir+dir+"/16384", "foreign")
	}
	mustWrite(t, foreign, "foreign")
	giveToPostgres(t, p.Dir)
	store := testStoreFile(t, file, "main")
	info := mustBackUp(t, store, p, backupOptions{})

	stored := map[string]bool{}
	for _, key := range s.keys(t, bucket, "main/base/"+info.ID+"/") {
		if space, _, isTar := strings.Cut(path.Base(key), ".tar"); isTar {
			for _, name := range tarNames(t, s, bucket, key) {
				if space, _, _ = strings.Cut(space, "_"); space != "data" {
					name = "pg_tblspc/" + space + "/" + name
				}
				stored[name] = true
				if strings.Contains(name, "pgsql_tmp/") && !strings.HasSuffix(name, "/") || strings.Contains(name, "pgsql_tmp1") || temporaryRelation.MatchString(path.Base(name)) {
					t.Errorf("%s is in the backup", name)
				}
			}
		}
	}
	for _, relation := range []string{"gone", "gone_pkey", "spaced"} {
		name := p.Query("SELECT pg_relation_filepath('" + relation + "')")
		for _, fork := range []string{"", "_fsm", "_vm"} {
			if stored[name+fork] {
				t.Errorf("%s of the unlogged %s is in the backup", name+fork, relation)
			}
		}
		if !stored[name+"_init"] {
			t.Errorf("the init fork %s_init of %s is not in the backup", name, relation)
		}
	}
	for _, name := range []string{p.Query("SELECT pg_relation_filepath('kept')"), "foreign/16384", strings.TrimPrefix(foreign, p.Dir+"/")} {
		if !stored[name] {
			t.Errorf("%s is not in the backup", name)
		}
	}
	p.WaitArchived(p.SwitchWAL())
	dir := testDir(t)
	if r := runProgram(t, nil, "restore", "--objectstore", file, "--server-name", "main", "--tablespace", "beside:"+dir+"/beside", dir+"/pgdata"); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	p.verifyBackup(dir+"/pgdata", "--ignore=postgresql.auto.conf", "--ignore=recovery.signal")
	restored := startRestored(t, dir+"/pgdata")
	const counts = "SELECT (SELECT count(*) FROM kept), (SELECT count(*) FROM gone), (SELECT count(*) FROM spaced)"
	if got := restored.Query(counts); got != "1000|0|0" {
		t.Errorf("rows in the restored tables: %s", got)
	}
	restored.Exec("INSERT INTO gone VALUES (1, 'new'); INSERT INTO spaced VALUES (1); INSERT INTO kept VALUES (1)")
	restored.Stop("immediate")
	restored.Start()
	if got := restored.Query(counts); got != "1001|0|0" {
		t.Errorf("rows after a crash of the restored server: %s", got)
	}
}

// A damaged page is found, in the second file of a relation and in a tablespace too, and
// told with file and block; it does not fail the backup. A busy server has none.
func TestBackupFindsDamagedPages(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket, "data: {compression: gzip}")
	p := startPostgres(t, pgOptions{Checksums: true, ArchiveCommand: archivingTo(t, file), Tablespaces: []string{"beside"},
		Settings: []string{"shared_buffers=1MB", "bgwriter_delay=10ms", "bgwriter_lru_maxpages=1000"}}) // pages are written all the time
	p.pgbenchTables(5)
	p.Exec("CREATE TABLE plain AS SELECT generate_series(1, 10000) AS n; CREATE TABLE spaced TABLESPACE beside AS SELECT * FROM plain")
	p.Exec("VACUUM spaced") // which makes its free space map
	store := testStoreFile(t, file, "main")
	stop := p.pgbenchLoad()
	for range 3 {
		if info := mustBackUp(t, store, p, backupOptions{}); info.BadPageCount != 0 {
			t.Errorf("a busy server: bad pages %q", info.BadPages)
		}
	}
	stop()

	plain, spaced := p.Query("SELECT pg_relation_filepath('plain')"), p.Query("SELECT pg_relation_filepath('spaced')")
	p.Stop("fast")
	for name, at := range map[string]int64{plain: 3*8192 + 4000, spaced: 5*8192 + 8191, spaced + "_fsm": 2*8192 + 100} {
		f, err := os.OpenFile(filepath.Join(p.Dir, name), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	p.Start()
	log := captureLog(t)
	id := mustBackUp(t, store, p, backupOptions{}).ID
	info, err := store.ReadBackupInfo(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{plain + ":3", spaced + ":5", spaced + "_fsm:2"}
	if slices.Sort(info.BadPages); !info.Done() || info.BadPageCount != 3 || !slices.Equal(info.BadPages, want) {
		t.Errorf("%s, %d bad pages %q, want %q", info.Status, info.BadPageCount, info.BadPages, want)
	}
	for _, text := range []string{fmt.Sprintf(`"file":"%s","block":3`, plain), `"badPages":3`} {
		if !log.has(text) {
			t.Errorf("the log does not have %s", text)
		}
	}
	if r := runProgram(t, nil, "verify", "--objectstore", file, "--server-name", "main", "--json", id); r.Code != 0 || !strings.Contains(r.Stdout, `"badPages": 3`) {
		t.Errorf("verify: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	list := runProgram(t, nil, "list", "--objectstore", file, "--server-name", "main", "-o", "json")
	if !strings.Contains(list.Stdout, plain+":3") || !strings.Contains(list.Stdout, `"badPageCount": 3`) {
		t.Errorf("list says %s", list.Stdout)
	}
}

// The names of many bad pages do not outgrow what S3 takes of user metadata.
func TestBadPagesAreBounded(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main")
	b := aBackup("20260101T100000", 1, "10:00", "0/3000200")
	for b.BadPageCount = range 5000 {
		b.BadPages = append(b.BadPages, fmt.Sprintf("pg_tblspc/16390/PG_18_202506291/16384/%d.1:131072", b.BadPageCount))
	}
	if err := store.WriteBackupInfo(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	got, err := store.ReadBackupInfo(t.Context(), b.ID)
	if n := len(got.BadPages); err != nil || got.BadPageCount != 4999 || n < 20 || !slices.Equal(got.BadPages, b.BadPages[:n]) {
		t.Errorf("%v, %d bad pages, of which %d have names: %q", err, got.BadPageCount, n, got.BadPages)
	}
}

// A file that is damaged all over is read without hours of waiting for its pages to become good.
func TestManyBadPages(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/1")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := append(bytes.Repeat([]byte{0}, 8), bytes.Repeat([]byte{1}, 8184)...) // with an LSN of 0
	piece := bytes.Repeat(page, 1000)
	if _, err := f.Write(piece); err != nil {
		t.Fatal(err)
	}
	b := &baseBackup{info: &BackupInfo{}, session: &session{checksums: true, blockSize: 8192, blocksPerFile: 131072}, start: 1}
	began := time.Now()
	b.checkPages(t.Context(), f, "base/5/1", piece, 0, 0)
	if took := time.Since(began); b.info.BadPageCount != 1000 || len(b.info.BadPages) != maxBadPages || took > 20*time.Second {
		t.Errorf("%d bad pages, %d named, after %s", b.info.BadPageCount, len(b.info.BadPages), took)
	}
}

func TestRelationFile(t *testing.T) {
	b := &baseBackup{session: &session{checksums: true, blocksPerFile: 131072}}
	for name, want := range map[string]int64{
		"base/5/16384": 0, "base/5/16384.3": 3 * 131072, "base/5/16384_fsm": 0, "base/5/16384_vm.1": 131072, "base/5/16384_init": 0, "global/1262": 0,
		"PG_15_202209061/5/16384.2": 2 * 131072, "pg_tblspc/16390/PG_15_202209061/5/16384": 0,
		"base/5/pg_filenode.map": -1, "base/5/PG_VERSION": -1, "base/5/pg_internal.init": -1, "global/pg_control": -1, "global/pg_filenode.map": -1,
		"pg_xact/0000": -1, "pg_multixact/offsets/0000": -1, "base/pgsql_tmp/1": -1, "16384": -1, "base/5/x/16384": -1, "PG_VERSION": -1,
	} {
		first, pages := b.relationFile(name)
		if !pages {
			first = -1
		}
		if first != want {
			t.Errorf("%s: first block %d, want %d", name, first, want)
		}
	}
}

func BenchmarkPageChecksum(b *testing.B) {
	page := random(b, 8192)
	b.SetBytes(8192)
	b.ReportAllocs()
	for b.Loop() {
		pageChecksum(page, 1)
	}
}

// A standby of an idle primary takes its own copy of the last segment along, and leaves
// out what pg_basebackup has put into its directory.
func TestBackupOfStandby(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	primary := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file)})
	primary.Exec("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")
	standby := startPostgres(t, pgOptions{StandbyOf: primary})
	for _, name := range []string{"backup_manifest", "standby.signal"} {
		if !fileExists(filepath.Join(standby.Dir, name)) {
			t.Fatalf("the standby has no %s, the test shows nothing", name)
		}
	}
	for _, name := range []string{"backup_label.old", "tablespace_map.old"} {
		if err := os.WriteFile(filepath.Join(standby.Dir, name), []byte("stale\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	primary.Exec("CHECKPOINT")
	caughtUp(t, standby, primary)
	standby.Exec("CHECKPOINT") // a restartpoint

	store := testStoreFile(t, file, "main")
	info := mustBackUp(t, store, standby, backupOptions{StandbyPatience: 2 * time.Second})
	if !slices.Equal(info.WALInBackup, []string{info.EndWAL}) {
		t.Errorf("WAL in the backup: %q, want %s", info.WALInBackup, info.EndWAL)
	}
	read, err := store.ReadBackupInfo(t.Context(), info.ID)
	if err != nil || !slices.Equal(read.WALInBackup, info.WALInBackup) {
		t.Errorf("WAL in the backup, read again: %q (%v)", read.WALInBackup, err)
	}
	found, manifests := false, 0
	for _, key := range s.keys(t, bucket, "main/base/"+info.ID+"/data") {
		for _, name := range tarNames(t, s, bucket, key) {
			found = found || name == "pg_wal/"+info.EndWAL
			switch name {
			case "backup_manifest": // its own, not that of pg_basebackup
				if manifests++; manifests > 1 {
					t.Error("there are two manifests in the backup")
				}
			case "standby.signal", "backup_label.old", "tablespace_map.old", "tablespace_map", "postmaster.pid":
				t.Errorf("%s is in the backup", name)
			}
		}
	}
	if !found {
		t.Errorf("pg_wal/%s is in no archive", info.EndWAL)
	}
	restored := restoreWithBarman(t, s, bucket, info.ID)
	if n := restored.Query("SELECT count(*) FROM t"); n != "1000" {
		t.Errorf("the restored table has %s rows", n)
	}

	// Copied by a tool that loses metadata, backup.info does not say any more what the backup has.
	unaware, pgdata := *read, filepath.Join(testDir(t), "pgdata")
	unaware.WALInBackup = nil
	if err := restoreBackup(t.Context(), store, &unaware, restoreOptions{Dir: pgdata}); err != nil {
		t.Error(err)
	} else if n := startRestored(t, pgdata).Query("SELECT count(*) FROM t"); n != "1000" {
		t.Errorf("the restored table has %s rows", n)
	}

	// A primary that is not idle ships the segment, and then the backup needs no copy.
	again := make(chan *BackupInfo)
	go func() {
		info, err := takeBackup(t.Context(), store, backupOptions{Connection: standby.connection(), FastCheckpoint: true, StandbyPatience: hang})
		if err != nil {
			t.Error(err)
		}
		again <- info
	}()
	for done := false; !done; {
		primary.SwitchWAL()
		select {
		case info := <-again:
			done = true
			if info != nil && len(info.WALInBackup) > 0 {
				t.Errorf("WAL in the backup of a standby whose primary is busy: %q", info.WALInBackup)
			}
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// caughtUp waits until a standby has replayed what its primary has written.
func caughtUp(t testing.TB, standby, primary *postgres) {
	t.Helper()
	waitFor(t, "the standby", func() bool {
		return standby.Query("SELECT pg_last_wal_replay_lsn()") == primary.Query("SELECT pg_current_wal_flush_lsn()")
	})
}

// A primary that is behind with archiving comes to the WAL of a standby's backup in the end: what
// it archives meanwhile is seen in the archive.
func TestBackupOfStandbyBehindBacklog(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	primary := startPostgres(t, pgOptions{ArchiveCommand: "false"})
	primary.Exec("CREATE TABLE t AS SELECT 1 AS a")
	standby := startPostgres(t, pgOptions{StandbyOf: primary, ArchiveCommand: "false"})
	const backlog = 8
	for range backlog {
		primary.Exec("INSERT INTO t VALUES (2)")
		primary.SwitchWAL()
	}
	primary.Exec("CHECKPOINT")
	caughtUp(t, standby, primary)
	standby.Exec("CHECKPOINT")
	primary.SwitchWAL() // the backup needs a segment that is complete, and the beginning of another one
	primary.Exec("INSERT INTO t VALUES (3)")
	caughtUp(t, standby, primary)
	primary.Exec("ALTER SYSTEM SET archive_command = 'sleep 2; " + archivingTo(t, file) + "'")
	primary.Exec("SELECT pg_reload_conf()")
	store := testStoreFile(t, file, "main")
	info := mustBackUp(t, store, standby, backupOptions{StandbyPatience: time.Second, WALTimeout: 12 * time.Second})
	if n := len(s.keys(t, bucket, "main/wals/")); n < backlog {
		t.Errorf("the backlog of %d files is %d in the archive: there was none to wait for", backlog, n)
	}
	if err := checkFirstWAL(t.Context(), store, info); err != nil {
		t.Error(err)
	}
}

// A standby that is promoted in the middle of its backup fails it: whatever the backup has
// then, DONE it is not.
func TestBackupOfStandbyThatIsPromoted(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	primary := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file)})
	primary.pgbenchTables(2)
	standby := startPostgres(t, pgOptions{StandbyOf: primary, ArchiveCommand: archivingTo(t, file), Settings: []string{"wal_retrieve_retry_interval=100ms"}})
	primary.SwitchWAL()
	store := testStoreFile(t, file, "main")
	store.data.MaxBandwidth = 8 << 20
	failure := make(chan error)
	go func() {
		_, err := takeBackup(t.Context(), store, backupOptions{Connection: standby.connection(), FastCheckpoint: true})
		failure <- err
	}()
	waitFor(t, "an upload to be on its way", func() bool { return len(s.uploads(t, bucket)) > 0 })
	primary.Stop("immediate")
	standby.Promote()
	if err := <-failure; err == nil || !strings.Contains(err.Error(), "promoted during online backup") {
		t.Errorf("the backup of a standby that was promoted meanwhile: %v", err)
	}
	assertFailed(t, s, bucket, store, standby, "promoted")
	store.data.MaxBandwidth = 0
	if info := mustBackUp(t, store, standby, backupOptions{}); info.Timeline != 2 {
		t.Errorf("the backup after the promotion is on timeline %d", info.Timeline)
	}
}

// pg_wal on another volume is an empty directory in the backup, and configuration files
// elsewhere lie in its root.
func TestBackupLinksAndConfiguration(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file)})
	p.Stop("fast")
	elsewhere := testDir(t)
	for _, move := range []string{"pg_wal", "pg_xact"} {
		mustRun(t, exec.Command("mv", filepath.Join(p.Dir, move), filepath.Join(elsewhere, move)))
		if err := os.Symlink(filepath.Join(elsewhere, move), filepath.Join(p.Dir, move)); err != nil {
			t.Fatal(err)
		}
	}
	hba := filepath.Join(elsewhere, "pg_hba.conf")
	if err := os.WriteFile(hba, []byte("local all all trust # elsewhere\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p.options = append(p.options, "-c", "hba_file="+hba)
	if err := os.Symlink("PG_VERSION", filepath.Join(p.Dir, "a_link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(p.Dir, "a_fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, filepath.Join(p.Dir, "foreign")); err != nil {
		t.Fatal(err)
	}
	giveToPostgres(t, p.Dir)
	p.Start()
	p.Exec("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n")
	log := captureLog(t)
	info := mustBackUp(t, testStoreFile(t, file, "main"), p, backupOptions{})
	if !log.has("none of PostgreSQL's own") || !log.has(filepath.Join(p.Dir, "foreign")) {
		t.Error("nothing is said of the link that is left out")
	}

	restored := restoreWithBarman(t, s, bucket, info.ID)
	if n := restored.Query("SELECT count(*) FROM t"); n != "1000" {
		t.Errorf("the restored table has %s rows", n)
	}
	for _, name := range []string{"a_fifo", "foreign"} {
		if fileExists(filepath.Join(restored.Dir, name)) {
			t.Errorf("%s was restored", name)
		}
	}
	if target, err := os.Readlink(filepath.Join(restored.Dir, "a_link")); target != "PG_VERSION" {
		t.Errorf("a_link leads to %q (%v)", target, err)
	}
	for _, name := range []string{"pg_wal", "pg_xact"} {
		if info, err := os.Lstat(filepath.Join(restored.Dir, name)); err != nil || !info.IsDir() {
			t.Errorf("%s is no directory: %v", name, err)
		}
	}
	if content, _ := os.ReadFile(filepath.Join(restored.Dir, "pg_hba.conf")); !strings.Contains(string(content), "# elsewhere") {
		t.Errorf("pg_hba.conf is %q", content)
	}
}

// The server spreads the checkpoint over minutes: the log says what is being waited for,
// and how to avoid it. The wait can be ended.
func TestBackupSaysThatItWaitsForTheCheckpoint(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file), Settings: []string{"checkpoint_timeout=1h"}})
	p.Exec("CHECKPOINT")
	p.pgbenchTables(1) // dirty pages, which a checkpoint spreads
	log := captureLog(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	failure := make(chan error)
	go func() {
		_, err := takeBackup(ctx, testStoreFile(t, file, "main"), backupOptions{Connection: p.connection(), ReportEvery: 50 * time.Millisecond})
		failure <- err
	}()
	waitFor(t, "the log to speak of the checkpoint", func() bool {
		return log.has("immediateCheckpoint: true") && log.has(`"mayTake":"54m0s"`)
	})
	cancel()
	if err := <-failure; !errors.Is(err, context.Canceled) {
		t.Errorf("the cancelled backup: %v", err)
	}
	assertFailed(t, s, bucket, testStoreFile(t, file, "main"), p, "canceled")
}

// ---------------------------------------------------------------------------
// Backups that fail
// ---------------------------------------------------------------------------

// A cancelled backup takes everything back, also archives that are already complete.
func TestBackupCancelled(t *testing.T) {
	for _, compression := range []string{"", "gzip"} {
		t.Run("compression="+compression, func(t *testing.T) {
			s, bucket := testS3(t), newBucket(t)
			file := storeFile(t, s, bucket, fmt.Sprintf(`data: {compression: %q, additionalCommandArgs: ["--max-bandwidth=4MB"]}`, compression))
			p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file), Tablespaces: []string{"side"}})                 // its archive is complete first
			p.Exec("CREATE TABLE noise AS SELECT gen_random_uuid() AS a, gen_random_uuid() AS b FROM generate_series(1, 600000)") // no codec helps
			store := testStoreFile(t, file, "main")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			failure := make(chan error)
			go func() {
				_, err := takeBackup(ctx, store, backupOptions{Connection: p.connection(), FastCheckpoint: true})
				failure <- err
			}()
			waitFor(t, "an archive to be complete and another to be on its way", func() bool {
				return len(s.keys(t, bucket, "main/base/")) > 0 && len(s.uploads(t, bucket)) > 0
			})
			cancel()
			if err := <-failure; !errors.Is(err, context.Canceled) {
				t.Errorf("the cancelled backup: %v", err)
			}
			assertFailed(t, s, bucket, store, p, "canceled")
		})
	}
}

// Once the DONE is on its way a backup is not cancelled any more: no later FAILED could
// overtake it.
func TestBackupCancelledAtTheEnd(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, s)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, storeFile(t, s, bucket))})
	store := openTestStore(t, storeFileAt(t, s, proxy.Endpoint, "s3://"+bucket))
	late := proxy.add(fault{Method: "PUT", Path: regexp.MustCompile("backup.info"), Do: delayReply, Delay: time.Second, Times: 1})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		waitFor(t, "the end", func() bool { return proxy.hits(late) == 1 })
		cancel()
	}()
	info, err := takeBackup(ctx, store, backupOptions{Connection: p.connection(), FastCheckpoint: true})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := store.ReadBackupInfo(t.Context(), info.ID); err != nil || !b.Done() {
		t.Errorf("backup.info %+v, %v", b, err)
	}
	if _, err := listArchives(t.Context(), store, info); err != nil {
		t.Error(err)
	}
	// The id is the backup's own until its backup.info is there, whether it says DONE or FAILED.
	steps := func() (steps []string) {
		order := regexp.MustCompile(`^(PUT|HEAD|DELETE) .*/base/\w+/(reserved|backup\.info)(\?|$)`)
		for _, r := range proxy.seen(order) {
			m := order.FindStringSubmatch(r)
			steps = append(steps, m[1]+" "+m[2])
		}
		return steps
	}
	want := []string{"PUT reserved", "HEAD backup.info", "PUT backup.info", "DELETE reserved"}
	if got := steps(); !slices.Equal(got, want) {
		t.Errorf("a backup that is done: %q, want %q", got, want)
	}
	proxy.add(fault{Path: regexp.MustCompile(`/data\.tar`), Do: answerError, HTTP: 403, Code: "AccessDenied"})
	if _, err := takeBackup(t.Context(), store, backupOptions{Connection: p.connection(), FastCheckpoint: true}); !errors.Is(err, errDenied) {
		t.Errorf("without the right to write: %v", err)
	}
	if got := steps()[len(want):]; !slices.Equal(got, want) {
		t.Errorf("a backup that has failed: %q, want %q", got, want)
	}
}

// A killed backup leaves no backup.info, and the next one is not disturbed by what is left.
func TestBackupKilled(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	slow := storeFile(t, s, bucket, `data: {immediateCheckpoint: true, additionalCommandArgs: ["--max-bandwidth=2MB"]}`)
	file := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file)})
	p.pgbenchTables(5)
	cmd := exec.Command(program(t), "backup", "--objectstore", slow, "--server-name", "main")
	cmd.Env = append(os.Environ(), p.Env()...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "an upload to be on its way", func() bool { return len(s.uploads(t, bucket)) > 0 })
	cmd.Process.Kill()
	cmd.Wait()
	store := testStoreFile(t, file, "main")
	if catalog, err := store.Catalog(t.Context()); err != nil || len(catalog.Backups) > 0 {
		t.Errorf("the catalog after the kill: %+v (%v)", catalog, err)
	}
	waitFor(t, "the server to notice", func() bool {
		return p.Query("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'barman_cloud_backup'") == "0"
	})
	info := mustBackUp(t, store, p, backupOptions{})
	if n := restoreWithBarman(t, s, bucket, info.ID).Query("SELECT count(*) FROM pgbench_accounts"); n != "500000" {
		t.Errorf("the restored table has %s rows", n)
	}
}

// The store goes away for good in the middle, or the reply to one request is lost.
func TestBackupAcrossFaults(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	direct := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, direct)})
	p.pgbenchTables(5)

	proxy := startFaultProxy(t, s)
	lost := proxy.add(fault{Method: "POST", Path: regexp.MustCompile(`/base/.*uploadId=`), Do: loseReply, Times: 1})
	info := mustBackUp(t, testStoreAt(t, s, proxy.Endpoint, bucket, "main"), p, backupOptions{})
	if proxy.hits(lost) != 1 {
		t.Errorf("no reply to CompleteMultipartUpload was lost")
	}
	if n := restoreWithBarman(t, s, bucket, info.ID).Query("SELECT count(*) FROM pgbench_accounts"); n != "500000" {
		t.Errorf("the restored table has %s rows", n)
	}

	// An archive that is put together in the background is as needed as the last one.
	denied := proxy.add(fault{Method: "POST", Path: regexp.MustCompile(`/base/.*/data\.tar\?uploadId=`), Do: answerError, HTTP: 403, Code: "AccessDenied"})
	store := testStoreAt(t, s, proxy.Endpoint, bucket, "main")
	_, err := takeBackup(t.Context(), store, backupOptions{Connection: p.connection(), FastCheckpoint: true})
	if !errors.Is(err, errDenied) || !strings.Contains(err.Error(), "/data.tar:") || proxy.hits(denied) == 0 {
		t.Errorf("a backup whose first archive could not be completed: %v", err)
	}
	if left := s.uploads(t, bucket); len(left) > 0 {
		t.Errorf("uploads are left: %q", left)
	}
	for _, key := range s.keys(t, bucket, "main/base/") {
		if !strings.Contains(key, info.ID) && !strings.HasSuffix(key, "/backup.info") {
			t.Errorf("%s is left of the failed backup", key)
		}
	}
	proxy.clear()

	gone := proxy.add(fault{Path: regexp.MustCompile(`.`), Do: resetRequest, Skip: 4})
	_, err = takeBackup(t.Context(), testStoreAt(t, s, proxy.Endpoint, bucket, "main"), backupOptions{Connection: p.connection(), FastCheckpoint: true, StorePatience: time.Second})
	if err == nil || !strings.Contains(err.Error(), "s3://"+bucket) || proxy.hits(gone) == 0 {
		t.Errorf("a backup into a store that went away: %v", err)
	}
	catalog, err := testStoreFile(t, direct, "main").Catalog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if done := slices.DeleteFunc(slices.Clone(catalog.Backups), func(b *BackupInfo) bool { return !b.Done() }); len(done) != 1 {
		t.Errorf("the catalog: %+v", catalog)
	}
}

// A store that is away for longer than the SDK tries costs neither a backup nor a restore.
func TestBackupAcrossAbsence(t *testing.T) {
	t.Setenv("AWS_MAX_ATTEMPTS", "1") // the SDK's share would take half a minute
	s, bucket := testS3(t), newBucket(t)
	direct := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, direct)})
	p.pgbenchTables(5)
	proxy := startFaultProxy(t, s)
	store := testStoreAt(t, s, proxy.Endpoint, bucket, "main")
	faults := []*fault{ // each is more than one request's attempts
		proxy.add(fault{Method: "POST", Path: regexp.MustCompile(`/base/.*uploads`), Do: resetRequest, Times: 3}),
		proxy.add(fault{Method: "PUT", Path: regexp.MustCompile(`/base/.*partNumber=2`), Do: answerError, HTTP: 503, Code: "SlowDown", Times: 4}),
		proxy.add(fault{Method: "POST", Path: regexp.MustCompile(`/base/.*uploadId=`), Do: loseReply, Times: 2}),
		proxy.add(fault{Method: "GET", Path: regexp.MustCompile(`/wals/.*/`), Do: answerError, HTTP: 500, Code: "InternalError", Times: 3}),
	}
	info := mustBackUp(t, store, p, backupOptions{})
	faults = append(faults, proxy.add(fault{Method: "GET", Path: regexp.MustCompile(`/base/.*/data\.tar`), Do: answerError, HTTP: 503, Code: "SlowDown", Times: maxAttempts + 1}),
		proxy.add(fault{Method: "GET", Path: regexp.MustCompile(`/base/.*/data_0001\.tar`), Do: truncateBody, Bytes: 0, Times: maxAttempts + 1}))
	pgdata := filepath.Join(testDir(t), "pgdata")
	command := restoreCommand(program(t), "wal-restore", "--objectstore", direct, "--server-name", "main")
	if err := restoreBackup(t.Context(), store, info, restoreOptions{Dir: pgdata, Settings: func() error { return writeRecoverySettings(pgdata, nil, command) }}); err != nil {
		t.Fatal(err)
	}
	for i, f := range faults {
		if n := proxy.hits(f); n < 2 {
			t.Errorf("fault %d happened %d times", i, n)
		}
	}
	if n := startRestored(t, pgdata).Query("SELECT count(*) FROM pgbench_accounts"); n != "500000" {
		t.Errorf("the restored table has %s rows", n)
	}
}

// Without the WAL there is no backup: the error names the first missing segment.
func TestBackupNeedsItsWAL(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main")
	p := startPostgres(t, pgOptions{ArchiveCommand: "false"})
	first := p.Query("SELECT pg_walfile_name(pg_current_wal_lsn())")
	log := captureLog(t)
	o := backupOptions{Connection: p.connection(), FastCheckpoint: true, WALTimeout: 5 * time.Second, ReportEvery: 100 * time.Millisecond}
	_, err := takeBackup(t.Context(), store, o)
	if !errors.Is(err, errWALMissing) || !strings.Contains(err.Error(), first) || !strings.Contains(err.Error(), "pg_stat_archiver") {
		t.Errorf("a backup whose WAL is not archived: %v; want %s named", err, first)
	}
	if !log.has("Waiting for the WAL of the backup") {
		t.Error("the log does not say that it waits")
	}
	assertFailed(t, s, bucket, store, p, first)

	// Nor is there one when the WAL goes elsewhere, however busily.
	elsewhere := startPostgres(t, pgOptions{ArchiveCommand: "true"})
	busy, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-busy:
				return
			case <-time.After(200 * time.Millisecond):
				elsewhere.psql("CREATE TABLE IF NOT EXISTS x(); SELECT pg_switch_wal(); DROP TABLE x").Run()
			}
		}
	}()
	o.Connection = elsewhere.connection()
	_, err = takeBackup(t.Context(), store, o)
	close(busy)
	<-done
	if !errors.Is(err, errWALMissing) {
		t.Errorf("a backup whose WAL is archived elsewhere: %v", err)
	}

	// Nor when only its names are there, which another cluster's WAL has too.
	other := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, storeFile(t, s, bucket))})
	for range 6 {
		first = other.SwitchWAL()
	}
	other.WaitArchived(first)
	o.Connection = p.connection()
	if _, err = takeBackup(t.Context(), store, o); !errors.Is(err, errDifferent) || !strings.Contains(err.Error(), "another cluster writes to the same place") {
		t.Errorf("a backup with the WAL of another cluster: %v", err)
	}

	off := startPostgres(t, pgOptions{Settings: []string{"archive_mode=off"}})
	if _, err := takeBackup(t.Context(), store, backupOptions{Connection: off.connection()}); !errors.Is(err, errSetup) || !strings.Contains(err.Error(), "archive_mode") {
		t.Errorf("a backup of a server that does not archive: %v", err)
	}
}

// Nor when the WAL that is there is of a server that began as this one and went another way,
// as after a rollback of the volume: nothing but its content tells it from our own.
func TestBackupOfServerThatForked(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	store := testStoreFile(t, file, "main")
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file)})
	p.Stop("fast")
	copied := filepath.Join(testDir(t), "pgdata")
	mustRun(t, exec.Command("cp", "--archive", p.Dir, copied))
	p.Start()
	twin := startRestored(t, copied, "archive_mode=on", "archive_command=false")
	for range 6 { // the original is ahead
		p.Exec("CREATE TABLE IF NOT EXISTS x(); DROP TABLE x")
		p.WaitArchived(p.SwitchWAL())
	}
	o := backupOptions{Connection: twin.connection(), FastCheckpoint: true, WALTimeout: hang, ReportEvery: time.Second}
	_, err := takeBackup(t.Context(), store, o)
	if !errors.Is(err, errDifferent) || !strings.Contains(err.Error(), "same origin") {
		t.Errorf("a backup of a server that forked: %v", err)
	}
}

// PGHOST may lead to another server than the one whose files are here.
func TestBackupOfAnotherHost(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStoreFile(t, storeFile(t, s, bucket), "main")
	here, there := startPostgres(t, pgOptions{ArchiveCommand: "true"}), startPostgres(t, pgOptions{ArchiveCommand: "true"})
	_, err := takeBackup(t.Context(), store, backupOptions{Connection: there.connection(), PGData: here.Dir, FastCheckpoint: true})
	if !errors.Is(err, errSetup) || !strings.Contains(err.Error(), here.Dir) || len(s.keys(t, bucket, "")) > 0 {
		t.Errorf("the files of one server with the label of another: %v", err)
	}
}

// A server that stops in the middle ends its backup.
func TestBackupOfServerThatStops(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file)})
	p.pgbenchTables(5)
	store := testStoreFile(t, file, "main")
	store.data.MaxBandwidth = 1 << 20
	failure := make(chan error)
	go func() {
		_, err := takeBackup(t.Context(), store, backupOptions{Connection: p.connection(), FastCheckpoint: true, ReportEvery: 100 * time.Millisecond})
		failure <- err
	}()
	waitFor(t, "an upload to be on its way", func() bool { return len(s.uploads(t, bucket)) > 0 })
	p.Restart()
	if err := <-failure; !errors.Is(err, errRefused) && !errors.Is(err, errServer) { // the server's last words may or may not arrive
		t.Errorf("the backup of a server that was restarted: %v", err)
	}
	assertFailed(t, s, bucket, store, p, "session")
}

// ---------------------------------------------------------------------------
// Files
// ---------------------------------------------------------------------------

// triggerCodec is no compression, but calls f once n bytes have been written.
func triggerCodec(n int, f func()) *codec {
	once := sync.OnceFunc(f)
	return &codec{newWriter: func(w io.Writer, _ int) (io.WriteCloser, error) {
		written := 0
		return nopWriteCloser{writerFunc(func(p []byte) (int, error) {
			if written += len(p); written > n {
				once()
			}
			return w.Write(p)
		})}, nil
	}}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A file that changes its size while it is being read has the size that its header says.
func TestBackupOfChangingFiles(t *testing.T) {
	const size = 4 << 20
	original := bytes.Repeat([]byte("PostgreSQL"), size/10+1)[:size]
	for _, c := range []struct {
		name   string
		change func(string) error
		want   func(stored []byte) bool
	}{
		{"shrinks", func(f string) error { return os.Truncate(f, size/2) }, func(stored []byte) bool {
			return bytes.Equal(stored[:size/2], original[:size/2]) && bytes.Equal(stored[size-1000:], make([]byte, 1000))
		}},
		{"grows", func(f string) error { return os.WriteFile(f, append(slices.Clone(original), "more"...), 0) }, func(stored []byte) bool {
			return len(stored) == size
		}},
		{"vanishes", os.Remove, func(stored []byte) bool { return bytes.Equal(stored, original) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, bucket := testS3(t), newBucket(t)
			dir := t.TempDir()
			path := filepath.Join(dir, "file")
			if err := os.WriteFile(path, original, 0o600); err != nil {
				t.Fatal(err)
			}
			changed := false
			b := &baseBackup{store: testStore(t, s, bucket, "main"), info: &BackupInfo{ID: "20260101T000000"}, read: new(progress), codec: triggerCodec(size/4, func() {
				changed = true
				if err := c.change(path); err != nil {
					t.Error(err)
				}
			})}
			a, err := b.openArchive(t.Context(), "data", 0)
			if err != nil {
				t.Fatal(err)
			}
			buffer := make([]byte, 64<<10)
			for _, name := range []string{"file", "gone"} { // gone was listed, and vanished before it was opened
				if err := b.copyFile(t.Context(), &tree{name: "data", root: dir}, &a, name, buffer); err != nil {
					t.Fatal(err)
				}
			}
			if err := a.add(tar.Header{Name: "after"}, []byte("content")); err != nil {
				t.Fatal(err)
			}
			if err := a.close(); err != nil || !changed {
				t.Fatalf("close: %v; the file was changed: %v", err, changed)
			}
			content, _ := s.read(t, bucket, a.key)
			r := tar.NewReader(bytes.NewReader(content))
			if h, err := r.Next(); err != nil || h.Name != "file" || h.Size != size {
				t.Fatalf("first entry: %+v (%v)", h, err)
			}
			if stored, err := io.ReadAll(r); err != nil || len(stored) != size || !c.want(stored) {
				t.Errorf("stored %d bytes (%v), or not the right ones", len(stored), err)
			}
			if h, err := r.Next(); err != nil || h.Name != "after" {
				t.Errorf("second entry: %+v (%v)", h, err)
			}
		})
	}
}

// A file that cannot be read fails the backup, and the error names it.
func TestBackupNamesUnreadableFile(t *testing.T) {
	store := testStore(t, testS3(t), newBucket(t), "main")
	b := &baseBackup{store: store, info: &BackupInfo{ID: "20260101T000000"}, codec: codecs[0]}
	a, err := b.openArchive(t.Context(), "data", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer a.abort()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(file, "below") // fails for every user, and is not "no such file"
	if err = b.addFile(t.Context(), a, "below", path, make([]byte, 4096)); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("unreadable file: %v", err)
	}
}

func TestExcludedFiles(t *testing.T) {
	data, space := &tree{top: ".", skip: map[string]bool{controlFile: true, "spaces/inside": true}}, &tree{top: "PG_15_202209061"}
	for _, c := range []struct {
		tree     *tree
		name     string
		excluded bool
	}{
		{data, "PG_VERSION", false},
		{data, "postmaster.pid", true},
		{data, "postmaster.opts", true},
		{data, "backup_manifest", true},
		{data, "backup_label", true},
		{data, "backup_label.old", true},
		{data, "tablespace_map", true},
		{data, "tablespace_map.old", true},
		{data, "standby.signal", true},
		{data, "standby.signal.bak", false},
		{data, "recovery.signal", true},
		{data, "current_logfiles", true},
		{data, "lost+found", true},
		{data, "postgresql.auto.conf", false},
		{data, "postgresql.auto.conf.tmp", true},
		{data, "global/pg_control", true},
		{data, "global/pg_internal.init", true},
		{data, "base/5/pg_internal.init", true},
		{data, "base/5/pg_internal.init.1234", true},
		{data, "base/5/pg_internal_init", false},
		{data, "base/5/16384", false},
		{data, "base/5/16384_fsm", false},
		{data, "base/5/t3_16384", true},
		{data, "base/5/t3_16384_fsm", true},
		{data, "base/5/t3_16384.1", true},
		{data, "base/5/t3", false},
		{data, "base/t3_16384", false},
		{data, "base/pgsql_tmp", true},
		{data, "base/pgsql_tmp/pgsql_tmp123.0", true},
		{data, "spaces/inside", true},
		{data, "spaces/other", false},
		{data, "base/5/standby.signal", false},
		{space, "PG_15_202209061/5/16384", false},
		{space, "PG_15_202209061/5/t3_16384", true},
		{space, "PG_15_202209061/pgsql_tmp", true},
	} {
		if got := c.tree.excluded(c.name); got != c.excluded {
			t.Errorf("excluded(%q) = %v", c.name, got)
		}
	}
}

// A link from one of PostgreSQL's directories to another, such as the old name of a new one, does
// not take the place of what it leads to, whichever is listed first; and a circle of links ends.
func TestLinkedDirectories(t *testing.T) {
	root := t.TempDir()
	mustWrite(t, root+"/pg_b/0000", "")
	mustWrite(t, root+"/pg_c/0000", "")
	for link, target := range map[string]string{"pg_a": "pg_b", "pg_d": "pg_c", "pg_b/up": ".."} {
		if err := os.Symlink(target, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	tree := &tree{root: root, top: "."}
	if err := tree.findDirectories("."); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range tree.directories {
		names = append(names, d.Name)
	}
	if slices.Sort(names); !slices.Equal(names, []string{"./", "pg_a/", "pg_b/", "pg_c/", "pg_d/"}) {
		t.Errorf("directories of the backup: %q", names)
	}
}

// A real pg_control is intact, and none of its bytes may change.
func TestControlFileIntact(t *testing.T) {
	p := startPostgres(t, pgOptions{})
	content, err := os.ReadFile(filepath.Join(p.Dir, controlFile))
	if err != nil || !controlFileIntact(content) {
		t.Fatalf("the control file of a running server does not count as intact (%v)", err)
	}
	for i := range 288 { // ControlFileData of version 15 without its CRC
		damaged := slices.Clone(content)
		damaged[i] ^= 1
		if controlFileIntact(damaged) {
			t.Errorf("intact with a flipped bit in byte %d", i)
		}
	}
	if controlFileIntact(nil) || controlFileIntact(make([]byte, 8192)) {
		t.Error("nothing at all counts as intact")
	}

	// One that is being written is read again until it is whole.
	s, bucket := testS3(t), newBucket(t)
	dir := t.TempDir()
	os.Mkdir(filepath.Join(dir, "global"), 0o700)
	torn := slices.Clone(content)
	copy(torn[:100], make([]byte, 100))
	path := filepath.Join(dir, controlFile)
	if err := os.WriteFile(path, torn, 0o600); err != nil {
		t.Fatal(err)
	}
	b := &baseBackup{store: testStore(t, s, bucket, "main"), info: &BackupInfo{ID: "20260101T000000"}, codec: codecs[0], pgdata: dir}
	a, err := b.openArchive(t.Context(), "data", 0)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(300*time.Millisecond, func() { os.WriteFile(path, content, 0o600) })
	if err := b.addControlFile(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	stored, _ := s.read(t, bucket, a.key)
	r := tar.NewReader(bytes.NewReader(stored))
	r.Next()
	if got, _ := io.ReadAll(r); !bytes.Equal(got, content) {
		t.Error("the stored control file is not the intact one")
	}
}

// ---------------------------------------------------------------------------
// WAL and names
// ---------------------------------------------------------------------------

func TestRequiredSegments(t *testing.T) {
	const mb = 1 << 20
	for _, c := range []struct {
		begin, end string
		timeline   uint32
		history    string
		size       int64
		want       string
	}{
		{"0/5000028", "0/5000100", 1, "", 16 * mb, "000000010000000000000005"},
		// the end is the first byte that is not needed
		{"0/5000028", "0/6000000", 1, "", 16 * mb, "000000010000000000000005"},
		{"0/5000028", "0/6000001", 1, "", 16 * mb, "000000010000000000000005 000000010000000000000006"},
		{"0/FE000028", "1/100", 1, "", 16 * mb, "0000000100000000000000FE 0000000100000000000000FF 000000010000000100000000"},
		{"0/C0000028", "1/100", 1, "", 1 << 30, "000000010000000000000003 000000010000000100000000"},
		// the segment of the switch is the new timeline's
		{"0/5000028", "0/7000100", 2, "1\t0/6000500\tno recovery target specified", 16 * mb,
			"000000010000000000000005 000000020000000000000006 000000020000000000000007"},
		{"0/5000028", "0/7000100", 3, "1\t0/5000500\tx\n2\t0/7000000\ty", 16 * mb,
			"000000020000000000000005 000000020000000000000006 000000030000000000000007"},
	} {
		begin, err1 := parseLSN(c.begin)
		end, err2 := parseLSN(c.end)
		history, err3 := parseTimelineHistory([]byte(c.history))
		if err := errors.Join(err1, err2, err3); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(requiredSegments(begin, end, c.timeline, history, c.size), " "); got != c.want {
			t.Errorf("%s to %s on timeline %d: %s, want %s", c.begin, c.end, c.timeline, got, c.want)
		}
	}
}

// The next id is later than every other one, also one of a Barman whose clock is ahead.
func TestNextBackupID(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main")
	before := time.Now().UTC().Format(backupIDLayout)
	if id, err := nextBackupID(t.Context(), store); err != nil || id < before || !backupIDForm.MatchString(id) {
		t.Errorf("next id %q (%v), want %s or later", id, err, before)
	}
	var wait sync.WaitGroup
	ids := make([]string, 5) // several instances in the same second
	for i := range ids {
		wait.Go(func() { ids[i], _ = nextBackupID(t.Context(), store) })
	}
	wait.Wait()
	if slices.Sort(ids); ids[0] == "" || len(slices.Compact(ids)) != 5 {
		t.Errorf("ids of backups that begin at once: %q", ids)
	}

	// A reservation that arrives late does not take the id of a backup that has ended meanwhile.
	proxy := startFaultProxy(t, s)
	late := proxy.add(fault{Method: "PUT", Path: regexp.MustCompile("reserved"), Times: 1, Do: delayRequest, Delay: 5 * time.Second})
	written := make(chan string, 1)
	go func() {
		waitFor(t, "the reservation", func() bool { return proxy.hits(late) == 1 })
		taken := path.Dir(strings.TrimPrefix(proxy.seen(regexp.MustCompile("^PUT .*reserved"))[0], "PUT /"+bucket+"/"))
		s.write(t, bucket, taken+"/backup.info", []byte("status=DONE\n"))
		written <- taken
	}()
	id, err := nextBackupID(t.Context(), testStoreAt(t, s, proxy.Endpoint, bucket, "main"))
	taken := <-written
	if err != nil || "main/base/"+id == taken {
		t.Errorf("id %q (%v), which another backup has had", id, err)
	}
	if keys := s.keys(t, bucket, taken); !slices.Equal(keys, []string{taken + "/backup.info"}) {
		t.Errorf("objects of the other backup: %q", keys)
	}

	s.write(t, bucket, "main/base/20991231T235959/data.tar", []byte("of a backup in progress"))
	s.write(t, bucket, "main/base/unrelated/x", nil)
	if id, err := nextBackupID(t.Context(), store); err != nil || id != "21000101T000000" {
		t.Errorf("next id %q (%v), want 21000101T000000", id, err)
	}
}

// ---------------------------------------------------------------------------
// The service
// ---------------------------------------------------------------------------

// brokenStatus is a source whose status cannot be written.
type brokenStatus struct{ configSource }

func (brokenStatus) UpdateStatus(context.Context, StoreRef, func(*RecoveryWindow, *ServerStatus)) error {
	return fs.ErrPermission
}

func TestBackupService(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket, "data: {immediateCheckpoint: true}")
	p := startPostgres(t, pgOptions{ArchiveCommand: archivingTo(t, file)})
	for _, variable := range p.Env() {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
	}
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	service := &backupService{source: source, instance: "main-1", report: newReport(source, p.Dir)}
	window := func() RecoveryWindow {
		st, err := source.Status(t.Context(), "store")
		if err != nil {
			t.Fatal(err)
		}
		return st.ServerRecoveryWindow["main"]
	}
	cluster := func(plugins string) []byte {
		return []byte(`{"metadata":{"name":"main","namespace":"default","uid":"u-1"},"spec":{"plugins":[` + plugins + `]}}`)
	}
	own := cluster(`{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store"}}`)

	recovered := []byte(strings.Replace(string(own), `"spec":{`, `"spec":{"bootstrap":{"recovery":{"source":"o"}},"externalClusters":[{"name":"o",
		"plugin":{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store","serverName":"origin"}}}],`, 1))

	for _, c := range []struct {
		name    string
		request *backup.BackupRequest
		code    codes.Code
		text    string
	}{
		{"no store", &backup.BackupRequest{ClusterDefinition: cluster("")}, codes.FailedPrecondition, "barmanObjectName"},
		{"no cluster", &backup.BackupRequest{ClusterDefinition: []byte("{}")}, codes.InvalidArgument, "metadata.name"},
		{"another store", &backup.BackupRequest{ClusterDefinition: own, Parameters: map[string]string{"barmanObjectName": "other"}}, codes.InvalidArgument, `"other"`},
		{"the server that it comes from", &backup.BackupRequest{ClusterDefinition: recovered, Parameters: map[string]string{"serverName": "origin"}}, codes.InvalidArgument, `"origin"`},
		{"a store that is not there", &backup.BackupRequest{ClusterDefinition: cluster(`{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"missing"}}`)},
			codes.FailedPrecondition, "missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := service.Backup(t.Context(), c.request)
			if status.Code(err) != c.code || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v; want %v with %q", err, c.code, c.text)
			}
		})
	}
	if w := window(); w.LastFailedBackupTime == nil || w.LastSuccessfulBackupTime != nil {
		t.Errorf("recovery window after failures: %+v", w)
	}

	var ends []time.Time
	for range 2 {
		before := time.Now().Truncate(time.Second)
		result, err := service.Backup(t.Context(), &backup.BackupRequest{ClusterDefinition: own, Parameters: map[string]string{"barmanObjectName": "store", "serverName": "main"}})
		if err != nil {
			t.Fatal(err)
		}
		info, err := testStoreFile(t, file, "main").ReadBackupInfo(t.Context(), result.BackupId)
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, info.EndTime)
		if !info.Done() || info.BackupName != result.BackupName || !regexp.MustCompile(`^backup-\d{14}$`).MatchString(result.BackupName) {
			t.Errorf("backup.info: status %s, name %q, result %q", info.Status, info.BackupName, result.BackupName)
		}
		if result.BeginWal != info.BeginWAL || result.EndWal != info.EndWAL || result.BeginLsn != info.BeginLSN || result.EndLsn != info.EndLSN ||
			result.StartedAt != info.BeginTime.Unix() || result.StoppedAt != info.EndTime.Unix() || result.StartedAt < before.Unix() ||
			!result.Online || result.InstanceId != "main-1" || result.BackupLabelFile != nil || result.TablespaceMapFile != nil {
			t.Errorf("result %v\nbackup.info %+v", result, info)
		}
		want := map[string]string{"timeline": "1", "clusterUID": "u-1", "pluginName": PluginName, "name": PluginName,
			"displayName": "BarmanCloudInstance", "version": version, "place": s.Endpoint + " s3://" + bucket + "/main"}
		if fmt.Sprint(result.Metadata) != fmt.Sprint(want) {
			t.Errorf("metadata %v, want %v", result.Metadata, want)
		}
	}
	w := window()
	if w.FirstRecoverabilityPoint == nil || !w.FirstRecoverabilityPoint.Time.Equal(ends[0]) || !w.LastSuccessfulBackupTime.Time.Equal(ends[1]) {
		t.Errorf("recovery window %+v, want %v and %v", w, ends[0], ends[1])
	}

	// To another server name, which gets the WAL that it needs: it can be restored alone.
	p.Exec("CREATE TABLE there AS SELECT generate_series(1, 1000) AS i")
	result, err := service.Backup(t.Context(), &backup.BackupRequest{ClusterDefinition: own, Parameters: map[string]string{"serverName": "elsewhere"}})
	if err != nil {
		t.Fatal(err)
	}
	if place := s.Endpoint + " s3://" + bucket + "/elsewhere"; result.Metadata["place"] != place {
		t.Errorf("place %q, not %q", result.Metadata["place"], place)
	}
	pgdata := filepath.Join(testDir(t), "pgdata")
	if r := run(t, asPostgres(t, program(t), "restore", "--objectstore", file, "--server-name", "elsewhere", pgdata)); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	if n := startRestored(t, pgdata).Query("SELECT count(*) FROM there"); n != "1000" {
		t.Errorf("%s rows restored", n)
	}
	if after := window(); !after.LastSuccessfulBackupTime.Equal(w.LastSuccessfulBackupTime) {
		t.Errorf("the recovery window of the archive moved: %+v", after)
	}

	// A status that cannot be written is no reason to call the backup failed.
	log := captureLog(t)
	if _, err := (&backupService{source: brokenStatus{source}, report: newReport(source, p.Dir)}).Backup(t.Context(), &backup.BackupRequest{ClusterDefinition: own}); err != nil {
		t.Error(err)
	}
	if !log.has("status of the ObjectStore could not be updated") {
		t.Error("nothing is said of the status")
	}

	// One at a time.
	service.running.Store(true)
	if _, err := service.Backup(t.Context(), &backup.BackupRequest{ClusterDefinition: own}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a second backup at the same time: %v", err)
	}
	service.running.Store(false)

	// A server that is not there.
	t.Setenv("PGHOST", "/nowhere")
	if _, err := service.Backup(t.Context(), &backup.BackupRequest{ClusterDefinition: own}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("a backup of a server that is not there: %v", err)
	}
}
