package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// testStore opens a store on a bucket of a test server, as the subcommands do: through a
// file with ObjectStore and Secrets. Lines of configuration are added, as for storeFile.
func testStore(t testing.TB, s *s3Server, bucket, server string, configuration ...string) *Store {
	t.Helper()
	return testStoreFile(t, storeFile(t, s, bucket, configuration...), server)
}

// testStoreAt is testStore through another endpoint, such as a fault proxy's.
func testStoreAt(t testing.TB, s *s3Server, endpoint, bucket, server string, configuration ...string) *Store {
	t.Helper()
	return testStoreFile(t, storeFileAt(t, s, endpoint, "s3://"+bucket, configuration...), server)
}

func testStoreFile(t testing.TB, file, server string) *Store {
	t.Helper()
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	store, err := source.Store(t.Context(), StoreRef{ObjectStore: "store", ServerName: server})
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// ---------------------------------------------------------------------------
// Configuration
// ---------------------------------------------------------------------------

func TestDestination(t *testing.T) {
	for _, c := range []struct{ in, bucket, prefix string }{
		{"s3://bucket", "bucket", ""},
		{"s3://bucket/", "bucket", ""},
		{"s3://bucket/path", "bucket", "path"},
		{"s3://bucket//a/b/", "bucket", "a/b"},
		{"s3://bucket/a//b", "bucket", "a//b"}, // as Barman: literally
		{"s3://bucket/100%/a%20b c", "bucket", "100%/a%20b c"},
		{"s3://", "", ""},
		{"s3:///path", "", ""},
		{"bucket/path", "", ""},
		{"https://bucket/path", "", ""},
		{"s3://bucket/path?x=1", "", ""},
		{"s3://bucket/path#x", "", ""},
		{"", "", ""},
	} {
		bucket, prefix, err := splitDestination(c.in)
		if (err == nil) != (c.bucket != "") || err == nil && (bucket != c.bucket || prefix != c.prefix) {
			t.Errorf("%q: %q, %q, %v", c.in, bucket, prefix, err)
		}
		if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("destinationPath %q", c.in)) {
			t.Errorf("%q: %v", c.in, err)
		}
	}
}

// Where everything lies (Barman's layout). There is never a leading slash, and an empty
// path leaves no trace.
func TestKeys(t *testing.T) {
	for prefix, before := range map[string]string{"": "", "a/b": "a/b/", "a//b": "a//b/"} {
		s := &Store{bucket: "bucket", prefix: prefix, Config: StoreConfig{ServerName: "pg-1"}}
		for got, want := range map[string]string{
			s.key():                                                 "pg-1",
			s.key("wals/"):                                          "pg-1/wals/",
			s.baseKey("20260101T100000", ""):                        "pg-1/base/20260101T100000/",
			s.baseKey("20260101T100000", "x"):                       "pg-1/base/20260101T100000/x",
			s.walPrefix("0000000A000000FF00000012"):                 "pg-1/wals/0000000A000000FF/0000000A000000FF00000012",
			s.walPrefix("0000000A000000FF00000012.partial"):         "pg-1/wals/0000000A000000FF/0000000A000000FF00000012.partial",
			s.walPrefix("0000000A000000FF00000012.00000028.backup"): "pg-1/wals/0000000A000000FF/0000000A000000FF00000012.00000028.backup",
			s.walPrefix("0000000A.history"):                         "pg-1/wals/0000000A.history",
		} {
			if got != before+want {
				t.Errorf("path %q: %s, want %s", prefix, got, before+want)
			}
		}
		if got := s.URL(s.key("base/")); got != "s3://bucket/"+before+"pg-1/base/" {
			t.Errorf("URL %s", got)
		}
	}
}

func TestCommandArgs(t *testing.T) {
	for _, c := range []struct {
		args string // separated by a blank
		want commandArgs
		says string
	}{
		{"", commandArgs{}, ""},
		{"--addressing-style=path", commandArgs{AddressingStyle: "path"}, ""},
		{"--addressing-style virtual", commandArgs{AddressingStyle: "virtual"}, ""},
		{"--read-timeout 60", commandArgs{ReadTimeout: time.Minute}, ""},
		{"--read-timeout=60 --min-chunk-size=5MB", commandArgs{ReadTimeout: time.Minute, MinChunkSize: 5 << 20}, ""},
		{"--max-archive-size 100GB --max-bandwidth 1M", commandArgs{MaxArchiveSize: 100 << 30, MaxBandwidth: 1 << 20}, ""},
		{"-S 20MB -e aws:kms --sse-kms-key-id alias/key", commandArgs{MaxArchiveSize: 20 << 20, Encryption: "aws:kms", KMSKeyID: "alias/key"}, ""},
		{"--encryption=AES256 -P backup", commandArgs{Encryption: "AES256", Profile: "backup"}, ""},
		{"--aws-profile backup", commandArgs{Profile: "backup"}, ""},
		{"--compression-level=high --no-partial", commandArgs{CompressionLevel: "high", NoPartial: true}, ""},
		{"--tablespace a:/x --tablespace=b:/y:z", commandArgs{Tablespaces: map[string]string{"a": "/x", "b": "/y:z"}}, ""},
		{"--tag k,v --tags=k2,v2 --history-tag h,1 --history-tags h2,2", commandArgs{Tags: map[string]string{"k": "v", "k2": "v2"},
			HistoryTags: map[string]string{"h": "1", "h2": "2"}}, ""},
		{"-v --verbose -vv -q -qq --max-concurrency 3 --max-single-put-size=1MB --max-block-size 4MB --cloud-provider=aws-s3", commandArgs{}, ""},
		{"--read-timeout", commandArgs{}, "read-timeout"},
		{"--read-timeout soon", commandArgs{}, "number of seconds"},
		{"--read-timeout=0", commandArgs{}, "number of seconds"},
		{"--frobnicate=1", commandArgs{}, "-frobnicate"},
		{"--snapshot-instance x", commandArgs{}, "-snapshot-instance"},
		{"--addressing-style=sideways", commandArgs{}, "auto, path, virtual"},
		{"--encryption=rot13", commandArgs{}, "AES256, aws:kms"},
		{"--max-archive-size=big", commandArgs{}, `"big" is not a size`},
		{"--tag=k", commandArgs{}, "KEY,VALUE"},
		{"--tablespace=k", commandArgs{}, "KEY:VALUE"},
		{"--no-partial extra", commandArgs{}, `"extra" is not an argument`},
	} {
		got, err := parseCommandArgs("data.additionalCommandArgs", strings.Fields(c.args))
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "data.additionalCommandArgs") {
				t.Errorf("%q: %v, want %q", c.args, err, c.says)
			}
		} else if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", c.want) {
			t.Errorf("%q: %+v, %v, want %+v", c.args, got, err, c.want)
		}
	}
}

