package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	s3types "github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/cloudnative-pg/cnpg-i/pkg/restore/job"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ---------------------------------------------------------------------------
// Choosing a backup
// ---------------------------------------------------------------------------

func TestParseTargetTime(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"2026-11-22 15:45:15", "2026-11-22T15:45:15Z"}, // no zone is UTC
		{"2026-11-22T15:45:15", "2026-11-22T15:45:15Z"},
		{"2026-11-22 15:45:15.686293", "2026-11-22T15:45:15.686293Z"},
		{"2026-11-22 15:45:15.686293+00", "2026-11-22T15:45:15.686293Z"},
		{"2026-11-22 15:45:15+02", "2026-11-22T13:45:15Z"},
		{"2026-11-22 15:45:15-03:30", "2026-11-22T19:15:15Z"},
		{"2026-11-22 15:45:15.5+0200", "2026-11-22T13:45:15.5Z"},
		{"2026-11-22 15:45:15 +02:00", "2026-11-22T13:45:15Z"},
		{"2026-11-22T15:45:15Z", "2026-11-22T15:45:15Z"},
		{"2026-11-22T15:45:15.686293+01:00", "2026-11-22T14:45:15.686293Z"},
		{"2026-11-22 15:45:15 UTC", "2026-11-22T15:45:15Z"},
		{"2026-11-22 15:45", "2026-11-22T15:45:00Z"},
		{"2026-11-22", ""},
		{"yesterday", ""},
		{"2026-13-22 15:45:15", ""},
		{"", ""},
	} {
		got, err := parseTargetTime(c.in)
		if text := got.Format(time.RFC3339Nano); (err == nil) != (c.want != "") || err == nil && text != c.want {
			t.Errorf("%q: %s, %v, want %q", c.in, text, err, c.want)
		}
	}
}

// aBackup is a backup that is done, took a minute, and ended at the given time and LSN.
func aBackup(id string, timeline int, end, endLSN string) *BackupInfo {
	ended, err := time.Parse("15:04", end)
	if err != nil {
		panic(err)
	}
	ended = ended.AddDate(2026, 0, 0)
	lsn, err := parseLSN(endLSN)
	if err != nil {
		panic(err)
	}
	const size = 16 << 20
	begin := lsn - 0x100
	return &BackupInfo{ID: id, BackupName: "name-" + id, Status: statusDone, Timeline: timeline, BeginTime: ended.Add(-time.Minute), EndTime: ended,
		BeginLSN: begin.String(), EndLSN: lsn.String(), WALSegmentSize: size,
		BeginWAL: segmentName(uint32(timeline), segmentNumber(begin, size), size), EndWAL: segmentName(uint32(timeline), segmentNumber(lsn, size), size)}
}

func TestChooseBackup(t *testing.T) {
	yes := true
	failed := aBackup("F", 1, "13:30", "0/8000200")
	failed.Status, failed.Error, failed.EndTime = statusFailed, "failure uploading data (no space)", time.Time{}
	// FAILED with both times, as other writers may leave it
	failedWithTimes := aBackup("G", 1, "13:40", "0/8000300")
	failedWithTimes.Status = statusFailed
	// begun on timeline 1 by a standby, which followed its primary to timeline 2
	across := aBackup("X", 2, "15:30", "0/A000200")
	across.Timeline, across.BeginWAL, across.BeginLSN = 1, "000000010000000000000008", "0/8000028"
	// newer than all others, and nothing that a restore of one backup could make a server of
	incremental, snapshot := aBackup("K", 1, "17:00", "0/8000300"), aBackup("L", 1, "17:30", "0/8000400")
	incremental.barmanOnly = map[string]string{"parent_backup_id": "A"}
	snapshot.barmanOnly = map[string]string{"snapshots_info": "{'provider': 'aws'}"}

	// Timeline 2 left 1 at 0/9000000, 3 left 2 at 0/C000000, 4 left 1 at 0/7000000.
	h := timelineHistories{
		2: {{1, 0x9000000}},
		3: {{1, 0x9000000}, {2, 0xC000000}},
		4: {{1, 0x7000000}},
	}
	// ids are deliberately not in the order of time: other writers use local time
	backups := []*BackupInfo{
		aBackup("D", 1, "10:00", "0/3000200"),
		aBackup("C", 1, "11:00", "0/5000200"),
		aBackup("B", 1, "12:00", "0/7000200"), // after timeline 4 left
		aBackup("A", 1, "13:00", "0/8000100"),
		failed, failedWithTimes,
		aBackup("E", 1, "14:00", "0/9500100"), // after timeline 2 left: the old primary went on
		aBackup("H", 2, "15:00", "0/A000100"),
		aBackup("I", 3, "16:00", "0/D000100"),
		aBackup("J", 4, "15:15", "0/7800100"),
	}
	only := func(ids string) []*BackupInfo {
		return slices.DeleteFunc(slices.Clone(backups), func(b *BackupInfo) bool { return !strings.Contains(ids, b.ID) })
	}
	at := func(hhmm string) string { return "2026-01-01 " + hhmm + ":00" }

	for _, c := range []struct {
		name    string
		backups []*BackupInfo
		target  *RecoveryTarget
		h       timelineHistories
		want    string // id, or "" for an error
		says    []string
	}{
		{"no target: the newest on the line of the latest timeline", only("ABCD"), nil, nil, "A", nil},
		{"not the failed ones", only("DFG"), nil, nil, "D", nil},
		{"not what only Barman can restore", append(only("ABCD"), incremental, snapshot), nil, nil, "A", nil},
		{"what only Barman can restore, by id", append(only("A"), incremental), &RecoveryTarget{BackupID: "K"}, nil, "", []string{"incremental backup", "only Barman"}},
		{"none done", only("FG"), nil, nil, "", []string{"no target backup found", "F (name-F) FAILED", "failure uploading data (no space)", "timeline 1"}},
		{"nothing at all", nil, nil, nil, "", []string{"no backup at all"}},

		{"by id", only("ABCD"), &RecoveryTarget{BackupID: "C"}, nil, "C", nil},
		{"by an id that is not there", only("AB"), &RecoveryTarget{BackupID: "Z"}, nil, "", []string{"no backup found with ID Z", "A (name-A)", "B (name-B)"}},
		{"by the id of a failed one", only("ABF"), &RecoveryTarget{BackupID: "F"}, nil, "", []string{"F (name-F)", "not done"}},
		{"an id and a time: the id counts", only("ABCD"), &RecoveryTarget{BackupID: "C", TargetTime: at("12:30")}, nil, "C", nil},
		{"an id that reaches beyond the target LSN", only("ABCD"), &RecoveryTarget{BackupID: "C", TargetLSN: "0/4000000"}, nil, "", []string{"0/5000200", "0/4000000"}},
		{"an id on a line that the target is not on", only("AB"), &RecoveryTarget{BackupID: "B", TargetTLI: "4"}, h, "", []string{"timeline 4 had left at 0/7000000"}},

		{"time", only("ABCD"), &RecoveryTarget{TargetTime: at("12:30")}, nil, "B", nil},
		{"time: at the very end", only("ABCD"), &RecoveryTarget{TargetTime: at("12:00")}, nil, "B", nil},
		{"time with a zone", only("ABCD"), &RecoveryTarget{TargetTime: "2026-01-01 12:30:00+01"}, nil, "C", nil},
		{"time before all", only("ABCD"), &RecoveryTarget{TargetTime: at("09:00")}, nil, "", []string{"time 2026-01-01 09:00:00 on timeline latest", "ended after the target time"}},
		{"LSN", only("ABCD"), &RecoveryTarget{TargetLSN: "0/7000300"}, nil, "B", nil},
		{"LSN: strictly before", only("ABCD"), &RecoveryTarget{TargetLSN: "0/7000200"}, nil, "C", nil},
		{"name, xid and immediate: the newest", only("ABCD"), &RecoveryTarget{TargetName: "here"}, nil, "A", nil},
		{"xid", only("ABCD"), &RecoveryTarget{TargetXID: "1234"}, nil, "A", nil},
		{"immediate", only("ABCD"), &RecoveryTarget{TargetImmediate: &yes}, nil, "A", nil},

		{"latest is the newest timeline that PostgreSQL would follow", backups, nil, timelineHistories{2: h[2], 3: h[3]}, "I", nil},
		{"an abandoned branch", only("ADE"), nil, timelineHistories{2: h[2]}, "A", nil},
		{"only the abandoned branch", only("E"), nil, timelineHistories{2: h[2]}, "", []string{"it reached 0/9500000 on timeline 1, which timeline 2 had left at 0/9000000"}},
		{"the abandoned branch by number", only("ADE"), &RecoveryTarget{TargetTLI: "1"}, timelineHistories{2: h[2]}, "E", nil},
		{"current", only("ADEH"), &RecoveryTarget{TargetTLI: "current", TargetTime: at("14:30")}, timelineHistories{2: h[2]}, "E", nil},
		{"an ancestor of the target timeline", only("ABCD"), &RecoveryTarget{TargetTLI: "3"}, h, "A", nil},
		{"the fork lies before the newer ones", only("ABCD"), &RecoveryTarget{TargetTLI: "4"}, h, "C", nil},
		{"a sister timeline", only("HI"), &RecoveryTarget{TargetTLI: "4"}, h, "", []string{"timeline 2, which is no ancestor of timeline 4", "timeline 3, which is no ancestor"}},
		{"hexadecimal, as PostgreSQL reads it", only("ABCD"), &RecoveryTarget{TargetTLI: "0x4"}, h, "C", nil},
		{"no history file of the target timeline", only("AH"), &RecoveryTarget{TargetTLI: "7"}, h, "", []string{"no 00000007.history"}},
		{"a target timeline that is older than the backup", only("H"), &RecoveryTarget{TargetTLI: "1"}, h, "", []string{"timeline 2, which is no ancestor of timeline 1"}},
		{"a backup on a timeline without history file", only("I"), &RecoveryTarget{TargetTLI: "3"}, nil, "I", nil},
		{"a later timeline than the backup, cut at the first gap", only("D"), nil, timelineHistories{2: h[2], 4: {{2, 0x1}}}, "D", nil},
		{"across a switch", []*BackupInfo{across}, nil, timelineHistories{2: h[2]}, "X", nil},
		{"across a switch, with a target on the old side", []*BackupInfo{across}, &RecoveryTarget{TargetTLI: "1"}, timelineHistories{2: h[2]}, "", []string{"timeline 2"}},

		{"a bad time", only("A"), &RecoveryTarget{TargetTime: "noon"}, nil, "", []string{"targetTime", "noon"}},
		{"a bad LSN", only("A"), &RecoveryTarget{TargetLSN: "5000"}, nil, "", []string{"targetLSN", "5000"}},
		{"a bad timeline", only("A"), &RecoveryTarget{TargetTLI: "newest"}, nil, "", []string{"targetTLI", "newest"}},
		{"timeline zero", only("A"), &RecoveryTarget{TargetTLI: "0"}, nil, "", []string{"targetTLI"}},
		{"two targets", only("A"), &RecoveryTarget{TargetTime: at("12:30"), TargetXID: "7"}, nil, "", []string{"targetTime and targetXID"}},
	} {
		b, err := chooseBackup(&Catalog{Backups: c.backups}, c.target, c.h)
		switch {
		case c.want == "" && err == nil:
			t.Errorf("%s: chose %s, want an error", c.name, b.ID)
		case c.want == "":
			for _, words := range c.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("%s: the error does not say %q: %v", c.name, words, err)
				}
			}
		case err != nil:
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		case b.ID != c.want:
			t.Errorf("%s: chose %s, want %s", c.name, b.ID, c.want)
		}
	}

	// What the catalog could not read is told too.
	_, err := chooseBackup(&Catalog{Incomplete: []string{"20260101T120000"}, Unreadable: map[string]error{"20260101T110000": errBadBackupInfo}}, nil, nil)
	if !errors.Is(err, errNoBackup) || !strings.Contains(err.Error(), "20260101T120000: in progress or abandoned") || !strings.Contains(err.Error(), "20260101T110000: cannot be understood") {
		t.Errorf("%v", err)
	}
	var many Catalog
	for i := range 3 * maxListed {
		b := aBackup(fmt.Sprint("id", i), 1, "12:00", "0/7000200")
		b.Status = statusFailed
		many.Backups = append(many.Backups, b)
	}
	if _, err = chooseBackup(&many, nil, nil); strings.Count(err.Error(), "\n") != maxListed+1 || !strings.Contains(err.Error(), fmt.Sprintf("and %d more", 2*maxListed)) {
		t.Errorf("the list is not bounded: %v", err)
	}
}

