package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	s3types "github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/cloudnative-pg/cnpg-i/pkg/wal"
	"github.com/golang/snappy"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ---------------------------------------------------------------------------
// What the tests of WAL are made of
// ---------------------------------------------------------------------------

// openTestStore opens the server `main` in a store whose file was written by storeFile.
func openTestStore(t testing.TB, file string) *Store {
	t.Helper()
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	s, err := source.Store(t.Context(), StoreRef{ObjectStore: "store", ServerName: "main"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// segment makes the bytes of a WAL segment of PostgreSQL 15: a right header, and a
// content that compresses to about half and differs with seed.
func segment(name string, size int64, systemID uint64, seed uint64) []byte {
	w, err := parseWALName(name)
	if err != nil {
		panic(err)
	}
	b := make([]byte, size)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := walLongHeaderSize; i+8 <= len(b); i += 16 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	binary.LittleEndian.PutUint16(b, 0xD110)
	binary.LittleEndian.PutUint16(b[2:], walLongHeaderFlag)
	binary.LittleEndian.PutUint32(b[4:], w.Timeline)
	binary.LittleEndian.PutUint64(b[8:], w.number(size)*uint64(size))
	binary.LittleEndian.PutUint64(b[24:], systemID)
	binary.LittleEndian.PutUint32(b[32:], uint32(size))
	binary.LittleEndian.PutUint32(b[36:], 8192)
	return b
}

const (
	mib  = 1 << 20
	seg5 = "000000010000000000000005"
	seg6 = "000000010000000000000006"
)

// writeWAL puts a file into a fresh pg_wal and returns its path.
func writeWAL(t testing.TB, name string, content []byte) string {
	t.Helper()
	dir := filepath.Join(testDir(t), "pg_wal")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// fetch restores a WAL file without patience.
func fetch(t testing.TB, s *Store, name string) ([]byte, error) {
	t.Helper()
	return fetchWith(t, s, name, restoreWALOptions{})
}

func fetchWith(t testing.TB, s *Store, name string, o restoreWALOptions) ([]byte, error) {
	t.Helper()
	dir := testDir(t)
	err := restoreWAL(t.Context(), s, name, filepath.Join(dir, "RECOVERYXLOG"), o)
	files, readErr := os.ReadDir(dir)
	if readErr != nil {
		t.Fatal(readErr)
	}
	if err != nil {
		if len(files) != 0 {
			t.Errorf("a failed restore of %s left %v behind", name, files)
		}
		return nil, err
	}
	if len(files) != 1 {
		t.Errorf("a restore of %s left %v behind", name, files)
	}
	content, readErr := os.ReadFile(filepath.Join(dir, "RECOVERYXLOG"))
	if readErr != nil {
		t.Fatal(readErr)
	}
	return content, nil
}

func mustArchive(t testing.TB, s *Store, path string) {
	t.Helper()
	if err := archiveWAL(t.Context(), s, path); err != nil {
		t.Fatal(err)
	}
}

// mustFetch restores a WAL file and compares it.
func mustFetch(t testing.TB, s *Store, name string, want []byte) {
	t.Helper()
	got, err := fetch(t, s, name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: restored %d bytes that differ from the %d that were archived", name, len(got), len(want))
	}
}

// mustSay checks an error: its kind and words that have to be in it.
func mustSay(t testing.TB, err, kind error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, and %v was expected", kind)
	}
	if kind != nil && !errors.Is(err, kind) {
		t.Errorf("error %v is not %q", err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

// ---------------------------------------------------------------------------
// Names
// ---------------------------------------------------------------------------

func TestWALNames(t *testing.T) {
	for name, want := range map[string]walName{
		"000000010000000000000005":                 {Kind: walSegment, Timeline: 1, Seg: 5},
		"0000000A00000002000000FF":                 {Kind: walSegment, Timeline: 10, Log: 2, Seg: 255},
		"000000010000000000000005.partial":         {Kind: walPartial, Timeline: 1, Seg: 5},
		"000000010000000000000005.00000028.backup": {Kind: walBackupHistory, Timeline: 1, Seg: 5},
		"00000002.history":                         {Kind: walHistory, Timeline: 2},
	} {
		want.Name = name
		if got, err := parseWALName(name); err != nil || got != want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "RECOVERYXLOG", "00000001000000000000000", "0000000100000000000000055", "000000010000000000000005.gz",
		"00000001000000000000000g", "000000010000000000000005.backup", "../000000010000000000000005", "00000002.history.partial", "000000010000000000000005\n"} {
		if got, err := parseWALName(name); !errors.Is(err, errWALName) {
			t.Errorf("%q was taken for %+v", name, got)
		}
	}
}

// The names of segments, for every size, against PostgreSQL's own arithmetic: the last
// segment of a log is FF for 16 MiB, FFF for 1 MiB, 3F for 64 MiB, 3 for 1 GiB.
// What is taken for a WAL file has one key below wals/, and a segment one place on its timeline.
func FuzzWALName(f *testing.F) {
	for _, name := range []string{seg5, seg5 + ".partial", seg5 + ".00000028.backup", "00000002.history", "../" + seg5, "0000000100000000000000ff", ""} {
		f.Add(name)
	}
	s := &Store{Config: StoreConfig{ServerName: "main"}}
	f.Fuzz(func(t *testing.T, name string) {
		w, err := parseWALName(name)
		if err != nil {
			if !errors.Is(err, errWALName) {
				t.Fatal(err)
			}
			return
		}
		if key := s.walPrefix(name); path.Clean(key) != key || !strings.HasPrefix(key, "main/wals/") || path.Base(key) != name {
			t.Errorf("%q lies at %q", name, key)
		}
		for size := int64(mib); size <= 1<<30; size *= 2 {
			if w.Kind == walSegment && uint64(w.Seg) < segmentsPerLog(size) && segmentName(w.Timeline, w.number(size), size) != name {
				t.Errorf("%q with segments of %d bytes is %q", name, size, segmentName(w.Timeline, w.number(size), size))
			}
		}
		if base, _ := splitSuffix(name); base != name {
			t.Errorf("%q has the suffix of a codec", name)
		}
	})
}

func TestSegmentArithmetic(t *testing.T) {
	for _, c := range []struct {
		lsn  string
		size int64
		name string
	}{
		{"0/5000028", 16 * mib, "000000010000000000000005"},
		{"0/FFFFFFFF", 16 * mib, "0000000100000000000000FF"},
		{"1/0", 16 * mib, "000000010000000100000000"},
		{"0/FFFFFFFF", mib, "000000010000000000000FFF"},
		{"2/0", mib, "000000010000000200000000"},
		{"0/FC000000", 64 * mib, "00000001000000000000003F"},
		{"1/4000000", 64 * mib, "000000010000000100000001"},
		{"0/C0000000", 1024 * mib, "000000010000000000000003"},
		{"A/40000001", 1024 * mib, "000000010000000A00000001"},
	} {
		lsn, err := parseLSN(c.lsn)
		if err != nil || lsn.String() != c.lsn {
			t.Fatalf("%s: %s, %v", c.lsn, lsn, err)
		}
		number := segmentNumber(lsn, c.size)
		name := segmentName(1, number, c.size)
		parsed, err := parseWALName(name)
		if name != c.name || err != nil || parsed.number(c.size) != number {
			t.Errorf("%s at %d: segment %s, number %d and back %d, %v", c.lsn, c.size, name, number, parsed.number(c.size), err)
		}
	}
	for _, bad := range []string{"", "5", "0/", "/5", "0/123456789", "x/1", "0/-1"} {
		if l, err := parseLSN(bad); err == nil {
			t.Errorf("%q was taken for the LSN %s", bad, l)
		}
	}
}

func TestTimelineHistory(t *testing.T) {
	got, err := parseTimelineHistory([]byte("1\t0/5000028\tno recovery target specified\n\n# a comment\n2\t1/A0 \tbefore 2026-11-22 15:45:15+00\n"))
	if want := []timelineSwitch{{1, 0x5000028}, {2, 0x1000000A0}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"1\n", "x\t0/1\n", "1\tzzz\n"} {
		if got, err := parseTimelineHistory([]byte(bad)); err == nil {
			t.Errorf("%q was taken for %v", bad, got)
		}
	}
}

// ---------------------------------------------------------------------------
// Archive
// ---------------------------------------------------------------------------

func TestArchiveRestore(t *testing.T) {
	for _, c := range codecs {
		t.Run(c.name, func(t *testing.T) {
			bucket := newBucket(t)
			s := openTestStore(t, storeFileAt(t, testS3(t), testS3(t).Endpoint, "s3://"+bucket+"/some/path/", "wal: {compression: '"+c.name+"'}"))
			files := map[string][]byte{
				seg5:                      segment(seg5, mib, 7, 1),
				seg6 + ".partial":         segment(seg6, mib, 7, 2),
				seg5 + ".00000028.backup": []byte("START WAL LOCATION: 0/5000028 (file 000000010000000000000005)\n"),
				"00000002.history":        []byte("1\t0/7000000\tno recovery target specified\n"),
			}
			for name, content := range files {
				mustArchive(t, s, writeWAL(t, name, content))
			}
			want := []string{
				"some/path/main/wals/0000000100000000/" + seg5 + ".00000028.backup" + c.suffix,
				"some/path/main/wals/0000000100000000/" + seg5 + c.suffix,
				"some/path/main/wals/0000000100000000/" + seg6 + ".partial" + c.suffix,
				"some/path/main/wals/00000002.history" + c.suffix,
			}
			slices.Sort(want)
			if got := testS3(t).keys(t, bucket, ""); !slices.Equal(got, want) {
				t.Errorf("the bucket holds %q, not %q", got, want)
			}
			for name, content := range files {
				mustFetch(t, s, name, content)
				_, metadata := testS3(t).read(t, bucket, want[slices.IndexFunc(want, func(k string) bool { return strings.HasSuffix(k, name+c.suffix) })])
				if sum := crc32.Checksum(content, crc32.MakeTable(crc32.Castagnoli)); metadata["content-crc32c"] != fmt.Sprintf("%08x", sum) {
					t.Errorf("%s carries the checksum %q", name, metadata[contentSum])
				}
			}
			mustFetch(t, s, seg6, files[seg6+".partial"]) // the .partial stands in for its segment
		})
	}
}

// Segments larger than walSinglePut go in parts; the checksum is there all the same.
func TestArchiveLargeSegment(t *testing.T) {
	bucket := newBucket(t)
	s := openTestStore(t, storeFile(t, testS3(t), bucket))
	const size = 64 * mib
	content := segment(seg5, size, 7, 1)
	mustArchive(t, s, writeWAL(t, seg5, content))
	_, metadata := testS3(t).read(t, bucket, s.walPrefix(seg5))
	if metadata[contentSum] != sumOf(content) {
		t.Errorf("checksum %q, not %q", metadata[contentSum], sumOf(content))
	}
	mustFetch(t, s, seg5, content)
	changed := slices.Clone(content)
	changed[size-1] ^= 1
	mustSay(t, archiveWAL(t.Context(), s, writeWAL(t, seg5, changed)), errDifferent)
	if left := testS3(t).uploads(t, bucket); len(left) > 0 {
		t.Errorf("unfinished uploads stay: %q", left)
	}
}

// A server that checks bodies gets the checksum of what was read first, for a segment that
// is sent as it is: what it has read then is what has arrived, or it is refused.
func TestArchiveBodyChecksum(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	path := writeWAL(t, seg5, segment(seg5, mib, 7, 1))
	stored := func(s *Store, key string) *string {
		h, err := s.client.HeadObject(t.Context(), &s3.HeadObjectInput{Bucket: &bucket, Key: &key, ChecksumMode: s3types.ChecksumModeEnabled})
		if err != nil {
			t.Fatal(err)
		}
		return h.ChecksumCRC32C
	}
	s := openTestStore(t, storeFile(t, server, bucket))
	mustArchive(t, s, path)
	if sum := stored(s, s.walPrefix(seg5)); sum != nil {
		t.Errorf("the server, which may be one that refuses checksums, was sent %s", *sum)
	}
	mustArchive(t, s, writeWAL(t, seg6, segment(seg6, mib, 7, 1)))
	compressed := openTestStore(t, storeFile(t, server, bucket, "wal: {compression: lz4}"))
	for _, name := range []string{segmentName(1, 7, mib), segmentName(1, 8, mib)} {
		mustArchive(t, compressed, writeWAL(t, name, segment(name, mib, 7, 1)))
	}
	for _, key := range []string{s.walPrefix(seg6), s.walPrefix(segmentName(1, 8, mib)) + ".lz4"} {
		object, _ := server.read(t, bucket, key)
		want := binary.BigEndian.AppendUint32(nil, crc32.Checksum(object, castagnoli))
		if sum := aws.ToString(stored(s, key)); sum != base64.StdEncoding.EncodeToString(want) {
			t.Errorf("%s: a server that had told a checksum unasked was sent %q", key, sum)
		}
		server.remove(t, bucket, key)
	}
	server.remove(t, bucket, s.walPrefix(segmentName(1, 7, mib))+".lz4")
	server.remove(t, bucket, s.walPrefix(seg5))
	t.Setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
	s = openTestStore(t, storeFile(t, server, bucket))
	mustArchive(t, s, path)
	sum, err := base64.StdEncoding.DecodeString(aws.ToString(stored(s, s.walPrefix(seg5))))
	if _, metadata := server.read(t, bucket, s.walPrefix(seg5)); err != nil || hex.EncodeToString(sum) != metadata[contentSum] {
		t.Errorf("the server has the checksum %x, %v; it was sent with %s", sum, err, metadata[contentSum])
	}
	const size = 64 * mib // in parts, each with a checksum of the SDK
	name := segmentName(1, 8, size)
	large := segment(name, size, 7, 1)
	mustArchive(t, s, writeWAL(t, name, large))
	mustFetch(t, s, name, large)
	read := crc32.New(castagnoli)
	io.WriteString(read, "what was read first")
	err = s.put(t.Context(), s.walPrefix(seg6), strings.NewReader("what was sent"), putOptions{Body: read})
	if names := server.keys(t, bucket, ""); err == nil || !strings.Contains(err.Error(), "BadDigest") || len(names) != 2 {
		t.Errorf("a file that changed between its readings: %v, %q", err, names)
	}
}

// A server that tells checksums, but takes none, is not asked to again; the file is stored all
// the same, and not without its condition. Whoever sets when_required has a reason.
func TestArchiveChecksumRefused(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	n := uint64(0)
	archive := func(s *Store) error {
		n++
		name := segmentName(1, n, mib)
		return archiveWAL(t.Context(), s, writeWAL(t, name, segment(name, mib, 7, n)))
	}
	for _, refusal := range []fault{{Code: "InvalidArgument", HTTP: http.StatusBadRequest}, {Code: "NotImplemented", HTTP: http.StatusNotImplemented}} {
		refusal.Method, refusal.Header, refusal.Do = http.MethodPut, "X-Amz-Checksum-Crc32c", answerError
		proxy.clear()
		refused, stored := proxy.add(refusal), proxy.add(fault{Method: http.MethodPut, Header: "If-None-Match", Do: delayRequest})
		s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
		for range 4 {
			if err := archive(s); err != nil {
				t.Fatal(err)
			}
		}
		if r, n := proxy.hits(refused), proxy.hits(stored); r != 1 || n != 4 {
			t.Errorf("%s: %d requests with a checksum, %d without", refusal.Code, r, n)
		}
		t.Run("when_required", func(t *testing.T) {
			t.Setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
			s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
			if err := errors.Join(archive(s), archive(s)); err != nil || proxy.hits(refused) != 1 {
				t.Errorf("%v; %d requests with a checksum", err, proxy.hits(refused))
			}
		})
	}
	// What looks like a passing failure may be none: that ends too.
	proxy.clear()
	failing := proxy.add(fault{Method: http.MethodPut, Header: "X-Amz-Checksum-Crc32c", Do: answerError, Code: "BadDigest", HTTP: http.StatusBadRequest})
	s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
	if err := archive(s); err != nil {
		t.Fatal(err)
	}
	for range maxRefusals {
		mustSay(t, archive(s), errTransient, "BadDigest")
	}
	before := proxy.hits(failing)
	if err := errors.Join(archive(s), archive(s)); err != nil || proxy.hits(failing) != before {
		t.Errorf("%v; %d requests with a checksum, and then %d", err, before, proxy.hits(failing))
	}
}

// An empty file has no end that could be held back.
func TestArchiveEmptyHistory(t *testing.T) {
	server := testS3TLS(t)
	bucket := server.newBucket(t)
	const name = "00000002.history"
	mustArchive(t, openTestStore(t, storeFile(t, server, bucket, "wal: {compression: gzip}")), writeWAL(t, name, []byte("1\t0/7000000\tours\n")))
	mustSay(t, archiveWAL(t.Context(), openTestStore(t, storeFile(t, server, bucket)), writeWAL(t, name, nil)), errDifferent, name)
	if keys := server.keys(t, bucket, ""); len(keys) != 1 {
		t.Errorf("the archive has %q", keys)
	}
}

// forwardTo passes requests on as they are signed.
func forwardTo(t testing.TB, s *s3Server) http.Handler {
	t.Helper()
	upstream, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	return &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(upstream); r.Out.Host = r.In.Host },
		ErrorLog: log.New(io.Discard, "", 0)} // of requests that are given up
}

// A file that goes as it is is on its way while the archive is asked for its name, and becomes
// an object only if the answer is that there is none.
func TestArchiveWhileListing(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	begun, denied, behind := make(chan struct{}, 9), atomic.Bool{}, forwardTo(t, server)
	slow := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPut:
			begun <- struct{}{}
		case http.MethodGet:
			if !strings.Contains(r.URL.RawQuery, "list-type") {
				break
			}
			select {
			case <-begun:
			case <-time.After(hang):
				t.Error("nothing is sent before the archive has answered")
			}
			if denied.Load() {
				w.WriteHeader(http.StatusForbidden)
				io.WriteString(w, "<Error><Code>AccessDenied</Code></Error>")
				return
			}
		}
		behind.ServeHTTP(w, r)
	}))
	defer slow.Close()
	ca := filepath.Join(testDir(t), "ca.crt")
	mustWrite(t, ca, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: slow.Certificate().Raw})))
	overTLS := s3Server{Endpoint: slow.URL, CAFile: ca, AccessKey: server.AccessKey, SecretKey: server.SecretKey}
	s := openTestStore(t, storeFileAt(t, &overTLS, slow.URL, "s3://"+bucket))

	content, other := segment(seg5, 16*mib, 7, 1), segment(seg6, 16*mib, 7, 1)
	mustArchive(t, s, writeWAL(t, seg5, content))
	mustArchive(t, openTestStore(t, storeFile(t, server, bucket, "wal: {compression: gzip}")), writeWAL(t, seg6, other))
	mustArchive(t, s, writeWAL(t, seg5, content))
	mustSay(t, archiveWAL(t.Context(), s, writeWAL(t, seg5, segment(seg5, 16*mib, 7, 2))), errDifferent, seg5)
	mustSay(t, archiveWAL(t.Context(), s, writeWAL(t, seg6, segment(seg6, 16*mib, 7, 2))), errDifferent, seg6)
	denied.Store(true)
	name := segmentName(1, 9, 16*mib)
	mustSay(t, archiveWAL(t.Context(), s, writeWAL(t, name, segment(name, 16*mib, 7, 1))), nil, name, "AccessDenied")
	if keys := server.keys(t, bucket, ""); len(keys) != 2 {
		t.Errorf("the archive has %q", keys)
	}
	direct := openTestStore(t, storeFile(t, server, bucket))
	mustFetch(t, direct, seg5, content)
	mustFetch(t, direct, seg6, other)
}