// No arguments break the parser, and what it takes is within what the program can do.
func FuzzCommandArgs(f *testing.F) {
	for _, args := range []string{"--read-timeout=60 --min-chunk-size=5MB", "-S 20MB -e aws:kms --sse-kms-key-id k", "--tag k,v --tags=k2,v2", "--tablespace a:/x", "-vv -- x", "--max-bandwidth 1.5e"} {
		f.Add(args)
	}
	f.Fuzz(func(t *testing.T, line string) {
		args, err := parseCommandArgs("wal.additionalCommandArgs", strings.Fields(line))
		if err != nil {
			if !strings.Contains(err.Error(), "wal.additionalCommandArgs") {
				t.Errorf("%q: %v does not name the field", line, err)
			}
			return
		}
		if args.ReadTimeout < 0 || args.MinChunkSize < 0 || args.MaxArchiveSize < 0 || args.MaxBandwidth < 0 {
			t.Errorf("%q: %+v", line, args)
		}
		again, err := parseCommandArgs("wal.additionalCommandArgs", strings.Fields(line))
		if err != nil || !reflect.DeepEqual(args, again) {
			t.Errorf("%q: %+v, then %+v, %v", line, args, again, err)
		}
	})
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "123": 123, "123b": 123, "1k": 1 << 10, "1KB": 1 << 10, "20MB": 20 << 20, "20 MiB": 20 << 20, "1.5G": 3 << 29, "100GB": 100 << 30, "1TiB": 1 << 40,
		"": -1, "MB": -1, "-1": -1, "1PB": -1, "1,5G": -1, "1e3": -1, "99999999999T": -1,
	} {
		if got, err := parseSize(in); (err == nil) != (want >= 0) || err == nil && got != want {
			t.Errorf("%q: %d, %v, want %d", in, got, err, want)
		}
	}
}

// ---------------------------------------------------------------------------
// backup.info
// ---------------------------------------------------------------------------

// barmanInfo was written by Barman 3.17.
const barmanInfo = `backup_label='START WAL LOCATION: 0/5000028 (file 000000010000000000000005)\nCHECKPOINT LOCATION: 0/5000060\nBACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-22 15:45:15 UTC\nLABEL: Barman backup cloud 20261122T154515\nSTART TIMELINE: 1\n'
backup_name=named-backup
begin_offset=40
begin_time=2026-11-22 15:45:15.686293+00:00
begin_wal=000000010000000000000005
begin_xlog=0/5000028
children_backup_ids=None
cluster_size=66080461
compression=None
config_file=/pgdata/postgresql.conf
copy_stats={'total_time': 3.878206, 'number_of_workers': 2, 'analysis_time': 0, 'analysis_time_per_item': {'16384': 0, '16398': 0, 'data': 0}, 'copy_time_per_item': {'16384': 0.141333, '16398': 0.019943, 'data': 3.346968}, 'serialized_copy_time_per_item': {'16384': 0.122425, '16398': 0.012023, 'data': 1.006044}, 'copy_time': 3.346968, 'serialized_copy_time': 1.140492}
data_checksums=off
deduplicated_size=None
encryption=None
end_offset=256
end_time=2026-11-22 15:45:17.158747+00:00
end_wal=000000010000000000000005
end_xlog=0/5000100
error=None
hba_file=/etc/pg/pg_hba.conf
ident_file=/etc/pg/pg_ident.conf
included_files=None
mode=None
parent_backup_id=None
pgdata=/pgdata
server_name=cloud
size=None
status=DONE
summarize_wal=None
systemid=7711022201327249345
tablespaces=[('fts', 16384, '/tblspc/fts'), ('ints', 16398, '/pgdata/ints')]
timeline=1
version=150018
xlog_segment_size=16777216
`

func TestBackupInfo(t *testing.T) {
	b, err := parseBackupInfo("20261122T154515", []byte(barmanInfo))
	if err != nil {
		t.Fatal(err)
	}
	want := BackupInfo{ID: "20261122T154515", BackupName: "named-backup", BeginOffset: 40, BeginWAL: "000000010000000000000005", BeginLSN: "0/5000028",
		BackupLabel: "START WAL LOCATION: 0/5000028 (file 000000010000000000000005)\nCHECKPOINT LOCATION: 0/5000060\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n" +
			"START TIME: 2026-11-22 15:45:15 UTC\nLABEL: Barman backup cloud 20261122T154515\nSTART TIMELINE: 1\n",
		BeginTime: b.BeginTime, EndTime: b.EndTime, ConfigFile: "/pgdata/postgresql.conf", CopyStats: b.CopyStats, EndOffset: 256,
		EndWAL: "000000010000000000000005", EndLSN: "0/5000100", HBAFile: "/etc/pg/pg_hba.conf", IdentFile: "/etc/pg/pg_ident.conf", PGData: "/pgdata",
		ServerName: "cloud", Status: "DONE", SystemID: "7711022201327249345", Timeline: 1, Version: 150018, WALSegmentSize: 16 << 20,
		Tablespaces: []Tablespace{{"fts", 16384, "/tblspc/fts"}, {"ints", 16398, "/pgdata/ints"}}}
	if !reflect.DeepEqual(*b, want) {
		t.Errorf("%+v, want %+v", *b, want)
	}
	if !b.BeginTime.Equal(time.Date(2026, 11, 22, 15, 45, 15, 686293000, time.UTC)) || !b.EndTime.Equal(time.Date(2026, 11, 22, 15, 45, 17, 158747000, time.UTC)) || !b.Done() {
		t.Errorf("from %s to %s, done %v", b.BeginTime, b.EndTime, b.Done())
	}

	// What we write ourselves has the lines of Barman 3.4, since it refuses any other, in alphabetical order.
	ours := string(b.marshal())
	var keys []string
	for line := range strings.Lines(ours) {
		keys = append(keys, line[:strings.Index(line, "=")])
		if !strings.Contains(barmanInfo, "\n"+line) && keys[0] != keys[len(keys)-1] {
			t.Errorf("it is not written as Barman writes it: %s", line)
		}
	}
	if want := strings.Fields(`backup_label backup_name begin_offset begin_time begin_wal begin_xlog compression config_file copy_stats deduplicated_size
		end_offset end_time end_wal end_xlog error hba_file ident_file included_files mode pgdata server_name size status systemid tablespaces timeline version xlog_segment_size`); !slices.Equal(keys, want) {
		t.Errorf("lines %q, want %q", keys, want)
	}
	again, err := parseBackupInfo(b.ID, []byte(ours))
	if err != nil || again.BackupLabel != b.BackupLabel || !reflect.DeepEqual(again.Tablespaces, b.Tablespaces) || !again.BeginTime.Equal(b.BeginTime) || !again.Done() {
		t.Errorf("read again: %+v, %v", again, err)
	}
	if b.BackupName = "a\nstatus=DONE"; !strings.Contains(string(b.marshal()), "\nbackup_name=a status=DONE\n") {
		t.Error("a name is more than its line")
	}
	b.BackupName = ""
	if strings.Contains(string(b.marshal()), "backup_name") {
		t.Error("there is a backup_name line without a name")
	}
}