// The catalog and the history files come from the bucket; and when the server has
// nothing, the message says which servers there are.
func TestFindBackup(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFileAt(t, s, s.Endpoint, "s3://"+bucket+"/some/path")
	store := testStoreFile(t, file, "main")

	_, err := findBackup(t.Context(), store, nil)
	if !errors.Is(err, errNoBackup) || !strings.Contains(err.Error(), "there is no server at all at s3://"+bucket+"/some/path") {
		t.Errorf("empty bucket: %v", err)
	}
	s.write(t, bucket, "some/path/other/wals/00000001/x", nil)
	s.write(t, bucket, "some/path/pg-2/base/20260101T000000/backup.info", []byte("status=DONE\n"))
	s.write(t, bucket, "some/path/notes/readme", nil)
	s.write(t, bucket, "some/elsewhere/base/x", nil)
	_, err = findBackup(t.Context(), store, nil)
	if !errors.Is(err, errNoBackup) || !strings.Contains(err.Error(), `there is no server "main" at s3://`+bucket+`/some/path, only other, pg-2: set serverName`) {
		t.Errorf("wrong server name: %v", err)
	}
	// nor does a wrong server name look like an archive in which all is well
	for args, code := range map[string]int{"verify": exitFailed, "list": 0, "list -o json": 0, "retention --policy 7d": 0} {
		if r := runProgram(t, nil, append(strings.Fields(args), "--objectstore", file, "--server-name", "main")...); r.Code != code ||
			!strings.Contains(r.Stderr, `there is no server \"main\" at s3://`) {
			t.Errorf("%s: %+v", args, r)
		}
	}
	s.write(t, bucket, "some/path/main/wals/0000000100000000/000000010000000000000001", nil)
	if _, err = findBackup(t.Context(), store, nil); !errors.Is(err, errNoBackup) || !strings.Contains(err.Error(), `server "main" has WAL but no base backup`) {
		t.Errorf("no backup: %v", err)
	}

	write := func(b *BackupInfo) {
		if err := store.WriteBackupInfo(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	write(aBackup("20260101T100000", 1, "10:00", "0/3000200"))
	write(aBackup("20260101T140000", 1, "14:00", "0/9500100"))
	s.write(t, bucket, "some/path/main/base/20260101T150000/data.tar", nil)
	s.write(t, bucket, "some/path/main/base/20260101T160000/backup.info", []byte("garbage"))
	s.write(t, bucket, "some/path/main/wals/00000003.history", []byte("not read, since 2 is missing"))
	find := func(target *RecoveryTarget) string {
		t.Helper()
		b, err := findBackup(t.Context(), store, target)
		if err != nil {
			return err.Error()
		}
		return b.ID
	}
	if got := find(nil); got != "20260101T140000" {
		t.Errorf("timeline 1 alone: %s", got)
	}
	s.write(t, bucket, "some/path/main/wals/00000003.history", []byte("1\t0/9000000\tno recovery target specified\n\n2\t0/A000000\treason\n"))
	s.write(t, bucket, "some/path/main/wals/00000002.history.gz", gzipped([]byte("1\t0/9000000\tno recovery target specified\n")))
	if got := find(nil); got != "20260101T100000" {
		t.Errorf("timeline 3 left before the second backup ended: %s", got)
	}
	if got := find(&RecoveryTarget{TargetTLI: "2"}); got != "20260101T100000" {
		t.Errorf("the compressed history file: %s", got)
	}
	if got := find(&RecoveryTarget{TargetTime: "2026-01-01 09:00:00Z"}); !strings.Contains(got, "20260101T150000: in progress") || !strings.Contains(got, "20260101T160000: s3://") {
		t.Errorf("nothing fits: %s", got)
	}
	s.write(t, bucket, "some/path/main/wals/00000004.history", []byte("nonsense\n"))
	if got := find(nil); !strings.Contains(got, "00000004.history") {
		t.Errorf("damaged history file: %s", got)
	}
}

// ---------------------------------------------------------------------------
// Made-up backups: what an archive may hold and what a restore makes of it
// ---------------------------------------------------------------------------

// tarFile, tarDir and the others are entries of a tar archive.
type tarEntry struct {
	tar.Header
	content string
}

func tarFile(name, content string) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(content))}, content}
}

func tarDir(name string) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o700}, ""}
}