// A name that is taken is never overwritten with other content, whichever the compression suffix.
func TestArchiveNeverOverwrites(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	plain := openTestStore(t, storeFile(t, server, bucket))
	gzip := openTestStore(t, storeFile(t, server, bucket, "wal: {compression: gzip}"))
	content := segment(seg5, 16*mib, 7, 1)
	path := writeWAL(t, seg5, content)
	mustArchive(t, plain, path)

	for _, s := range []*Store{plain, gzip} {
		mustArchive(t, s, path) // the same content is a success
		foreign := writeWAL(t, seg5, segment(seg5, 16*mib, 8, 1))
		mustSay(t, archiveWAL(t.Context(), s, foreign), errDifferent, seg5, "s3://"+bucket+"/main/wals/0000000100000000/"+seg5,
			"system identifier 7", "has 8", "major version", "serverName")
		diverged := writeWAL(t, seg5, segment(seg5, 16*mib, 7, 2))
		mustSay(t, archiveWAL(t.Context(), s, diverged), errDifferent, "same origin", "serverName")
	}
	if keys := server.keys(t, bucket, ""); len(keys) != 1 {
		t.Errorf("the bucket holds %q", keys)
	}
	mustFetch(t, gzip, seg5, content)

	// history files too
	mustArchive(t, plain, writeWAL(t, "00000002.history", []byte("1\t0/7000000\tours\n")))
	mustSay(t, archiveWAL(t.Context(), gzip, writeWAL(t, "00000002.history", []byte("1\t0/8000000\ttheirs\n"))), errDifferent, "00000002.history")
}

// Of a .partial the newest counts, also when the compression was switched in between.
func TestArchivePartialNewestWins(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	name := seg5 + ".partial"
	first, second, third := segment(seg5, 16*mib, 7, 1), segment(seg5, 16*mib, 7, 2), segment(seg5, 16*mib, 7, 3)
	plain := openTestStore(t, storeFile(t, server, bucket))
	mustArchive(t, plain, writeWAL(t, name, first))
	mustArchive(t, plain, writeWAL(t, name, second))
	mustFetch(t, plain, name, second)
	time.Sleep(1100 * time.Millisecond) // Last-Modified has whole seconds
	mustArchive(t, openTestStore(t, storeFile(t, server, bucket, "wal: {compression: gzip}")), writeWAL(t, name, third))
	mustFetch(t, plain, name, third)
	mustFetch(t, plain, seg5, third)
	// and the whole segment beats every .partial (FORMAT section 2, first trap)
	whole := segment(seg5, 16*mib, 7, 4)
	mustArchive(t, plain, writeWAL(t, seg5, whole))
	mustFetch(t, plain, seg5, whole)
}

// What Barman stored has no checksum: its content is compared by downloading it.
func TestArchiveAfterBarman(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	s := openTestStore(t, storeFile(t, server, bucket, "wal: {compression: gzip}"))
	content := segment(seg5, 16*mib, 7, 1)
	path := writeWAL(t, seg5, content)
	if r := barman(t, server, nil, "barman-cloud-wal-archive", "--bzip2", "s3://"+bucket, "other", path); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	for _, flag := range []string{"", "--gzip"} {
		name := map[string]string{"": seg5, "--gzip": seg6}[flag]
		content := segment(name, 16*mib, 7, 1)
		path := writeWAL(t, name, content)
		args := []string{"s3://" + bucket, "main", path}
		if flag != "" {
			args = append([]string{flag}, args...)
		}
		if r := barman(t, server, nil, "barman-cloud-wal-archive", args...); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		mustFetch(t, s, name, content)
		mustArchive(t, s, path)
		content[len(content)-1] ^= 1
		mustSay(t, archiveWAL(t.Context(), s, writeWAL(t, name, content)), errDifferent)
	}
	if keys := server.keys(t, bucket, "main/"); len(keys) != 2 {
		t.Errorf("the bucket holds %q", keys)
	}
}

// What we store, Barman restores.
func TestBarmanRestoresOurWAL(t *testing.T) {
	server := testS3(t)
	for _, compression := range []string{"", "gzip"} {
		bucket := newBucket(t)
		s := openTestStore(t, storeFile(t, server, bucket, "wal: {compression: '"+compression+"'}"))
		for name, content := range map[string][]byte{seg5: segment(seg5, 16*mib, 7, 1), "00000002.history": []byte("1\t0/7000000\tx\n")} {
			mustArchive(t, s, writeWAL(t, name, content))
			destination := filepath.Join(testDir(t), "restored")
			if r := barman(t, server, nil, "barman-cloud-wal-restore", "s3://"+bucket, "main", name, destination); r.Code != 0 {
				t.Fatal(r.Stderr)
			}
			if got, err := os.ReadFile(destination); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%s, compression %q: Barman restored something else (%v)", name, compression, err)
			}
		}
	}
}

