package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	s3types "github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// ---------------------------------------------------------------------------
// Made archives
// ---------------------------------------------------------------------------

const segmentSize = 16 << 20

// madeArchive is what a cluster has left in the bucket. WAL positions are segment numbers.
type madeArchive struct {
	name      string
	policy    string
	timelines map[uint32]madeTimeline // except the first
	wal       map[uint32][2]uint64    // the first and the last segment
	backups   []madeBackup
	noHistory bool
}

type madeTimeline struct {
	parent uint32
	fork   uint64
}

type madeBackup struct {
	name       string
	ended      time.Duration // ago
	took       time.Duration // default an hour
	timeline   uint32        // default 1
	begin, end uint64        // end defaults to begin
	status     string        // default DONE
	keep       string
	zone       *time.Location // of all its times
	id         time.Duration  // ago, when the id is not the time of the beginning
	change     func(*BackupInfo)
	text       func(string) string // of backup.info
}

func days(n float64) time.Duration { return time.Duration(n * 24 * float64(time.Hour)) }

var madeNow = time.Now().UTC().Truncate(time.Second)

func (b *madeBackup) backupID() string {
	ago := cmp.Or(b.id, b.ended+cmp.Or(b.took, time.Hour))
	return madeNow.Add(-ago).In(cmp.Or(b.zone, time.UTC)).Format(backupIDLayout)
}

func (b *madeBackup) info() *BackupInfo {
	b.timeline, b.end, b.status, b.zone = cmp.Or(b.timeline, 1), cmp.Or(b.end, b.begin), cmp.Or(b.status, statusDone), cmp.Or(b.zone, time.UTC)
	info := &BackupInfo{ID: b.backupID(), BackupName: b.name, ServerName: "cloud", Status: b.status, Timeline: int(b.timeline), Version: 150018,
		SystemID: "7", PGData: "/pgdata", WALSegmentSize: segmentSize,
		BeginTime: madeNow.Add(-b.ended - cmp.Or(b.took, time.Hour)), EndTime: madeNow.Add(-b.ended),
		BeginLSN: LSN(b.begin*segmentSize + 0x28).String(), EndLSN: LSN(b.end*segmentSize + 0x100).String(),
		BeginWAL: segmentName(b.timeline, b.begin, segmentSize), EndWAL: segmentName(b.timeline, b.end, segmentSize)}
	if b.status == statusFailed {
		info.EndTime, info.EndWAL, info.EndLSN = time.Time{}, "", ""
	}
	if b.change != nil {
		b.change(info)
	}
	return info
}

// write puts the archive into a bucket under a server name, with the times that the objects would have.
func (a *madeArchive) write(t testing.TB, s *s3Server, bucket, server string) {
	t.Helper()
	put := func(name, content string, ago time.Duration) {
		path := filepath.Join(s.Dir, bucket, server, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		at := madeNow.Add(-ago)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	for i := range a.backups {
		b := &a.backups[i]
		info := b.info()
		text := string(info.marshal())
		if b.zone != time.UTC {
			for _, at := range []time.Time{info.BeginTime, info.EndTime} {
				text = strings.ReplaceAll(text, at.UTC().Format("2006-01-02 15:04:05-07:00"), at.In(b.zone).Format("2006-01-02 15:04:05-07:00"))
			}
		}
		if b.text != nil {
			text = b.text(text)
		}
		dir := "base/" + info.ID + "/"
		put(dir+"data.tar", "data", b.ended)
		put(dir+"data_0001.tar.gz", "more data", b.ended)
		if text != "" {
			put(dir+"backup.info", text, b.ended)
		}
		if b.keep != "" {
			put(dir+"annotations/keep", b.keep, b.ended)
		}
	}
	for timeline, r := range a.wal {
		content := "wal"
		if r[1]-r[0] > 10_000 {
			content = "" // takes no space
		}
		for n := r[0]; n <= r[1]; n++ {
			name := segmentName(timeline, n, segmentSize)
			put("wals/"+name[:16]+"/"+name+[]string{"", ".gz", ".bz2"}[n%3], content, days(1))
		}
	}
	for timeline := range a.timelines {
		if a.noHistory {
			break
		}
		var history string
		for child := timeline; child != 1; child = a.timelines[child].parent {
			f := a.timelines[child]
			history = fmt.Sprintf("%d\t%s\tno recovery target specified\n", f.parent, LSN(f.fork*segmentSize+0x1000)) + history
		}
		put(fmt.Sprintf("wals/%08X.history", timeline), history, days(1))
	}
}

// left is what is in the bucket under a server name: the names of the backups that have a
// backup.info, and the WAL as 1:5-9 2:8-8 (timeline and segment numbers).
func (a *madeArchive) left(t testing.TB, s *s3Server, bucket, server string) (backups, wal []string) {
	t.Helper()
	for i := range a.backups {
		b := &a.backups[i]
		if _, err := os.Stat(filepath.Join(s.Dir, bucket, server, "base", b.info().ID, "backup.info")); err == nil {
			backups = append(backups, b.name)
		}
	}
	filepath.WalkDir(filepath.Join(s.Dir, bucket, server, "wals"), func(path string, d fs.DirEntry, err error) error {
		base, _ := splitSuffix(filepath.Base(path))
		if w, parseErr := parseWALName(base); err == nil && parseErr == nil && w.Kind == walSegment {
			wal = append(wal, fmt.Sprintf("%d:%d", w.Timeline, w.number(segmentSize)))
		}
		return nil
	})
	slices.SortFunc(wal, compareWAL)
	slices.Sort(backups)
	return backups, wal
}

func walPosition(s string) (timeline uint32, n uint64) {
	a, b, _ := strings.Cut(s, ":")
	x, _ := strconv.Atoi(a)
	y, _ := strconv.Atoi(b)
	return uint32(x), uint64(y)
}

func compareWAL(a, b string) int {
	ta, na := walPosition(a)
	tb, nb := walPosition(b)
	return cmp.Or(cmp.Compare(ta, tb), cmp.Compare(na, nb))
}

// ranges writes 1:5 1:6 1:7 as 1:5-7.
func ranges(wal []string) string {
	var out []string
	for i := 0; i < len(wal); {
		timeline, from := walPosition(wal[i])
		to := from
		for i++; i < len(wal); i++ {
			if t, n := walPosition(wal[i]); t != timeline || n != to+1 {
				break
			}
			to++
		}
		out = append(out, fmt.Sprintf("%d:%d-%d", timeline, from, to))
	}
	return strings.Join(out, " ")
}

func without(all, some []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(some, s) })
}