func tarLink(kind byte, name, target string) tarEntry {
	return tarEntry{tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func (e tarEntry) mode(m int64) tarEntry { e.Mode = m; return e }

func makeTar(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(content []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(content)
	w.Close()
	return b.Bytes()
}

// plain is what every backup has; extra entries come before pg_control and backup_label, as in Barman's.
func plain(extra ...tarEntry) []tarEntry {
	entries := append([]tarEntry{tarDir("./").mode(0o700), tarFile("./PG_VERSION", "15\n"), tarDir("global"), tarDir("pg_tblspc"), tarDir("pg_wal")}, extra...)
	return append(entries, tarFile("global/pg_control", "control"), tarFile("backup_label", "START WAL LOCATION: 0/3000028\n").mode(0o644))
}

// testBackup writes a backup made of objects (file name -> content) and its first WAL
// segment to the bucket.
func testBackup(t testing.TB, s *s3Server, bucket string, store *Store, objects map[string][]byte, change ...func(*BackupInfo)) *BackupInfo {
	t.Helper()
	b := aBackup("20260101T100000", 1, "10:00", "0/3000200")
	b.PGData = "/old/pgdata"
	for _, f := range change {
		f(b)
	}
	for name, content := range objects {
		s.write(t, bucket, store.baseKey(b.ID, name), content)
	}
	s.write(t, bucket, store.walPrefix("000000010000000000000003")+".gz", nil)
	if err := store.WriteBackupInfo(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	b, err := store.ReadBackupInfo(t.Context(), b.ID)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// dirTree describes everything below a directory, one entry per line.
func dirTree(t testing.TB, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, name)
		switch {
		case d.IsDir():
			found[rel] = fmt.Sprintf("dir %o", info.Mode().Perm())
		case d.Type() == fs.ModeSymlink:
			target, _ := os.Readlink(name)
			found[rel] = "-> " + target
		default:
			content, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			found[rel] = fmt.Sprintf("file %o %s", info.Mode().Perm(), content)
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return found
}

func expectTree(t testing.TB, root string, want map[string]string) {
	t.Helper()
	got := dirTree(t, root)
	for name, w := range want {
		if w == "" {
			if g, ok := got[name]; ok {
				t.Errorf("%s should not be there, and is %q", name, g)
			}
		} else if got[name] != w {
			t.Errorf("%s: %q, want %q", name, got[name], w)
		}
	}
}

// Everything that Barman is known to store restores, in any number of parallel archives.
func TestRestoreLayout(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main", `data: {jobs: 4, restoreAdditionalCommandArgs: ["--tablespace", "moved:/nowhere", "--tablespace=other-cluster:/x"]}`)
	base := testDir(t)
	pgdata, moved, outside := filepath.Join(base, "new"), filepath.Join(base, "moved"), filepath.Join(base, "outside")
	b := testBackup(t, s, bucket, store, map[string][]byte{
		"data.tar": makeTar(t,
			tarDir("./").mode(0o2777), tarFile("./PG_VERSION", "15\n").mode(0o6777), tarFile("./postgresql.conf", "stale").mode(0o400),
			tarFile("./backup_label", "stale label"), tarFile("./tablespace_map", "16384 /old\n"), tarFile("./postmaster.pid", "1\n"),
			tarLink(tar.TypeSymlink, "./server.crt", "/etc/ssl/server.crt"), tarLink(tar.TypeSymlink, "pg_wal", "/old/wal"),
			tarDir("base/"), tarDir("base/5").mode(0o050), tarFile("base/5/PG_VERSION", "15\n").mode(0o640), tarFile("base/5/16385", "heap"),
			tarLink(tar.TypeLink, "base/5/hard", "base/5/16385"),
			tarEntry{tar.Header{Typeflag: tar.TypeReg, Name: "base/5/fraction", Mode: 0o600, ModTime: time.Unix(1, 5e8), Format: tar.FormatPAX, Uname: "postgres"}, ""},
			tarDir("global"), tarDir("pg_wal"), tarDir("pg_tblspc"), tarDir("pg_tblspc/16384"), tarFile("pg_tblspc/16384/junk", "x"),
			tarDir("inner/PG_15_1"), tarDir("inner/PG_15_1/5"), tarFile("inner/PG_15_1/5/1", "the copy in data.tar"),
		),
		// its directory comes in another archive, or not at all
		"data_0001.tar.gz": gzipped(makeTar(t, tarFile("base/6/1", "one"), tarFile("global/1262", "shared"), tarFile("pg_wal/000000010000000000000003", "segment"))),
		"data_0002.tar": makeTar(t, tarFile("global/pg_control", "control"), tarFile("postgresql.conf", "the server's").mode(0o644),
			tarFile("backup_label", "START WAL LOCATION: 0/3000028\n").mode(0o644)),
		"16384.tar":        makeTar(t, tarDir("PG_15_1"), tarFile("PG_15_1/5/1", "in side")),
		"16384_0001.tar":   makeTar(t, tarFile("PG_15_1/5/2", "in side too")),
		"16385.tar":        makeTar(t, tarDir("PG_15_1"), tarDir("PG_15_1/5"), tarFile("PG_15_1/5/1", "the tablespace's own")),
		"16386.tar.gz":     gzipped(makeTar(t)),
		"extra.txt":        []byte("foreign objects are ignored"),
		"annotations/keep": []byte("full"),
	}, func(b *BackupInfo) {
		b.Tablespaces = []Tablespace{{"side", 16384, outside}, {"inner", 16385, "/old/pgdata/inner"}, {"moved", 16386, "/nowhere/else"}}
	})
	err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata, Tablespaces: map[string]string{"moved": moved}})
	if err != nil {
		t.Fatal(err)
	}
	expectTree(t, pgdata, map[string]string{
		".": "dir 750", "PG_VERSION": "file 640 15\n", "postgresql.conf": "file 640 the server's", "server.crt": "-> /etc/ssl/server.crt",
		"backup_label": "file 640 START WAL LOCATION: 0/3000028\n", "global/pg_control": "file 600 control", "global/1262": "file 600 shared",
		"base/5": "dir 750", "base/5/PG_VERSION": "file 640 15\n", "base/5/16385": "file 600 heap", "base/5/hard": "file 600 heap", "base/6/1": "file 600 one",
		"base/5/fraction": "file 600 ",
		"pg_wal":          "dir 700", "pg_wal/archive_status": "dir 700", "pg_wal/000000010000000000000003": "file 600 segment",
		"pg_tblspc/16384": "-> " + outside, "pg_tblspc/16385": "-> " + pgdata + "/inner", "pg_tblspc/16386": "-> " + moved,
		"inner/PG_15_1/5/1": "file 600 the tablespace's own",
		"tablespace_map":    "", "postmaster.pid": "", "restore.incomplete": "", "global/pg_control.restoring": "", "inner/restore.incomplete": "",
	})
	for name := range dirTree(t, base) {
		if strings.Contains(name, stagedSuffix) || strings.Contains(name, incompleteFile) {
			t.Errorf("%s was left behind", name)
		}
	}
	expectTree(t, outside, map[string]string{".": "dir 700", "PG_15_1/5/1": "file 600 in side", "PG_15_1/5/2": "file 600 in side too"})
	expectTree(t, moved, map[string]string{".": "dir 700"})
}

// pg_wal on its own volume, whose file system has a lost+found; nothing at all in the
// root of an archive but what PostgreSQL needs; the label only in backup.info.
func TestRestoreWALDir(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main")
	base := testDir(t)
	pgdata, wal := filepath.Join(base, "pgdata"), filepath.Join(base, "wal", "pg_wal")
	for _, d := range []string{pgdata + "/lost+found", wal + "/lost+found"} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	b := testBackup(t, s, bucket, store, map[string][]byte{
		"data.tar": makeTar(t, tarFile("global/pg_control", "control"), tarDir("./pg_wal"), tarFile("./pg_wal/00000002.history", "history")),
	}, func(b *BackupInfo) { b.BackupLabel = "START WAL LOCATION: 0/3000028\n" })
	if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata, WALDir: wal}); err != nil {
		t.Fatal(err)
	}
	expectTree(t, pgdata, map[string]string{"pg_wal": "-> " + wal, "global/pg_control": "file 600 control", "lost+found": "dir 700",
		"backup_label": "file 600 START WAL LOCATION: 0/3000028\n", "pg_tblspc": "dir 700"})
	expectTree(t, wal, map[string]string{"archive_status": "dir 700", "00000002.history": "file 600 history", "lost+found": "dir 700", incompleteFile: ""})
}

// What is wrong with a backup or with the directory is found before anything is written.
func TestRestoreRefuses(t *testing.T) {
	s := testS3(t)
	whole := makeTar(t, plain()...)
	for _, c := range []struct {
		name    string
		objects map[string][]byte
		change  func(*BackupInfo)
		prepare func(t *testing.T, s *s3Server, bucket string, store *Store, o *restoreOptions)
		kind    error
		says    []string
	}{
		{"no archive", map[string][]byte{"other": whole}, nil, nil, errNoRecoverable, []string{"no data.tar", "/main/base/20260101T100000/"}},
		{"a gap in the numbers", map[string][]byte{"data.tar": whole, "data_0002.tar": whole}, nil, nil, errNoRecoverable, []string{"data_0002.tar", "number 1"}},
		{"the first one missing", map[string][]byte{"data_0001.tar": whole}, nil, nil, errNoRecoverable, []string{"data_0001.tar", "number 0"}},
		{"stored twice", map[string][]byte{"data.tar": whole, "data.tar.gz": whole}, nil, nil, errNoRecoverable, []string{"data.tar and", "data.tar.gz are the same"}},
		{"an unknown compression", map[string][]byte{"data.tar": whole, "data_0001.tar.arj": whole}, nil, nil, errNoRecoverable, []string{".arj"}},
		{"a tablespace without archive", map[string][]byte{"data.tar": whole}, func(b *BackupInfo) { b.Tablespaces = []Tablespace{{"side", 16384, "/side"}} }, nil,
			errNoRecoverable, []string{"16384.tar", `"side"`}},
		{"an archive without tablespace", map[string][]byte{"data.tar": whole, "16384.tar": whole}, nil, nil, errNoRecoverable, []string{"16384.tar", "no tablespace"}},
		{"an archive of no OID", map[string][]byte{"data.tar": whole, "99999999999.tar": whole}, nil, nil, errNoRecoverable, []string{"99999999999.tar"}},
		{"no first WAL segment", map[string][]byte{"data.tar": whole}, nil, func(t *testing.T, s *s3Server, bucket string, store *Store, _ *restoreOptions) {
			s.remove(t, bucket, store.walPrefix("000000010000000000000003")+".gz")
			s.write(t, bucket, store.walPrefix("000000010000000000000003")+".00000028.backup", nil)
		}, errNoRecoverable, []string{"first WAL segment", "/main/wals/0000000100000000/000000010000000000000003"}},
		{"no begin_wal", map[string][]byte{"data.tar": whole}, func(b *BackupInfo) { b.BeginWAL = "" }, nil, errNoRecoverable, []string{"begin_wal"}},
		{"a directory in use", map[string][]byte{"data.tar": whole}, nil, func(t *testing.T, _ *s3Server, _ string, _ *Store, o *restoreOptions) {
			mustWrite(t, o.Dir+"/precious", "data")
		}, errNotEmpty, []string{"/pgdata: the directory is not empty", `"precious"`}},
		{"a database", map[string][]byte{"data.tar": whole}, nil, func(t *testing.T, _ *s3Server, _ string, _ *Store, o *restoreOptions) {
			mustWrite(t, o.Dir+"/global/pg_control", "control")
			mustWrite(t, o.Dir+"/"+incompleteFile, "") // a mark does not make it free for the taking
		}, errNotEmpty, []string{"/pgdata"}},
		{"a file in the way", map[string][]byte{"data.tar": whole}, nil, func(t *testing.T, _ *s3Server, _ string, _ *Store, o *restoreOptions) {
			mustWrite(t, o.Dir, "data")
		}, nil, []string{"/pgdata"}},
		{"a WAL directory in use", map[string][]byte{"data.tar": whole}, nil, func(t *testing.T, _ *s3Server, _ string, _ *Store, o *restoreOptions) {
			o.WALDir = filepath.Dir(o.Dir) + "/wal"
			mustWrite(t, o.WALDir+"/000000010000000000000001", "")
		}, errNotEmpty, []string{"/wal"}},
		{"a tablespace in use", map[string][]byte{"data.tar": whole, "16384.tar": whole}, func(b *BackupInfo) { b.Tablespaces = []Tablespace{{"side", 16384, "/side"}} },
			func(t *testing.T, _ *s3Server, _ string, _ *Store, o *restoreOptions) {
				o.Tablespaces = map[string]string{"side": filepath.Dir(o.Dir) + "/side"}
				mustWrite(t, filepath.Dir(o.Dir)+"/side/PG_15_1/5/1", "")
			}, errNotEmpty, []string{`tablespace "side"`, "/side"}},
		{"two tablespaces in one place", map[string][]byte{"data.tar": whole, "1.tar": whole, "2.tar": whole},
			func(b *BackupInfo) { b.Tablespaces = []Tablespace{{"a", 1, "/a"}, {"b", 2, "/b"}} },
			func(t *testing.T, _ *s3Server, _ string, _ *Store, o *restoreOptions) {
				o.Tablespaces = map[string]string{"a": filepath.Dir(o.Dir) + "/x", "b": filepath.Dir(o.Dir) + "/x/"}
			}, nil, []string{`tablespace "b"`, "/x"}},
		{"a tablespace that is not in the backup", map[string][]byte{"data.tar": whole}, nil, func(_ *testing.T, _ *s3Server, _ string, _ *Store, o *restoreOptions) {
			o.Tablespaces = map[string]string{"sied": "/x"}
		}, nil, []string{`no tablespace "sied"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bucket := newBucket(t)
			store := testStore(t, s, bucket, "main")
			parent := testDir(t)
			o := restoreOptions{Dir: filepath.Join(parent, "pgdata")}
			change := c.change
			if change == nil {
				change = func(*BackupInfo) {}
			}
			b := testBackup(t, s, bucket, store, c.objects, change)
			if c.prepare != nil {
				c.prepare(t, s, bucket, store, &o)
			}
			before := fmt.Sprint(dirTree(t, parent))
			err := restoreBackup(t.Context(), store, b, o)
			if err == nil || c.kind != nil && !errors.Is(err, c.kind) {
				t.Fatalf("%v, want %v", err, c.kind)
			}
			for _, words := range append(c.says, "restore backup 20260101T100000: ") {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("the error does not say %q: %v", words, err)
				}
			}
			if after := fmt.Sprint(dirTree(t, parent)); after != before {
				t.Errorf("something was touched:\nbefore %s\nafter  %s", before, after)
			}
		})
	}
}

// The manifest counts if it is of this backup, and then for every file.
func TestRestoreChecksManifest(t *testing.T) {
	const begin, other = "0/3000028", "0/2000028"
	file := func(name string, content string) tarEntry { return tarFile(name, content) }
	listed := func(from string, names ...string) string {
		b := &baseBackup{walRanges: []walRange{{1, from, "0/3000200"}}, info: &BackupInfo{}}
		for _, name := range names {
			if err := b.manifest.add(name, 7, time.Now(), crc32.Checksum([]byte("content"), castagnoli)); err != nil {
				t.Fatal(err)
			}
		}
		var out bytes.Buffer
		a := &archive{tar: tar.NewWriter(&out)}
		if err := b.addManifest(a); err != nil {
			t.Fatal(err)
		}
		r := tar.NewReader(&out)
		r.Next()
		text, _ := io.ReadAll(r)
		return string(text)
	}
	good := listed(begin, "base/5/1", "odd \xff\"name")
	for name, c := range map[string]struct {
		manifest string
		content  string
		want     string // of the error; "" is none
	}{
		"right":               {good, "content", ""},
		"wrong":               {good, "c0ntent", "base/5/1 has another size or checksum"},
		"longer":              {good, "content+", "base/5/1 has another size or checksum"},
		"missing":             {listed(begin, "base/5/1", "base/5/2"), "content", "base/5/2 is missing"},
		"of another backup":   {listed(other, "base/5/1", "base/5/2"), "c0ntent", ""},
		"not to be trusted":   {strings.Replace(good, "base/5/1", "base/5/3", 1), "content", "checksum that it ends with"},
		"cut short":           {good[:len(good)-20], "content", "checksum that it ends with"},
		"no manifest in fact": {"something else", "c0ntent", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s, bucket := testS3(t), newBucket(t)
			store := testStore(t, s, bucket, "main")
			b := testBackup(t, s, bucket, store, map[string][]byte{"data.tar": makeTar(t, plain(tarDir("base"), tarDir("base/5"),
				file("base/5/1", c.content), file("odd \xff\"name", "content"), file("backup_manifest", c.manifest))...)},
				func(b *BackupInfo) { b.BeginLSN = "0/03000028" }) // as PostgreSQL 19 writes it
			dir := t.TempDir() + "/pgdata"
			err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: dir})
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			mustSay(t, err, errDamaged, c.want)
			if fileExists(dir + "/global/pg_control") {
				t.Error("there is a pg_control")
			}
		})
	}
}

func mustWrite(t testing.TB, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// What a hostile or damaged archive may hold. None of it is written outside, the error
// names object and entry, and the directory is never taken for a database.
func TestRestoreHostile(t *testing.T) {
	s := testS3(t)
	whole := makeTar(t, plain(tarFile("base/1", strings.Repeat("x", 100_000)))...)
	zip := gzipped(whole)
	flipped := bytes.Clone(zip)
	flipped[len(zip)/2] ^= 0xff
	badSum := bytes.Clone(zip)
	badSum[len(zip)-6] ^= 0xff // in the CRC-32 of the trailer
	badHeader := bytes.Clone(whole)
	badHeader[0] ^= 0xff
	hugeSize := makeTar(t, plain()...)
	huge := makeTar(t, tarEntry{tar.Header{Typeflag: tar.TypeReg, Name: "huge", Mode: 0o600}, ""})
	copy(huge[124:], "\x80\x00\x00\x00\x70\x00\x00\x00\x00\x00\x00\x00") // size in base 256: 2^62 or so
	for i := 148; i < 156; i++ {
		huge[i] = ' '
	}
	sum := 0
	for _, x := range huge[:512] {
		sum += int(x)
	}
	copy(huge[148:], fmt.Sprintf("%06o\x00 ", sum))
	sparse := makeTar(t, append([]tarEntry{{tar.Header{Typeflag: tar.TypeReg, Name: "./GNUSparseFile.0/holes", Mode: 0o600, Format: tar.FormatPAX,
		PAXRecords: map[string]string{}}, ""}}, plain()...)...)

	outside := func(e tarEntry) []byte { return makeTar(t, plain(e)...) }
	for _, c := range []struct {
		name    string
		object  string
		content []byte
		says    []string // none: it is restored, harmlessly
		check   map[string]string
	}{
		{"parent", "data.tar", outside(tarFile("../escaped", "x")), []string{`entry "../escaped"`, "leads out"}, nil},
		{"parent further in", "data.tar", outside(tarFile("base/../../escaped", "x")), []string{`entry "base/../../escaped"`}, nil},
		{"parent directory", "data.tar", outside(tarDir("..")), []string{`entry ".."`}, nil},
		{"absolute", "data.tar", outside(tarFile("/tmp/escaped", "x")), []string{`entry "/tmp/escaped"`}, nil},
		{"within, by detour", "data.tar", outside(tarFile("base/../global/../inside", "x")), nil, map[string]string{"inside": "file 600 x"}},
		{"through a link that leads out", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "base", ".."), tarFile("base/escaped", "x"))...), []string{`entry "base/escaped"`, "escapes"}, nil},
		{"through an absolute link", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "base", "/"), tarFile("base/escaped", "x"))...), []string{`entry "base/escaped"`}, nil},
		{"a directory through a link", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "base", "../victim"), tarDir("base/escaped"))...), []string{`entry "base/escaped`}, nil},
		{"chmod through a link", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "base", "../victim"), tarDir("base"))...), []string{`entry "base"`}, nil},
		{"through a chain of links", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "a", "b"), tarLink(tar.TypeSymlink, "b", ".."), tarFile("a/escaped", "x"))...), []string{`entry "a/escaped"`}, nil},
		{"over a link", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "conf", "../victim/file"), tarFile("conf", "mine"))...), nil, map[string]string{"conf": "file 600 mine"}},
		{"over a link, further in", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "base/conf", "../../victim/file"), tarFile("base/conf", "mine"))...), nil, map[string]string{"base/conf": "file 600 mine"}},
		{"the WAL through a link", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "./pg_wal", "../victim"), tarFile("pg_wal/escaped", "x"))...), nil,
			map[string]string{"pg_wal/escaped": "file 600 x", "pg_wal": "dir 700"}},
		{"pg_control through a link", "data.tar", makeTar(t, tarLink(tar.TypeSymlink, "global", "../victim"), tarFile("global/pg_control", "x"), tarFile("backup_label", "x")), []string{`entry "global/pg_control"`}, nil},
		{"pg_control as a link", "data.tar", makeTar(t, tarDir("global"), tarLink(tar.TypeSymlink, "global/pg_control", "../../victim/file"), tarFile("backup_label", "x")), []string{"no archive of the backup has global/pg_control"}, nil},
		{"pg_tblspc as a link", "data.tar", makeTar(t, append([]tarEntry{tarLink(tar.TypeSymlink, "pg_tblspc", "../victim")}, tarFile("global/pg_control", "c"), tarFile("backup_label", "l"))...), []string{"pg_tblspc"}, nil},
		{"hard link to the outside", "data.tar", outside(tarLink(tar.TypeLink, "stolen", "../victim/file")), []string{`entry "stolen"`, "leads out"}, nil},
		{"absolute hard link", "data.tar", outside(tarLink(tar.TypeLink, "stolen", "/etc/passwd")), []string{`entry "stolen"`}, nil},
		{"hard link through a link", "data.tar", makeTar(t, plain(tarLink(tar.TypeSymlink, "way", "../victim"), tarLink(tar.TypeLink, "stolen", "way/file"))...), []string{`entry "stolen"`}, nil},
		{"hard link to nothing", "data.tar", outside(tarLink(tar.TypeLink, "stolen", "missing")), []string{`entry "stolen"`}, nil},
		{"device", "data.tar", outside(tarEntry{tar.Header{Typeflag: tar.TypeBlock, Name: "disk", Devmajor: 8, Mode: 0o666}, ""}), []string{`entry "disk"`, "neither file"}, nil},
		{"character device", "data.tar", outside(tarEntry{tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3, Mode: 0o666}, ""}), []string{`entry "null"`}, nil},
		{"fifo", "data.tar", outside(tarEntry{tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o666}, ""}), []string{`entry "pipe"`}, nil},
		{"a file where a directory is", "data.tar", makeTar(t, plain(tarDir("base"), tarFile("base", "x"))...), []string{`entry "base"`}, nil},
		{"a directory where a file is", "data.tar", makeTar(t, plain(tarFile("base/1", "x"), tarDir("base/1"))...), []string{`entry "base/1"`}, nil},
		{"a link where a directory is", "data.tar", makeTar(t, plain(tarDir("base"), tarLink(tar.TypeSymlink, "base", "global"))...), []string{`entry "base"`}, nil},
		{"twice", "data.tar", makeTar(t, plain(tarFile("base/1", "first"), tarFile("base/1", "second"), tarFile("twice", "first"), tarFile("./twice", "second"))...), nil,
			map[string]string{"base/1": "file 600 second", "twice": "file 600 second"}},
		{"a long name", "data.tar", outside(tarFile(strings.Repeat("n", 255), "x")), nil, map[string]string{strings.Repeat("n", 255): "file 600 x"}},
		{"names like those of unfinished files", "data.tar", makeTar(t, plain(tarFile("data.restoring", "x"), tarFile("data_0001.restoring", "y"), tarFile("z", "z"))...), nil, map[string]string{"data.restoring": "file 600 x", "z": "file 600 z"}},
		{"a mark that is none", "data.tar", makeTar(t, plain(tarDir("base"), tarFile("base/"+incompleteFile, "x"))...), nil, map[string]string{"base/" + incompleteFile: "file 600 x"}},
		{"our own mark", "data.tar", outside(tarFile(incompleteFile, "x")), nil, map[string]string{incompleteFile: ""}},
		{"a name of our own", "data.tar", outside(tarFile("global/pg_control.restoring", "x")), nil, map[string]string{"global/pg_control": "file 600 control"}},
		{"an empty name", "data.tar", rename(t, outside(tarFile("blank", "x")), "blank"), []string{`entry ""`}, nil},
		{"a file without end", "data.tar", append(huge[:512:512], hugeSize...), []string{"data.tar"}, nil},
		{"a sparse file", "data.tar", sparseTar(t, sparse), []string{"sparse"}, nil},
		{"no pg_control", "data.tar", makeTar(t, tarDir("global"), tarFile("backup_label", "x")), []string{"global/pg_control"}, nil},
		{"no backup_label", "data.tar", makeTar(t, tarFile("global/pg_control", "x")), []string{"backup_label"}, nil},
		{"not a tar", "data.tar", bytes.Repeat([]byte("text "), 1000), []string{"data.tar", "damaged"}, nil},
		{"an empty object", "data.tar", nil, []string{"data.tar", "end-of-archive"}, nil},
		{"damaged header", "data.tar", badHeader, []string{"data.tar", "damaged"}, nil},
		{"cut in the middle of a file", "data.tar", whole[:50_000], []string{"data.tar", `entry "base/1"`}, nil},
		{"cut between two files", "data.tar", whole[:512*3], []string{"data.tar", "end-of-archive"}, nil},
		{"cut before the end mark", "data.tar", bytes.TrimRight(whole, "\x00")[:len(whole)-1024], []string{"data.tar", "end-of-archive"}, nil},
		{"gzip cut", "data.tar.gz", zip[:len(zip)/2], []string{"data.tar.gz", "damaged"}, nil},
		{"gzip without trailer", "data.tar.gz", zip[:len(zip)-8], []string{"data.tar.gz", "damaged"}, nil},
		{"gzip with a flipped bit", "data.tar.gz", flipped, []string{"data.tar.gz", "damaged"}, nil},
		{"gzip with a wrong checksum", "data.tar.gz", badSum, []string{"data.tar.gz", "damaged", "checksum"}, nil},
		{"gzip that is none", "data.tar.gz", whole, []string{"data.tar.gz", "damaged"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			bucket := newBucket(t)
			store := testStore(t, s, bucket, "main")
			parent := testDir(t)
			pgdata := filepath.Join(parent, "pgdata")
			mustWrite(t, parent+"/victim/file", "untouched")
			b := testBackup(t, s, bucket, store, map[string][]byte{c.object: c.content})
			err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata})
			if (err == nil) != (len(c.says) == 0) {
				t.Fatalf("%v, want %q", err, c.says)
			}
			if err != nil {
				for _, words := range append(c.says, pgdata, "unusable") {
					if !strings.Contains(err.Error(), words) {
						t.Errorf("the error does not say %q: %v", words, err)
					}
				}
				if _, err := os.Lstat(pgdata + "/global/pg_control"); err == nil && c.name != "pg_control as a link" {
					t.Error("there is a global/pg_control")
				}
			}
			expectTree(t, pgdata, c.check)
			got := dirTree(t, parent)
			for name := range got {
				if name != "." && name != "pgdata" && !strings.HasPrefix(name, "pgdata/") && name != "victim" && name != "victim/file" {
					t.Errorf("%s was written outside", name)
				}
			}
			if got["victim"] != "dir 700" || got["victim/file"] != "file 600 untouched" {
				t.Errorf("outside was changed: %q, %q", got["victim"], got["victim/file"])
			}
			if err == nil {
				return
			}
			// Once the backup is whole again, the restore can simply be repeated.
			s.write(t, bucket, store.baseKey(b.ID, c.object), map[string][]byte{"data.tar": whole, "data.tar.gz": zip}[c.object])
			if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata}); err != nil && c.name != "pg_control as a link" {
				t.Errorf("again: %v", err)
			}
		})
	}
}