// A reply that is lost, a server that is busy, a connection that breaks: the segment is
// stored once, and success is only said when it is.
func TestArchiveThroughFaults(t *testing.T) {
	put := regexp.MustCompile(`/wals/`)
	for name, f := range map[string]fault{
		"reply lost":            {Method: http.MethodPut, Path: put, Times: 1, Do: loseReply},
		"reply lost five times": {Method: http.MethodPut, Path: put, Times: 5, Do: loseReply},
		"reset":                 {Method: http.MethodPut, Path: put, Times: 2, Do: resetRequest},
		"slow down":             {Method: http.MethodPut, Path: put, Times: 2, Do: answerError, HTTP: 503, Code: "SlowDown"},
		"internal error":        {Method: http.MethodPut, Path: put, Times: 1, Do: answerError, HTTP: 500, Code: "InternalError"},
		"listing fails":         {Method: http.MethodGet, Times: 2, Do: answerError, HTTP: 503, Code: "SlowDown"},
		"no conditional put":    {Method: http.MethodPut, Path: put, Times: 1, Do: answerError, HTTP: 501, Code: "NotImplemented"},
	} {
		t.Run(name, func(t *testing.T) {
			server, bucket := testS3(t), newBucket(t)
			proxy := startFaultProxy(t, server)
			s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
			rule := proxy.add(f)
			content := segment(seg5, 16*mib, 7, 1)
			mustArchive(t, s, writeWAL(t, seg5, content))
			if proxy.hits(rule) != f.Times {
				t.Fatalf("the fault happened %d times, not %d", proxy.hits(rule), f.Times)
			}
			mustFetch(t, s, seg5, content)
			mustSay(t, archiveWAL(t.Context(), s, writeWAL(t, seg5, segment(seg5, 16*mib, 7, 2))), errDifferent)
		})
	}
	t.Run("down", func(t *testing.T) {
		server, bucket := testS3(t), newBucket(t)
		proxy := startFaultProxy(t, server)
		s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
		proxy.add(fault{Method: http.MethodPut, Do: answerError, HTTP: 503, Code: "SlowDown"})
		err := archiveWAL(t.Context(), s, writeWAL(t, seg5, segment(seg5, 16*mib, 7, 1)))
		mustSay(t, err, errTransient, seg5, "503 SlowDown", "s3://"+bucket)
		if keys := server.keys(t, bucket, ""); len(keys) != 0 {
			t.Errorf("the bucket holds %q", keys)
		}
	})
}

// Two writers of the same name in the same moment, with different content: one of them is refused.
func TestArchiveRace(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	// both see an empty listing before either of them writes
	proxy.add(fault{Method: http.MethodPut, Do: delayRequest, Delay: 300 * time.Millisecond})
	contents := [][]byte{segment(seg5, mib, 7, 1), segment(seg5, mib, 7, 2)}
	errs := make([]error, 2)
	var writers sync.WaitGroup
	for i := range 2 {
		s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
		path := writeWAL(t, seg5, contents[i])
		writers.Go(func() { errs[i] = archiveWAL(context.Background(), s, path) })
	}
	writers.Wait()
	winner := slices.Index(errs, nil)
	if winner < 0 {
		t.Fatalf("nobody won: %v", errs)
	}
	mustSay(t, errs[1-winner], errDifferent)
	mustFetch(t, openTestStore(t, storeFile(t, server, bucket)), seg5, contents[winner])
}

// kill -9 in the middle of an upload: nothing half is there, and the next attempt succeeds.
func TestArchiveKilled(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	content := segment(seg5, 16*mib, 7, 1)
	path := writeWAL(t, seg5, content)
	for _, f := range []fault{
		{Method: http.MethodPut, Times: 1, Do: stallRequest},                     // killed before the server has the object
		{Method: http.MethodPut, Times: 1, Do: delayRequest, Delay: time.Minute}, // the request is under way
	} {
		rule := proxy.add(f)
		cmd := asPostgres(t, program(t), "wal-archive", "--objectstore", storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket), "--server-name", "main", path)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the upload", func() bool { return proxy.hits(rule) == 1 })
		cmd.Process.Kill()
		cmd.Wait()
	}
	proxy.clear()
	file := storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket)
	if r := runProgram(t, nil, "wal-archive", "--objectstore", file, "--server-name", "main", path); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	mustFetch(t, openTestStore(t, file), seg5, content)
}

func TestArchiveBadInput(t *testing.T) {
	s := openTestStore(t, storeFile(t, testS3(t), newBucket(t)))
	for name, c := range map[string]struct {
		path  string
		kind  error
		words []string
	}{
		"no such file": {filepath.Join(testDir(t), seg5), os.ErrNotExist, []string{seg5}},
		"not WAL":      {writeWAL(t, "backup_label", []byte("x")), errWALName, []string{"backup_label"}},
		"cut short":    {writeWAL(t, seg5, make([]byte, 16*mib-1)), nil, []string{"16777215 bytes", "size of a WAL segment"}},
		"empty":        {writeWAL(t, seg5, nil), nil, []string{"0 bytes"}},
	} {
		t.Run(name, func(t *testing.T) { mustSay(t, archiveWAL(t.Context(), s, c.path), c.kind, c.words...) })
	}
}

// What is wrong with the store is said with the names of the things to correct.
func TestArchiveErrorsNameTheCure(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	path := writeWAL(t, seg5, segment(seg5, mib, 7, 1))
	wrongKey := *server
	wrongKey.AccessKey = "nobody"
	wrongSecret := *server
	wrongSecret.SecretKey = "wrong"
	free, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		file  string
		kind  error
		code  codes.Code
		words []string
	}{
		"wrong key":    {storeFile(t, &wrongKey, bucket), errDenied, codes.PermissionDenied, []string{"Secret keys", "ObjectStore default/store", bucket}},
		"wrong secret": {storeFile(t, &wrongSecret, bucket), errDenied, codes.PermissionDenied, []string{"Secret keys", "SignatureDoesNotMatch"}},
		"wrong bucket": {storeFile(t, server, "no-such-bucket"), errNoBucket, codes.FailedPrecondition, []string{"no-such-bucket", "destinationPath", "ObjectStore default/store", "create it"}},
		"unreachable":  {storeFileAt(t, server, "http://"+free, "s3://"+bucket), errTransient, codes.Unavailable, []string{free, "reachable"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := openTestStore(t, c.file)
			err := archiveWAL(t.Context(), s, path)
			mustSay(t, err, c.kind, append(c.words, seg5)...)
			if got := status.Code(grpcError(err)); got != c.code {
				t.Errorf("code %s, not %s", got, c.code)
			}
			_, err = fetch(t, s, seg5)
			mustSay(t, err, c.kind, append(c.words, seg5)...)
			if errors.Is(err, errNotFound) {
				t.Errorf("%v passes for the end of the archive", err)
			}
		})
	}
}

// ---------------------------------------------------------------------------
// The empty-archive check
// ---------------------------------------------------------------------------

func TestEmptyArchiveCheck(t *testing.T) {
	server := testS3(t)
	content := segment(seg5, mib, 7, 1)
	path := writeWAL(t, seg5, content)
	for key, empty := range map[string]bool{
		"":                                                           true,
		"main/base/20260101T000000/backup.info":                      true,
		"main/wals/readme.txt":                                       true,
		"other/wals/0000000100000000/" + seg6:                        true,
		"main/wals/0000000100000000/" + seg6:                         false,
		"main/wals/0000000100000000/" + seg6 + ".gz":                 false,
		"main/wals/0000000100000000/" + seg6 + ".partial":            false,
		"main/wals/0000000100000000/" + seg6 + ".00000028.backup.gz": false,
		"main/wals/00000002.history":                                 false,
		"main/wals/0000000100000000/" + seg5:                         true, // the same name: compared when it is archived
	} {
		t.Run(key, func(t *testing.T) {
			bucket := newBucket(t)
			if key != "" {
				server.write(t, bucket, key, []byte("x"))
			}
			_, err := checkEmptyArchive(t.Context(), openTestStore(t, storeFile(t, server, bucket)), path, "")
			if empty && err != nil {
				t.Error(err)
			}
			if !empty {
				mustSay(t, err, errArchiveNotEmpty, "Expected empty archive", key, "serverName")
			}
		})
	}
	t.Run("own first file", func(t *testing.T) { // stored before, and the reply was lost
		s := openTestStore(t, storeFile(t, server, newBucket(t)))
		mustArchive(t, s, path)
		if _, err := checkEmptyArchive(t.Context(), s, path, ""); err != nil {
			t.Error(err)
		}
		mustSay(t, second(checkEmptyArchive(t.Context(), s, "", "")), errArchiveNotEmpty)
		mustSay(t, second(checkEmptyArchive(t.Context(), s, writeWAL(t, seg6, segment(seg6, mib, 7, 1)), "")), errArchiveNotEmpty, seg5)
	})
	t.Run("missing bucket is made", func(t *testing.T) {
		s := openTestStore(t, storeFile(t, server, "made-by-the-check"))
		if _, err := checkEmptyArchive(t.Context(), s, path, ""); err != nil {
			t.Fatal(err)
		}
		mustArchive(t, s, path)
		mustFetch(t, s, seg5, content)
	})
	t.Run("missing bucket may not be made", func(t *testing.T) {
		proxy := startFaultProxy(t, server)
		rule := proxy.add(fault{Method: http.MethodPut, Do: answerError, HTTP: 403, Code: "AccessDenied"})
		s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://not-for-us"))
		mustSay(t, second(checkEmptyArchive(t.Context(), s, path, "")), errNoBucket, "not-for-us", "403 AccessDenied", "destinationPath")
		if proxy.hits(rule) == 0 {
			t.Error("nobody asked for the bucket")
		}
	})
}

// ---------------------------------------------------------------------------
// Restore
// ---------------------------------------------------------------------------

// Each stored form is judged by itself (FORMAT section 2, the traps).
func TestRestoreCandidates(t *testing.T) {
	server := testS3(t)
	whole := segment(seg5, 16*mib, 7, 1)
	partial := segment(seg5, 16*mib, 7, 2)
	note := []byte("START WAL LOCATION: 0/5000028\n")
	for name, c := range map[string]struct {
		stored map[string][]byte // name with suffix
		want   []byte
	}{
		"plain next to its plain .partial":    {map[string][]byte{seg5: whole, seg5 + ".partial": partial}, whole},
		"plain next to a compressed .backup":  {map[string][]byte{seg5: whole, seg5 + ".00000028.backup.gz": note}, whole},
		"compressed next to a plain .backup":  {map[string][]byte{seg5 + ".gz": whole, seg5 + ".00000028.backup": note}, whole},
		"plain and compressed":                {map[string][]byte{seg5: whole, seg5 + ".gz": whole}, whole},
		"only a .partial":                     {map[string][]byte{seg5 + ".partial.gz": partial}, partial},
		"compressed next to a plain .partial": {map[string][]byte{seg5 + ".gz": whole, seg5 + ".partial": partial}, whole},
		"a damaged form next to a good one":   {map[string][]byte{seg5: whole[:100], seg5 + ".gz": whole}, whole},
		"only a .backup":                      {map[string][]byte{seg5 + ".00000028.backup": note}, nil},
		"only a longer name":                  {map[string][]byte{seg5 + ".gz.old": whole}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			bucket := newBucket(t)
			s := openTestStore(t, storeFile(t, server, bucket))
			for stored, content := range c.stored {
				_, codec := splitSuffix(stored)
				var b bytes.Buffer
				z, err := codec.compress(&b, "")
				if err != nil {
					t.Fatal(err)
				}
				z.Write(content)
				if err := z.Close(); err != nil {
					t.Fatal(err)
				}
				server.write(t, bucket, "main/wals/0000000100000000/"+stored, b.Bytes())
			}
			if c.want != nil {
				mustFetch(t, s, seg5, c.want)
				return
			}
			_, err := fetch(t, s, seg5)
			mustSay(t, err, errNotFound, `wal "`+seg5+`" not found`)
		})
	}
}