// barmanDelete runs Debian's barman-cloud-backup-delete on many servers of a bucket, in two
// processes with one boto3 session each, since it takes a second to start. It returns the exit
// code for each server.
func barmanDelete(t testing.TB, s *s3Server, bucket string, policies map[string]string) map[string]int {
	t.Helper()
	script := `
import boto3, functools, json, sys
from barman.clients import cloud_backup_delete
boto3.Session = functools.lru_cache(boto3.Session)
codes = {}
for server, policy in json.load(sys.stdin).items():
    try:
        cloud_backup_delete.main(["--cloud-provider", "aws-s3", "--endpoint-url", sys.argv[1], "--retention-policy", policy, sys.argv[2], server])
        codes[server] = 0
    except SystemExit as e:
        codes[server] = e.code or 0
print(json.dumps(codes))
`
	program, err := exec.LookPath("barman-cloud-backup-delete")
	if err != nil {
		t.Fatalf("%v: install it with `make deps` (Debian package barman-cli-cloud)", err)
	}
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	python, _, _ := strings.Cut(strings.TrimPrefix(string(text), "#!"), "\n")
	halves := [2]map[string]string{{}, {}}
	for server, policy := range policies {
		half := halves[0]
		if len(halves[0]) > len(halves[1]) {
			half = halves[1]
		}
		half[server] = policy
	}
	var outputs [2]string
	var both sync.WaitGroup
	for i, half := range halves {
		both.Go(func() {
			input, _ := json.Marshal(half)
			cmd := exec.Command(python, "-c", script, s.Endpoint, "s3://"+bucket)
			cmd.Stdin = strings.NewReader(string(input))
			cmd.Env = append(os.Environ(), barmanEnv(s)...)
			output, err := cmd.Output()
			if outputs[i] = string(output); err != nil {
				outputs[i] = err.Error()
			}
		})
	}
	both.Wait()
	codes := map[string]int{}
	for _, output := range outputs {
		if err := json.Unmarshal([]byte(output), &codes); err != nil {
			t.Fatalf("barman-cloud-backup-delete: %v: %s", err, output)
		}
	}
	if len(codes) != len(policies) {
		t.Fatalf("barman-cloud-backup-delete: %d of %d catalogs", len(codes), len(policies))
	}
	return codes
}

// barmanPolicy is how CloudNativePG words a policy for Barman.
func barmanPolicy(policy string) string {
	unit := map[string]string{"d": "DAYS", "w": "WEEKS", "m": "MONTHS"}[policy[len(policy)-1:]]
	return "RECOVERY WINDOW OF " + policy[:len(policy)-1] + " " + unit
}

// ---------------------------------------------------------------------------
// The decision, against Barman's
// ---------------------------------------------------------------------------

type chosenArchive struct {
	madeArchive
	gone, walGone       string
	barman, barmanWAL   string // "" means the same as above
	barmanRefuses       bool
	problem, keptReason string
}

