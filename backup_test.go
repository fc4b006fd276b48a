package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// archivingTo is the archive_command of a server that archives with our own program.
func archivingTo(t testing.TB, file string) string {
	return fmt.Sprintf("%s wal-archive --objectstore %s --server-name main %%p", program(t), file)
}

// connection leads takeBackup to a server.
func (p *postgres) connection() string {
	return fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres", p.SocketDir, p.Port)
}

// pgbench fills a database of the given scale and then writes to it until stop is called.
func (p *postgres) pgbench(scale int) (stop func()) {
	p.t.Helper()
	init := exec.Command(p.tool("pgbench"), "--initialize", "--quiet", fmt.Sprint("--scale=", scale))
	init.Env = p.Env()
	mustRun(p.t, init)
	load := exec.Command(p.tool("pgbench"), "--client=4", "--time=600", "--no-vacuum", "--rate=300")
	load.Env = p.Env()
	if err := load.Start(); err != nil {
		p.t.Fatal(err)
	}
	return func() { load.Process.Kill(); load.Wait() }
}

// balanced asserts what pgbench leaves true at every commit.
func (p *postgres) balanced() {
	p.t.Helper()
	sums := p.Query(`SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(bbalance) FROM pgbench_branches),
		(SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(delta) FROM pgbench_history)`)
	f := strings.Split(sums, "|")
	if f[0] != f[1] || f[0] != f[2] || f[0] != f[3] {
		p.t.Errorf("sums of accounts, branches, tellers, history: %s", sums)
	}
}

// restoreWithBarman restores a backup with Barman's own programs and starts it.
func restoreWithBarman(t testing.TB, s *s3Server, bucket, id string, tablespaces ...string) *postgres {
	t.Helper()
	dir := filepath.Join(testDir(t), "restored")
	args := []string{"s3://" + bucket, "main", id, dir}
	for _, space := range tablespaces {
		args = append([]string{"--tablespace", space}, args...)
	}
	if r := barman(t, s, nil, "barman-cloud-restore", args...); r.Code != 0 {
		t.Fatalf("barman-cloud-restore: exit code %d\n%s", r.Code, r.Stderr)
	}
	command := fmt.Sprintf("AWS_ACCESS_KEY_ID=%s AWS_SECRET_ACCESS_KEY=%s AWS_DEFAULT_REGION=us-east-1 barman-cloud-wal-restore --endpoint-url %s s3://%s main %%f %%p",
		s.AccessKey, s.SecretKey, s.Endpoint, bucket)
	if err := exec.Command("touch", filepath.Join(dir, "recovery.signal")).Run(); err != nil {
		t.Fatal(err)
	}
	return startRestored(t, dir, "restore_command="+command)
}

func TestBackupRestoredByBarman(t *testing.T) {
	for _, compression := range []string{"", "gzip"} {
		t.Run("compression="+compression, func(t *testing.T) {
			s3, bucket := testS3(t), newBucket(t)
			var lines []string
			if compression != "" {
				lines = []string{"data: {compression: " + compression + "}", "wal: {compression: " + compression + "}"}
			}
			file := storeFile(t, s3, bucket, lines...)
			p := startPostgres(t, pgOptions{Checksums: true, ArchiveCommand: archivingTo(t, file)})
			stop := p.pgbench(5)
			defer stop()
			info, err := takeBackup(t.Context(), testStoreFile(t, file, "main"), backupOptions{Name: "a-name", Connection: p.connection(), FastCheckpoint: true})
			if err != nil {
				t.Fatal(err)
			}
			stop()
			p.WaitArchived(p.SwitchWAL())
			restored := restoreWithBarman(t, s3, bucket, info.ID)
			restored.balanced()
		})
	}
}