// A file is handed over only if it is what its name says.
func TestRestoreRefusesDamage(t *testing.T) {
	server := testS3(t)
	good := segment(seg5, 16*mib, 7, 1)
	with := func(change func([]byte)) []byte {
		b := slices.Clone(good)
		change(b)
		return b
	}
	for name, c := range map[string]struct {
		content []byte
		ok      bool
		words   []string
	}{
		"good":             {content: good, ok: true},
		"cut":              {content: good[:len(good)-1], words: []string{"16777215 bytes"}},
		"half":             {content: good[:8*mib], words: []string{"header says 16777216"}},
		"empty":            {content: []byte{}, words: []string{"0 bytes"}},
		"another segment":  {content: segment(seg6, 16*mib, 7, 1), words: []string{"0/6000000", "0/5000000"}},
		"another cluster":  {content: segment(seg5, 16*mib, 8, 1), words: []string{"system identifier 8", "serverName"}},
		"no long header":   {content: with(func(b []byte) { b[2] = 0 }), words: []string{"long page header"}},
		"old timeline":     {content: with(func(b []byte) { b[4] = 9 }), ok: true}, // as in the first segment after a switch
		"unknown version":  {content: with(func(b []byte) { b[0], b[8] = 0xFF, 0xFF }), ok: true},
		"another seg size": {content: with(func(b []byte) { binary.LittleEndian.PutUint32(b[32:], mib) }), words: []string{"header says 1048576"}},
	} {
		t.Run(name, func(t *testing.T) {
			bucket := newBucket(t)
			s := openTestStore(t, storeFile(t, server, bucket))
			server.write(t, bucket, "main/wals/0000000100000000/"+seg5, c.content)
			got, err := fetchWith(t, s, seg5, restoreWALOptions{SystemID: 7})
			if c.ok {
				if err != nil || !bytes.Equal(got, c.content) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				return
			}
			mustSay(t, err, errDamaged, append(c.words, seg5)...)
			if code := status.Code(grpcError(err)); code != codes.DataLoss {
				t.Errorf("code %s", code)
			}
		})
	}
}

// A damaged segment is not made good by a .partial, with which recovery would end early.
func TestRestoreDamagedNextToPartial(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	s := openTestStore(t, storeFile(t, server, bucket))
	mustArchive(t, s, writeWAL(t, seg5+".partial", segment(seg5, 16*mib, 7, 1)))
	server.write(t, bucket, "main/wals/0000000100000000/"+seg5, []byte("damaged"))
	_, err := fetch(t, s, seg5)
	mustSay(t, err, errDamaged, seg5)
}

// What the listing has and the store then denies is trouble, not the end of the archive;
// nor is a 404 that is no answer of an S3 server, or a page that somebody else answers with.
func TestRestoreDoubtsNotFound(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	mustArchive(t, openTestStore(t, storeFile(t, server, bucket)), writeWAL(t, seg5, segment(seg5, mib, 7, 1)))
	proxy := startFaultProxy(t, server)
	s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
	proxy.add(fault{Method: http.MethodGet, Path: regexp.MustCompile(`/wals/0`), Do: answerError, HTTP: 404, Code: "NoSuchKey"})
	_, err := fetch(t, s, seg5)
	mustSay(t, err, errTransient, "is listed", seg5)

	for _, body := range []string{"", "<html>no backend</html>", "<Error><Code>NoSuchKey</Code></Error>"} {
		gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, body)
		}))
		defer gateway.Close()
		_, err := fetch(t, openTestStore(t, storeFileAt(t, server, gateway.URL, "s3://"+bucket)), seg5)
		if mustSay(t, err, nil, "404", "check endpointURL"); errors.Is(err, errNotFound) {
			t.Errorf("404 %q is the end of the archive: %v", body, err)
		}
	}
	for _, body := range []string{"", "OK", "<html><body>back soon</body></html>"} {
		gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, body) }))
		defer gateway.Close()
		s := openTestStore(t, storeFileAt(t, server, gateway.URL, "s3://"+bucket))
		_, err := fetch(t, s, seg5)
		if mustSay(t, err, errNotS3, "list s3://", "check endpointURL"); errors.Is(err, errNotFound) {
			t.Errorf("200 %q is the end of the archive: %v", body, err)
		}
		mustSay(t, archiveWAL(t.Context(), s, writeWAL(t, seg5+".partial", segment(seg5, mib, 7, 1))), errNotS3, "put s3://", "check endpointURL")
	}
}

// A flipped bit anywhere in an object of ours is found, compressed or not.
func TestRestoreFindsFlippedBits(t *testing.T) {
	server := testS3(t)
	for _, compression := range []string{"", "gzip"} {
		for _, offset := range []int64{20, 1000, 3 * mib} {
			bucket := newBucket(t)
			s := openTestStore(t, storeFile(t, server, bucket, "wal: {compression: '"+compression+"'}"))
			mustArchive(t, s, writeWAL(t, seg5, segment(seg5, 16*mib, 7, 1)))
			server.corrupt(t, bucket, server.keys(t, bucket, "")[0], offset)
			_, err := fetch(t, s, seg5)
			mustSay(t, err, errDamaged, seg5)
		}
		bucket := newBucket(t)
		s := openTestStore(t, storeFile(t, server, bucket, "wal: {compression: '"+compression+"'}"))
		mustArchive(t, s, writeWAL(t, seg5, segment(seg5, 16*mib, 7, 1)))
		server.truncate(t, bucket, server.keys(t, bucket, "")[0], 2*mib)
		_, err := fetch(t, s, seg5)
		mustSay(t, err, errDamaged, seg5)
	}
}

// So is one in what is not of ours, where the SDK compares what it got with the server's checksum.
func TestRestoreChecksumOfTheServer(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	t.Setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported")
	s := openTestStore(t, storeFile(t, server, bucket))
	content := segment(seg5, 16*mib, 7, 1)
	server.write(t, bucket, s.walPrefix(seg5), content)
	mustFetch(t, s, seg5, content)
	server.corrupt(t, bucket, s.walPrefix(seg5), 3*mib)
	_, err := fetch(t, s, seg5)
	mustSay(t, err, errDamaged, s.URL(s.walPrefix(seg5)), "checksum")
}

// PostgreSQL takes every error for the end of the archive, so failures are ridden out.
func TestRestoreThroughFaults(t *testing.T) {
	get := regexp.MustCompile(`/wals/0`) // the objects, not the listing
	for name, c := range map[string]struct {
		fault    fault
		patience time.Duration
	}{
		"body cut":               {fault{Method: http.MethodGet, Path: get, Times: 2, Do: truncateBody, Bytes: 5 * mib}, 0},
		"body cut at the header": {fault{Method: http.MethodGet, Path: get, Times: 1, Do: truncateBody, Bytes: 10}, 0},
		"busy":                   {fault{Times: 3, Do: answerError, HTTP: 503, Code: "SlowDown"}, streamingPatience}, // the SDK's pauses may take 11 s
		"busy for longer":        {fault{Times: 8, Do: answerError, HTTP: 503, Code: "SlowDown"}, time.Minute},
		"listing cut":            {fault{Method: http.MethodGet, Path: regexp.MustCompile(`list-type=2`), Times: 2, Do: truncateBody, Bytes: 200}, time.Minute},
		"reset for longer":       {fault{Times: 8, Do: resetRequest}, time.Minute},
		"denied for a while":     {fault{Times: 3, Do: answerError, HTTP: 403, Code: "AccessDenied"}, forever},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, bucket := testS3(t), newBucket(t)
			content := segment(seg5, 16*mib, 7, 1)
			mustArchive(t, openTestStore(t, storeFile(t, server, bucket)), writeWAL(t, seg5, content))
			proxy := startFaultProxy(t, server)
			s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
			rule := proxy.add(c.fault)
			got, err := fetchWith(t, s, seg5, restoreWALOptions{Patience: c.patience})
			if err != nil || !bytes.Equal(got, content) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			if proxy.hits(rule) != c.fault.Times {
				t.Errorf("the fault happened %d times, not %d", proxy.hits(rule), c.fault.Times)
			}
		})
	}
	t.Run("denied", func(t *testing.T) {
		server, bucket := testS3(t), newBucket(t)
		proxy := startFaultProxy(t, server)
		s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
		proxy.add(fault{Do: answerError, HTTP: 403, Code: "AccessDenied"})
		_, err := fetchWith(t, s, seg5, restoreWALOptions{Patience: time.Minute})
		mustSay(t, err, errDenied, seg5, "403 AccessDenied")
	})
	t.Run("gone in the middle", func(t *testing.T) { // Go's bzip2 reads on after an error
		server, bucket := testS3(t), newBucket(t)
		proxy := startFaultProxy(t, server)
		s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, "wal: {compression: bzip2}"))
		mustArchive(t, s, writeWAL(t, seg5, segment(seg5, mib, 7, 1)))
		proxy.add(fault{Method: http.MethodGet, Path: get, Times: 1, Do: truncateBody, Bytes: 100_000})
		denied := proxy.add(fault{Method: http.MethodGet, Path: get, Do: answerError, HTTP: 403, Code: "AccessDenied"})
		_, err := fetch(t, s, seg5)
		mustSay(t, err, errDenied, seg5, "403 AccessDenied")
		if n := proxy.hits(denied); n != 1 {
			t.Errorf("it was asked for %d times after the answer", n)
		}
	})
}

// restore_command is told apart by exit code: 1 is the end of the archive, more than 125 ends recovery.
func TestWALRestoreExitCodes(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket)
	destination := filepath.Join(testDir(t), "RECOVERYXLOG")
	if r := runProgram(t, nil, "wal-restore", "--objectstore", file, "--server-name", "main", seg5, destination); r.Code != 1 {
		t.Errorf("a missing WAL file ends with %d: %s", r.Code, r.Stderr)
	}
	wrongKey := *server
	wrongKey.SecretKey = "wrong"
	r := runProgram(t, nil, "wal-restore", "--objectstore", storeFile(t, &wrongKey, bucket), "--server-name", "main", seg5, destination)
	if r.Code <= 125 || !strings.Contains(r.Stderr, "Secret keys") {
		t.Errorf("a wrong key ends with %d: %s", r.Code, r.Stderr)
	}
	for _, args := range [][]string{{"--no-such-flag", seg5, destination}, {"--objectstore", file, "--server-name", "main", seg5}, {seg5, destination}} {
		if r := runProgram(t, nil, append([]string{"wal-restore"}, args...)...); r.Code <= 125 {
			t.Errorf("%q ends with %d, as if the archive ended: %s", args, r.Code, r.Stderr)
		}
	}
}

// ---------------------------------------------------------------------------
// The WAL service
// ---------------------------------------------------------------------------

func TestRestoreStoreChoice(t *testing.T) {
	const archive = `"plugins":[{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"archive"}}]`
	const external = `"externalClusters":[{"name":"origin","plugin":{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"origin-store","serverName":"origin"}}}]`
	const recovery = `"bootstrap":{"recovery":{"source":"origin"}}`
	const replica = `"replica":{"primary":"other","source":"origin"}`
	own, origin := &StoreRef{"archive", "c"}, &StoreRef{"origin-store", "origin"}
	for _, c := range []struct {
		spec, primary string
		want          *StoreRef
	}{
		{archive, "c-1", own},
		{archive, "c-2", own},
		{archive, "", own},
		{archive + "," + external + "," + recovery, "", origin},
		{archive + "," + external + "," + recovery, "c-1", own},
		{archive + "," + external + "," + replica, "c-1", origin}, // the designated primary, or one that is being promoted
		{archive + "," + external + "," + replica, "c-2", own},
		{external + "," + replica, "c-2", origin}, // no archive of its own
		{external + "," + recovery, "c-1", nil},
		{`"instances":1`, "c-1", nil},
	} {
		cluster, err := DecodeCluster(fmt.Appendf(nil, `{"metadata":{"name":"c"},"spec":{%s},"status":{"currentPrimary":%q}}`, c.spec, c.primary))
		if err != nil {
			t.Fatal(err)
		}
		got := restoreStore(cluster, "c-1")
		if (got == nil) != (c.want == nil) || got != nil && *got != *c.want {
			t.Errorf("{%s} with primary %q: %v, not %v", c.spec, c.primary, got, c.want)
		}
	}
}