func TestParseBackupInfo(t *testing.T) {
	for _, c := range []struct{ text, says string }{
		{"version=150018\n", ""},
		{"\n# comment\n  status = DONE  \nfoo=a=b=c\n", ""},
		{"backup_label=None\ntablespaces=None\nbegin_time=None\ntimeline=None\n", ""},
		{"included_files=['/a', \"it's\"]\n", ""},
		{"", "empty"},
		{"\n\n", "empty"},
		{"garbage", "line 1"},
		{"status=DONE\n<html>", "line 2"},
		{"timeline=one\n", "timeline=one"},
		{"begin_time=noon\n", "begin_time=noon"},
		{"backup_label=unquoted\n", "backup_label"},
		{"backup_label=7\n", "backup_label"},
		{"tablespaces=[('a', 1)]\n", "tablespaces"},
		{"tablespaces=[('a', 0, '/x')]\n", "tablespaces"},
		{"tablespaces=[('a', 4294967296, '/x')]\n", "tablespaces"},
		{"tablespaces=('a'\n", "tablespaces"},
		{"included_files=[1]\n", "included_files"},
	} {
		b, err := parseBackupInfo("id", []byte(c.text))
		switch {
		case (err == nil) != (c.says == ""):
			t.Errorf("%q: %v, want %q", c.text, err, c.says)
		case err != nil && !strings.Contains(err.Error(), c.says):
			t.Errorf("%q: %v does not say %q", c.text, err, c.says)
		case err == nil && b.WALSegmentSize != 16<<20:
			t.Errorf("%q: segment size %d", c.text, b.WALSegmentSize)
		}
	}
}

func TestParsePythonTime(t *testing.T) {
	want := time.Date(2026, 11, 22, 15, 45, 15, 0, time.UTC)
	for in, fraction := range map[string]time.Duration{
		"2026-11-22 15:45:15.686293+00:00": 686293 * time.Microsecond,
		"2026-11-22 15:45:15+00:00":        0,
		"2026-11-22 17:45:15+02:00":        0,
		"2026-11-22T15:45:15Z":             0,
		"2026-11-22 15:45:15":              0,
		"2026-11-22T15:45:15.5":            500 * time.Millisecond,
		"2026-11-22 15:45:15+00":           0,
		"Sun Nov 22 15:45:15 2026":         0,
	} {
		if got, err := parsePythonTime(in); err != nil || !got.Equal(want.Add(fraction)) {
			t.Errorf("%q: %s, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "None", "2026-11-22", "15:45", "1700000000"} {
		if got, err := parsePythonTime(in); err == nil {
			t.Errorf("%q: %s", in, got)
		}
	}
}

func TestPython(t *testing.T) {
	for literal, want := range map[string]any{
		`''`: "", `'a'`: "a", `"it's"`: "it's", `'it\'s "x"'`: `it's "x"`, `'\\\n\t\r'`: "\\\n\t\r", `'\\"'`: `\"`, `'"'`: `"`,
		`'\x00\x7f\xe9'`: "\x00\x7fé", `'é\u2028'`: "é\u2028", `'\u2028\U0001f600'`: "\u2028😀", `'é😀'`: "é😀", `'(None,)'`: "(None,)",
		`7`: 7.0, `-7`: -7.0, `None`: nil, `[]`: []any{}, `()`: []any{}, `(1,)`: []any{1.0},
		` [ ( 'a' , 1 ) , None ] `: []any{[]any{"a", 1.0}, nil},
	} {
		var got any
		if err := parsePython(literal, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %#v, %v, want %#v", literal, got, err, want)
		}
		// what Python prints as it is may be escaped all the same
		if text, ok := want.(string); ok && !strings.ContainsAny(literal, "xU") && pythonRepr(text) != literal {
			t.Errorf("repr of %q: %s, want %s", text, pythonRepr(text), literal)
		}
	}
	for _, bad := range []string{"", "'", "'a", `'\`, `'\x`, `'\x4'`, `'\q'`, `'\U00110000'`, "[", "[1", "[1 2]", "(1", "1 2", "nope", "-", "'a' 'b'"} {
		var got any
		if err := parsePython(bad, &got); err == nil {
			t.Errorf("%s: %#v", bad, got)
		}
	}
}

// Whatever a backup.info holds, it is read or refused; and what is read is written
// so that it reads the same.
func FuzzBackupInfo(f *testing.F) {
	f.Add([]byte(barmanInfo))
	f.Add([]byte("backup_label=\"it's\"\nfoo=bar\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		b, err := parseBackupInfo("id", content)
		if err != nil {
			return
		}
		again, err := parseBackupInfo("id", b.marshal())
		if err != nil {
			t.Fatalf("%v in:\n%s", err, b.marshal())
		}
		if !bytes.Equal(b.marshal(), again.marshal()) {
			t.Fatalf("%s\n%s", b.marshal(), again.marshal())
		}
	})
}

// A string survives the way to Python and back; other literals do not crash.
func FuzzPython(f *testing.F) {
	f.Add("it's", `[('a', 1, "b")]`)
	f.Add("\x00\xff\u2028", `'\x`)
	f.Fuzz(func(t *testing.T, text, literal string) {
		if text = strings.ToValidUTF8(text, "?"); text != "" {
			var got string
			if err := parsePython(pythonRepr(text), &got); err != nil || got != text {
				t.Errorf("%q: %s reads as %q, %v", text, pythonRepr(text), got, err)
			}
			if strings.ContainsAny(pythonRepr(text), "\n\r") {
				t.Errorf("%q: more than one line", text)
			}
		}
		var got any
		parsePython(literal, &got)
	})
}

// ---------------------------------------------------------------------------
// Objects
// ---------------------------------------------------------------------------

func random(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	io.ReadFull(rand.NewChaCha8([32]byte{byte(n)}), b)
	return b
}

func TestPartBuffer(t *testing.T) {
	for _, size := range []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, 3*chunkSize + 17} {
		content := random(t, size)
		var b partBuffer
		for rest, n := content, 1; len(rest) > 0; n = n*3 + 1 { // in uneven pieces
			n = min(n, len(rest))
			if written, err := b.Write(rest[:n]); written != n || err != nil {
				t.Fatal(written, err)
			}
			rest = rest[n:]
		}
		if b.size != size || len(b.chunks) != (size+chunkSize-1)/chunkSize {
			t.Errorf("%d bytes: size %d in %d chunks", size, b.size, len(b.chunks))
		}
		if err := iotest.TestReader(io.NewSectionReader(&b, 0, int64(size)), content); err != nil && size > 0 {
			t.Errorf("%d bytes: %v", size, err)
		}
		if got, err := io.ReadAll(io.NewSectionReader(&b, 0, int64(size))); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes: read back %d, %v", size, len(got), err)
		}
		b.free()
		if n, err := b.ReadAt(make([]byte, 1), 0); n != 0 || err != io.EOF {
			t.Errorf("%d bytes: after free: %d, %v", size, n, err)
		}
	}
}