// chosenArchives come with what goes from them. Where Barman does something else, that is
// written beside it: this is the list of the differences.
var chosenArchives = []chosenArchive{
	{madeArchive: madeArchive{name: "a week", policy: "7d", wal: map[uint32][2]uint64{1: {240, 270}}, backups: []madeBackup{
		{name: "a", ended: days(17), begin: 241}, {name: "b", ended: days(11), begin: 246}, {name: "c", ended: days(10), begin: 258, end: 260},
		{name: "d", ended: days(4), begin: 264}, {name: "e", ended: days(0.2), begin: 270}}},
		gone: "a b", walGone: "1:240-257"},
	{madeArchive: madeArchive{name: "all within the window", policy: "1m", wal: map[uint32][2]uint64{1: {1, 20}}, backups: []madeBackup{
		{name: "a", ended: days(17), begin: 5}, {name: "b", ended: days(1), begin: 10}}}},
	{madeArchive: madeArchive{name: "the last good one is old", policy: "1d", wal: map[uint32][2]uint64{1: {1, 20}}, backups: []madeBackup{
		{name: "a", ended: days(400), begin: 5}, {name: "b", ended: days(300), begin: 10}, {name: "x", ended: days(2), begin: 15, status: statusFailed}}},
		gone: "a x", walGone: "1:1-9", barman: "a"},
	{madeArchive: madeArchive{name: "one backup, none to be deleted", policy: "7d", wal: map[uint32][2]uint64{1: {1, 20}}, backups: []madeBackup{
		{name: "a", ended: days(9), begin: 12}}},
		walGone: "1:1-11", barmanWAL: "-"}, // Barman looks at WAL only when it deletes a backup
	{madeArchive: madeArchive{name: "one young backup", policy: "7d", wal: map[uint32][2]uint64{1: {1, 20}}, backups: []madeBackup{
		{name: "a", ended: days(1), begin: 12}}}},
	{madeArchive: madeArchive{name: "no backup at all", policy: "7d", wal: map[uint32][2]uint64{1: {1, 20}, 2: {20, 25}},
		timelines: map[uint32]madeTimeline{2: {1, 20}}}},
	{madeArchive: madeArchive{name: "failed ones only", policy: "7d", wal: map[uint32][2]uint64{1: {1, 20}}, backups: []madeBackup{
		{name: "x", ended: days(9), begin: 3, status: statusFailed}, {name: "y", ended: days(1), begin: 12, status: statusFailed}}},
		gone: "x", barman: "-"},
	{madeArchive: madeArchive{name: "a failed one that is kept", policy: "7d", wal: map[uint32][2]uint64{1: {1, 20}}, backups: []madeBackup{
		{name: "x", ended: days(29), begin: 3, status: statusFailed, keep: "full"}, {name: "a", ended: days(20), begin: 8}, {name: "b", ended: days(10), begin: 12}}},
		gone: "a", walGone: "1:1-2", barmanWAL: "1:1-11"},
	{madeArchive: madeArchive{name: "kept standalone", policy: "7d", wal: map[uint32][2]uint64{1: {1, 40}}, backups: []madeBackup{
		{name: "a", ended: days(40), begin: 5}, {name: "s", ended: days(30), begin: 10, end: 12, keep: "standalone"}, {name: "b", ended: days(20), begin: 20},
		{name: "c", ended: days(10), begin: 30}, {name: "d", ended: days(1), begin: 38}}},
		gone: "a b", walGone: "1:1-9 1:13-29"},
	{madeArchive: madeArchive{name: "kept in full", policy: "7d", wal: map[uint32][2]uint64{1: {1, 40}}, backups: []madeBackup{
		{name: "a", ended: days(40), begin: 5}, {name: "f", ended: days(30), begin: 10, end: 12, keep: "full"}, {name: "b", ended: days(20), begin: 20},
		{name: "c", ended: days(10), begin: 30}, {name: "d", ended: days(1), begin: 38}}},
		gone: "a b", walGone: "1:1-9"},
	{madeArchive: madeArchive{name: "kept, whatever that means", policy: "7d", wal: map[uint32][2]uint64{1: {1, 40}}, backups: []madeBackup{
		{name: "f", ended: days(30), begin: 10, keep: "standalone\n"}, {name: "g", ended: days(28), begin: 12, keep: "for ever"}, {name: "b", ended: days(20), begin: 20},
		{name: "c", ended: days(10), begin: 30}}},
		gone: "b", walGone: "1:1-9", barmanWAL: "-"},
	{madeArchive: madeArchive{name: "the boundary is kept standalone", policy: "7d", wal: map[uint32][2]uint64{1: {1, 40}}, backups: []madeBackup{
		{name: "a", ended: days(30), begin: 10}, {name: "s", ended: days(10), begin: 20, end: 22, keep: "standalone"}, {name: "b", ended: days(1), begin: 35}}},
		gone: "a", walGone: "1:1-19"},
	{madeArchive: madeArchive{name: "timelines", policy: "7d", timelines: map[uint32]madeTimeline{2: {1, 20}, 3: {2, 30}},
		wal: map[uint32][2]uint64{1: {1, 20}, 2: {20, 30}, 3: {30, 40}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 5}, {name: "b", ended: days(30), begin: 15}, {name: "c", ended: days(20), begin: 25, timeline: 2},
			{name: "d", ended: days(10), begin: 35, timeline: 3}, {name: "e", ended: days(1), begin: 39, timeline: 3}}},
		gone: "a b c", walGone: "1:1-20 2:20-30 3:30-34", barmanWAL: "1:1-20 2:20-24 3:30-34"}, // with Barman c still counts while it is being deleted: its timeline stays until the next time
	{madeArchive: madeArchive{name: "the first on a new timeline", policy: "7d", timelines: map[uint32]madeTimeline{2: {1, 20}},
		wal: map[uint32][2]uint64{1: {1, 20}, 2: {20, 30}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 5}, {name: "b", ended: days(10), begin: 15}, {name: "c", ended: days(5), begin: 25, timeline: 2}}},
		gone: "a", walGone: "1:1-14"},
	{madeArchive: madeArchive{name: "kept in full, and timelines that lead on from it", policy: "7d", timelines: map[uint32]madeTimeline{2: {1, 20}, 3: {2, 30}},
		wal: map[uint32][2]uint64{1: {1, 20}, 2: {20, 30}, 3: {30, 40}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 5}, {name: "f", ended: days(35), begin: 10, keep: "full"}, {name: "b", ended: days(20), begin: 25, timeline: 2},
			{name: "c", ended: days(10), begin: 35, timeline: 3}}},
		gone: "a b", walGone: "1:1-9"},
	{madeArchive: madeArchive{name: "kept in full, and a branch before it", policy: "7d", timelines: map[uint32]madeTimeline{2: {1, 8}, 3: {1, 20}},
		wal: map[uint32][2]uint64{1: {1, 20}, 2: {8, 15}, 3: {20, 40}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 5}, {name: "f", ended: days(35), begin: 10, keep: "full"}, {name: "c", ended: days(10), begin: 35, timeline: 3}}},
		gone: "a", walGone: "1:1-9 2:8-15", barmanWAL: "1:1-9"},
	{madeArchive: madeArchive{name: "a failed one on the old timeline", policy: "7d", timelines: map[uint32]madeTimeline{2: {1, 20}},
		wal: map[uint32][2]uint64{1: {1, 20}, 2: {20, 40}}, backups: []madeBackup{
			{name: "x", ended: days(50), begin: 3, status: statusFailed}, {name: "a", ended: days(40), begin: 5}, {name: "b", ended: days(20), begin: 25, timeline: 2},
			{name: "c", ended: days(10), begin: 35, timeline: 2}}},
		gone: "x a b", walGone: "1:1-20 2:20-34", barman: "a b", barmanWAL: "2:20-34"},
	{madeArchive: madeArchive{name: "a branch that was left", policy: "7d", timelines: map[uint32]madeTimeline{2: {1, 20}, 3: {1, 18}},
		wal: map[uint32][2]uint64{1: {1, 20}, 2: {20, 30}, 3: {18, 40}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 5}, {name: "b", ended: days(30), begin: 25, timeline: 2},
			{name: "c", ended: days(20), begin: 28, timeline: 3}, {name: "d", ended: days(10), begin: 35, timeline: 3}}},
		gone: "a b c", walGone: "1:1-20 2:20-30 3:18-34"},
	{madeArchive: madeArchive{name: "a backup of the primary that lost", policy: "7d", timelines: map[uint32]madeTimeline{2: {1, 20}},
		wal: map[uint32][2]uint64{1: {1, 30}, 2: {20, 30}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 5}, {name: "b", ended: days(20), begin: 15}, {name: "lost", ended: days(10), begin: 25},
			{name: "c", ended: days(5), begin: 24, timeline: 2}}},
		gone: "a", walGone: "1:1-14", barman: "a b", barmanWAL: "1:1-24"}, // with Barman the window has a hole from 10 to 5 days ago
	{madeArchive: madeArchive{name: "no history", policy: "7d", noHistory: true, timelines: map[uint32]madeTimeline{2: {1, 20}},
		wal: map[uint32][2]uint64{1: {1, 20}, 2: {20, 30}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 5}, {name: "b", ended: days(10), begin: 15}, {name: "c", ended: days(5), begin: 25, timeline: 2}}},
		gone: "", walGone: "", barman: "a", barmanWAL: "1:1-14", keptReason: "no 00000002.history"},
	{madeArchive: madeArchive{name: "no history, and it does not matter", policy: "7d", noHistory: true, timelines: map[uint32]madeTimeline{2: {1, 20}},
		wal: map[uint32][2]uint64{1: {1, 20}, 2: {20, 30}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 5}, {name: "b", ended: days(30), begin: 15}, {name: "c", ended: days(8), begin: 25, timeline: 2}}},
		gone: "a b", walGone: "1:1-20 2:20-24", barmanWAL: "1:1-14 2:20-24"},
	{madeArchive: madeArchive{name: "overlapping", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(12), took: days(1), begin: 5, end: 20}, {name: "b", ended: days(12.3), took: days(0.2), begin: 14, end: 16},
		{name: "slow", ended: days(6), took: days(4), begin: 30, end: 50}, {name: "quick", ended: days(8), took: days(1), begin: 35, end: 40},
		{name: "c", ended: days(1), begin: 55}}},
		gone: "a b slow", walGone: "1:1-34"},
	{madeArchive: madeArchive{name: "out of order", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(20), begin: 10}, {name: "b", ended: days(2), begin: 40, id: days(15)}, {name: "c", ended: days(12), begin: 20, id: days(12)},
		{name: "d", ended: days(1), begin: 50}}},
		gone: "a b", walGone: "1:1-19", barmanWAL: "1:1-39"}, // with a Barman deletes what is before b, and c is lost
	{madeArchive: madeArchive{name: "the same second", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(20), begin: 10}, {name: "b", ended: days(10), begin: 20, id: days(11)}, {name: "c", ended: days(10), begin: 20, id: days(11) - time.Second},
		{name: "d", ended: days(10), begin: 20, id: days(11) - 2*time.Second}}},
		gone: "a b c", walGone: "1:1-19"},
	{madeArchive: madeArchive{name: "a clock that was ahead", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(20), begin: 10}, {name: "b", ended: days(-30), begin: 20}, {name: "c", ended: days(10), begin: 30}}},
		gone: "a", walGone: "1:1-19", barmanWAL: "1:1-29"}, // and here b
	{madeArchive: madeArchive{name: "time zones", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(20), begin: 10, zone: time.FixedZone("", 14*3600)}, {name: "b", ended: days(7) + 2*time.Hour, begin: 20, zone: time.FixedZone("", -11*3600)},
		{name: "c", ended: days(7) - 2*time.Hour, begin: 30, zone: time.FixedZone("", 9*3600+1800)}, {name: "d", ended: days(1), begin: 40}}},
		gone: "a", walGone: "1:1-19"},
	{madeArchive: madeArchive{name: "incremental", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(20), begin: 10, text: func(s string) string { return s + "children_backup_ids=20250101T000000\n" }}, {name: "b", ended: days(10), begin: 20}}},
		barmanRefuses: true, keptReason: "incremental"}, // 3.4 does not know the line
	{madeArchive: madeArchive{name: "a former cluster of that name", policy: "7d", timelines: map[uint32]madeTimeline{2: {1, 4}},
		wal: map[uint32][2]uint64{1: {1, 60}, 2: {4, 10}}, backups: []madeBackup{
			{name: "a", ended: days(40), begin: 10, change: func(b *BackupInfo) { b.SystemID = "6" }}, {name: "b", ended: days(20), begin: 5, timeline: 2, change: func(b *BackupInfo) { b.SystemID = "6" }},
			{name: "c", ended: days(1), begin: 50}}},
		gone: "a", walGone: "", barmanWAL: "2:4-4"},
	{madeArchive: madeArchive{name: "absurd timeline", policy: "7d", wal: map[uint32][2]uint64{1: {1, 20}}, backups: []madeBackup{
		{name: "a", ended: days(40), begin: 10, change: func(b *BackupInfo) { b.SystemID = "6" }}, {name: "b", ended: days(20), begin: 5, timeline: 0xfffffff0}}},
		gone: "a", walGone: "1:1-20", barmanWAL: "-"},
	{madeArchive: madeArchive{name: "without children", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(20), begin: 10, text: func(s string) string { return s + "children_backup_ids=None\nparent_backup_id=None\n" }}, {name: "b", ended: days(10), begin: 20}}},
		gone: "a", walGone: "1:1-19", barmanRefuses: true},
	{madeArchive: madeArchive{name: "unreadable, with known neighbours", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(40), begin: 10}, {name: "b", ended: days(30), begin: 20}, {name: "bad", ended: days(25), begin: 25, text: func(string) string { return "rubbish" }},
		{name: "c", ended: days(20), begin: 30}, {name: "d", ended: days(10), begin: 40}}},
		gone: "a b c", walGone: "1:1-19", barmanRefuses: true, problem: "cannot be understood"},
	{madeArchive: madeArchive{name: "unreadable, the oldest", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "bad", ended: days(45), begin: 5, text: func(string) string { return "rubbish" }}, {name: "a", ended: days(40), begin: 10}, {name: "d", ended: days(10), begin: 40}}},
		gone: "a", barmanRefuses: true, problem: "cannot be understood"},
	{madeArchive: madeArchive{name: "of unknown status", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(40), begin: 10}, {name: "w", ended: days(30), begin: 20, status: "WAITING_FOR_WALS"}, {name: "d", ended: days(10), begin: 40}}},
		gone: "a", walGone: "1:1-19", keptReason: "WAITING_FOR_WALS"},
	{madeArchive: madeArchive{name: "in progress, without an end", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(40), begin: 10}, {name: "run", ended: days(0.1), took: days(39), begin: 20, status: "STARTED", change: func(b *BackupInfo) { b.EndTime = time.Time{} }},
		{name: "d", ended: days(10), begin: 40}}},
		gone: "a", walGone: "1:1-19", keptReason: "STARTED", barmanWAL: "1:1-39"},
	{madeArchive: madeArchive{name: "in progress for days", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(40), begin: 10}, {name: "run", ended: days(0.1), took: days(13), begin: 20, text: func(string) string { return "" }},
		{name: "d", ended: days(10), begin: 40}}},
		gone: "a", walGone: "1:1-9", keptReason: "in progress", barmanWAL: "1:1-39"},
	{madeArchive: madeArchive{name: "DONE without an end", policy: "7d", wal: map[uint32][2]uint64{1: {1, 60}}, backups: []madeBackup{
		{name: "a", ended: days(40), begin: 10}, {name: "odd", ended: days(30), begin: 20, change: func(b *BackupInfo) { b.EndTime = time.Time{} }},
		{name: "d", ended: days(10), begin: 40}}},
		gone: "a", walGone: "1:1-19", keptReason: "does not say when", barman: "a odd", barmanWAL: "1:1-39"},
}