// Each archive is read by its own suffix, in every format there is; a bit that flips, or
// an end that is missing, is found in every one that has checksums.
func TestRestoreCodecs(t *testing.T) {
	s := testS3(t)
	content := string(random(t, 300_000))
	whole := makeTar(t, plain(tarFile("base/1", content))...)
	for _, c := range codecs {
		t.Run(cmp.Or(c.name, "none"), func(t *testing.T) {
			bucket := newBucket(t)
			store := testStore(t, s, bucket, "main")
			var stored bytes.Buffer
			z, err := c.compress(&stored, "")
			if err != nil {
				t.Fatal(err)
			}
			z.Write(whole)
			if err := z.Close(); err != nil {
				t.Fatal(err)
			}
			key := "data.tar" + c.suffix
			b := testBackup(t, s, bucket, store, map[string][]byte{key: stored.Bytes()})
			pgdata := filepath.Join(testDir(t), "pgdata")
			if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata}); err != nil {
				t.Fatal(err)
			}
			expectTree(t, pgdata, map[string]string{"base/1": "file 600 " + content, "global/pg_control": "file 600 control"})

			flipped := bytes.Clone(stored.Bytes())
			flipped[len(flipped)/2] ^= 0x10
			for name, damaged := range map[string][]byte{"flipped": flipped, "cut": stored.Bytes()[:stored.Len()/2], "cut at the end": stored.Bytes()[:stored.Len()-1100]} {
				if c.name == "" && name == "flipped" {
					continue
				}
				s.write(t, bucket, store.baseKey(b.ID, key), damaged)
				dir := filepath.Join(testDir(t), "pgdata")
				err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: dir})
				if !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), key) || fileExists(dir+"/global/pg_control") {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
}