func TestWriter(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main", "tags: {team: db, a b: c=d+e}", "historyTags: {kind: history}")
	const part = minPartSize
	for _, c := range []struct {
		name  string
		size  int
		multi bool
	}{
		{"empty", 0, false}, {"small", 100, false}, {"one part", part, false}, {"one byte more", part + 1, true}, {"two parts", 2 * part, true}, {"several", 3*part + 12345, true},
	} {
		content := random(t, c.size)
		key := store.key("base", "x", c.name)
		late := map[string]string{"sum": "1"}
		w := store.NewWriter(t.Context(), key, putOptions{PartSize: part, Parts: 4, Metadata: late})
		for rest := content; len(rest) > 0; {
			n := min(len(rest), 777_777)
			if _, err := w.Write(rest[:n]); err != nil {
				t.Fatal(c.name, err)
			}
			rest = rest[n:]
		}
		late["late"] = "2" // as the sum of a content is known at its end only
		if err := w.Close(); err != nil {
			t.Fatal(c.name, err)
		}
		got, metadata := s.read(t, bucket, key)
		if !bytes.Equal(got, content) || metadata["sum"] != "1" || (metadata["late"] == "2") == c.multi {
			t.Errorf("%s: %d bytes of %d, or they differ; metadata %v", c.name, len(got), c.size, metadata)
		}
		if tags := s.tags(t, bucket, key); !reflect.DeepEqual(tags, map[string]string{"team": "db", "a b": "c=d+e"}) {
			t.Errorf("%s: tags %v", c.name, tags)
		}
		h, err := store.Head(t.Context(), key)
		if err != nil || h.Size != int64(c.size) || h.Metadata["sum"] != "1" {
			t.Errorf("%s: head %+v, %v", c.name, h, err)
		}

		// Once it is there, IfAbsent refuses and leaves it as it is.
		w = store.NewWriter(t.Context(), key, putOptions{PartSize: part, IfAbsent: true})
		w.Write(append(content, 1))
		if err := w.Close(); !errors.Is(err, errPrecondition) {
			t.Errorf("%s: IfAbsent: %v", c.name, err)
		}
		if got, _ := s.read(t, bucket, key); !bytes.Equal(got, content) {
			t.Errorf("%s: IfAbsent has changed the object", c.name)
		}
	}
	if err := store.Put(t.Context(), "history", []byte("x"), putOptions{History: true}); err != nil {
		t.Fatal(err)
	}
	if tags := s.tags(t, bucket, "history"); !reflect.DeepEqual(tags, map[string]string{"kind": "history"}) {
		t.Errorf("tags of a history file: %v", tags)
	}
	if uploads := s.uploads(t, bucket); len(uploads) > 0 {
		t.Errorf("uploads left: %q", uploads)
	}
}

// What is given up, or fails, leaves neither an object nor parts.
func TestWriterLeavesNothing(t *testing.T) {
	s := testS3(t)
	proxy := startFaultProxy(t, s)
	content := random(t, 3*minPartSize)
	for name, spoil := range map[string]func(store *Store, cancel func(), w *objectWriter) error{
		"abort": func(_ *Store, _ func(), w *objectWriter) error { w.Abort(); return errors.New("given up") },
		"abort twice, and after close": func(_ *Store, _ func(), w *objectWriter) error {
			w.Abort()
			w.Abort()
			return w.Close()
		},
		"cancelled": func(_ *Store, cancel func(), w *objectWriter) error { cancel(); return w.Close() },
		"a part is refused": func(_ *Store, _ func(), w *objectWriter) error {
			proxy.add(fault{Method: "PUT", Path: regexp.MustCompile(`partNumber=3`), Do: answerError, HTTP: http.StatusForbidden, Code: "AccessDenied"})
			return w.Close()
		},
		"the end is refused": func(_ *Store, _ func(), w *objectWriter) error {
			proxy.add(fault{Method: "POST", Path: regexp.MustCompile(`uploadId=`), Do: answerError, HTTP: http.StatusForbidden, Code: "AccessDenied"})
			return w.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			bucket := newBucket(t)
			defer proxy.clear()
			store := testStoreAt(t, s, proxy.Endpoint, bucket, "main")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			w := store.NewWriter(ctx, "key", putOptions{PartSize: minPartSize, Parts: 3})
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
			if err := spoil(store, cancel, w); err == nil {
				t.Error("it succeeded")
			}
			if keys, uploads := s.keys(t, bucket, ""), s.uploads(t, bucket); len(keys)+len(uploads) > 0 {
				t.Errorf("objects %q and uploads %q stay", keys, uploads)
			}
			if _, err := w.Write(content); err == nil {
				t.Error("a write after the end succeeds")
			}
		})
	}
}

// A writer that is cancelled while the server begins its upload knows the upload all the
// same, and takes it back.
func TestWriterCancelledAtTheBeginning(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, s)
	late := proxy.add(fault{Method: "POST", Path: regexp.MustCompile(`uploads`), Do: delayReply, Delay: 5 * time.Second, Times: 1})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w := testStoreAt(t, s, proxy.Endpoint, bucket, "main").NewWriter(ctx, "key", putOptions{PartSize: minPartSize})
	go func() {
		waitFor(t, "the upload", func() bool { return proxy.hits(late) == 1 && len(s.uploads(t, bucket)) == 1 })
		cancel()
	}()
	w.Write(random(t, 2*minPartSize)) // may or may not notice that it is over
	if err := w.Close(); err == nil {
		t.Error("it succeeded")
	}
	if uploads := s.uploads(t, bucket); len(uploads) > 0 {
		t.Errorf("uploads left: %q", uploads)
	}
}

// A Close after a Write that has failed is none that succeeds.
func TestWriterFailedBefore(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, s)
	proxy.add(fault{Method: "POST", Path: regexp.MustCompile(`uploads`), Do: answerError, HTTP: 403, Code: "AccessDenied"})
	w := testStoreAt(t, s, proxy.Endpoint, bucket, "main").NewWriter(t.Context(), "key", putOptions{PartSize: minPartSize})
	if _, err := w.Write(random(t, 2*minPartSize)); !errors.Is(err, errDenied) {
		t.Errorf("the write: %v", err)
	}
	if err := w.Close(); !errors.Is(err, errDenied) {
		t.Errorf("close: %v", err)
	}
	if keys := s.keys(t, bucket, ""); len(keys) > 0 {
		t.Errorf("half of it was stored as %q", keys)
	}
}