func words(s string) []string { return strings.Fields(strings.Trim(s, "-")) }

func TestRetentionChosen(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	policies := map[string]string{}
	for i, c := range chosenArchives {
		for _, who := range []string{"ours", "barman"} {
			c.write(t, s, bucket, fmt.Sprintf("%s-%d", who, i))
		}
		policies[fmt.Sprintf("barman-%d", i)] = barmanPolicy(c.policy)
	}
	codes := barmanDelete(t, s, bucket, policies)
	for i, c := range chosenArchives {
		t.Run(c.name, func(t *testing.T) {
			server := fmt.Sprintf("ours-%d", i)
			store := testStore(t, s, bucket, server)
			before, walBefore := c.left(t, s, bucket, server)
			check := func(server, gone, walGone string) {
				t.Helper()
				backups, wal := c.left(t, s, bucket, server)
				if got := without(before, backups); !slices.Equal(got, slices.Sorted(slices.Values(words(gone)))) {
					t.Errorf("%s: the backups that went are %q, want %q", server, got, gone)
				}
				if got := ranges(without(walBefore, wal)); got != strings.Join(words(walGone), " ") {
					t.Errorf("%s: the WAL that went is %q, want %q", server, got, walGone)
				}
				if n := len(s.keys(t, bucket, server+"/wals/0000000")) - len(wal); !c.noHistory && n != len(c.timelines) {
					t.Errorf("%s: %d history files of %d", server, n, len(c.timelines))
				}
			}
			dry, err := store.enforceRetention(t.Context(), retentionOptions{Policy: c.policy, Now: time.Now(), DryRun: true})
			if err != nil {
				t.Fatal(err)
			}
			check(server, "", "")
			keys := len(s.keys(t, bucket, server+"/"))
			r, err := store.enforceRetention(t.Context(), retentionOptions{Policy: c.policy, Now: time.Now()})
			if err != nil {
				t.Fatal(err)
			}
			check(server, c.gone, c.walGone)
			if left := len(s.keys(t, bucket, server+"/")); r.Objects != keys-left || dry.Objects != r.Objects {
				t.Errorf("%d objects went, the report says %d, that of the dry run %d", keys-left, r.Objects, dry.Objects)
			}
			if problems := strings.Join(r.Problems, "\n"); !strings.Contains(problems, c.problem) || c.problem == "" && problems != "" {
				t.Errorf("problems: %q, want %q", problems, c.problem)
			}
			if why := fmt.Sprint(r.Backups); !strings.Contains(why, c.keptReason) {
				t.Errorf("%q is not among the reasons:\n%s", c.keptReason, why)
			}
			// Where WAL was deleted on purpose there is no gap.
			if coverage, err := walCoverage(t.Context(), store, r.Catalog); err != nil || slices.ContainsFunc(coverage, func(w *timelineWAL) bool { return w.Missing > 0 }) {
				t.Errorf("gaps: %+v, %v", coverage, err)
			}
			if again, err := store.enforceRetention(t.Context(), retentionOptions{Policy: c.policy, Now: time.Now()}); err != nil || again.Objects != 0 && c.name != "unreadable, the oldest" {
				t.Errorf("the second run deleted %d objects: %v", again.Objects, err)
			}

			server = fmt.Sprintf("barman-%d", i)
			if refuses := codes[server] != 0; refuses != c.barmanRefuses {
				t.Errorf("Barman ended with %d", codes[server])
			} else if refuses {
				check(server, "", "")
			} else {
				check(server, cmp.Or(c.barman, c.gone), cmp.Or(c.barmanWAL, c.walGone))
			}
		})
	}
}