// rename blanks a name of the same length as it stands in the headers of an archive, and repairs the checksum.
func rename(t testing.TB, archive []byte, name string) []byte {
	t.Helper()
	at := bytes.Index(archive, []byte(name+"\x00"))
	if at < 0 || at%512 != 0 {
		t.Fatalf("no entry %q", name)
	}
	h := archive[at : at+512]
	copy(h, make([]byte, len(name)))
	fixChecksum(h)
	return archive
}

func fixChecksum(h []byte) {
	copy(h[148:], "        ")
	sum := 0
	for _, x := range h[:512] {
		sum += int(x)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
}

// sparseTar puts a GNU sparse header (PAX 1.0) with a terabyte of nothing before an archive.
func sparseTar(t testing.TB, rest []byte) []byte {
	t.Helper()
	record := func(k, v string) string {
		n := len(k) + len(v) + 3
		for len(strconv.Itoa(n))+len(k)+len(v)+3 != n {
			n = len(strconv.Itoa(n)) + len(k) + len(v) + 3
		}
		return fmt.Sprintf("%d %s=%s\n", n, k, v)
	}
	records := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "holes") + record("GNU.sparse.realsize", "1099511627776")
	var out []byte
	for _, h := range []struct {
		kind    byte
		content string
	}{{'x', records}, {'0', "1\n0\n1\n"}} {
		block := makeTar(t, tarFile("holes", ""))[:512]
		block[156] = h.kind
		size := len(h.content)
		if h.kind == '0' {
			size = 512 + 512
			h.content += string(make([]byte, 512-len(h.content))) + "d" + string(make([]byte, 511))
		}
		copy(block[124:], fmt.Sprintf("%011o\x00", size))
		fixChecksum(block)
		out = append(append(out, block...), h.content...)
		out = append(out, make([]byte, (512-len(h.content)%512)%512)...)
	}
	return append(out, rest...)
}

// Whatever bytes an archive is made of: nothing crashes and nothing is written outside.
func FuzzUnpack(f *testing.F) {
	f.Add(makeTar(f, plain()...), true)
	f.Add(makeTar(f, plain(tarLink(tar.TypeSymlink, "base", ".."), tarFile("base/escaped", "x"))...), true)
	f.Add(makeTar(f, tarFile("../escaped", "x"), tarLink(tar.TypeLink, "a", "../victim")), false)
	f.Add(sparseTar(f, makeTar(f, plain()...)), true)
	root, err := os.MkdirTemp("", "fuzz")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { os.RemoveAll(root) })
	f.Fuzz(func(t *testing.T, archive []byte, data bool) {
		if len(archive) > 1<<20 {
			return
		}
		parent, err := os.MkdirTemp(root, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(parent)
		mustWrite(t, parent+"/victim", "untouched")
		r := &restorer{backup: &BackupInfo{}, tablespaces: map[uint32]*targetDir{}, winners: map[string]int{}}
		if err := r.plan(restoreOptions{Dir: parent + "/pgdata"}); err != nil {
			t.Fatal(err)
		}
		if err := r.open(); err != nil {
			t.Fatal(err)
		}
		defer r.close()
		a := dataArchive{name: "data", codec: codecs[0]}
		if !data {
			a.oid, r.tablespaces[1] = 1, r.data
		}
		if err := r.unpack(a, bytes.NewReader(archive)); err == nil {
			r.finish()
		}
		entries, err := os.ReadDir(parent)
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(parent + "/victim")
		if len(entries) != 2 || err != nil || string(content) != "untouched" {
			t.Errorf("outside was changed: %v, %q, %v", entries, content, err)
		}
	})
}

// A connection that breaks in the middle of an archive is taken up where it broke.
func TestRestoreResumes(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, s)
	store := testStoreAt(t, s, proxy.Endpoint, bucket, "main")
	big := strings.Repeat("0123456789abcdef", 64<<10) // 1 MiB
	b := testBackup(t, s, bucket, store, map[string][]byte{"data.tar": makeTar(t, plain(tarFile("base/1", big), tarFile("base/2", big))...)})
	cut := proxy.add(fault{Method: "GET", Path: regexp.MustCompile(`data\.tar`), Times: 3, Do: truncateBody, Bytes: 300_000})
	pgdata := filepath.Join(testDir(t), "pgdata")
	if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata}); err != nil {
		t.Fatal(err)
	}
	if proxy.hits(cut) != 3 {
		t.Errorf("the connection was cut %d times", proxy.hits(cut))
	}
	expectTree(t, pgdata, map[string]string{"base/1": "file 600 " + big, "base/2": "file 600 " + big, "global/pg_control": "file 600 control"})

	// An archive that cannot be had is no damaged one.
	proxy.add(fault{Method: "GET", Path: regexp.MustCompile(`data\.tar`), Do: answerError, HTTP: 403, Code: "AccessDenied"})
	err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata + "2"})
	if !errors.Is(err, errDenied) || errors.Is(err, errDamaged) || !strings.Contains(err.Error(), "data.tar") {
		t.Errorf("%v", err)
	}
}

// A backup.info that the server will not hand out, as when a lifecycle rule has moved it to cold
// storage, hides no other backup and stops no archiving; where that is so of all, the keys are wrong.
func TestCatalogDenied(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	a := aWeek()
	a.write(t, s, bucket, "main")
	proxy := startFaultProxy(t, s)
	store := testStoreFile(t, storeFileAt(t, s, proxy.Endpoint, "s3://"+bucket), "main")
	all, err := store.Catalog(t.Context())
	if err != nil || len(all.Backups) < 3 {
		t.Fatal(err)
	}
	oldest, newest := all.Backups[0], all.Backups[len(all.Backups)-1]
	for _, b := range []*BackupInfo{oldest, newest} {
		proxy.add(fault{Method: "GET", Path: regexp.MustCompile(b.ID + `/backup\.info`), Do: answerError, HTTP: 403, Code: "InvalidObjectState"})
	}
	c, err := store.Catalog(t.Context())
	if err != nil || len(c.Backups) != len(all.Backups)-2 || !errors.Is(c.Unreadable[oldest.ID], errDenied) || !errors.Is(c.Unreadable[newest.ID], errDenied) {
		t.Errorf("%+v, %v", c, err)
	}
	if b, err := findBackup(t.Context(), store, nil); err != nil || b.ID == newest.ID {
		t.Errorf("%+v, %v", b, err)
	}
	mustSay(t, second(findBackup(t.Context(), store, &RecoveryTarget{BackupID: newest.ID})), errNoBackup, newest.ID, "InvalidObjectState")
	for _, b := range []*BackupInfo{oldest, newest} {
		before := s.keys(t, bucket, "main/base/"+b.ID)
		r, err := store.enforceRetention(t.Context(), retentionOptions{Policy: "1d", Now: time.Now()})
		if left := s.keys(t, bucket, "main/base/"+b.ID); err != nil || !slices.Equal(left, before) {
			t.Errorf("%q are left of %q: %+v, %v", left, before, r, err)
		}
	}
	if err := checkSystem(t.Context(), store, 7); err != nil {
		t.Error(err)
	}
	if v, err := verifyStore(t.Context(), store, newest.ID); err != nil || v.OK || len(v.Backups[0].Problems) != 1 || !strings.Contains(v.Backups[0].Problems[0], "InvalidObjectState") {
		t.Errorf("verify: %+v, %v", v, err)
	}
	proxy.add(fault{Method: "GET", Path: regexp.MustCompile(`/backup\.info`), Do: answerError, HTTP: 403, Code: "AccessDenied"})
	mustSay(t, second(store.Catalog(t.Context())), errDenied, "/backup.info")
	mustSay(t, checkSystem(t.Context(), store, 7), errDenied, "/backup.info")
}

// A disk that takes what is written and cannot keep it: what stands under its file system is full.
func TestRestoreFailingDisk(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket)
	large := tarFile("base/1/2", strings.Repeat("x", 100<<20)) // some of it is synced while it is being written
	testBackup(t, server, bucket, testStoreFile(t, file, "main"), map[string][]byte{"data.tar": makeTar(t, plain(tarDir("base"), tarDir("base/1"), large)...)})
	restore := func(space string) result {
		return run(t, exec.Command("unshare", "--mount", "sh", "-c", `
			mount -t tmpfs -o size="$0" none "$1" && truncate -s 300M "$1/disk" && mkfs.ext4 -q -F "$1/disk" && mkdir "$1/m" && mount -o loop "$1/disk" "$1/m" || exit 77
			"$2" restore --objectstore "$3" --server-name main "$1/m/pgdata"; code=$?
			if [ -e "$1/m/pgdata/global/pg_control" ]; then echo "pg_control is there"; fi
			umount "$1/m"; exit $code`, space, testDir(t), program(t), file))
	}
	if r := restore("200m"); r.Code == 77 || r.Code != 0 && strings.Contains(r.Stderr, "unshare") {
		t.Skipf("cannot mount a file system here: %s", r.Stderr)
	} else if r.Code != 0 || !strings.Contains(r.Stdout, "pg_control is there") {
		t.Fatalf("a disk that is large enough: %+v", r)
	}
	r := restore("40m")
	if r.Code != exitFailed || strings.Contains(r.Stdout, "pg_control") || !strings.Contains(r.Stderr, "sync") || !strings.Contains(r.Stderr, "base/1/2") {
		t.Errorf("a disk that cannot keep it: %+v", r)
	}
}