// testWALService makes the service with a spool of its own, and ends its background work with the test.
func testWALService(t testing.TB, source configSource, instance, pgdata string) *walService {
	t.Helper()
	life, cancel := context.WithCancel(context.Background())
	w, err := newWALService(life, source, instance, pgdata, testDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); w.wait() })
	return w
}

// A major upgrade makes a new database system, whose segments carry on with new names: the
// archive of the old one is not continued, unless somebody insists.
func TestArchiveOfAnotherSystem(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket)
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	pgdata := testDir(t)
	if err := os.Mkdir(filepath.Join(pgdata, "global"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(pgdata, "global/pg_control"), binary.LittleEndian.AppendUint64(nil, 7), 0o600); err != nil {
		t.Fatal(err)
	}
	backup := func(id, systemID string, done bool) {
		t.Helper()
		b := aBackup(id, 1, "13:30", "0/8000200")
		if b.SystemID = systemID; !done {
			b.Status, b.EndTime = statusFailed, time.Time{}
		}
		if err := testStore(t, server, bucket, "main").WriteBackupInfo(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	archive := func(annotations string) error { // as a sidecar that has just started
		cluster := []byte(`{"metadata":{"name":"main","annotations":{` + annotations + `}},"spec":{"plugins":[{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store"}}]}}`)
		_, err := testWALService(t, source, "main-1", pgdata).Archive(t.Context(), &wal.WALArchiveRequest{ClusterDefinition: cluster, SourceFileName: writeWAL(t, seg6, segment(seg6, mib, 7, 1))})
		return err
	}
	backup("20260101T000000", "9", true)
	backup("20260102T000000", "7", false) // one that was tried after the upgrade
	if err := archive(""); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("the archive of another system is continued: %v", err)
	} else {
		mustSay(t, err, nil, "base/20260101T000000", "system identifier 9", "7", "major version", "serverName", "base backup")
	}
	if err := archive(`"cnpg.io/skipEmptyWalArchiveCheck":"enabled"`); err != nil {
		t.Error(err)
	}
	backup("20260103T000000", "7", true)
	if err := archive(""); err != nil {
		t.Errorf("after somebody insisted, and a backup: %v", err)
	}
}

// A standby may have been made while its primary still had the marker of the empty-archive
// check. Once promoted it goes on with the archive that its Cluster has begun, and with no other's.
func TestArchiveOfPromotedStandby(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	source, err := newFileSource(storeFile(t, server, bucket, "wal: {maxParallel: 4}"))
	if err != nil {
		t.Fatal(err)
	}
	archive := func(instance, uid, pgWAL, name string) error {
		marker := filepath.Join(filepath.Dir(pgWAL), emptyArchiveMarker)
		if err := os.WriteFile(marker, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		cluster := strings.NewReplacer("main-1", instance, "u-1", uid).Replace(mainCluster)
		_, err := testWALService(t, source, instance, filepath.Dir(pgWAL)).Archive(t.Context(), &wal.WALArchiveRequest{
			ClusterDefinition: []byte(cluster), SourceFileName: filepath.Join(pgWAL, name)})
		if (err == nil) == fileExists(marker) {
			t.Errorf("%s: %v, and the marker is there: %t", instance, err, fileExists(marker))
		}
		return err
	}
	one, two, three, four := segmentName(1, 1, mib), segmentName(1, 2, mib), segmentName(1, 3, mib), segmentName(1, 4, mib)
	primary, _ := readyWAL(t, 1)
	standby, contents := readyWAL(t, 2, 3, 4)
	if err := archive("main-1", "ours", primary, one); err != nil {
		t.Fatal(err)
	}
	for _, uid := range []string{"theirs", ""} {
		if err := archive("main-2", uid, standby, two); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "Expected empty archive") {
			t.Errorf("a Cluster with the uid %q: %v", uid, err)
		}
	}
	// As after a major upgrade in place: the Cluster is the same, the database system is not.
	s := testStoreFile(t, storeFile(t, server, bucket), "main")
	foreign := aBackup("20260101T100000", 1, "10:00", "0/3000200")
	foreign.SystemID = "42"
	if err := s.WriteBackupInfo(t.Context(), foreign); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, filepath.Join(filepath.Dir(standby), controlFile), "\x07\x00\x00\x00\x00\x00\x00\x00")
	if err := archive("main-2", "ours", standby, two); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "system identifier "+foreign.SystemID) {
		t.Errorf("the archive has a backup of another database system: %v", err)
	}
	if err := s.Delete(t.Context(), s.baseKey(foreign.ID, backupInfoFile)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{two, three, four} {
		if err := archive("main-2", "ours", standby, name); err != nil {
			t.Fatal(err)
		}
		mustFetch(t, s, name, contents[name])
	}
}

func TestWALService(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	source, err := newFileSource(storeFile(t, server, bucket))
	if err != nil {
		t.Fatal(err)
	}
	pgdata := testDir(t)
	w := testWALService(t, source, "main-1", pgdata)
	cluster := []byte(`{"metadata":{"name":"main"},"spec":{"plugins":[{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store"}}]},"status":{"currentPrimary":"main-1"}}`)
	marker := filepath.Join(pgdata, emptyArchiveMarker)
	archive := func(definition []byte, path string, check *bool) error {
		_, err := w.Archive(t.Context(), &wal.WALArchiveRequest{ClusterDefinition: definition, SourceFileName: path, CheckEmptyWalArchive: check})
		return err
	}
	touch := func() {
		t.Helper()
		if err := os.WriteFile(marker, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	yes, no := true, false
	first, second := segment(seg5, mib, 7, 1), segment(seg6, mib, 7, 1)

	touch()
	if err := archive(cluster, writeWAL(t, seg5, first), nil); err != nil {
		t.Fatal(err)
	}
	if fileExists(marker) {
		t.Error("the marker stays after the first file: the second one would be refused")
	}
	if err := archive(cluster, writeWAL(t, seg6, second), nil); err != nil {
		t.Fatal(err)
	}

	// the archive is not empty any more
	path := writeWAL(t, "000000010000000000000007", segment("000000010000000000000007", mib, 7, 1))
	if err := archive(cluster, path, &yes); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "Expected empty archive") {
		t.Errorf("check asked for: %v", err)
	}
	touch()
	if err := archive(cluster, path, nil); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("check by the marker: %v", err)
	}
	if !fileExists(marker) {
		t.Error("a refusal took the marker away")
	}
	annotated := bytes.Replace(cluster, []byte(`"name":"main"`), []byte(`"name":"main","annotations":{"cnpg.io/skipEmptyWalArchiveCheck":"enabled"}`), 1)
	if err := archive(annotated, path, nil); err != nil {
		t.Errorf("the annotation switches the check off: %v", err)
	}
	touch()
	if err := archive(cluster, path, &no); err != nil {
		t.Errorf("an explicit no beats the marker: %v", err)
	}

	destination := filepath.Join(pgdata, "RECOVERYXLOG")
	restore := func(name string) error {
		_, err := w.Restore(t.Context(), &wal.WALRestoreRequest{ClusterDefinition: cluster, SourceWalName: name, DestinationFileName: destination})
		return err
	}
	if err := restore(seg6); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(destination); err != nil || !bytes.Equal(got, second) {
		t.Errorf("restored something else: %v", err)
	}
	if err := restore("000000010000000000000009"); status.Code(err) != codes.NotFound {
		t.Errorf("a missing segment: %v", err)
	}
	if err := restore("../../etc/passwd"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a bad name: %v", err)
	}

	for name, c := range map[string]struct {
		definition string
		code       codes.Code
		words      string
	}{
		"no JSON":         {`{`, codes.InvalidArgument, "decode the Cluster"},
		"no plugin":       {`{"metadata":{"name":"main"},"spec":{}}`, codes.FailedPrecondition, "barmanObjectName"},
		"disabled plugin": {strings.Replace(string(cluster), `"parameters"`, `"enabled":false,"parameters"`, 1), codes.FailedPrecondition, "no enabled plugin"},
		"no such store":   {strings.Replace(string(cluster), `"store"`, `"stroe"`, 1), codes.FailedPrecondition, "ObjectStore stroe"},
	} {
		if err := archive([]byte(c.definition), path, nil); status.Code(err) != c.code || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A store that cannot be found while a cluster is being recovered holds recovery, until it is there.
func TestRestoreHoldsRecovery(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	content := segment(seg5, mib, 7, 1)
	file := storeFile(t, server, bucket)
	mustArchive(t, openTestStore(t, file), writeWAL(t, seg5, content))
	manifest, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	change := func(from, to string, when time.Time) {
		t.Helper()
		if err := os.WriteFile(file, bytes.Replace(manifest, []byte(from), []byte(to), 1), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, when, when); err != nil {
			t.Fatal(err)
		}
	}
	change("metadata: {name: keys", "metadata: {name: gone", time.Now().Add(time.Hour))
	cluster := []byte(`{"metadata":{"name":"new"},"spec":{"bootstrap":{"recovery":{"source":"origin"}},"externalClusters":[{"name":"origin",
		"plugin":{"name":"barman-cloud.cloudnative-pg.io","parameters":{"barmanObjectName":"store","serverName":"main"}}}]}}`)
	w := testWALService(t, source, "new-1", testDir(t))
	destination := filepath.Join(w.pgdata, "RECOVERYXLOG")
	done := make(chan error, 1)
	go func() {
		_, err := w.Restore(context.Background(), &wal.WALRestoreRequest{ClusterDefinition: cluster, SourceWalName: seg5, DestinationFileName: destination})
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("recovery was let go with %v", err)
	case <-time.After(time.Second):
	}
	change("", "", time.Now().Add(2*time.Hour))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(destination); err != nil || !bytes.Equal(got, content) {
		t.Errorf("restored something else: %v", err)
	}
}

// A real PostgreSQL archives through the program, and recovers through it.
func TestWALOfARealServer(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket, "wal: {compression: gzip}")
	command := func(sub string) string {
		return fmt.Sprintf("%s %s --objectstore %s --server-name main ", program(t), sub, file)
	}
	p := startPostgres(t, pgOptions{WALSegmentMB: 1, ArchiveCommand: command("wal-archive") + "%p"})
	p.Exec("CREATE TABLE t AS SELECT generate_series(1, 50000) AS i")
	for range 3 {
		p.Exec("INSERT INTO t SELECT generate_series(1, 20000)")
		p.WaitArchived(p.SwitchWAL())
	}
	s := openTestStore(t, file)
	n := 0
	for _, key := range server.keys(t, bucket, "main/wals/") {
		name, _ := splitSuffix(filepath.Base(key))
		content, err := fetchWith(t, s, name, restoreWALOptions{SystemID: systemIdentifier(p.Dir)})
		if err != nil {
			t.Fatal(err)
		}
		if len(content) != mib {
			t.Errorf("%s has %d bytes", name, len(content))
		}
		n++
	}
	if n < 3 {
		t.Errorf("only %d segments were archived", n)
	}
	if want := p.Query("SELECT system_identifier FROM pg_control_system()"); fmt.Sprint(systemIdentifier(p.Dir)) != want {
		t.Errorf("system identifier %d, not %s", systemIdentifier(p.Dir), want)
	}
}

// What we compress, the program of the format's own people decompresses, and the other
// way round, also when it is made of several members.
func TestCodecsAgainstTheirPrograms(t *testing.T) {
	content := segment(seg5, mib, 7, 1)
	for _, c := range codecs[1:] {
		if c.name == "snappy" {
			continue // has no program; see below
		}
		t.Run(c.name, func(t *testing.T) {
			for _, level := range []string{"", "low", "high", "3"} {
				var stored, got bytes.Buffer
				z, err := c.compress(&stored, level)
				if err != nil {
					t.Fatal(err)
				}
				z.Write(content)
				if err := z.Close(); err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command(c.name, "-dc")
				cmd.Stdin, cmd.Stdout, cmd.Stderr = &stored, &got, os.Stderr
				if err := cmd.Run(); err != nil || !bytes.Equal(got.Bytes(), content) {
					t.Errorf("level %q: %s makes %d bytes of it, %v", level, c.name, got.Len(), err)
				}
			}
			var stored bytes.Buffer
			for _, part := range [][]byte{content[:1000], content[1000:]} {
				cmd := exec.Command(c.name, "-c")
				cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(part), &stored, os.Stderr
				if err := cmd.Run(); err != nil {
					t.Fatal(err)
				}
			}
			z, err := c.newReader(&stored)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, content) {
				t.Errorf("two members of %s: %d bytes, %v", c.name, len(got), err)
			}
		})
	}
	t.Run("snappy", func(t *testing.T) { // against the library of the format's own people
		c, err := codecByName("snappy")
		if err != nil {
			t.Fatal(err)
		}
		var ours, theirs bytes.Buffer
		z, err := c.compress(&ours, "")
		if err != nil {
			t.Fatal(err)
		}
		z.Write(content)
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(snappy.NewReader(&ours)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("it makes %d bytes of ours, %v", len(got), err)
		}
		for _, part := range [][]byte{content[:1000], content[1000:]} {
			w := snappy.NewBufferedWriter(&theirs)
			w.Write(part)
			w.Close()
		}
		r, err := c.newReader(&theirs)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, content) {
			t.Errorf("we make %d bytes of two streams of theirs, %v", len(got), err)
		}
	})
	for level, c := range map[string]string{"x": "gzip", "10": "lz4", "23": "zstd", "99": "gzip"} {
		codec, err := codecByName(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := codec.compress(io.Discard, level); err == nil || !strings.Contains(err.Error(), "--compression-level") {
			t.Errorf("%s takes level %q: %v", c, level, err)
		}
	}
}