// generateArchive makes up the life of a cluster: backups that fail, overlap and are kept, failovers,
// recoveries in place, primaries that went on after they had lost, and wrong clocks.
func generateArchive(r *rand.Rand) madeArchive {
	a := madeArchive{policy: []string{"1d", "3d", "7d", "2w", "1m"}[r.Intn(5)], timelines: map[uint32]madeTimeline{}, wal: map[uint32][2]uint64{1: {240, 240}}}
	current, last := uint32(1), uint32(1)
	at := map[uint32]uint64{1: 240}
	begin := func(fork uint64) {
		last++
		a.timelines[last], at[last], a.wal[last] = madeTimeline{current, fork}, fork, [2]uint64{fork, fork}
		current = last
	}
	ids := map[string]bool{}
	for ago := days(45); ago > 3*time.Hour; ago -= time.Duration(12+r.Intn(90))*time.Hour + 17*time.Minute {
		at[current] += uint64(1 + r.Intn(3))
		timeline := current
		switch n := r.Intn(100); {
		case n < 8:
			begin(at[current])
		case n < 11 && at[current] > a.wal[current][0]+5:
			begin(at[current] - uint64(r.Intn(5)))
		case n < 16 && current > 1:
			timeline = a.timelines[current].parent
			at[timeline]++
			fallthrough
		case n < 75:
			b := madeBackup{name: fmt.Sprintf("b%02d", len(a.backups)), ended: ago, took: time.Duration(1+r.Intn(3)) * time.Hour, timeline: timeline, begin: at[timeline]}
			b.end = b.begin + uint64(r.Intn(3))
			at[timeline] = b.end
			switch n := r.Intn(100); {
			case n < 15:
				b.status = statusFailed
			case n < 20:
				b.keep = "full"
			case n < 28:
				b.keep = "standalone"
			case n < 34:
				b.id, b.ended = b.ended+b.took, b.ended+time.Duration(r.Intn(6*24)-3*24)*time.Hour
			case n < 40:
				b.took = days(2)
			}
			if id := b.backupID(); !ids[id] {
				ids[id] = true
				a.backups = append(a.backups, b)
			}
		}
		for timeline := range a.wal {
			a.wal[timeline] = [2]uint64{a.wal[timeline][0], at[timeline]}
		}
	}
	return a
}

// onLine says whether recovery from backup b can end where backup n is.
func (a *madeArchive) onLine(n, b *madeBackup) bool {
	for t := n.timeline; t != b.timeline; t = a.timelines[t].parent {
		f, ok := a.timelines[t]
		if !ok {
			return false
		}
		if f.parent == b.timeline {
			return b.end <= f.fork
		}
	}
	return true
}

// needs says whether recovery from b may read a segment.
func (a *madeArchive) needs(b *madeBackup, timeline uint32, n uint64) bool {
	for timeline != b.timeline {
		f, ok := a.timelines[timeline]
		if !ok {
			return false
		}
		timeline, n = f.parent, f.fork
	}
	return n >= b.begin
}

// expect says what must be left, given what Barman left: the same backups, except for the two
// differences that are documented, and of the WAL whatever a backup that is left may need,
// and whatever comes after the backup with which the window begins.
func (a *madeArchive) expect(since time.Time, barman, wal []string) (backups, left []string) {
	byID := slices.SortedFunc(slices.Values(a.backups), func(x, y madeBackup) int { return strings.Compare(x.backupID(), y.backupID()) })
	var newest, boundary *madeBackup
	for i := range byID {
		if byID[i].status != statusFailed {
			newest = &byID[i]
		}
	}
	covers := func(b *madeBackup) bool {
		return b.status != statusFailed && madeNow.Add(-b.ended).Before(since) && a.onLine(newest, b)
	}
	for i := range byID {
		if covers(&byID[i]) {
			boundary = &byID[i]
		}
	}
	var full, alone []*madeBackup
	for i := range byID {
		b := &byID[i]
		covered := slices.ContainsFunc(byID[i+1:], func(later madeBackup) bool { return covers(&later) })
		if b.status == statusFailed {
			if !b.info().BeginTime.Before(since) {
				backups = append(backups, b.name)
			}
			continue
		}
		if !covered || slices.Contains(barman, b.name) {
			backups = append(backups, b.name)
		}
		switch {
		case !covered || b.keep == "full":
			full = append(full, b)
		case b.keep == "standalone":
			alone = append(alone, b)
		}
	}
	for _, w := range wal {
		timeline, n := walPosition(w)
		needed := boundary == nil || timeline > boundary.timeline || timeline == boundary.timeline && n >= boundary.begin ||
			slices.ContainsFunc(full, func(b *madeBackup) bool { return a.needs(b, timeline, n) }) ||
			slices.ContainsFunc(alone, func(b *madeBackup) bool { return b.timeline == timeline && b.begin <= n && n <= b.end })
		if needed {
			left = append(left, w)
		}
	}
	slices.Sort(backups)
	return backups, left
}

