package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
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
		for n := r[0]; n <= r[1]; n++ {
			name := segmentName(timeline, n, segmentSize)
			put("wals/"+name[:16]+"/"+name+[]string{"", ".gz", ".bz2"}[n%3], "wal", days(1))
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

// barmanDelete runs Debian's barman-cloud-backup-delete on many servers of a bucket, in one
// process, since it takes a second to start. It returns the exit code for each.
func barmanDelete(t testing.TB, s *s3Server, bucket string, policies map[string]string) map[string]int {
	t.Helper()
	script := `
import json, sys, logging
from barman.clients import cloud_backup_delete
codes = {}
for server, policy in json.load(sys.stdin).items():
    try:
        cloud_backup_delete.main(["--cloud-provider", "aws-s3", "--endpoint-url", sys.argv[1], "--retention-policy", policy, sys.argv[2], server])
        codes[server] = 0
    except SystemExit as e:
        codes[server] = e.code or 0
print(json.dumps(codes))
`
	input, err := json.Marshal(policies)
	if err != nil {
		t.Fatal(err)
	}
	program, err := exec.LookPath("barman-cloud-backup-delete")
	if err != nil {
		t.Fatalf("%v: install it with `make deps` (Debian package barman-cli-cloud)", err)
	}
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(text), "\n")
	cmd := exec.Command(strings.TrimPrefix(first, "#!"), "-c", script, s.Endpoint, "s3://"+bucket)
	cmd.Stdin = strings.NewReader(string(input))
	cmd.Env = append(os.Environ(), barmanEnv(s)...)
	codes := map[string]int{}
	if err := json.Unmarshal([]byte(mustRun(t, cmd)), &codes); err != nil || len(codes) != len(policies) {
		t.Fatalf("barman-cloud-backup-delete: %d of %d catalogs: %v", len(codes), len(policies), err)
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

// chosenArchives come with what goes from them. Where Barman does something else, that is
// written beside it: this is the list of the differences.
var chosenArchives = []struct {
	madeArchive
	gone, walGone       string
	barman, barmanWAL   string // "" means the same as above
	barmanRefuses       bool
	problem, keptReason string
}{
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

var _ = maps.Keys[map[int]int]
var _ = rand.New