// A restore that is interrupted leaves nothing that looks like a database, and can be run again.
func TestRestoreInterrupted(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, s)
	store := testStoreAt(t, s, proxy.Endpoint, bucket, "main")
	big := strings.Repeat("0123456789abcdef", 64<<10)
	base := testDir(t)
	pgdata, side := filepath.Join(base, "pgdata"), filepath.Join(base, "side")
	// pg_control comes early here: its place is not what protects it; nor can a backup bring marks
	b := testBackup(t, s, bucket, store, map[string][]byte{
		"data.tar":  makeTar(t, tarDir("./"), tarFile(incompleteFile, "\n/\n"), tarDir("global"), tarFile("global/pg_control", "control"), tarFile("backup_label", "x"), tarFile("base/1", big)),
		"16384.tar": makeTar(t, tarFile("./"+incompleteFile, "\n/\n"), tarFile("PG_15_1/5/1", "in side")),
	}, func(b *BackupInfo) { b.Tablespaces = []Tablespace{{"side", 16384, side}} })
	stall := proxy.add(fault{Method: "GET", Path: regexp.MustCompile(`data\.tar`), Times: 1, Do: stallBody, Bytes: 500_000})
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- restoreBackup(ctx, store, b, restoreOptions{Dir: pgdata, Jobs: 1}) }()
	waitFor(t, "the restore to be in the middle of a file", func() bool {
		info, err := os.Stat(pgdata + "/base/1")
		return err == nil && info.Size() > 100_000 && proxy.hits(stall) == 1
	})
	// while it runs, no other restore takes the directory for its own
	if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata}); !errors.Is(err, errNotEmpty) || !strings.Contains(err.Error(), "another restore") || !fileExists(pgdata+"/base/1") {
		t.Errorf("a second restore: %v, or it has removed the first one's files", err)
	}
	cancel()
	err := <-result
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), pgdata) {
		t.Errorf("%v", err)
	}
	expectTree(t, pgdata, map[string]string{"global/pg_control": ""})
	for _, dir := range []string{pgdata, side} {
		if mark, err := os.ReadFile(filepath.Join(dir, incompleteFile)); err != nil || !strings.HasPrefix(string(mark), "A restore of backup "+b.ID) {
			t.Errorf("the leftovers do not say what they are: %q (%v)", mark, err)
		}
	}
	// nor does one that cannot write its recovery settings
	full := errors.New("no space")
	if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata, Settings: func() error { return full }}); !errors.Is(err, full) {
		t.Errorf("without recovery settings: %v", err)
	}
	expectTree(t, pgdata, map[string]string{"global/pg_control": "", "base/1": "file 600 " + big})
	// nor one that ends with its very last step, the naming of pg_control, undone
	o := restoreOptions{Dir: pgdata, WALDir: filepath.Join(base, "wal")}
	o.Settings = func() error { return os.MkdirAll(filepath.Join(pgdata, "global/pg_control/in the way"), 0o700) }
	if err := restoreBackup(t.Context(), store, b, o); err == nil {
		t.Fatal("pg_control has got its name")
	}
	if err := os.RemoveAll(filepath.Join(pgdata, "global/pg_control")); err != nil {
		t.Fatal(err)
	}
	o.Settings = nil
	if err := restoreBackup(t.Context(), store, b, o); err != nil {
		t.Fatal(err)
	}
	expectTree(t, filepath.Join(base, "wal"), map[string]string{"archive_status": "dir 700", incompleteFile: ""})
	expectTree(t, pgdata, map[string]string{"global/pg_control": "file 600 control", "base/1": "file 600 " + big, incompleteFile: ""})
	expectTree(t, side, map[string]string{"PG_15_1/5/1": "file 600 in side", incompleteFile: ""})
	if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata}); !errors.Is(err, errNotEmpty) {
		t.Errorf("over a database: %v", err)
	}
}

// A recovery Job that runs again finds PGDATA moved away by the operator, and the tablespaces full.
func TestRestoreAgain(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main")
	base := testDir(t)
	pgdata, side := filepath.Join(base, "pgdata"), filepath.Join(base, "side", "data")
	b := testBackup(t, s, bucket, store, map[string][]byte{
		"data.tar":  makeTar(t, plain()...),
		"16384.tar": makeTar(t, tarFile("PG_15_1/5/1", "in side")),
	}, func(b *BackupInfo) { b.Tablespaces = []Tablespace{{"side", 16384, side}} })
	if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata, SetAside: true}); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, side+"/PG_15_1/5/1", "replayed")
	if err := os.Rename(pgdata, pgdata+"_1"); err != nil {
		t.Fatal(err)
	}
	// Others may use the directory; only the operator's recovery has volumes of its own.
	mustSay(t, restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata}), errNotEmpty, side)
	if err := restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata, SetAside: true}); err != nil {
		t.Fatal(err)
	}
	expectTree(t, side, map[string]string{"PG_15_1/5/1": "file 600 in side"})
	if aside, err := filepath.Glob(side + "_*"); err != nil || len(aside) != 1 {
		t.Errorf("set aside: %q, %v", aside, err)
	} else {
		expectTree(t, aside[0], map[string]string{"PG_15_1/5/1": "file 600 replayed"})
	}
	mustSay(t, restoreBackup(t.Context(), store, b, restoreOptions{Dir: pgdata, SetAside: true}), errNotEmpty, pgdata)
	expectTree(t, side, map[string]string{"PG_15_1/5/1": "file 600 in side"})
}

// ---------------------------------------------------------------------------
// Recovery settings
// ---------------------------------------------------------------------------

func TestRestoreCommand(t *testing.T) {
	for _, c := range []struct {
		words []string
		want  string
	}{
		{[]string{"/usr/bin/x", "wal-restore", "--objectstore", "/etc/store.yaml"}, `/usr/bin/x wal-restore --objectstore /etc/store.yaml "%f" "%p"`},
		{[]string{"/opt/my tools/x", "it's", "100%"}, `'/opt/my tools/x' 'it'\''s' '100%%' "%f" "%p"`},
		{[]string{"x", ""}, `x '' "%f" "%p"`},
	} {
		got, exit, _ := strings.Cut(restoreCommand(c.words[0], c.words[1:]...), " ||")
		if got != c.want || exit == "" {
			t.Errorf("%q: %s, want %s", c.words, got, c.want)
		}
	}
	// PostgreSQL takes up to 125 for the end of the archive, which only 1 is: 2 is a Go program that crashed.
	for code, want := range map[int]int{0: 0, 1: 1, 2: 130, 125: 130, 127: 130, 130: 130, 143: 130} {
		cmd := exec.Command("sh", "-c", restoreCommand("sh", "-c", fmt.Sprintf("exit %d", code)))
		if cmd.Run(); cmd.ProcessState.ExitCode() != want {
			t.Errorf("exit code %d became %d, want %d", code, cmd.ProcessState.ExitCode(), want)
		}
	}
}

func TestWriteRecoverySettings(t *testing.T) {
	dir := testDir(t)
	mustWrite(t, dir+"/postgresql.auto.conf", "# Do not edit\nrecovery_target_time = '2020-01-01'\n")
	mustWrite(t, dir+"/standby.signal", "")
	if err := writeRecoverySettings(dir, &RecoveryTarget{TargetName: `it's a \ point`}, `'a b' "%f"`); err != nil {
		t.Fatal(err)
	}
	got := dirTree(t, dir)
	conf := got["postgresql.auto.conf"]
	for _, line := range []string{"# Do not edit\n", "restore_command = '''a b'' \"%f\"'\n", `recovery_target_name = 'it''s a \\ point'` + "\n",
		"recovery_target_action = 'promote'\n", "recovery_target_timeline = 'latest'\n", "recovery_target_time = ''\n"} {
		if !strings.Contains(conf, line) {
			t.Errorf("no line %q in:\n%s", line, conf)
		}
	}
	// PostgreSQL assigns in the order of the file, and an empty target after another one is an error to it
	if !strings.HasSuffix(conf, "point'\n") {
		t.Errorf("the target is not the last line:\n%s", conf)
	}
	if got["recovery.signal"] != "file 600 " || got["standby.signal"] != "" {
		t.Errorf("recovery.signal %q, standby.signal %q", got["recovery.signal"], got["standby.signal"])
	}
	if err := writeRecoverySettings(dir, &RecoveryTarget{TargetName: "two\nlines"}, "x"); !errors.Is(err, errBadTarget) {
		t.Errorf("%v", err)
	}
	outside := testDir(t)
	if err := os.Symlink(outside+"/conf", testDirIn(t, dir, "evil")+"/postgresql.auto.conf"); err != nil {
		t.Fatal(err)
	}
	if err := writeRecoverySettings(dir+"/evil", nil, "x"); err == nil || fileExists(outside+"/conf") {
		t.Errorf("written through a link: %v", err)
	}
}

func testDirIn(t testing.TB, dir, name string) string {
	t.Helper()
	if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}

// ---------------------------------------------------------------------------
// The service
// ---------------------------------------------------------------------------

func TestRestoreJobService(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	base := testDir(t)
	source, err := newFileSource(storeFile(t, s, bucket))
	if err != nil {
		t.Fatal(err)
	}
	store, err := source.Store(t.Context(), StoreRef{"store", "old"})
	if err != nil {
		t.Fatal(err)
	}
	service := &restoreJobService{source: source, pgdata: filepath.Join(base, "pgdata"), walDir: filepath.Join(base, "wal", "pg_wal"), report: newReport(source, "")}

	capabilities, err := service.GetCapabilities(t.Context(), nil)
	if err != nil || len(capabilities.Capabilities) != 1 || capabilities.Capabilities[0].Kind != job.RestoreJobHooksCapability_KIND_RESTORE {
		t.Errorf("capabilities %v, %v", capabilities, err)
	}

	const recovery = `"externalClusters":[{"name":"origin","plugin":{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store","serverName":"old"}}}],
		"bootstrap":{"recovery":{"source":"origin"%s}}`
	const archiving = `,"plugins":[{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store","serverName":"%s"}}]`
	cluster := func(annotations, spec string) []byte {
		return fmt.Appendf(nil, `{"metadata":{"name":"new","annotations":{%s}},"spec":{%s}}`, annotations, spec)
	}
	yes, no := true, false
	call := func(definition []byte, check *bool) (string, codes.Code, string) {
		reply, err := service.Restore(t.Context(), &job.RestoreRequest{ClusterDefinition: definition, CheckEmptyWalArchive: check})
		return reply.GetRestoreConfig(), status.Code(err), fmt.Sprint(err)
	}
	expect := func(name string, definition []byte, check *bool, code codes.Code, says ...string) {
		t.Helper()
		reply, got, text := call(definition, check)
		if got != code {
			t.Errorf("%s: %s %s, want %s", name, got, text, code)
		}
		for _, words := range says {
			if !strings.Contains(text, words) {
				t.Errorf("%s: the error does not say %q: %s", name, words, text)
			}
		}
		if code != codes.OK && (reply != "" || fileExists(service.pgdata)) {
			t.Errorf("%s: replied %q, or touched PGDATA", name, reply)
		}
	}
	plainRecovery := fmt.Sprintf(recovery, "")
	expect("garbage", []byte("{"), nil, codes.InvalidArgument)
	expect("no recovery store", cluster("", `"bootstrap":{"recovery":{"source":"missing"}}`), nil, codes.FailedPrecondition, "Cluster new", "bootstrap.recovery.source", "barmanObjectName")
	expect("an ObjectStore that is not there", cluster("", strings.Replace(plainRecovery, `"barmanObjectName":"store"`, `"barmanObjectName":"nope"`, 1)), nil, codes.FailedPrecondition, "nope")
	expect("nothing in the bucket", cluster("", plainRecovery), nil, codes.NotFound, "no target backup found")
	expect("a bad target", cluster("", fmt.Sprintf(recovery, `,"recoveryTarget":{"targetTime":"noon"}`)), nil, codes.InvalidArgument, "noon")

	testBackup(t, s, bucket, store, map[string][]byte{"data.tar": makeTar(t, plain()...)})
	s.write(t, bucket, "busy/wals/0000000100000000/000000010000000000000001", nil)
	expect("a time before the backup", cluster("", fmt.Sprintf(recovery, `,"recoveryTarget":{"targetTime":"2025-01-01 00:00:00"}`)), nil, codes.NotFound, "20260101T100000", "ended after the target time")
	busy := plainRecovery + fmt.Sprintf(archiving, "busy")
	expect("a destination in use", cluster("", busy), nil, codes.FailedPrecondition, "Expected empty archive", "serverName")
	expect("a destination in use, says the operator too", cluster(`"cnpg.io/skipEmptyWalArchiveCheck":"enabled"`, busy), &yes, codes.FailedPrecondition, "Expected empty archive")
	same := plainRecovery + fmt.Sprintf(archiving, "old")
	expect("its own source", cluster("", same), nil, codes.FailedPrecondition, "Expected empty archive", "the very place that it is restored from", "s3://"+bucket+"/old", "serverName")
	mustWrite(t, service.pgdata+"/precious", "data")
	if _, code, text := call(cluster("", plainRecovery), nil); code != codes.FailedPrecondition || !strings.Contains(text, "not empty") {
		t.Errorf("PGDATA in use: %s %s", code, text)
	}

	for name, c := range map[string]struct {
		definition []byte
		check      *bool
	}{
		"without archive":                  {cluster("", plainRecovery), nil},
		"with an archive of its own":       {cluster("", plainRecovery+fmt.Sprintf(archiving, "new")), &yes},
		"check switched off by annotation": {cluster(`"cnpg.io/skipEmptyWalArchiveCheck":"enabled"`, busy), nil},
		"check switched off by operator":   {cluster("", same), &no},
		"with walStorage":                  {cluster("", plainRecovery+`,"walStorage":{"size":"1Gi"}`), nil},
	} {
		os.RemoveAll(service.pgdata)
		os.RemoveAll(service.walDir)
		reply, code, text := call(c.definition, c.check)
		if code != codes.OK {
			t.Errorf("%s: %s %s", name, code, text)
		}
		if want := "recovery_target_action = promote\n" +
			"restore_command = '/controller/manager wal-restore --log-destination /controller/log/postgres.json %f %p'\n"; reply != want {
			t.Errorf("%s: reply %q", name, reply)
		}
		wal := "dir 700"
		if name == "with walStorage" {
			wal = "-> " + service.walDir
		}
		expectTree(t, service.pgdata, map[string]string{"global/pg_control": "file 600 control", "pg_wal": wal, "recovery.signal": "", "postgresql.auto.conf": ""})
	}
}