// A page that a gateway answers with 200 is neither a part of an upload nor its end.
func TestWriterBehindAGateway(t *testing.T) {
	s := testS3(t)
	upstream, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	for name, query := range map[string]string{"begin": "uploads", "end": "uploadId"} {
		gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost && r.URL.Query().Has(query) {
				io.WriteString(w, "back soon")
				return
			}
			httputil.NewSingleHostReverseProxy(upstream).ServeHTTP(w, r)
		}))
		defer gateway.Close()
		bucket := s.newBucket(t)
		w := testStoreAt(t, s, gateway.URL, bucket, "main").NewWriter(t.Context(), "key", putOptions{PartSize: minPartSize})
		w.Write(random(t, 2*minPartSize))
		if err := w.Close(); !errors.Is(err, errNotS3) {
			t.Errorf("%s: %v", name, err)
		}
		if left := append(s.keys(t, bucket, ""), s.uploads(t, bucket)...); len(left) > 0 {
			t.Errorf("%s: left %q", name, left)
		}
	}
}

// All parts that may be in memory are on their way together, and no more than those.
func TestWriterPartsInFlight(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	upstream, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	const parts = 2
	var now, most atomic.Int32
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("partNumber") {
			n := now.Add(1)
			defer now.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			for range 100 { // none ends before as many as may have begun; one more would have the time to begin
				time.Sleep(50 * time.Millisecond)
				if most.Load() >= parts {
					break
				}
			}
		}
		httputil.NewSingleHostReverseProxy(upstream).ServeHTTP(w, r)
	}))
	defer slow.Close()
	content := random(t, 6*minPartSize+1)
	w := testStoreAt(t, s, slow.URL, bucket, "main").NewWriter(t.Context(), "key", putOptions{PartSize: minPartSize, Parts: parts})
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, _ := s.read(t, bucket, "key"); most.Load() != parts || !bytes.Equal(got, content) {
		t.Errorf("%d parts were in flight at once, not %d; %d bytes of %d, or they differ", most.Load(), parts, len(got), len(content))
	}
}

// "No such upload" after a lost reply is a success only if it is our object that is there.
func TestWriterUploadGone(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, s)
	s.write(t, bucket, "key", make([]byte, minPartSize+1))
	w := testStoreAt(t, s, proxy.Endpoint, bucket, "main").NewWriter(t.Context(), "key", putOptions{Metadata: map[string]string{contentSum: "ours"}})
	if _, err := w.Write(random(t, minPartSize+1)); err != nil {
		t.Fatal(err)
	}
	proxy.add(fault{Method: "POST", Path: regexp.MustCompile("uploadId"), Do: answerError, HTTP: 404, Code: "NoSuchUpload"})
	if err := w.Close(); err == nil {
		t.Error("somebody else's object of the same size was taken for ours")
	}
}

// A codec whose output is refused ends its goroutines, and touches nothing any more.
func TestCodecsGivenUp(t *testing.T) {
	content := random(t, 4<<20)
	server := testS3(t) // which has a goroutine too
	before := runtime.NumGoroutine()
	for _, c := range codecs {
		a := &archive{object: testStore(t, server, "nowhere", "main").NewWriter(t.Context(), "key", putOptions{})}
		var err error
		if a.codec, err = c.compress(a.object, ""); err != nil {
			t.Fatal(err)
		}
		a.tar = tar.NewWriter(a.codec)
		if err := a.add(tar.Header{Name: "file"}, content[:1<<20]); err != nil {
			t.Fatal(err)
		}
		a.object.cancel(context.Canceled)
		if err := a.close(); err == nil {
			t.Errorf("%s: closed without an error", c.name)
		}
		// another writer, which may have got what that one gave back
		var stored bytes.Buffer
		z, err := c.compress(&stored, "")
		if err != nil {
			t.Fatal(err)
		}
		z.Write(content[:1<<20])
		a.abort()
		z.Write(content[1<<20:])
		if err := z.Close(); err != nil {
			t.Error(c.name, err)
		}
		r, err := c.newReader(&stored)
		if err != nil {
			t.Fatal(c.name, err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: %d of %d bytes, %v", c.name, len(got), len(content), err)
		}
	}
	waitFor(t, "the goroutines of the codecs", func() bool { return runtime.NumGoroutine() <= before })
}

// A listing that says that there is more and not where is an error, not an endless list.
func TestListWithoutContinuation(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `<ListBucketResult><IsTruncated>true</IsTruncated><Contents><Key>a</Key><Size>1</Size></Contents></ListBucketResult>`)
	}))
	defer server.Close()
	s := testS3(t)
	for o, err := range testStoreAt(t, s, server.URL, "bucket", "main").List(t.Context(), "") {
		if err == nil || !strings.Contains(err.Error(), "there is more") {
			t.Fatalf("%v, %v", o, err)
		}
	}
}

// A reply that is lost, or a server that is busy, does not make a write fail nor change
// what is written.
func TestWriterThroughFaults(t *testing.T) {
	s := testS3(t)
	for _, c := range []struct {
		name string
		size int
		f    fault
		o    putOptions
		kind error // nil: success
	}{
		{"PUT, reply lost", 1000, fault{Method: "PUT", Times: 1, Do: loseReply}, putOptions{}, nil},
		// the object is there, by whose hand cannot be told: archiveWAL compares it
		{"PUT if absent, reply lost", 1000, fault{Method: "PUT", Times: 1, Do: loseReply}, putOptions{IfAbsent: true}, errPrecondition},
		{"PUT, reset", 1000, fault{Method: "PUT", Times: 2, Do: resetRequest}, putOptions{IfAbsent: true}, nil},
		{"PUT, busy", 1000, fault{Method: "PUT", Times: 2, Do: answerError, HTTP: 503, Code: "SlowDown"}, putOptions{}, nil},
		{"PUT, no conditions on this server", 1000, fault{Method: "PUT", Times: 1, Do: answerError, HTTP: 501, Code: "NotImplemented"}, putOptions{IfAbsent: true}, nil},
		{"create, busy", 2 * minPartSize, fault{Method: "POST", Path: regexp.MustCompile(`uploads`), Times: 1, Do: answerError, HTTP: 500, Code: "InternalError"}, putOptions{}, nil},
		{"part, reply lost", 3 * minPartSize, fault{Method: "PUT", Path: regexp.MustCompile(`partNumber=2`), Times: 1, Do: loseReply}, putOptions{}, nil},
		{"part, reset", 3 * minPartSize, fault{Method: "PUT", Path: regexp.MustCompile(`partNumber=1`), Times: 2, Do: resetRequest}, putOptions{}, nil},
		{"complete, reply lost", 3 * minPartSize, fault{Method: "POST", Path: regexp.MustCompile(`uploadId=`), Times: 1, Do: loseReply}, putOptions{}, nil},
		{"complete, reset", 3 * minPartSize, fault{Method: "POST", Path: regexp.MustCompile(`uploadId=`), Times: 1, Do: resetRequest}, putOptions{IfAbsent: true}, nil},
		{"part, damaged on the way", 3 * minPartSize, fault{Method: "PUT", Path: regexp.MustCompile(`partNumber=2`), Times: 1, Do: answerError, HTTP: 400, Code: "BadDigest"}, putOptions{Patience: time.Minute}, nil},
		{"complete, nothing of the reply", 3 * minPartSize, fault{Method: "POST", Path: regexp.MustCompile(`uploadId=`), Times: 1, Do: truncateBody}, putOptions{Patience: time.Minute}, nil},
		{"complete, reply cut", 3 * minPartSize, fault{Method: "POST", Path: regexp.MustCompile(`uploadId=`), Times: 1, Do: truncateBody, Bytes: 60}, putOptions{IfAbsent: true, Patience: time.Minute}, nil},
		{"for good", 1000, fault{Method: "PUT", Do: answerError, HTTP: 503, Code: "SlowDown"}, putOptions{}, errTransient},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // most of the time goes into the pauses between attempts
			bucket, proxy := newBucket(t), startFaultProxy(t, s)
			store := testStoreAt(t, s, proxy.Endpoint, bucket, "main")
			f := proxy.add(c.f)
			content := random(t, c.size)
			c.o.PartSize, c.o.Parts = minPartSize, 3
			w := store.NewWriter(t.Context(), "key", c.o)
			_, err := w.Write(content)
			if err == nil {
				err = w.Close()
			}
			if c.kind == nil && err != nil || c.kind != nil && !errors.Is(err, c.kind) {
				t.Errorf("%v, want %v", err, c.kind)
			}
			if proxy.hits(f) < max(1, c.f.Times) {
				t.Errorf("%d requests were spoilt", proxy.hits(f))
			}
			if c.kind != errTransient {
				if got, _ := s.read(t, bucket, "key"); !bytes.Equal(got, content) {
					t.Errorf("%d bytes are there of %d, or they differ", len(got), len(content))
				}
			}
			if uploads := s.uploads(t, bucket); len(uploads) > 0 {
				t.Errorf("uploads %q stay", uploads)
			}
		})
	}
}