func TestRetentionGenerated(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	r := rand.New(rand.NewSource(20261122))
	archives := make([]madeArchive, 100)
	policies := map[string]string{}
	for i := range archives {
		archives[i] = generateArchive(r)
		for _, who := range []string{"ours", "barman"} {
			archives[i].write(t, s, bucket, fmt.Sprintf("%s-%d", who, i))
		}
		policies[fmt.Sprintf("barman-%d", i)] = barmanPolicy(archives[i].policy)
	}
	for server, code := range barmanDelete(t, s, bucket, policies) {
		if code != 0 {
			t.Errorf("Barman ended with %d on %s", code, server)
		}
	}
	var backups, gone, same, sameWAL, lost, late int
	for i := range archives {
		a := &archives[i]
		server, other := fmt.Sprintf("ours-%d", i), fmt.Sprintf("barman-%d", i)
		_, before := a.left(t, s, bucket, server)
		barman, barmanWAL := a.left(t, s, bucket, other)
		run, err := testStore(t, s, bucket, server).enforceRetention(t.Context(), retentionOptions{Policy: a.policy, Now: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		if len(run.Problems) > 0 {
			t.Errorf("%d: %q", i, run.Problems)
		}
		ours, oursWAL := a.left(t, s, bucket, server)
		want, wantWAL := a.expect(*run.Since, barman, before)
		if !slices.Equal(ours, want) {
			t.Errorf("%d, %s: the backups that are left are %q, want %q; with Barman %q", i, a.policy, ours, want, barman)
		}
		if !slices.Equal(oursWAL, wantWAL) {
			t.Errorf("%d, %s: the WAL that is left is %q, want %q; with Barman %q", i, a.policy, ranges(oursWAL), ranges(wantWAL), ranges(barmanWAL))
		}
		if t.Failed() {
			t.Fatalf("%d: %+v", i, *a)
		}
		backups, gone = backups+len(a.backups), gone+len(a.backups)-len(ours)
		if slices.Equal(ours, barman) {
			same++
		}
		if slices.Equal(oursWAL, barmanWAL) {
			sameWAL++
		}
		if len(without(oursWAL, barmanWAL)) > 0 {
			lost++
		}
		if len(without(barmanWAL, oursWAL)) > 0 {
			late++
		}
	}
	t.Logf("%d backups in %d archives, of which %d went; the same backups as with Barman in %d archives, the same WAL in %d; in %d Barman keeps WAL that no backup needs, in %d it deletes WAL that one needs",
		backups, len(archives), gone, same, sameWAL, late, lost)
	if gone == 0 || same == 0 {
		t.Error("nothing was compared")
	}
}

// ---------------------------------------------------------------------------
// The run
// ---------------------------------------------------------------------------

// aWeek is the archive that the runs below start from: a and b go, and WAL 1:240-257.
func aWeek() madeArchive { return chosenArchives[0].madeArchive }

// offered checks that every backup that a restore may choose is whole, and so is its WAL.
func offered(t *testing.T, s *s3Server, bucket string, store *Store) (names []string) {
	t.Helper()
	c, err := store.Catalog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range c.Backups {
		if _, err := chooseBackup(c, &RecoveryTarget{BackupID: b.ID}, timelineHistories{}); err != nil {
			continue
		}
		names = append(names, b.BackupName)
		if archives, err := listArchives(t.Context(), store, b); err != nil || len(archives) != 2 {
			t.Errorf("%s is offered, and has %d archives: %v", b.BackupName, len(archives), err)
		}
		if err := checkFirstWAL(t.Context(), store, b); err != nil {
			t.Errorf("%s is offered: %v", b.BackupName, err)
		}
	}
	return names
}

// A run is killed at each of its requests that changes something, before the server hears of it and
// after: no half backup is ever offered, and the next run finishes what it began.
func TestRetentionKilled(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	a := aWeek()
	change := regexp.MustCompile(`delete=|uploadId=`)
	for i, point := range []struct {
		what string
		skip int
		do   faultAction
	}{
		{"before backup.info", 0, stallRequest}, {"after backup.info", 0, delayReply}, {"before the archives", 1, stallRequest},
		{"after the archives", 1, delayReply}, {"before the WAL", 2, stallRequest}, {"after the WAL", 2, delayReply},
	} {
		t.Run(point.what, func(t *testing.T) {
			server := fmt.Sprintf("main-%d", i)
			a.write(t, s, bucket, server)
			proxy := startFaultProxy(t, s)
			f := proxy.add(fault{Method: "POST", Path: change, Skip: point.skip, Times: 1, Do: point.do, Delay: hang})
			cmd := exec.Command(program(t), "retention", "--objectstore", storeFileAt(t, s, proxy.Endpoint, "s3://"+bucket), "--server-name", server, "--policy", "7d")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "the request", func() bool { return proxy.hits(f) == 1 })
			if point.do == delayReply {
				waitFor(t, "the server to have done it", func() bool {
					keys := s.keys(t, bucket, server+"/")
					return []int{5*3 + 31 - 2, 3*3 + 31, 3*3 + 13}[point.skip] == len(keys)
				})
			}
			cmd.Process.Kill()
			cmd.Wait()

			store := testStore(t, s, bucket, server)
			want := []string{"a", "b", "c", "d", "e"}
			if point.skip > 0 || point.do == delayReply {
				want = want[2:]
			}
			if got := offered(t, s, bucket, store); !slices.Equal(got, want) {
				t.Errorf("%q are offered, want %q", got, want)
			}
			rows, err := store.Catalog(t.Context())
			if err != nil || len(rows.Backups) != len(want) {
				t.Errorf("%d backups, %v", len(rows.Backups), err)
			}
			if _, err := store.enforceRetention(t.Context(), retentionOptions{Policy: "7d", Now: time.Now()}); err != nil {
				t.Fatal(err)
			}
			if keys := s.keys(t, bucket, server+"/"); len(keys) != 3*3+13 {
				t.Errorf("the next run left %d objects: %q", len(keys), keys)
			}
			if got := offered(t, s, bucket, store); !slices.Equal(got, []string{"c", "d", "e"}) {
				t.Errorf("%q are offered after the next run", got)
			}
		})
	}
}

// Objects that the server does not let go stay, are named, and end nothing. A backup whose
// backup.info stays is a backup: its data and its WAL stay too.
func TestRetentionRefused(t *testing.T) {
	s := testS3(t)
	locked := "locked-bucket"
	if _, err := s.client.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: &locked, ObjectLockEnabledForBucket: aws.Bool(true)}); err != nil {
		t.Fatal(err)
	}
	a := aWeek()
	hold := func(key string) {
		if _, err := s.client.PutObjectLegalHold(t.Context(), &s3.PutObjectLegalHoldInput{Bucket: &locked, Key: &key,
			LegalHold: &s3types.ObjectLockLegalHold{Status: s3types.ObjectLockLegalHoldStatusOn}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name    string
		held    string
		left    []string
		wal     string
		refused int
	}{
		{"archive", "base/" + a.backups[0].backupID() + "/data.tar", []string{"c", "d", "e"}, "1:240-257", 1},
		{"info", "base/" + a.backups[1].backupID() + "/backup.info", []string{"b", "c", "d", "e"}, "1:240-245", 1},
		{"wal", "wals/0000000100000001/000000010000000100000000.gz", []string{"c", "d", "e"}, "1:240-255 1:257-257", 1},
	} {
		for _, batch := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, batches %v", c.name, batch), func(t *testing.T) {
				server := fmt.Sprintf("%s-%v", c.name, batch)
				a.write(t, s, locked, server)
				hold(server + "/" + c.held)
				_, before := a.left(t, s, locked, server)
				store := testStore(t, s, locked, server)
				store.noBatchDelete.Store(!batch)
				r, err := store.enforceRetention(t.Context(), retentionOptions{Policy: "7d", Now: time.Now()})
				if err != nil {
					t.Fatal(err)
				}
				if r.Refused != c.refused || len(r.Problems) != c.refused || !strings.Contains(r.Problems[0], server+"/") {
					t.Errorf("%d refused, %q", r.Refused, r.Problems)
				}
				if got := offered(t, s, locked, store); !slices.Equal(got, c.left) {
					t.Errorf("%q are offered, want %q", got, c.left)
				}
				_, wal := a.left(t, s, locked, server)
				if got := ranges(without(before, wal)); got != c.wal {
					t.Errorf("the WAL that went is %s, want %s", got, c.wal)
				}
			})
		}
	}
}

// Servers without DeleteObjects get single requests, and those that want a Content-MD5 get it.
func TestRetentionBatches(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	a := aWeek()
	for i, f := range []fault{{HTTP: 501, Code: "NotImplemented"}, {HTTP: 400, Code: "MissingContentMD5"}, {HTTP: 400, Code: "MalformedXML"}, {HTTP: 405, Code: "MethodNotAllowed"}, {}} {
		proxy := startFaultProxy(t, s)
		server := fmt.Sprintf("main-%d", i)
		a.write(t, s, bucket, server)
		if f.HTTP != 0 {
			f.Method, f.Path, f.Do = "POST", regexp.MustCompile("delete="), answerError
			proxy.add(f)
		}
		var sums atomic.Int64
		front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "POST" && r.Header.Get("Content-MD5") != "" && r.Header.Get("x-amz-checksum-crc32") == "" {
				sums.Add(1)
			}
			proxy.ServeHTTP(w, r)
		}))
		defer front.Close()
		store := testStoreFile(t, storeFileAt(t, s, front.URL, "s3://"+bucket), server)
		if _, err := store.enforceRetention(t.Context(), retentionOptions{Policy: "7d", Now: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if n := len(s.keys(t, bucket, server+"/")); n != 3*3+13 {
			t.Errorf("%s: %d objects are left", f.Code, n)
		}
		batches, singles := len(proxy.seen(regexp.MustCompile("^POST .*delete="))), len(proxy.seen(regexp.MustCompile("^DELETE ")))
		if f.HTTP != 0 && (batches != 1 || singles != 2*3+18) || f.HTTP == 0 && (batches != 3 || singles != 0) || sums.Load() != int64(batches) {
			t.Errorf("%q: %d batches, %d single requests, %d sums", f.Code, batches, singles, sums.Load())
		}
	}
	// What is no refusal of one object, nor of the request as such, ends the run.
	proxy := startFaultProxy(t, s)
	a.write(t, s, bucket, "main")
	proxy.add(fault{Method: "POST", Do: answerError, HTTP: 400, Code: "ExpiredToken"})
	store := testStoreFile(t, storeFileAt(t, s, proxy.Endpoint, "s3://"+bucket), "main")
	if _, err := store.enforceRetention(t.Context(), retentionOptions{Policy: "7d", Now: time.Now()}); err == nil || !strings.Contains(err.Error(), "ExpiredToken") {
		t.Error(err)
	}
}