// ---------------------------------------------------------------------------
// Look-ahead and prefetch
// ---------------------------------------------------------------------------

// readyWAL writes segments that wait to be archived, as PostgreSQL leaves them.
func readyWAL(t testing.TB, numbers ...uint64) (pgWAL string, contents map[string][]byte) {
	t.Helper()
	pgWAL = filepath.Join(testDir(t), "pg_wal")
	if err := os.MkdirAll(filepath.Join(pgWAL, "archive_status"), 0o755); err != nil {
		t.Fatal(err)
	}
	contents = map[string][]byte{}
	for _, n := range numbers {
		name := segmentName(1, n, mib)
		contents[name] = segment(name, mib, 7, n)
		for file, content := range map[string][]byte{name: contents[name], "archive_status/" + name + ".ready": nil} {
			if err := os.WriteFile(filepath.Join(pgWAL, file), content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	return pgWAL, contents
}

func archived(pgWAL, name string) error {
	status := filepath.Join(pgWAL, "archive_status", name)
	return os.Rename(status+".ready", status+".done")
}

// Files that wait are stored ahead, at most maxParallel at once, and answer without
// another request when they are asked for; the same content lies in the archive.
func TestArchiveLookAhead(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, "wal: {maxParallel: 4, compression: zstd}"))
	life, end := context.WithCancel(context.Background())
	a := newArchiver(life)
	defer func() { end(); a.workers.Wait() }()
	pgWAL, contents := readyWAL(t, 1, 2, 3, 4, 5, 6, 7, 8)
	archive := func(n uint64) error {
		return a.archive(t.Context(), s, "", filepath.Join(pgWAL, segmentName(1, n, mib)), true)
	}

	if err := archive(1); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the three files behind it", func() bool { return len(server.keys(t, bucket, "")) == 4 })
	if err := archived(pgWAL, segmentName(1, 1, mib)); err != nil {
		t.Fatal(err)
	}
	requests := func(name string) int { return len(proxy.seen(regexp.MustCompile(name))) }
	before := requests(segmentName(1, 2, mib))
	for n := uint64(2); n <= 8; n++ {
		if err := archive(n); err != nil {
			t.Fatal(err)
		}
		if err := archived(pgWAL, segmentName(1, n, mib)); err != nil {
			t.Fatal(err)
		}
	}
	if got := requests(segmentName(1, 2, mib)); got != before {
		t.Errorf("a file that was stored ahead made %d more requests when it was asked for", got-before)
	}
	for name, content := range contents {
		mustFetch(t, s, name, content)
		if n := len(proxy.seen(regexp.MustCompile("^PUT .*" + name))); n != 1 {
			t.Errorf("%s was sent %d times", name, n)
		}
	}
}

// The failure of a neighbour is not the failure of the file that was asked for, and is tried again in its turn.
func TestArchiveLookAheadFailure(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, "wal: {maxParallel: 2}"))
	life, end := context.WithCancel(context.Background())
	a := newArchiver(life)
	defer func() { end(); a.workers.Wait() }()
	pgWAL, contents := readyWAL(t, 1, 2)
	first, second := segmentName(1, 1, mib), segmentName(1, 2, mib)
	denied := proxy.add(fault{Method: http.MethodPut, Path: regexp.MustCompile(second), Do: answerError, HTTP: 403, Code: "AccessDenied"})
	if err := a.archive(t.Context(), s, "", filepath.Join(pgWAL, first), true); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the failure", func() bool { return proxy.hits(denied) > 0 })
	mustSay(t, a.archive(t.Context(), s, "", filepath.Join(pgWAL, second), true), errDenied, second)
	proxy.clear()
	if err := a.archive(t.Context(), s, "", filepath.Join(pgWAL, second), true); err != nil {
		t.Fatal(err)
	}
	for name, content := range contents {
		mustFetch(t, s, name, content)
	}
}

// The first file of a cluster is stored alone: when storing it fails, its neighbours must not
// be taken for another cluster's archive the next time.
func TestArchiveLookAheadWaitsForTheFirst(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	source, err := newFileSource(storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, "wal: {maxParallel: 3}"))
	if err != nil {
		t.Fatal(err)
	}
	pgWAL, contents := readyWAL(t, 1, 2, 3)
	w := testWALService(t, source, "main-1", filepath.Dir(pgWAL))
	archive := func(n uint64, check bool) error {
		_, err := w.Archive(t.Context(), &wal.WALArchiveRequest{ClusterDefinition: []byte(mainCluster),
			SourceFileName: filepath.Join(pgWAL, segmentName(1, n, mib)), CheckEmptyWalArchive: &check})
		return err
	}
	denied := proxy.add(fault{Method: http.MethodPut, Path: regexp.MustCompile(segmentName(1, 1, mib)), Do: answerError, HTTP: 403, Code: "AccessDenied"})
	if err := archive(1, true); status.Code(err) != codes.PermissionDenied || proxy.hits(denied) == 0 {
		t.Fatal(err)
	}
	w.archiver.workers.Wait()
	proxy.clear()
	for n := uint64(1); n <= 3; n++ {
		if err := archive(n, n == 1); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range contents {
		mustFetch(t, openTestStore(t, storeFile(t, server, bucket)), name, content)
	}
}

// A store that was switched never acknowledges what only the old one holds; a file that
// changed since it was stored ahead is judged anew.
func TestArchiveLookAheadStoreSwitched(t *testing.T) {
	server := testS3(t)
	oldBucket, newOne := newBucket(t), newBucket(t)
	before := openTestStore(t, storeFile(t, server, oldBucket, "wal: {maxParallel: 3}"))
	after := openTestStore(t, storeFile(t, server, newOne, "wal: {maxParallel: 3}"))
	life, end := context.WithCancel(context.Background())
	a := newArchiver(life)
	defer func() { end(); a.workers.Wait() }()
	pgWAL, contents := readyWAL(t, 1, 2, 3)
	if err := a.archive(t.Context(), before, "", filepath.Join(pgWAL, segmentName(1, 1, mib)), true); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the files behind it", func() bool { return len(server.keys(t, oldBucket, "")) == 3 })
	for _, n := range []uint64{2, 3} {
		name := segmentName(1, n, mib)
		if err := a.archive(t.Context(), after, "", filepath.Join(pgWAL, name), true); err != nil {
			t.Fatal(err)
		}
		mustFetch(t, after, name, contents[name])
	}
	third := filepath.Join(pgWAL, segmentName(1, 3, mib))
	if err := a.archive(t.Context(), before, "", filepath.Join(pgWAL, segmentName(1, 2, mib)), true); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(third, segment(segmentName(1, 3, mib), mib, 7, 99), 0o644); err != nil {
		t.Fatal(err)
	}
	mustSay(t, a.archive(t.Context(), before, "", third, true), errDifferent)
}

// A store that hangs keeps nobody from going on with another one once the ObjectStore names
// it: neither the file in turn, nor what was on its way ahead and has all the memory.
func TestArchiveStoreThatHangs(t *testing.T) {
	server, bucket, other := testS3(t), newBucket(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	const options = "wal: {maxParallel: 8, compression: zstd}"
	file := storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, options)
	corrected, err := os.ReadFile(storeFile(t, server, other, options))
	if err != nil {
		t.Fatal(err)
	}
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	stalled := proxy.add(fault{Method: http.MethodPut, Do: stallRequest})
	pgWAL := filepath.Join(testDir(t), "pg_wal")
	const size, files = 16 * mib, 10
	for n := uint64(1); n <= files; n++ {
		name := segmentName(1, n, size)
		mustWrite(t, filepath.Join(pgWAL, name), string(random(t, size)))
		mustWrite(t, filepath.Join(pgWAL, "archive_status", name+".ready"), "")
	}
	w := testWALService(t, source, "main-1", filepath.Dir(pgWAL))
	archive := func(n uint64) error {
		_, err := w.Archive(t.Context(), &wal.WALArchiveRequest{ClusterDefinition: []byte(mainCluster), SourceFileName: filepath.Join(pgWAL, segmentName(1, n, size))})
		return err
	}
	first := make(chan error)
	go func() { first <- archive(1) }()
	// One transfer is enough for that: two others may each have got a part of what it left.
	waitFor(t, "the memory to be full", func() bool {
		if proxy.hits(stalled) == 0 {
			return false
		}
		room := walBuffers.TryAcquire(chunkSize)
		if room {
			walBuffers.Release(chunkSize)
		}
		return !room
	})
	mustWrite(t, file, string(corrected))
	mustSay(t, <-first, nil, segmentName(1, 1, size), "leads to", other)
	for n := uint64(1); n <= files; n++ {
		if err := archive(n); err != nil {
			t.Fatal(err)
		}
		if err := archived(pgWAL, segmentName(1, n, size)); err != nil {
			t.Fatal(err)
		}
	}
	if keys := server.keys(t, other, ""); len(keys) != files {
		t.Errorf("the new store has %q", keys)
	}
}

// A page of a gateway in place of a listing, after the store has answered: that passes.
func TestRestoreThroughGateway(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	behind := forwardTo(t, server)
	var pages atomic.Int32
	gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if pages.Add(-1) >= 0 {
			io.WriteString(w, "<html>We will be back</html>")
			return
		}
		behind.ServeHTTP(w, r)
	}))
	defer gateway.Close()
	open := func() *Store { return openTestStore(t, storeFileAt(t, server, gateway.URL, "s3://"+bucket)) }
	s, content := open(), segment(seg5, mib, 7, 1)
	mustArchive(t, s, writeWAL(t, seg5, content))
	pages.Store(1)
	if got, err := fetchWith(t, s, seg5, restoreWALOptions{Patience: time.Minute}); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	pages.Store(1) // nothing says that the address is right
	_, err := fetchWith(t, open(), seg5, restoreWALOptions{Patience: time.Minute})
	mustSay(t, err, errNotS3, "endpointURL")
}