// One answer that says so does not make a server one without conditions; a few in a row do.
func TestConditionsRefused(t *testing.T) {
	t.Setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required") // or a refusal is taken for one of the checksum first
	s, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, s)
	store := testStoreAt(t, s, proxy.Endpoint, bucket, "main")
	put := func(key string) error { return store.Put(t.Context(), key, []byte(key), putOptions{IfAbsent: true}) }
	refuse := func(skip int) {
		proxy.add(fault{Method: "PUT", Skip: skip, Times: 1, Do: answerError, HTTP: 501, Code: "NotImplemented"})
	}
	refuse(0)
	if err := put("a"); err != nil {
		t.Error(err)
	}
	if err := put("a"); !errors.Is(err, errPrecondition) {
		t.Errorf("a condition after one refusal: %v", err)
	}
	proxy.clear()
	before := len(proxy.seen(regexp.MustCompile("^PUT")))
	for i := range maxRefusals { // each rule sees what the ones before it let pass: every other request is refused
		refuse(i)
	}
	for i := range maxRefusals + 1 {
		if err := put(fmt.Sprint("b", i)); err != nil {
			t.Error(err)
		}
	}
	if n := len(proxy.seen(regexp.MustCompile("^PUT"))) - before; n != 2*maxRefusals+1 {
		t.Errorf("%d requests for %d objects", n, maxRefusals+1)
	}
}

// A connection has as long for its reply from the end of the request on, however long that takes
// and however long it was idle before.
func TestStalledConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		c := &stallConn{Conn: ours, in: bufio.NewReader(ours), read: 400 * time.Millisecond, write: time.Minute}
		defer c.Close()
		reply := make(chan error, 1)
		read := func() { // as the HTTP transport does from the moment that a connection is idle
			_, err := c.Read(make([]byte, 1))
			reply <- err
		}
		go read()
		go io.CopyN(io.Discard, theirs, 10)
		for range 10 {
			time.Sleep(100 * time.Millisecond)
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(100 * time.Millisecond)
		go theirs.Write([]byte("y"))
		if err := <-reply; err != nil {
			t.Errorf("a slow request that was answered at once: %v", err)
		}
		start := time.Now()
		go read()
		if err := <-reply; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) > 10*time.Second {
			t.Errorf("no reply: %v after %s", err, time.Since(start))
		}
	})
}

// A reader gets the whole object or an error.
func TestReader(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, s)
	store := testStoreAt(t, s, proxy.Endpoint, bucket, "main")
	content := random(t, 2<<20)
	s.write(t, bucket, "key", content)
	read := func() ([]byte, error) {
		r, err := store.Get(t.Context(), "key")
		if err != nil {
			return nil, err
		}
		defer r.Close()
		if r.Size != int64(len(content)) {
			t.Errorf("size %d", r.Size)
		}
		return io.ReadAll(r)
	}
	for _, f := range []fault{
		{Times: 4, Do: truncateBody, Bytes: 100_000},
		{Times: 2, Do: answerError, HTTP: 503, Code: "SlowDown"},
		{Times: 1, Do: resetRequest},
		{Times: 1, Do: truncateBody, Bytes: 0},
	} {
		f.Method = "GET"
		rule := proxy.add(f)
		if got, err := read(); err != nil || !bytes.Equal(got, content) || proxy.hits(rule) != f.Times {
			t.Errorf("%+v: %d bytes, %v, %d faults", f, len(got), err, proxy.hits(rule))
		}
		proxy.clear()
	}

	// Broken off, and then the server is busy for longer than one request is retried.
	proxy.add(fault{Method: "GET", Do: truncateBody, Bytes: 1000, Times: 1})
	busy := proxy.add(fault{Method: "GET", Do: answerError, HTTP: 503, Code: "SlowDown", Times: maxAttempts + 1})
	if got, err := read(); err != nil || !bytes.Equal(got, content) || proxy.hits(busy) != maxAttempts+1 {
		t.Errorf("busy while resuming: %d bytes, %v, %d faults", len(got), err, proxy.hits(busy))
	}
	proxy.clear()

	// Broken off again and again without a byte of progress.
	proxy.add(fault{Method: "GET", Skip: 1, Do: truncateBody, Bytes: 0})
	proxy.add(fault{Method: "GET", Times: 1, Do: truncateBody, Bytes: 1000})
	if got, err := read(); err == nil || !errors.Is(err, errTransient) || !strings.Contains(err.Error(), fmt.Sprintf("broke off after %d of %d bytes", len(got), len(content))) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	proxy.clear()

	// Replaced while it is being read: never a mixture.
	proxy.add(fault{Method: "GET", Times: 1, Do: truncateBody, Bytes: 1000})
	r, err := store.Get(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s.write(t, bucket, "key", random(t, 2<<20+1))
	if _, err := io.ReadAll(r); !errors.Is(err, errPrecondition) {
		t.Errorf("replaced: %v", err)
	}

	r, err = store.Get(t.Context(), "key")
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if _, err := store.Get(t.Context(), "missing"); !errors.Is(err, errNotFound) || !strings.Contains(err.Error(), "get s3://"+bucket+"/missing: 404") {
		t.Errorf("missing: %v", err)
	}
	if _, err := store.Head(t.Context(), "missing"); !errors.Is(err, errNotFound) {
		t.Errorf("missing: %v", err)
	}
}