// age makes everything below a prefix look so old. versitygw keeps the parts of uploads elsewhere.
func (s *s3Server) age(t *testing.T, bucket, below string, ago time.Duration) {
	t.Helper()
	at := time.Now().Add(-ago)
	if err := filepath.WalkDir(filepath.Join(s.Dir, bucket, below), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, at, at)
	}); err != nil {
		t.Fatal(err)
	}
}

// What a killed Pod leaves behind goes when nothing was written to it for a day, and not while
// a backup is being taken; nothing that is not of the layout goes at all.
func TestRetentionDebris(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	begin := func(key string) {
		t.Helper()
		u, err := s.client.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: &bucket, Key: &key})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.client.UploadPart(t.Context(), &s3.UploadPartInput{Bucket: &bucket, Key: &key, UploadId: u.UploadId, PartNumber: aws.Int32(1),
			Body: strings.NewReader("part")}); err != nil {
			t.Fatal(err)
		}
	}
	id := func(ago time.Duration) string { return time.Now().UTC().Add(-ago).Format(backupIDLayout) }
	old, kept, foreign := id(days(3)), id(days(4)), "wals/0000000100000000/notes.txt"
	for _, server := range []string{"a", "a-b"} {
		for _, key := range []string{"base/" + old + "/data.tar", "base/" + old + "/notes.txt", "base/" + kept + "/data.tar", "base/" + kept + "/annotations/keep",
			"base/README", "base/other/data.tar", foreign, "wals/00000001.history", "hello"} {
			s.write(t, bucket, server+"/"+key, []byte("# x"))
		}
		begin(server + "/base/" + old + "/16384.tar")
		begin(server + "/base/" + id(days(5)) + "/data.tar") // an upload and nothing else
		begin(server + "/wals/0000000100000000/000000010000000000000001")
		begin(server + "/mine")
	}
	a := testStore(t, s, bucket, "a")
	enforce := func(now time.Time, running bool, objects, uploads int) *retentionReport {
		t.Helper()
		before, uploadsBefore := len(s.keys(t, bucket, "a/")), len(s.uploads(t, bucket))
		r, err := a.enforceRetention(t.Context(), retentionOptions{Now: now, BackupRunning: running})
		if err != nil {
			t.Fatal(err)
		}
		if n, u := before-len(s.keys(t, bucket, "a/")), uploadsBefore-len(s.uploads(t, bucket)); n != objects || u != uploads {
			t.Errorf("%d objects and %d uploads went, want %d and %d: %+v", n, u, objects, uploads, r)
		}
		return r
	}
	enforce(time.Now(), false, 0, 0)
	s.age(t, bucket, "a", days(2))
	if r := enforce(time.Now(), false, 0, 0); !strings.Contains(fmt.Sprint(r.Backups), old) { // its upload is young
		t.Errorf("%+v", r.Backups)
	}
	s.age(t, bucket, ".sgwtmp/multipart", days(2))
	enforce(time.Now(), true, 0, 0)
	if r := enforce(time.Now(), false, 1, 3); !slices.Equal(r.Debris[:1], []string{old}) || len(r.Debris) != 4 { // and the keys of the uploads
		t.Errorf("%q", r.Debris)
	}
	enforce(time.Now(), false, 0, 0)
	if n := len(s.keys(t, bucket, "a-b/")); n != 9 {
		t.Errorf("%d objects of the other server are left", n)
	}

	// A server that does not list uploads: nothing is taken for abandoned, and it is said.
	proxy := startFaultProxy(t, s)
	proxy.add(fault{Method: "GET", Path: regexp.MustCompile(`\?.*uploads`), Do: answerError, HTTP: 501, Code: "NotImplemented"})
	b := testStoreFile(t, storeFileAt(t, s, proxy.Endpoint, "s3://"+bucket), "a-b")
	s.age(t, bucket, "a-b", days(2))
	if r, err := b.enforceRetention(t.Context(), retentionOptions{Now: time.Now()}); err != nil || len(r.Problems) != 1 || r.Objects != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// A server that says once, wrongly, that there is no such backup.info loses nobody a backup, nor its WAL.
func TestRetentionLied(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	a := aWeek()
	a.write(t, s, bucket, "main")
	s.age(t, bucket, "main", days(2))
	before, _ := a.left(t, s, bucket, "main")
	for i := range a.backups {
		proxy := startFaultProxy(t, s)
		proxy.add(fault{Method: "GET", Path: regexp.MustCompile(a.backups[i].backupID() + `/backup\.info`), Do: answerError, HTTP: http.StatusNotFound, Code: "NoSuchKey"})
		store := testStoreFile(t, storeFileAt(t, s, proxy.Endpoint, "s3://"+bucket), "main")
		r, err := store.enforceRetention(t.Context(), retentionOptions{Now: time.Now()})
		if backups, _ := a.left(t, s, bucket, "main"); err != nil || !slices.Equal(backups, before) || len(r.Debris) > 0 {
			t.Errorf("%s: %q are left of %q: %+v, %v", a.backups[i].name, backups, before, r, err)
		}
	}
}

// A backup that runs has its archives in unfinished uploads, which no listing shows. Its WAL
// stays all the same, from the beginning of the backup before it.
func TestRetentionBackupUnderWay(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	a := aWeek()
	a.write(t, s, bucket, "main")
	id := a.backups[1].info().BeginTime.Add(36 * time.Hour).Format(backupIDLayout) // it has been running since b
	key := "main/base/" + id + "/data.tar"
	if _, err := s.client.CreateMultipartUpload(t.Context(), &s3.CreateMultipartUploadInput{Bucket: &bucket, Key: &key}); err != nil {
		t.Fatal(err)
	}
	_, before := a.left(t, s, bucket, "main")
	for _, c := range []struct {
		ago     time.Duration
		running bool
		wal     string
		uploads int
	}{{0, false, "1:240-245", 1}, {days(2), true, "1:240-245", 1}, {days(2), false, "1:240-257", 0}} {
		s.age(t, bucket, ".sgwtmp/multipart", c.ago)
		r, err := testStore(t, s, bucket, "main").enforceRetention(t.Context(), retentionOptions{Policy: "7d", Now: time.Now(), BackupRunning: c.running})
		if err != nil {
			t.Fatal(err)
		}
		backups, wal := a.left(t, s, bucket, "main")
		if got := ranges(without(before, wal)); got != c.wal || !slices.Equal(backups, []string{"c", "d", "e"}) || len(s.uploads(t, bucket)) != c.uploads {
			t.Errorf("%+v: the WAL that went is %s, %q are left: %+v", c, got, backups, r.Backups)
		}
	}
}