// Nothing is stored ahead of a file that the archive has otherwise: that is another cluster's
// archive, and what its owner archives next would find ours there.
func TestArchiveLookAheadRefused(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	s := openTestStore(t, storeFile(t, server, bucket, "wal: {maxParallel: 8}"))
	owner, contents := readyWAL(t, 1)
	first := segmentName(1, 1, mib)
	if err := archiveWAL(t.Context(), s, filepath.Join(owner, first)); err != nil {
		t.Fatal(err)
	}
	a := newArchiver(t.Context())
	pgWAL, _ := readyWAL(t, 1, 2, 3, 4)
	if err := os.WriteFile(filepath.Join(pgWAL, first), segment(first, mib, 7, 99), 0o644); err != nil {
		t.Fatal(err)
	}
	mustSay(t, a.archive(t.Context(), s, "", filepath.Join(pgWAL, first), true), errDifferent, first)
	a.workers.Wait()
	if err := os.WriteFile(filepath.Join(pgWAL, "00000002.history"), []byte("1\t0/108000\tfork\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := a.archive(t.Context(), s, "", filepath.Join(pgWAL, "00000002.history"), true); err != nil {
		t.Fatal(err)
	}
	a.workers.Wait()
	if keys := server.keys(t, bucket, ""); len(keys) != 2 {
		t.Errorf("the archive has %q", keys)
	}
	mustFetch(t, s, first, contents[first])
	a.remember(s, "", filepath.Join(pgWAL, first))
	a.drain(t.Context())
	if keys := server.keys(t, bucket, ""); len(keys) != 2 {
		t.Errorf("drained although the first one was refused: %q", keys)
	}
}

// Of a segment in which its timeline ends only what comes before counts: replica clusters archive it
// as it was received and again as it was restored.
func TestArchiveEndOfTimeline(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	s := openTestStore(t, storeFile(t, server, bucket))
	pgWAL, contents := readyWAL(t, 1)
	name := segmentName(1, 1, mib)
	file := filepath.Join(pgWAL, name)
	archive := func(change int) error {
		content := slices.Clone(contents[name])
		if change >= 0 {
			content[change]++
		}
		if err := os.WriteFile(file, content, 0o644); err != nil {
			t.Fatal(err)
		}
		return archiveWAL(t.Context(), s, file)
	}
	if err := archive(-1); err != nil {
		t.Fatal(err)
	}
	mustSay(t, archive(0x8000), errDifferent, name)
	for history, at := range map[string]string{"00000002": "0/200000", "00000003": "0/100000", "00000004": "0/108000"} {
		if err := os.WriteFile(filepath.Join(pgWAL, history+".history"), []byte("1\t"+at+"\tno recovery target specified\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, change := range []int{-1, 0x8000, mib - 1} {
		if err := archive(change); err != nil {
			t.Errorf("byte %#x differs: %v", change, err)
		}
	}
	mustSay(t, archive(0x7fff), errDifferent, name)
	mustFetch(t, s, name, contents[name])
}

// What PostgreSQL left behind is stored on SIGTERM, by an instance that has archived before.
func TestArchiveDrain(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	s := openTestStore(t, storeFile(t, server, bucket))
	a := newArchiver(t.Context())
	pgWAL, contents := readyWAL(t, 1, 2, 3)
	a.drain(t.Context())
	if keys := server.keys(t, bucket, ""); len(keys) != 0 {
		t.Errorf("an instance that never archived stored %q", keys)
	}
	if err := a.archive(t.Context(), s, "", filepath.Join(pgWAL, segmentName(1, 1, mib)), true); err != nil {
		t.Fatal(err)
	}
	orphan := filepath.Join(pgWAL, "archive_status", segmentName(1, 0, mib)+".ready")
	if err := os.WriteFile(orphan, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	a.drain(t.Context())
	for name, content := range contents {
		mustFetch(t, s, name, content)
	}
}

// Several at once, history files first; what is left is said.
func TestArchiveDrainParallel(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, "wal: {maxParallel: 3}"))
	a := newArchiver(t.Context())
	pgWAL, contents := readyWAL(t, 1, 2, 3, 4, 5)
	if err := a.archive(t.Context(), s, "", filepath.Join(pgWAL, segmentName(1, 1, mib)), false); err != nil {
		t.Fatal(err)
	}
	const history = "00000002.history"
	for _, file := range []string{history, "archive_status/" + history + ".ready"} {
		if err := os.WriteFile(filepath.Join(pgWAL, file), []byte("1\t0/500000\twhy\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	stalled := proxy.add(fault{Method: http.MethodPut, Path: regexp.MustCompile(segmentName(1, 2, mib)), Do: stallRequest})
	log := captureLog(t)
	ctx, cancel := context.WithCancel(t.Context())
	drained := make(chan struct{})
	go func() { defer close(drained); a.drain(ctx) }()
	// The first two are there: all forms of 1, the history, and what is behind the one that hangs.
	waitFor(t, "the others", func() bool { return len(server.keys(t, bucket, "")) >= 4 && proxy.hits(stalled) > 0 })
	if !slices.Contains(server.keys(t, bucket, ""), "main/wals/"+history) {
		t.Errorf("no history in %q", server.keys(t, bucket, ""))
	}
	cancel()
	<-drained
	if !log.has("stay behind") || !log.has(`"first":"`+segmentName(1, 2, mib)) || !log.has(`"files":4`) {
		t.Error("the log does not say which files are left")
	}
	proxy.clear()
	a.drain(t.Context())
	for name, content := range contents {
		mustFetch(t, s, name, content)
	}
}

// A decoder that panics has met a damaged object, and the process goes on.
func TestRestoreDecoderPanics(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	s := testStore(t, server, bucket, "main")
	name := segmentName(1, 1, mib)
	server.write(t, bucket, s.walPrefix(name), []byte("x"))
	objects, err := walObjects(t.Context(), s, name, false)
	if err != nil || len(objects) != 1 {
		t.Fatal(objects, err)
	}
	broken := &codec{newReader: func(io.Reader) (io.Reader, error) { panic("out of range") }}
	objects[0].codec = broken
	_, _, err = readWAL(t.Context(), s, objects[0], io.Discard)
	mustSay(t, err, errDamaged, name, "out of range")
	r := &restorer{store: s, read: &progress{}}
	archive := dataArchive{object: objects[0].object, codec: broken}
	mustSay(t, r.extract(t.Context(), archive), errDamaged, s.URL(archive.Key), "out of range")
}

// A missing segment ends a new cluster's recovery; that there are later ones is said, once.
func TestRestoreTellsOfGap(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket)
	store := testStoreFile(t, file, "main")
	for _, n := range []uint64{1, 2, 4} {
		name := segmentName(1, n, mib)
		server.write(t, bucket, store.walPrefix(name), segment(name, mib, 7, n))
	}
	log := captureLog(t)
	c := newRestoreClient(t, file, strings.Replace(mainCluster, `"currentPrimary":"main-1"`, `"currentPrimary":""`, 1))
	ask := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if code := c.ask(name, wal.WALRestoreRequest_MODE_RECOVERY); code != codes.NotFound {
				t.Errorf("%s: %s", name, code)
			}
		}
	}
	ask(segmentName(1, 5, mib), segmentName(1, 3, mib), segmentName(1, 3, mib), "00000002.history")
	if n := log.count("There is a gap"); n != 1 || !log.has("before WAL file "+segmentName(1, 3, mib)) || !log.has(store.URL(store.walPrefix(segmentName(1, 4, mib)))) {
		t.Errorf("told %d times", n)
	}
	// The gap reaches to the end of its directory.
	perDirectory := segmentsPerLog(mib)
	last, next := segmentName(1, perDirectory-1, mib), segmentName(1, perDirectory, mib)
	server.write(t, bucket, store.walPrefix(next), segment(next, mib, 7, 1))
	ask(last)
	if !log.has("before WAL file "+last) || !log.has(store.URL(store.walPrefix(next))) {
		t.Error("nothing is told of the directory behind")
	}
	// The timeline is there, and its history is not.
	other := segmentName(3, 5, mib)
	server.write(t, bucket, store.walPrefix(other), segment(other, mib, 7, 1))
	ask("00000003.history")
	if !log.has("before WAL file 00000003.history") || !log.has(store.URL(store.walPrefix(other))) {
		t.Error("nothing is told of the missing history")
	}
}

// A store that takes requests and does not answer holds up who can do without for no longer than its patience.
func TestRestoreHangingStore(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	s := openTestStore(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket))
	stalled := proxy.add(fault{Method: http.MethodGet, Do: stallRequest})
	err := restoreWAL(t.Context(), s, segmentName(1, 1, mib), filepath.Join(testDir(t), "wal"), restoreWALOptions{Patience: time.Second})
	mustSay(t, err, errTransient, segmentName(1, 1, mib))
	if n := proxy.hits(stalled); n != 1 {
		t.Errorf("%d requests: the first one was waited for", n)
	}
}

// restoreClient asks a WAL service as the instance manager does.
type restoreClient struct {
	t           testing.TB
	w           *walService
	cluster     string
	destination string
}

// standbyCluster is a Cluster whose primary is another instance: streaming is possible.
var standbyCluster = strings.Replace(mainCluster, `"currentPrimary":"main-1"`, `"currentPrimary":"main-2"`, 1)

func newRestoreClient(t testing.TB, file, cluster string) *restoreClient {
	t.Helper()
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	return &restoreClient{t, testWALService(t, source, "main-1", testDir(t)), cluster, filepath.Join(testDir(t), "RECOVERYXLOG")}
}

func (c *restoreClient) ask(name string, mode wal.WALRestoreRequest_Mode) codes.Code {
	c.t.Helper()
	os.Remove(c.destination)
	_, err := c.w.Restore(c.t.Context(), &wal.WALRestoreRequest{ClusterDefinition: []byte(c.cluster), SourceWalName: name,
		DestinationFileName: c.destination, Mode: mode})
	if err != nil && fileExists(c.destination) {
		c.t.Errorf("%s: an error, and a file all the same", name)
	}
	return status.Code(err)
}

// must asks for a segment and compares it.
func (c *restoreClient) must(name string, want []byte) {
	c.t.Helper()
	if code := c.ask(name, wal.WALRestoreRequest_MODE_RECOVERY); code != codes.OK {
		c.t.Fatalf("%s: %s", name, code)
	}
	if got, err := os.ReadFile(c.destination); err != nil || !bytes.Equal(got, want) {
		c.t.Fatalf("%s: restored something else (%v)", name, err)
	}
}

// spooled are the whole segments that wait in the spool.
func (c *restoreClient) spooled() []string {
	c.t.Helper()
	entries, err := os.ReadDir(c.w.prefetch.spool)
	if err != nil {
		c.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		name, _, _ := strings.Cut(e.Name(), ".")
		if w, err := parseWALName(name); err == nil && w.Kind == walSegment {
			names = append(names, name)
		}
	}
	return names
}

// The steps of the original's acceptance test for its prefetch (FEATURES G19): three at
// a time, the end found ahead, told once, and asked for again after that.
func TestPrefetchSequence(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	file := storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket, "wal: {maxParallel: 3}")
	s := openTestStore(t, file)
	pgWAL, contents := readyWAL(t, 1, 2, 3, 4, 5, 6)
	names := make([]string, 8)
	for n := range names {
		names[n] = segmentName(1, uint64(n), mib)
	}
	store := func(numbers ...int) {
		for _, n := range numbers {
			mustArchive(t, s, filepath.Join(pgWAL, names[n]))
		}
	}
	store(1, 2, 3, 4, 5)
	c, log := newRestoreClient(t, file, standbyCluster), captureLog(t)
	listed := func(n int) int { return len(proxy.seen(regexp.MustCompile("prefix=.*" + names[n] + "$"))) }
	base := make([]int, len(names))
	for n := range base {
		base[n] = listed(n)
	}

	c.must(names[1], contents[names[1]]) // #1: asked for, the next two come along
	waitFor(t, "2 and 3 in the spool", func() bool { return slices.Equal(c.spooled(), []string{names[2], names[3]}) })
	if n := log.count("Restored WAL file"); n != 1 {
		t.Errorf("%d files are logged as restored, and 2 of them PostgreSQL has not got", n)
	}
	c.must(names[2], contents[names[2]]) // #2: from the spool, 4 follows
	waitFor(t, "3 and 4 in the spool", func() bool { return slices.Equal(c.spooled(), []string{names[3], names[4]}) })
	c.must(names[3], contents[names[3]])
	c.must(names[4], contents[names[4]]) // here the prefetch meets the end
	waitFor(t, "the end", func() bool { return listed(6) > base[6] && slices.Equal(c.spooled(), []string{names[5]}) })
	c.must(names[5], contents[names[5]]) // a spooled segment comes before the end
	end := listed(6)
	if code := c.ask(names[6], wal.WALRestoreRequest_MODE_RECOVERY); code != codes.OutOfRange {
		t.Errorf("the end: %s", code)
	}
	if listed(6) != end {
		t.Error("the end, known already, was asked for again")
	}
	store(6)
	c.must(names[6], contents[names[6]]) // told once; now it is asked for, and there
	for n := 1; n <= 5; n++ {
		if got := len(proxy.seen(regexp.MustCompile("^GET /[^?]*" + names[n]))); got != 1 {
			t.Errorf("segment %d was fetched %d times", n, got)
		}
		if got := log.count(`"Restored WAL file","walName":"` + names[n]); got != 1 {
			t.Errorf("segment %d was logged as restored %d times", n, got)
		}
	}
}