func TestCatalog(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main")
	if c, err := store.Catalog(t.Context()); err != nil || len(c.Backups)+len(c.Incomplete)+len(c.Unreadable) != 0 {
		t.Errorf("empty: %+v, %v", c, err)
	}
	for i := range 20 { // more than are read at once
		s.write(t, bucket, fmt.Sprintf("main/base/202601%02dT000000/backup.info", i+1), []byte(barmanInfo))
	}
	s.write(t, bucket, "main/base/20260201T000000/data.tar", nil)
	s.write(t, bucket, "main/base/20260202T000000/backup.info", []byte("garbage"))
	s.write(t, bucket, "main/base/notes/backup.info", []byte(barmanInfo))
	b := aBackup("20260203T000000", 1, "12:00", "0/3000200")
	b.WALInBackup = []string{"000000010000000000000003", "000000010000000000000004"}
	if err := store.WriteBackupInfo(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	c, err := store.Catalog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Backups) != 21 || !slices.IsSortedFunc(c.Backups, func(a, b *BackupInfo) int { return strings.Compare(a.ID, b.ID) }) {
		t.Errorf("%d backups, or not in order", len(c.Backups))
	}
	if got := c.Backups[20]; !slices.Equal(got.WALInBackup, b.WALInBackup) || got.ID != b.ID {
		t.Errorf("%+v", got)
	}
	if !slices.Equal(c.Incomplete, []string{"20260201T000000"}) || len(c.Unreadable) != 1 || !errors.Is(c.Unreadable["20260202T000000"], errBadBackupInfo) {
		t.Errorf("incomplete %q, unreadable %v", c.Incomplete, c.Unreadable)
	}
	s.corrupt(t, bucket, "main/base/20260203T000000/backup.info", 15)
	if _, err := store.ReadBackupInfo(t.Context(), b.ID); !errors.Is(err, errBadBackupInfo) || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("a flipped bit: %v", err)
	}
}