// Nothing goes when the policy or a clock is wrong, or a history file cannot be read.
func TestRetentionCareful(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	a := aWeek()
	a.write(t, s, bucket, "main")
	store := testStore(t, s, bucket, "main")
	n := len(s.keys(t, bucket, "main/"))
	for _, c := range []struct {
		o    retentionOptions
		says string
	}{
		{retentionOptions{Policy: "7d", Now: time.Now().Add(days(3))}, "correct the clock"},
		{retentionOptions{Policy: "7d", Now: time.Now().Add(-days(3))}, "correct the clock"},
		{retentionOptions{Policy: "0d", Now: time.Now()}, "retentionPolicy \"0d\""},
		{retentionOptions{Policy: "7", Now: time.Now()}, "such as 30d"},
		{retentionOptions{Policy: "7D", Now: time.Now()}, "such as 30d"},
		{retentionOptions{Policy: " 7d", Now: time.Now()}, "such as 30d"},
		{retentionOptions{Policy: "RECOVERY WINDOW OF 7 DAYS", Now: time.Now()}, "such as 30d"},
		{retentionOptions{Now: time.Now()}, ""},
		{retentionOptions{Policy: "99999999999999999999999m", Now: time.Now()}, ""},
		{retentionOptions{Policy: "7d", Now: time.Now(), DryRun: true}, ""},
	} {
		_, err := store.enforceRetention(t.Context(), c.o)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%+v: %v", c.o, err)
		}
		if left := len(s.keys(t, bucket, "main/")); left != n {
			t.Fatalf("%+v: %d of %d objects are left", c.o, left, n)
		}
	}
	for policy, want := range map[string]time.Duration{"1d": days(1), "2w": days(14), "3m": days(93), "100000000d": days(maxWindow)} {
		if got, err := parseRetentionPolicy(policy); got != want || err != nil {
			t.Errorf("%s: %v, %v", policy, got, err)
		}
	}
	// A month has 31 days, whatever the calendar says.
	for now, since := range map[string]string{"2024-03-31": "2024-02-29", "2024-03-01": "2024-01-30", "2025-03-01": "2025-01-29", "2024-02-29": "2024-01-29", "2025-01-31": "2024-12-31"} {
		at, err := time.Parse(time.DateOnly, now)
		if err != nil {
			t.Fatal(err)
		}
		window, _ := parseRetentionPolicy("1m")
		if got := at.Add(-window).Format(time.DateOnly); got != since {
			t.Errorf("a month before %s: %s, want %s", now, got, since)
		}
	}

	old := chosenArchives[slices.IndexFunc(chosenArchives, func(c chosenArchive) bool { return c.name == "timelines" })]
	old.write(t, s, bucket, "damaged")
	s.write(t, bucket, "damaged/wals/00000002.history", []byte("not a history"))
	r, err := testStore(t, s, bucket, "damaged").enforceRetention(t.Context(), retentionOptions{Policy: "7d", Now: time.Now()})
	if err != nil || len(r.Problems) != 1 || !strings.Contains(r.Problems[0], "00000002.history: damaged") {
		t.Errorf("%q, %v", r.Problems, err)
	}
	if backups, wal := old.left(t, s, bucket, "damaged"); ranges(wal) != "3:35-40" || !slices.Equal(backups, []string{"d", "e"}) {
		t.Errorf("%q, %s", backups, ranges(wal))
	}
}

// The subcommand: what --dry-run tells, where the policy comes from, exit codes.
func TestRetentionCommand(t *testing.T) {
	s, bucket := testS3(t), newBucket(t)
	a := aWeek()
	a.write(t, s, bucket, "main")
	file := storeFile(t, s, bucket)
	if r := runProgram(t, nil, "retention", "--objectstore", file, "--server-name", "main"); r.Code != exitUsage || !strings.Contains(r.Stderr, "has no retentionPolicy") {
		t.Errorf("%+v", r)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(text), "spec:", "spec:\n  retentionPolicy: 7d", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	ids := func(i int) string { return a.backups[i].backupID() }
	r := runProgram(t, nil, "retention", "--objectstore", file, "--server-name", "main", "--dry-run")
	for _, want := range []string{"The recovery window of 7d begins at ", ids(0) + "  DONE    would go  the window can be recovered from " + ids(2),
		ids(4) + "  DONE    stays     it ended within the window", "WAL of timeline 1, 0000000100000000000000F0 to 000000010000000100000001: 18 objects, 54 B, would go",
		"24 objects in all"} {
		if r.Code != 0 || !strings.Contains(r.Stdout, want) {
			t.Errorf("no %q in:\n%s%s", want, r.Stdout, r.Stderr)
		}
	}
	if r = runProgram(t, nil, "retention", "--objectstore", file, "--server-name", "main", "--policy", "1m"); !strings.Contains(r.Stdout, "\n0 objects in all") {
		t.Errorf("%s%s", r.Stdout, r.Stderr)
	}
	r = runProgram(t, nil, "retention", "--objectstore", file, "--server-name", "main", "--json")
	var report retentionReport
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil || r.Code != 0 || report.Objects != 24 || len(report.Backups) != 5 || report.WAL[0].Objects != 18 {
		t.Errorf("%v: %+v", err, r)
	}
	s.write(t, bucket, "main/base/20200101T000000/backup.info", []byte("rubbish"))
	if r = runProgram(t, nil, "retention", "--objectstore", file, "--server-name", "main"); r.Code != exitFailed || !strings.Contains(r.Stdout, "20200101T000000  UNREADABLE") {
		t.Errorf("%+v", r)
	}
}

// A large archive needs no more memory than a small one. RETENTION_OBJECTS=1000000 makes it a
// million objects.
func TestRetentionMemory(t *testing.T) {
	n := 20_000
	if v := os.Getenv("RETENTION_OBJECTS"); v != "" {
		n, _ = strconv.Atoi(v)
	}
	s, bucket := testS3(t), newBucket(t)
	a := madeArchive{wal: map[uint32][2]uint64{1: {256, 256 + uint64(n) - 1}}, backups: []madeBackup{
		{name: "a", ended: days(20), begin: 300}, {name: "b", ended: days(10), begin: 256 + uint64(n) - 100}}}
	a.write(t, s, bucket, "main")
	file := storeFile(t, s, bucket)
	runs := []string{"--dry-run", "--policy=7d"}
	if n > 200_000 { // the deletion takes the S3 server half an hour
		runs = runs[:1]
	}
	for _, arg := range runs {
		cmd := exec.Command(program(t), "retention", "--objectstore", file, "--server-name", "main", "--policy", "7d", "--json", arg)
		start := time.Now()
		var out, log bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kib := 0 // not by rusage, which begins with the size of this process
		stop := every(10*time.Millisecond, func() { kib = max(kib, peakMemory(cmd.Process.Pid)) })
		err := cmd.Wait()
		stop()
		if err != nil || kib == 0 {
			t.Fatalf("%v, peak memory %d KiB: %s", err, kib, log.String())
		}
		var r retentionReport
		if err := json.Unmarshal(out.Bytes(), &r); err != nil || r.Objects != n-100+3 {
			t.Errorf("%d objects, %v", r.Objects, err)
		}
		rss := kib >> 10
		t.Logf("%s: %d objects in %v, peak memory %d MiB", arg, r.Objects, time.Since(start).Round(time.Second), rss)
		if rss > 64 {
			t.Errorf("%s: peak memory %d MiB", arg, rss)
		}
	}
	if left := len(s.keys(t, bucket, "main/wals/")); left != 100 && len(runs) > 1 {
		t.Errorf("%d segments are left", left)
	}
}