// While a cluster is bootstrapped the end that a prefetch met does not stand: only the store's own answer does.
func TestPrefetchDuringRecovery(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket, "wal: {maxParallel: 4}")
	s := openTestStore(t, file)
	pgWAL, contents := readyWAL(t, 1, 2, 3)
	mustArchive(t, s, filepath.Join(pgWAL, segmentName(1, 1, mib)))
	c := newRestoreClient(t, file, strings.Replace(mainCluster, "main-1", "", 1))
	c.must(segmentName(1, 1, mib), contents[segmentName(1, 1, mib)])
	c.w.prefetch.workers.Wait() // it has found the end
	mustArchive(t, s, filepath.Join(pgWAL, segmentName(1, 2, mib)))
	c.must(segmentName(1, 2, mib), contents[segmentName(1, 2, mib)])
	if code := c.ask(segmentName(1, 3, mib), wal.WALRestoreRequest_MODE_RECOVERY); code != codes.NotFound {
		t.Errorf("the end of a recovery: %s", code)
	}
}

// A prefetch leaves a .partial alone, and does not say that there is nothing.
func TestPrefetchLeavesPartial(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket, "wal: {maxParallel: 4}")
	s := openTestStore(t, file)
	one, two := segmentName(1, 1, mib), segmentName(1, 2, mib)
	mustArchive(t, s, writeWAL(t, one, segment(one, mib, 7, 1)))
	mustArchive(t, s, writeWAL(t, two+".partial", segment(two, mib, 7, 2)))
	c := newRestoreClient(t, file, strings.Replace(mainCluster, "main-1", "", 1))
	c.must(one, segment(one, mib, 7, 1))
	c.w.prefetch.workers.Wait()
	c.must(two, segment(two, mib, 7, 2))
}

// A missing file costs one request, and is not asked for again within a second.
func TestMissingWALCostsOneRequest(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	proxy := startFaultProxy(t, server)
	c := newRestoreClient(t, storeFileAt(t, server, proxy.Endpoint, "s3://"+bucket), mainCluster)
	began := time.Now()
	for range 5 {
		if code := c.ask(seg5, wal.WALRestoreRequest_MODE_RECOVERY); code != codes.NotFound {
			t.Fatal(code)
		}
	}
	if n, took := len(proxy.seen(regexp.MustCompile(seg5))), time.Since(began); n < 1 || n > 1+int(took/missingLife) {
		t.Errorf("five requests for a missing file made %d to the store in %s", n, took)
	}
}

// What a killed sidecar was fetching does not stay in pg_wal.
func TestRestoreLeftovers(t *testing.T) {
	pgdata := testDir(t)
	pgWAL := filepath.Join(pgdata, "pg_wal")
	if err := os.Mkdir(pgWAL, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{seg5, temporaryWAL + "1"} {
		if err := os.WriteFile(filepath.Join(pgWAL, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	testWALService(t, nil, "main-1", pgdata)
	if fileExists(filepath.Join(pgWAL, temporaryWAL+"1")) || !fileExists(filepath.Join(pgWAL, seg5)) {
		t.Error("the leftover stays, or the segment does not")
	}
}

// pg_rewind goes backwards: it gets what it asks for, prefetching ends, and no end is remembered.
func TestPrefetchRewind(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket, "wal: {maxParallel: 3}")
	s := openTestStore(t, file)
	pgWAL, contents := readyWAL(t, 1, 2, 3, 4)
	for name := range contents {
		mustArchive(t, s, filepath.Join(pgWAL, name))
	}
	c := newRestoreClient(t, file, standbyCluster)
	two, three := segmentName(1, 2, mib), segmentName(1, 3, mib)
	c.must(segmentName(1, 1, mib), contents[segmentName(1, 1, mib)])
	waitFor(t, "the prefetch", func() bool { return slices.Equal(c.spooled(), []string{two, three}) })
	if code := c.ask(three, wal.WALRestoreRequest_MODE_REWIND); code != codes.OK {
		t.Fatal(code)
	}
	if got, err := os.ReadFile(c.destination); err != nil || !bytes.Equal(got, contents[three]) {
		t.Error("rewind got something else")
	}
	waitFor(t, "the spool to be empty", func() bool { return len(c.spooled()) == 0 })
	if code := c.ask(segmentName(1, 9, mib), wal.WALRestoreRequest_MODE_REWIND); code != codes.NotFound {
		t.Error(code)
	}
	if code := c.ask(two, wal.WALRestoreRequest_MODE_REWIND); code != codes.OK {
		t.Error(code)
	}
}

// What was prefetched from one store is never handed out for another one, also when that has nothing.
func TestPrefetchStoreSwitched(t *testing.T) {
	server, bucket, other := testS3(t), newBucket(t), newBucket(t)
	file := storeFile(t, server, bucket, "wal: {maxParallel: 3}")
	s := openTestStore(t, file)
	pgWAL, contents := readyWAL(t, 1, 2, 3)
	for name := range contents {
		mustArchive(t, s, filepath.Join(pgWAL, name))
	}
	c := newRestoreClient(t, file, standbyCluster)
	two := segmentName(1, 2, mib)
	c.must(segmentName(1, 1, mib), contents[segmentName(1, 1, mib)])
	waitFor(t, "the prefetch", func() bool { return len(c.spooled()) == 2 })
	switched, err := newFileSource(storeFile(t, server, other, "wal: {maxParallel: 3}"))
	if err != nil {
		t.Fatal(err)
	}
	c.w.source = switched
	for range 2 {
		if code := c.ask(two, wal.WALRestoreRequest_MODE_RECOVERY); code != codes.NotFound {
			t.Fatalf("the other store does not have it: %s", code)
		}
	}
}

// A spool that cannot be written never fails the file that was asked for; one on another volume is copied from.
func TestPrefetchSpoolTrouble(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	file := storeFile(t, server, bucket, "wal: {maxParallel: 3}")
	s := openTestStore(t, file)
	pgWAL, contents := readyWAL(t, 1, 2, 3)
	for name := range contents {
		mustArchive(t, s, filepath.Join(pgWAL, name))
	}
	mount := func(size string) string { // a volume of its own: full after the first segment
		dir := testDir(t)
		mustRun(t, exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir))
		t.Cleanup(func() { exec.Command("umount", dir).Run() })
		return dir
	}
	for size, whole := range map[string]bool{"100k": false, "16m": true} {
		c := newRestoreClient(t, file, mainCluster)
		c.w.prefetch.spool = mount(size)
		for n := uint64(1); n <= 3; n++ {
			c.must(segmentName(1, n, mib), contents[segmentName(1, n, mib)])
			if n == 1 && whole {
				waitFor(t, "the prefetch", func() bool { return len(c.spooled()) == 2 })
			}
		}
		if left := c.spooled(); len(left) != 0 {
			t.Errorf("%s: %q stay in the spool", size, left)
		}
	}
}

// Coverage of an archive over three timelines, as PostgreSQL leaves them: a segment that the
// new timeline begins with is on the old one at most a .partial.
func TestWALCoverage(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	store := testStore(t, s, bucket, "main")
	size := int64(16 << 20)
	put := func(timeline uint32, from, to uint64, suffix string) {
		for n := from; n <= to; n++ {
			s.write(t, bucket, store.walPrefix(segmentName(timeline, n, size))+suffix, nil)
		}
	}
	catalog := &Catalog{}
	backup := func(begin string, inBackup ...string) {
		b := aBackup("20260101T100000", 1, "10:00", "0/3000200")
		b.BeginWAL, b.WALSegmentSize, b.WALInBackup = begin, size, inBackup
		catalog.Backups = append(catalog.Backups, b)
	}
	expect := func(what string, absent []string, want ...string) {
		t.Helper()
		timelines, err := walCoverage(t.Context(), store, catalog, absent...)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, w := range timelines {
			got = append(got, fmt.Sprintf("%d: %s-%s %d %d %q", w.Timeline, w.First, w.Last, w.Segments, w.Missing, w.Gaps))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s:\n got %q\nwant %q", what, got, want)
		}
	}
	put(1, 1, 3, "") // before the backup, with a gap that does not matter
	put(1, 6, 9, ".gz")
	put(1, 7, 7, "") // two forms of one segment
	s.write(t, bucket, store.walPrefix("000000010000000000000006")+".00000028.backup.gz", nil)
	s.write(t, bucket, store.walPrefix("00000001000000000000000C")+".partial.gz", nil)
	expect("no backup", nil)
	backup("000000010000000000000006")
	expect("whole", nil, `1: 000000010000000000000006-000000010000000000000009 4 0 []`)
	put(1, 11, 11, ".gz")
	expect("one is missing", nil, `1: 000000010000000000000006-00000001000000000000000B 5 1 ["00000001000000000000000A"]`)
	expect("one is on its way", []string{"00000001000000000000000A"}, `1: 000000010000000000000006-00000001000000000000000B 5 0 []`)

	// timeline 2 begins with segment 0xC: what is behind that on timeline 1 may be missing, what is before may not
	put(1, 14, 15, "")
	s.write(t, bucket, store.walPrefix("00000002.history"), []byte("1\t0/C000100\tno recovery target specified\n"))
	put(2, 12, 13, ".zst")
	put(2, 16, 16, "")
	expect("two timelines", nil, `1: 000000010000000000000006-00000001000000000000000F 7 3 ["00000001000000000000000A" "00000001000000000000000C to 00000001000000000000000D (2 segments)"]`,
		`2: 00000002000000000000000C-000000020000000000000010 3 2 ["00000002000000000000000E to 00000002000000000000000F (2 segments)"]`)
	// timeline 3 left timeline 2 at 0x12, of which nothing came; it ends the other line
	s.write(t, bucket, store.walPrefix("00000003.history")+".gz", gzipped([]byte("1\t0/C000100\tno recovery target specified\n2\t0/12000000\tno recovery target specified\n")))
	put(3, 18, 18, "")
	expect("three timelines", nil, `1: 000000010000000000000006-00000001000000000000000F 7 3 ["00000001000000000000000A" "00000001000000000000000C to 00000001000000000000000D (2 segments)"]`,
		`2: 00000002000000000000000C-000000020000000000000010 3 3 ["00000002000000000000000E to 00000002000000000000000F (2 segments)" "000000020000000000000011"]`,
		`3: 000000030000000000000012-000000030000000000000012 1 0 []`)
	// only the newest backup: what comes before it does not matter, nor what it has itself
	catalog.Backups = nil
	backup("000000020000000000000010", "000000020000000000000011")
	expect("a backup on timeline 2", nil, `2: 000000020000000000000010-000000020000000000000010 1 0 []`, `3: 000000030000000000000012-000000030000000000000012 1 0 []`)
	put(4, 0x14, 0x15, "")
	expect("a timeline without its history", nil, `2: 000000020000000000000010-000000020000000000000010 1 0 []`, `3: 000000030000000000000012-000000030000000000000012 1 0 []`,
		`4: 000000040000000000000014-000000040000000000000015 2 1 ["00000004.history"]`)
}

// What a restore chooses from does not hide that there is more.
func TestMissingHistory(t *testing.T) {
	server, bucket := testS3(t), newBucket(t)
	store := testStore(t, server, bucket, "main")
	testBackup(t, server, bucket, store, nil)
	log := captureLog(t)
	find := func(target *RecoveryTarget) {
		t.Helper()
		if _, err := findBackup(t.Context(), store, target); err != nil {
			t.Fatal(err)
		}
	}
	find(nil)
	server.write(t, bucket, store.walPrefix("000000020000000000000005"), nil)
	find(&RecoveryTarget{TargetTLI: "current"})
	if log.has("without its history") {
		t.Error("it is told of what does not matter")
	}
	find(nil)
	if !log.has("without its history") || !log.has(store.URL(store.walPrefix("00000002.history"))) {
		t.Error("nothing is told of timeline 2")
	}
}