// An error says what was asked of which object, what the answer was, and what to do.
func TestStoreErrors(t *testing.T) {
	t.Setenv("AWS_MAX_ATTEMPTS", "1")
	s, bucket := testS3(t), newBucket(t)
	secure := testS3TLS(t)
	with := func(s *s3Server, change func(*s3Server)) *s3Server { other := *s; change(&other); return &other }
	closed, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	otherCA := testDir(t)
	pki, err := newPKI(otherCA)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		s      *s3Server
		bucket string
		kind   error
		says   []string
	}{
		{"right", s, bucket, nil, nil},
		{"right, over TLS", secure, secure.newBucket(t), nil, nil},
		{"wrong secret", with(s, func(s *s3Server) { s.SecretKey = "wrong" }), bucket, errDenied, []string{"403", "Secret keys", "ObjectStore default/store", `bucket "` + bucket}},
		{"wrong key id", with(s, func(s *s3Server) { s.AccessKey = "nobody" }), bucket, errDenied, []string{"Secret keys", "ObjectStore default/store"}},
		{"wrong bucket", s, "no-such-bucket", errNoBucket, []string{"404", `bucket "no-such-bucket" does not exist at ` + s.Endpoint, "destinationPath", "default/store"}},
		{"unreachable", with(s, func(s *s3Server) { s.Endpoint = "http://" + closed }), bucket, errTransient, []string{"refused", "is http://" + closed + " reachable from here?"}},
		{"no CA", with(secure, func(s *s3Server) { s.CAFile = "" }), bucket, nil, []string{"set endpointCA of ObjectStore default/store", secure.Endpoint}},
		{"wrong CA", with(secure, func(s *s3Server) { s.CAFile = pki.caFile }), bucket, nil, []string{"set endpointCA of ObjectStore default/store"}},
		{"http, not https", with(secure, func(s *s3Server) { s.Endpoint = strings.Replace(s.Endpoint, "https:", "http:", 1) }), bucket, nil, []string{secure.Endpoint[len("https://"):]}},
	} {
		t.Run(c.name, func(t *testing.T) {
			store := testStore(t, c.s, c.bucket, "main")
			err := store.Put(t.Context(), store.key("x"), []byte("x"), putOptions{})
			if c.says == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			_, listErr := store.ListDirectories(t.Context(), store.key("base/"))
			for op, err := range map[string]error{"put": err, "list": listErr} {
				if err == nil || c.kind != nil && !errors.Is(err, c.kind) {
					t.Errorf("%s: %v, want %v", op, err, c.kind)
					continue
				}
				for _, words := range append(c.says, op+" s3://"+c.bucket+"/main/") {
					if !strings.Contains(err.Error(), words) {
						t.Errorf("%s: the error does not say %q: %v", op, words, err)
					}
				}
			}
		})
	}
	t.Run("the other CA in AWS_CA_BUNDLE", func(t *testing.T) { // endpointCA is trusted in addition
		t.Setenv("AWS_CA_BUNDLE", secure.CAFile)
		store := testStore(t, with(secure, func(s *s3Server) { s.CAFile = pki.caFile }), secure.newBucket(t), "main")
		if err := store.Put(t.Context(), store.key("x"), []byte("x"), putOptions{}); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(otherCA+"/garbage", []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	source, err := newFileSource(storeFile(t, with(secure, func(s *s3Server) { s.CAFile = otherCA + "/garbage" }), bucket))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := source.Store(t.Context(), StoreRef{"store", "main"}); err == nil || !strings.Contains(err.Error(), "endpointCA (key ca.crt of Secret ca) holds no PEM certificate") {
		t.Errorf("a CA that is none: %v", err)
	}
}

func TestCreateBucket(t *testing.T) {
	s := testS3(t)
	store := testStore(t, s, "made-by-the-test", "main")
	for range 2 { // that it exists already is no error
		if err := store.CreateBucket(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Put(t.Context(), "key", []byte("x"), putOptions{}); err != nil {
		t.Fatal(err)
	}
	s.remove(t, "made-by-the-test", "key")
}

// The image has no CA bundle: there the embedded CAs are trusted, and only once a store is used.
func TestEmbeddedRoots(t *testing.T) {
	if os.Getenv("SSL_CERT_FILE") != "/nonexistent" {
		cmd := exec.Command(os.Args[0], "-test.run", "^TestEmbeddedRoots$", "-test.v")
		cmd.Env = append(os.Environ(), "SSL_CERT_FILE=/nonexistent", "SSL_CERT_DIR=/nonexistent")
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("trusted: ")) {
			t.Fatalf("without a CA bundle: %v\n%s", err, out)
		}
		return
	}
	trusted := func() int {
		pool, err := x509.SystemCertPool()
		if err != nil {
			t.Fatal(err)
		}
		return len(pool.Subjects())
	}
	if n := trusted(); n != 0 {
		t.Fatalf("%d CAs are trusted before a store is used", n)
	}
	testStore(t, testS3(t), newBucket(t), "main") // with a client
	if n := trusted(); n < 50 {
		t.Fatalf("%d CAs are trusted", n)
	} else {
		t.Logf("trusted: %d", n)
	}
}

// Each way by which a Pod gets the keys of a role, against a server that answers as that
// part of AWS does; the keys it hands out are those of the S3 server, without a session
// token, which that one does not know.
func TestIAMRole(t *testing.T) {
	s := testS3(t)
	var mu sync.Mutex
	var asked []string
	role := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		r.ParseForm()
		asked = append(asked, r.Method+" "+r.URL.Path+r.Header.Get("Authorization")+r.Form.Get("WebIdentityToken"))
		// so near that the next request needs new ones
		expiration := time.Now().Add(time.Minute).UTC().Format(time.RFC3339)
		switch r.URL.Path {
		case "/latest/api/token":
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
			io.WriteString(w, "session")
		case "/latest/meta-data/iam/security-credentials/":
			io.WriteString(w, "node-role")
		case "/latest/meta-data/iam/security-credentials/node-role", "/v1/credentials":
			fmt.Fprintf(w, `{"Code": "Success", "AccessKeyId": %q, "SecretAccessKey": %q, "Token": "", "Expiration": %q}`, s.AccessKey, s.SecretKey, expiration)
		case "/": // STS
			fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>%s</AccessKeyId><SecretAccessKey>%s</SecretAccessKey><SessionToken></SessionToken><Expiration>%s</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`, s.AccessKey, s.SecretKey, expiration)
		default:
			http.NotFound(w, r)
		}
	}))
	defer role.Close()
	token := filepath.Join(testDir(t), "token")
	for _, test := range []struct {
		name        string
		environment map[string]string
		first, then string // the last thing that is asked for, before and after the token changed
	}{
		{"environment", map[string]string{"AWS_ACCESS_KEY_ID": s.AccessKey, "AWS_SECRET_ACCESS_KEY": s.SecretKey}, "", ""},
		{"web identity", map[string]string{"AWS_ROLE_ARN": "arn:aws:iam::1:role/r", "AWS_WEB_IDENTITY_TOKEN_FILE": token, "AWS_ENDPOINT_URL_STS": role.URL},
			"POST /one", "POST /two"},
		{"Pod identity", map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": role.URL + "/v1/credentials", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token},
			"GET /v1/credentialsone", "GET /v1/credentialstwo"},
		{"role of the node", map[string]string{"AWS_EC2_METADATA_SERVICE_ENDPOINT": role.URL},
			"GET /latest/meta-data/iam/security-credentials/node-role", ""}, // the SDK uses these for longer than they say
	} {
		t.Run(test.name, func(t *testing.T) {
			for k, v := range test.environment {
				t.Setenv(k, v)
			}
			file := storeFile(t, s, s.newBucket(t))
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			keys := regexp.MustCompile(`accessKeyId: .*\n *secretAccessKey: .*`)
			if err := os.WriteFile(file, keys.ReplaceAll(content, []byte("inheritFromIAMRole: true")), 0o644); err != nil {
				t.Fatal(err)
			}
			store := testStoreFile(t, file, "server")
			for _, step := range [][2]string{{"one", test.first}, {"two", test.then}} {
				if err := os.WriteFile(token, []byte(step[0]), 0o600); err != nil {
					t.Fatal(err)
				}
				mu.Lock()
				asked = nil
				mu.Unlock()
				w := store.NewWriter(t.Context(), "server/"+step[0], putOptions{})
				if _, err := io.WriteString(w, "content"); err != nil {
					t.Fatal(err)
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				mu.Lock()
				if want := step[1]; want != "" && (len(asked) == 0 || asked[len(asked)-1] != want) {
					t.Errorf("with the token %q: asked for %q, want %q at last", step[0], asked, want)
				}
				mu.Unlock()
			}
		})
	}
}

// The SDK's environment variables for retries count.
func TestRetryMode(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	for _, mode := range []string{"standard", "adaptive"} {
		t.Setenv("AWS_RETRY_MODE", mode)
		t.Setenv("AWS_MAX_ATTEMPTS", "")
		proxy := startFaultProxy(t, server)
		s := testStoreAt(t, server, proxy.Endpoint, bucket, mode)
		if logged, _ := s.client.Options().Retryer.(loggedRetryer); (mode == "adaptive") != (fmt.Sprintf("%T", logged.RetryerV2) == "*retry.AdaptiveMode") {
			t.Errorf("%s: %T", mode, logged.RetryerV2)
		}
		t.Setenv("AWS_MAX_ATTEMPTS", "3")
		s = testStoreAt(t, server, proxy.Endpoint, bucket, mode)
		slowDown := proxy.add(fault{Method: http.MethodPut, Do: answerError, HTTP: 503, Code: "SlowDown", Times: 2})
		if err := s.Put(t.Context(), s.key("x"), []byte("x"), putOptions{}); err != nil || proxy.hits(slowDown) != 2 {
			t.Errorf("%s: %v after %d refusals", mode, err, proxy.hits(slowDown))
		}
		proxy.clear()
		slowDown = proxy.add(fault{Method: http.MethodPut, Do: answerError, HTTP: 503, Code: "SlowDown"})
		if err := s.Put(t.Context(), s.key("y"), []byte("y"), putOptions{}); !errors.Is(err, errTransient) || proxy.hits(slowDown) != 3 {
			t.Errorf("%s: %v after %d refusals", mode, err, proxy.hits(slowDown))
		}
	}
}

// A key without a value is said; the SDK would go and look for other credentials.
func TestEmptyKey(t *testing.T) {
	server := testS3(t)
	t.Setenv("AWS_ACCESS_KEY_ID", server.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", server.SecretKey)
	for _, key := range []string{"ID: ", "SECRET: "} {
		file := storeFile(t, server, newBucket(t))
		manifests, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, file, regexp.MustCompile(key+`[^,}]*`).ReplaceAllString(string(manifests), key+`"\n"`))
		source, err := newFileSource(file)
		if err != nil {
			t.Fatal(err)
		}
		mustSay(t, second(source.Store(t.Context(), StoreRef{"store", "main"})), nil, "ObjectStore default/store", "Secret keys", "is empty")
	}
}

// AWS gets checksums by whatever address, other servers only if they are told so.
func TestStoreSendsChecksums(t *testing.T) {
	for endpoint, want := range map[string]bool{
		"": true, "https://s3.eu-central-1.amazonaws.com": true, "https://bucket.vpce-1a2b.s3.us-east-1.vpce.amazonaws.com": true,
		"https://s3.cn-north-1.amazonaws.com.cn:443": true, "https://minio.example": false, "http://amazonaws.com.example": false,
	} {
		s, err := OpenStore(t.Context(), StoreConfig{Name: "store", Configuration: Configuration{DestinationPath: "s3://b", EndpointURL: endpoint}})
		if err != nil || s.sendsChecksums() != want {
			t.Errorf("%q: %v, %v", endpoint, err, s.sendsChecksums())
		}
	}
}