// ---------------------------------------------------------------------------
// Real backups of a real PostgreSQL
// ---------------------------------------------------------------------------

// checksum stands for the whole content of table t.
func checksum(p *postgres) string {
	return p.Query("SELECT count(*) || ' rows ' || md5(string_agg(t::text, ',' ORDER BY id)) FROM t")
}

// archivingPostgres is a server that archives to server main of the bucket through this
// project's program, with a table in each of three tablespaces: the default one, one
// beside PGDATA (side), and one inside it (inner).
func archivingPostgres(t *testing.T, store string) *postgres {
	t.Helper()
	p := startPostgres(t, pgOptions{Checksums: true, Tablespaces: []string{"side"},
		ArchiveCommand: program(t) + " wal-archive --objectstore " + store + " --server-name main %p"})
	if err := os.Mkdir(p.Dir+"/inner", 0o700); err != nil {
		t.Fatal(err)
	}
	giveToPostgres(t, p.Dir+"/inner")
	p.Exec("CREATE TABLESPACE inner_place LOCATION '" + p.Dir + "/inner'")
	p.Exec(`CREATE TABLE t (id int PRIMARY KEY, filler text);
		INSERT INTO t SELECT n, repeat(md5(n::text), 20) FROM generate_series(1, 20000) n;
		CREATE TABLE a TABLESPACE side AS SELECT * FROM t;
		CREATE TABLE b TABLESPACE inner_place AS SELECT * FROM t`)
	return p
}

// restoreWithProgram restores by the command line into a new directory and returns it.
func restoreWithProgram(t *testing.T, store string, args ...string) string {
	t.Helper()
	base := testDir(t)
	pgdata := filepath.Join(base, "pgdata")
	args = append([]string{"restore", "--objectstore", store, "--server-name", "main", "--tablespace", "side:" + base + "/side"}, args...)
	if r := runProgram(t, nil, append(args, pgdata)...); r.Code != 0 {
		t.Fatalf("%q: exit code %d\n%s", args, r.Code, r.Stderr)
	}
	return pgdata
}

// Barman's backups, in each form it has, restore: PostgreSQL starts, replays what was
// archived since, and has every row.
func TestRestoreBarmanBackup(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := storeFile(t, s, bucket, "wal: {compression: gzip}", "data: {jobs: 3}")
	p := archivingPostgres(t, store)
	type taken struct {
		name, id string
	}
	var backups []taken
	for name, args := range map[string][]string{
		"none, split": {"--max-archive-size", "5MB"},
		"gzip":        {"--gzip"},
		"bzip2":       {"--bzip2"},
	} {
		if compression := strings.TrimPrefix(args[0], "--"); len(args) == 1 {
			if _, err := codecByName(compression); err != nil {
				t.Logf("%s: %v", name, err)
				continue
			}
		}
		// rows that a backup has only by replay are added while it runs
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				default:
					run(t, p.psql("INSERT INTO t SELECT max(id) + 1, 'busy' FROM t; UPDATE a SET filler = 'u' WHERE id = (random() * 20000)::int"))
				}
			}
		}()
		r := barman(t, s, p.Env(), "barman-cloud-backup", append(args, "--immediate-checkpoint", "--jobs", "2", "s3://"+bucket, "main")...)
		close(stop)
		<-stopped
		if r.Code != 0 {
			t.Fatalf("%s: barman-cloud-backup: exit code %d\n%s", name, r.Code, r.Stderr)
		}
		catalog, err := testStoreFile(t, store, "main").Catalog(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		backups = append(backups, taken{name, catalog.Backups[len(catalog.Backups)-1].ID})
	}
	p.Exec("INSERT INTO t VALUES (1000000, 'after every backup'); UPDATE b SET filler = 'moved on' WHERE id % 7 = 0")
	p.WaitArchived(p.SwitchWAL())
	table := func(p *postgres, name string) string {
		return p.Query("SELECT count(*) || ' rows ' || md5(string_agg(x::text, ',' ORDER BY id)) FROM " + name + " x")
	}
	want := []string{table(p, "t"), table(p, "a"), table(p, "b")}
	p.Stop("fast")
	for _, b := range backups {
		t.Run(b.name, func(t *testing.T) {
			if keys := s.keys(t, bucket, "main/base/"+b.id+"/data_"); (len(keys) > 2) != strings.Contains(b.name, "split") {
				t.Fatalf("the backup has %q", keys)
			}
			pgdata := restoreWithProgram(t, store, "--backup-id", b.id)
			restored := startRestored(t, pgdata)
			for i, name := range []string{"t", "a", "b"} {
				if got := table(restored, name); got != want[i] {
					t.Errorf("table %s: %s, want %s", name, got, want[i])
				}
			}
			if got := restored.Query("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname IN ('side', 'inner_place') ORDER BY spcname"); got != pgdata+"/inner\n"+filepath.Dir(pgdata)+"/side" {
				t.Errorf("tablespaces at %s", got)
			}
			restored.Stop("fast")
			mustRun(t, asPostgres(t, restored.tool("pg_checksums"), "--check", "-D", pgdata))
		})
	}
}

// Barman's backups of what this project, or pg_basebackup, has made: of a standby, and of a
// cluster that was restored. The backup_manifest that lies there is not theirs, and refuses nothing.
func TestRestoreBarmanBackupOfCopies(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file := storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{Checksums: true, ArchiveCommand: archivingTo(t, file)})
	p.Exec("CREATE TABLE t AS SELECT n AS id, md5(n::text) AS x FROM generate_series(1, 20000) n")
	store := testStoreFile(t, file, "main")
	mustBackUp(t, store, p, backupOptions{})
	p.WaitArchived(p.SwitchWAL())
	pgdata := testDir(t) + "/pgdata"
	if r := runProgram(t, nil, "restore", "--objectstore", file, "--server-name", "main", pgdata); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	again := strings.Replace(archivingTo(t, file), "--server-name main", "--server-name again", 1)
	copied := startRestored(t, pgdata, "archive_mode=on", "archive_command="+again)
	standby := startPostgres(t, pgOptions{StandbyOf: p})
	for server, from := range map[string]*postgres{"again": copied, "main": standby} {
		if !fileExists(filepath.Join(from.Dir, "backup_manifest")) {
			t.Fatalf("%s has no backup_manifest, the test shows nothing", from.Dir)
		}
		stop := make(chan struct{})
		stopped := make(chan struct{})
		go func() { // a standby's backup needs the primary to go on
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				case <-time.After(500 * time.Millisecond):
					run(t, p.psql("INSERT INTO t SELECT max(id) + 1, 'busy' FROM t; CHECKPOINT; SELECT pg_switch_wal()"))
				}
			}
		}()
		r := barman(t, s, from.Env(), "barman-cloud-backup", "--immediate-checkpoint", "s3://"+bucket, server)
		close(stop)
		<-stopped
		if r.Code != 0 {
			t.Fatalf("barman-cloud-backup: exit code %d\n%s", r.Code, r.Stderr)
		}
		if server == "again" {
			from.Exec("INSERT INTO t VALUES (0, 'of the copy')")
			from.WaitArchived(from.SwitchWAL())
		}
	}
	p.WaitArchived(p.SwitchWAL())
	for server, from := range map[string]*postgres{"again": copied, "main": p} {
		if r := runProgram(t, nil, "verify", "--objectstore", file, "--server-name", server); r.Code != 0 {
			t.Errorf("verify %s: exit code %d\n%s%s", server, r.Code, r.Stdout, r.Stderr)
		}
		dir := testDir(t) + "/pgdata"
		if r := runProgram(t, nil, "restore", "--objectstore", file, "--server-name", server, dir); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		if got, want := checksum(startRestored(t, dir)), checksum(from); got != want {
			t.Errorf("%s restored as %s, not %s", server, got, want)
		}
	}
}

// Without endpointURL the server is AWS: checksums go with everything that is sent, over TLS
// behind the body, and a multipart upload is put together by them.
func TestRestoreWithServerChecksums(t *testing.T) {
	s := testS3TLS(t)
	bucket := s.newBucket(t)
	t.Setenv("AWS_ENDPOINT_URL", s.Endpoint) // in place of AWS
	file := storeFileAt(t, s, "", "s3://"+bucket, "wal: {compression: gzip}",
		`data: {jobs: 2, immediateCheckpoint: true, additionalCommandArgs: ["--addressing-style=path", "--min-chunk-size=5MB"]}`)
	p := startPostgres(t, pgOptions{Checksums: true, Tablespaces: []string{"side"}, ArchiveCommand: archivingTo(t, file)})
	p.pgbenchTables(3)
	info := mustBackUp(t, testStoreFile(t, file, "main"), p, backupOptions{})
	p.Exec("UPDATE pgbench_accounts SET abalance = 1 WHERE aid <= 1000")
	p.WaitArchived(p.SwitchWAL())
	parts := 0
	for _, key := range s.keys(t, bucket, "main/base/"+info.ID+"/data") {
		h, err := s.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: &bucket, Key: &key, ChecksumMode: s3types.ChecksumModeEnabled})
		if err != nil || h.ChecksumCRC32C == nil {
			t.Errorf("%s: the server has no CRC-32C: %v", key, err)
		}
		if strings.Contains(aws.ToString(h.ETag), "-") {
			parts++
		}
	}
	if parts == 0 {
		t.Error("nothing was sent in parts")
	}
	if r := runProgram(t, nil, "check", "--objectstore", file, "--server-name", "main"); r.Code != 0 {
		t.Errorf("check: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if r := runProgram(t, nil, "verify", "--objectstore", file, "--server-name", "main"); r.Code != 0 {
		t.Errorf("verify: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	restored := startRestored(t, restoreWithProgram(t, file))
	if n := restored.Query("SELECT count(*) || ' ' || sum(abalance) FROM pgbench_accounts"); n != "300000 1000" {
		t.Errorf("accounts and their sum: %s", n)
	}
}

// Recovery ends where it is asked to end, from a backup of this project: by time, LSN,
// transaction, restore point, as soon as it is consistent, and on either timeline.
func TestRestorePointInTime(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := storeFile(t, s, bucket, "wal: {compression: gzip}", "data: {compression: gzip, immediateCheckpoint: true}")
	p := archivingPostgres(t, store)
	take := func(p *postgres) string {
		t.Helper()
		r := runProgram(t, append(p.Env(), "PGDATA="+p.Dir), "backup", "--objectstore", store, "--server-name", "main")
		if r.Code != 0 {
			t.Fatalf("backup: exit code %d\n%s", r.Code, r.Stderr)
		}
		return strings.TrimSpace(r.Stdout)
	}
	first := take(p)

	type moment struct{ time, lsn, xid, name, rows string }
	mark := func(p *postgres, id int) moment {
		t.Helper()
		m := moment{name: fmt.Sprintf("point-%d", id)}
		m.xid = p.Query(fmt.Sprintf("WITH i AS (INSERT INTO t VALUES (%d, 'mark') RETURNING 1) SELECT pg_current_xact_id() FROM i", id))
		m.rows = checksum(p)
		m.lsn = p.Query("SELECT pg_create_restore_point('" + m.name + "')")
		p.Query("SELECT pg_sleep(0.01)") // so that the clock moves between two marks
		m.time = p.Query("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')")
		p.Query("SELECT pg_sleep(0.01)")
		return m
	}
	var marks []moment
	for i := range 4 {
		marks = append(marks, mark(p, 100_001+i))
	}
	p.WaitArchived(p.SwitchWAL())
	second := take(p)
	last := mark(p, 200_000)
	p.Exec("DROP TABLE t") // what everybody recovers from
	p.WaitArchived(p.SwitchWAL())
	p.Stop("fast")

	for _, c := range []struct {
		name   string
		args   []string
		backup string
		want   string
	}{
		{"time", []string{"--target-time", marks[0].time}, first, marks[0].rows},
		{"time with a zone", []string{"--target-time", marks[2].time + "+00"}, first, marks[2].rows},
		{"time after the second backup", []string{"--target-time", last.time}, second, last.rows},
		{"LSN", []string{"--target-lsn", marks[1].lsn}, first, marks[1].rows},
		{"transaction", []string{"--target-xid", marks[1].xid, "--backup-id", first}, first, marks[1].rows},
		{"just before a transaction", []string{"--target-xid", marks[1].xid, "--target-exclusive", "--backup-id", first}, first, marks[0].rows},
		{"restore point", []string{"--target-name", marks[3].name, "--backup-id", first}, first, marks[3].rows},
		{"immediate", []string{"--target-immediate", "--backup-id", second}, second, marks[3].rows},
	} {
		t.Run(c.name, func(t *testing.T) {
			pgdata := restoreWithProgram(t, store, c.args...)
			label, err := os.ReadFile(pgdata + "/backup_label")
			if err != nil {
				t.Fatal(err)
			}
			b, err := testStoreFile(t, store, "main").ReadBackupInfo(t.Context(), c.backup)
			if err != nil || !strings.Contains(string(label), b.BeginLSN+" ") {
				t.Fatalf("not restored from %s (%v): %s", c.backup, err, label)
			}
			// a target that was left in the directory by an earlier recovery does not get in the way
			restored := startRestored(t, pgdata)
			if got := checksum(restored); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}

	// The cluster lives on from a point in time on timeline 2, archives there, and takes a
	// backup; later recoveries can go to the end of either line.
	archive := "archive_command=" + program(t) + " wal-archive --objectstore " + store + " --server-name main %p"
	second2 := startRestored(t, restoreWithProgram(t, store, "--target-time", marks[1].time), "archive_mode=on", archive)
	if got := checksum(second2); got != marks[1].rows {
		t.Errorf("before timeline 2: %s, want %s", got, marks[1].rows)
	}
	onTwo := mark(second2, 300_000)
	second2.WaitArchived(second2.SwitchWAL())
	latest := startRestored(t, restoreWithProgram(t, store))
	if got := checksum(latest); got != onTwo.rows {
		t.Errorf("latest timeline, from a backup before the fork: %s, want %s", got, onTwo.rows)
	}
	third := take(second2)
	after := mark(second2, 300_001)
	second2.WaitArchived(second2.SwitchWAL())
	latest = startRestored(t, restoreWithProgram(t, store))
	if got := checksum(latest); got != after.rows {
		t.Errorf("latest timeline, from backup %s on it: %s, want %s", third, got, after.rows)
	}
	old := startRestored(t, restoreWithProgram(t, store, "--target-timeline", "1", "--target-name", last.name))
	if got := checksum(old); got != last.rows {
		t.Errorf("the abandoned timeline 1: %s, want %s", got, last.rows)
	}
	// The second backup was taken after the fork of timeline 2.
	r := runProgram(t, nil, "restore", "--objectstore", store, "--server-name", "main", "--backup-id", second, testDir(t)+"/pgdata")
	if r.Code == 0 || !strings.Contains(r.Stderr, "which timeline 2 had left at") {
		t.Errorf("a backup that is not on the line: exit code %d\n%s", r.Code, r.Stderr)
	}
}

// What verify says of an archive that is whole, and of each way in which it is not: of a
// backup with a tablespace, and of WAL compressed and plain that goes on after a promotion.
func TestVerify(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	file, plain := storeFile(t, s, bucket, "wal: {compression: gzip}"), storeFile(t, s, bucket)
	p := startPostgres(t, pgOptions{Checksums: true, ArchiveCommand: archivingTo(t, file), Tablespaces: []string{"beside"}})
	p.Exec("CREATE TABLE t AS SELECT n, repeat('x', 100) FROM generate_series(1, 1000) n; CREATE TABLE spaced TABLESPACE beside AS SELECT * FROM t")
	store := testStoreFile(t, file, "main")
	id := mustBackUp(t, store, p, backupOptions{}).ID
	paths := []string{p.Query("SELECT pg_relation_filepath('t')"), p.Query("SELECT pg_relation_filepath('spaced')")}
	next := func() string {
		t.Helper()
		p.Exec("INSERT INTO t VALUES (0, 'more')")
		wal := p.SwitchWAL()
		p.WaitArchived(wal)
		return wal
	}
	zipped, between := next(), next()
	p.Set("archive_command", archivingTo(t, plain))
	unzipped := next()
	p.Stop("fast") // and a failover: a history, and timeline 2
	mustWrite(t, filepath.Join(p.Dir, "standby.signal"), "")
	giveToPostgres(t, p.Dir)
	p.Start()
	p.Promote()
	second, newest := next(), next()
	if !strings.HasPrefix(second, "00000002") {
		t.Fatalf("%s is on no other timeline", second)
	}
	p.Stop("fast")
	verify := func(code int, words ...string) {
		t.Helper()
		r := runProgram(t, nil, "verify", "--objectstore", file, "--server-name", "main", "--json", id)
		if r.Code != code {
			t.Errorf("exit code %d, want %d\n%s%s", r.Code, code, r.Stdout, r.Stderr)
		}
		for _, word := range words {
			if !strings.Contains(r.Stdout, word) {
				t.Errorf("it does not say %q:\n%s", word, r.Stdout)
			}
		}
	}
	verify(0, `"ok": true`, `"manifest": true`, `"to": "`+newest+`"`)
	if r := runProgram(t, nil, "verify", "--objectstore", file, "--server-name", "main"); r.Code != 0 || !strings.Contains(r.Stdout, "ok") {
		t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}

	// damaged changes the object on the disk of the server, and undoes that after f.
	damaged := func(key string, change func(path string) error, f func()) {
		t.Helper()
		path := filepath.Join(s.Dir, bucket, key)
		content, err := os.ReadFile(path)
		if err == nil {
			err = change(path)
		}
		if err != nil {
			t.Fatal(err)
		}
		f()
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	damage := func(key string, change func(path string) error, words ...string) {
		t.Helper()
		damaged(key, change, func() { t.Helper(); verify(1, append(words, `"ok": false`)...) })
	}
	flip := func(at int) func(string) error {
		return func(path string) error {
			content, err := os.ReadFile(path)
			if err == nil {
				content[at] ^= 1
				err = os.WriteFile(path, content, 0o644)
			}
			return err
		}
	}
	cut := func(path string) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, info.Size()/2) // the first archive of a tablespace may hold directories only
	}
	dir := "main/base/" + id + "/"
	flipped := 0
	for _, key := range s.keys(t, bucket, dir) {
		content, _ := s.read(t, bucket, key)
		at := bytes.Index(content, []byte(strings.Repeat("x", 100)))
		if at < 0 {
			continue
		}
		flipped++
		names := tarNames(t, s, bucket, key)
		relation := paths[slices.IndexFunc(paths, func(p string) bool {
			return slices.ContainsFunc(names, func(name string) bool { return name != "" && strings.HasSuffix(p, "/"+name) || p == name })
		})]
		damage(key, flip(at), relation+" has another size or checksum")
		damaged(key, flip(at), func() {
			b, err := store.ReadBackupInfo(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			to := t.TempDir()
			mustSay(t, restoreBackup(t.Context(), store, b, restoreOptions{Dir: to + "/pgdata", Tablespaces: map[string]string{"beside": to + "/beside"}}), errDamaged, relation)
		})
	}
	if flipped != 2 {
		t.Errorf("%d tables were damaged, not 2", flipped)
	}
	archives := s.keys(t, bucket, dir+"data")
	last, space := archives[len(archives)-1], strings.Split(paths[1], "/")[1]+".tar"
	damage(last, cut, last)
	damage(last, os.Remove, "pg_control")
	damage(archives[0], os.Remove, "data")
	damage(dir+space, cut, space)
	damage(dir+space, os.Remove, space)
	damage(dir+"backup.info", flip(100), "UNREADABLE", "checksum")
	stored := func(wal, suffix string) string { return "main/wals/" + wal[:16] + "/" + wal + suffix }
	damage(stored(zipped, ".gz"), flip(1000), zipped)
	damage(stored(zipped, ".gz"), cut, zipped)
	damage(stored(between, ".gz"), os.Remove, "WAL is missing in the archive: "+between)
	damage(stored(unzipped, ""), flip(1<<20), unzipped, "CRC-32C")
	damage(stored(unzipped, ""), cut, unzipped)
	damage(stored(second, ""), flip(1<<20), second, "CRC-32C")
	damage(stored(second, ""), os.Remove, "WAL is missing in the archive: "+second)
	damage("main/wals/00000002.history", os.Remove, "00000002.history")
	damage("main/wals/00000002.history", flip(3), "00000002.history")
	s.write(t, bucket, "main/wals/00000002FFFFFFFF/00000002FFFFFFFF000000FE", []byte("far away"))
	verify(1, "another cluster's")
	s.remove(t, bucket, "main/wals/00000002FFFFFFFF/00000002FFFFFFFF000000FE")
	verify(0, `"ok": true`) // what was undone is whole
}
