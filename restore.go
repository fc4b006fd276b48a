// This file is everything about restoring: the choice of a base backup for a recovery
// target, its download and extraction, the settings with which PostgreSQL finishes the
// job, and the CNPG-I RestoreJobHooks service.

package main

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/maphash"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cloudnative-pg/cnpg-i/pkg/restore/job"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What can be wrong with a restore before anything is written, for errors.Is.
var (
	errNoBackup      = errors.New("no target backup found")
	errBadTarget     = errors.New("bad recovery target")
	errNotEmpty      = errors.New("the directory is not empty")
	errNoRecoverable = errors.New("the backup cannot be recovered")
)

// ---------------------------------------------------------------------------
// Choosing a backup
// ---------------------------------------------------------------------------

// recoveryGoal is a RecoveryTarget, checked and parsed.
type recoveryGoal struct {
	RecoveryTarget
	time time.Time // zero: no target time
	lsn  LSN
	// The timeline to end on: a number, or the backup's own (current), or the latest
	// one, which is PostgreSQL's default too.
	timeline uint32
	current  bool
	// The setting of PostgreSQL that says where recovery ends; "" is the end of the archive.
	setting, value string
	words          string // where recovery is to end
}

// parseTarget checks a recovery target; nil means the end of the archive. It returns
// errBadTarget, with the field that is wrong.
func parseTarget(t *RecoveryTarget) (recoveryGoal, error) {
	g := recoveryGoal{RecoveryTarget: *cmp.Or(t, &RecoveryTarget{})}
	var err error
	var immediate, at, lsn string
	if g.TargetImmediate != nil && *g.TargetImmediate {
		immediate = "immediate"
	}
	if g.TargetTime != "" {
		if g.time, err = parseTargetTime(g.TargetTime); err != nil {
			return g, fmt.Errorf("%w: targetTime %w", errBadTarget, err)
		}
		at = g.time.Format("2006-01-02 15:04:05.999999+00")
	}
	if g.TargetLSN != "" {
		if g.lsn, err = parseLSN(g.TargetLSN); err != nil {
			return g, fmt.Errorf("%w: targetLSN %w", errBadTarget, err)
		}
		lsn = g.lsn.String()
	}
	switch g.TargetTLI = cmp.Or(g.TargetTLI, "latest"); g.TargetTLI {
	case "latest":
	case "current":
		g.current = true
	default:
		// base 0, since PostgreSQL reads recovery_target_timeline with strtoul(..., 0)
		n, err := strconv.ParseUint(g.TargetTLI, 0, 32)
		if err != nil || n == 0 {
			return g, fmt.Errorf("%w: targetTLI %q is not latest, current or the number of a timeline", errBadTarget, g.TargetTLI)
		}
		g.timeline = uint32(n)
	}
	field, words := "", "the end of the archive"
	for _, end := range []struct{ field, setting, value, words string }{
		{"targetImmediate", "recovery_target", immediate, "the end of a backup"},
		{"targetLSN", "recovery_target_lsn", lsn, "LSN " + g.TargetLSN},
		{"targetName", "recovery_target_name", g.TargetName, fmt.Sprintf("restore point %q", g.TargetName)},
		{"targetTime", "recovery_target_time", at, "time " + g.TargetTime},
		{"targetXID", "recovery_target_xid", g.TargetXID, "transaction " + g.TargetXID},
	} {
		if end.value == "" {
			continue
		}
		if field != "" {
			return g, fmt.Errorf("%w: PostgreSQL takes one of them, not %s and %s together", errBadTarget, field, end.field)
		}
		field, g.setting, g.value, words = end.field, end.setting, end.value, end.words
	}
	g.words = words + " on timeline " + g.TargetTLI
	return g, nil
}

// parseTargetTime reads a point in time as PostgreSQL prints it, or as RFC 3339. A time
// without zone is UTC, whatever the zone of the server or of this process.
func parseTargetTime(s string) (time.Time, error) {
	text := strings.TrimSpace(s)
	text = strings.TrimSuffix(strings.TrimSuffix(text, " UTC"), " GMT")
	text = strings.Replace(text, "T", " ", 1)
	for _, zone := range []string{"", "Z07:00", "Z0700", "Z07", " Z07:00", " Z0700", " Z07"} {
		for _, layout := range []string{"2006-01-02 15:04:05", "2006-01-02 15:04"} {
			if t, err := time.Parse(layout+zone, text); err == nil { // Parse accepts a fraction of the seconds
				return t.UTC(), nil
			}
		}
	}
	return time.Time{}, fmt.Errorf("%q is not a time such as 2006-01-02 15:04:05+00 or 2006-01-02T15:04:05Z", s)
}

// timelineHistories are the history files of an archive by timeline: where each of the
// timeline's ancestors was left, oldest first.
type timelineHistories map[uint32][]timelineSwitch

// latest is the timeline that PostgreSQL's recovery_target_timeline=latest means for a
// backup of timeline t: it asks for one history file after the other until one is
// missing (findNewestTimeLine in timeline.c).
func (h timelineHistories) latest(t uint32) uint32 {
	for {
		if _, ok := h[t+1]; !ok {
			return t
		}
		t++
	}
}

// offLine says why a position on a timeline is not on the way to the target timeline;
// "" when it is.
func (h timelineHistories) offLine(target, timeline uint32, at LSN) string {
	if timeline == target {
		return ""
	}
	history, ok := h[target]
	if !ok && timeline < target { // which was made before its descendants
		return fmt.Sprintf("it is on timeline %d, and the archive has no %08X.history to say that timeline %d came from it", timeline, target, target)
	}
	for _, s := range history {
		if s.Timeline != timeline {
			continue
		}
		if at > s.At {
			return fmt.Sprintf("it reached %s on timeline %d, which timeline %d had left at %s", at, timeline, target, s.At)
		}
		return ""
	}
	return fmt.Sprintf("it is on timeline %d, which is no ancestor of timeline %d", timeline, target)
}

// timelineOf is the timeline of a WAL file's name, or else the one given.
func timelineOf(wal string, otherwise int) uint32 {
	if w, err := parseWALName(wal); err == nil {
		return w.Timeline
	}
	return uint32(otherwise)
}

// targetTimeline is the timeline on which recovery from b would end.
func (g *recoveryGoal) targetTimeline(b *BackupInfo, h timelineHistories) uint32 {
	own := timelineOf(b.EndWAL, b.Timeline)
	switch {
	case g.timeline != 0:
		return g.timeline
	case g.current:
		return own
	default:
		return h.latest(own)
	}
}

// unfit says why recovery cannot start from b; "" when it can.
func (g *recoveryGoal) unfit(b *BackupInfo, h timelineHistories) string {
	if !b.Done() {
		if b.Error != "" {
			return "it is not done: " + b.Error
		}
		return "it is not done"
	}
	if b.barmanOnly["parent_backup_id"]+b.barmanOnly["snapshots_info"] != "" { // PostgreSQL 17 refuses to start on the former
		return "it is an incremental backup, or one of disk snapshots, which only Barman can restore"
	}
	begin, beginErr := parseLSN(b.BeginLSN)
	end, endErr := parseLSN(b.EndLSN)
	if beginErr != nil || endErr != nil {
		return fmt.Sprintf("its backup.info has no begin_xlog and end_xlog (%q, %q)", b.BeginLSN, b.EndLSN)
	}
	// A backup of a standby may begin on one timeline and end on the next.
	own, target := timelineOf(b.EndWAL, b.Timeline), g.targetTimeline(b, h)
	if why := cmp.Or(h.offLine(target, timelineOf(b.BeginWAL, b.Timeline), begin), h.offLine(target, own, end)); why != "" {
		return fmt.Sprintf("%s (a targetTLI of %d would lead on from it)", why, own)
	}
	switch {
	case g.TargetLSN != "" && g.BackupID == "" && end >= g.lsn, g.TargetLSN != "" && end > g.lsn:
		return fmt.Sprintf("it ended at %s, not before the target %s", end, g.lsn)
	case !g.time.IsZero() && g.BackupID == "" && b.EndTime.After(g.time):
		return "it ended after the target time"
	}
	return ""
}

// chooseBackup picks the backup that recovery to a target starts from: the one that is
// asked for, or the newest that ended before the target and lies on its line of descent.
// errNoBackup comes with the list of what there is and why each was passed over.
func chooseBackup(catalog *Catalog, target *RecoveryTarget, h timelineHistories) (*BackupInfo, error) {
	g, err := parseTarget(target)
	if err != nil {
		return nil, err
	}
	newestFirst := slices.SortedFunc(slices.Values(catalog.Backups), func(a, b *BackupInfo) int {
		return cmp.Or(cmp.Or(b.EndTime, b.BeginTime).Compare(cmp.Or(a.EndTime, a.BeginTime)), strings.Compare(b.ID, a.ID))
	})
	var passedOver []string
	for _, b := range newestFirst {
		if g.BackupID != "" && b.ID != g.BackupID {
			passedOver = append(passedOver, describeBackup(b))
			continue
		}
		why := g.unfit(b, h)
		if why == "" {
			if !g.time.IsZero() && b.EndTime.After(g.time) {
				slog.Warn("The backup ended after the target time: recovery succeeds only if nothing was committed in between",
					"backupID", b.ID, "endTime", b.EndTime, "targetTime", g.time)
			}
			return b, nil
		}
		why = describeBackup(b) + ": " + why
		if g.BackupID != "" {
			return nil, fmt.Errorf("%w: %s", errNoBackup, why)
		}
		passedOver = append(passedOver, why)
	}
	err = fmt.Errorf("%w for %s", errNoBackup, g.words)
	if g.BackupID != "" {
		err = fmt.Errorf("%w: no backup found with ID %s", errNoBackup, g.BackupID)
	}
	for _, id := range slices.Backward(slices.Sorted(maps.Keys(catalog.Unreadable))) {
		passedOver = append(passedOver, fmt.Sprintf("%s: %v", id, catalog.Unreadable[id]))
	}
	for _, id := range slices.Backward(catalog.Incomplete) {
		passedOver = append(passedOver, id+": in progress or abandoned, it has no backup.info")
	}
	if n := len(passedOver) - maxListed; n > 0 {
		passedOver = append(passedOver[:maxListed], fmt.Sprintf("and %d more", n))
	}
	if len(passedOver) == 0 {
		return nil, fmt.Errorf("%w: there is no backup at all", err)
	}
	return nil, fmt.Errorf("%w; there is:\n  %s", err, strings.Join(passedOver, "\n  "))
}

// maxListed bounds the list of backups in an error.
const maxListed = 50

// describeBackup names a backup in an error message.
func describeBackup(b *BackupInfo) string {
	stamp := func(t time.Time) string {
		if t.IsZero() {
			return "?"
		}
		return t.UTC().Format("2006-01-02 15:04:05.999999Z07:00")
	}
	return fmt.Sprintf("%s (%s) %s, timeline %d, %s at %s to %s at %s", b.ID, cmp.Or(b.BackupName, "unnamed"), cmp.Or(b.Status, "of unknown status"),
		b.Timeline, stamp(b.BeginTime), cmp.Or(b.BeginLSN, "?"), stamp(b.EndTime), cmp.Or(b.EndLSN, "?"))
}

// findBackup reads the catalog and the timelines of a server and chooses the backup for a target.
func findBackup(ctx context.Context, s *Store, target *RecoveryTarget) (*BackupInfo, error) {
	goal, err := parseTarget(target)
	if err != nil {
		return nil, err
	}
	catalog, err := s.Catalog(ctx)
	if err != nil {
		return nil, err
	}
	if len(catalog.Backups)+len(catalog.Incomplete)+len(catalog.Unreadable) == 0 {
		return nil, nothingThere(ctx, s)
	}
	histories, err := readHistories(ctx, s, catalog, &goal)
	if err != nil {
		return nil, err
	}
	b, err := chooseBackup(catalog, target, histories)
	if err != nil {
		return nil, fmt.Errorf("server %q at %s: %w", s.Config.ServerName, s.URL(s.key("base/")), err)
	}
	slog.Info("Chose the base backup", "backupID", b.ID, "backupName", b.BackupName, "timeline", b.Timeline, "endTime", b.EndTime,
		"endLSN", b.EndLSN, "target", goal.words, "targetTimeline", goal.targetTimeline(b, histories), "backups", len(catalog.Backups))
	return b, nil
}

// nothingThere explains an empty catalog: most often the server name is wrong.
func nothingThere(ctx context.Context, s *Store) error {
	names, err := s.ServerNames(ctx)
	if err != nil {
		return err
	}
	destination := s.Config.Configuration.DestinationPath
	switch {
	case slices.Contains(names, s.Config.ServerName):
		return fmt.Errorf("%w: server %q has WAL but no base backup at %s", errNoBackup, s.Config.ServerName, s.URL(s.key("base/")))
	case len(names) == 0:
		return fmt.Errorf("%w: there is no server at all at %s: check destinationPath of ObjectStore %s", errNoBackup, destination, s.Config.Name)
	}
	return fmt.Errorf("%w: there is no server %q at %s, only %s: set serverName to one of them", errNoBackup, s.Config.ServerName, destination, strings.Join(names, ", "))
}

// readHistories finds out which timelines the archive knows, and reads the history files
// that the choice among these backups depends on; the others stay empty. Without a goal it
// reads all of them: errDamaged then comes with those that could be read.
func readHistories(ctx context.Context, s *Store, catalog *Catalog, goal *recoveryGoal) (timelineHistories, error) {
	histories, stored := timelineHistories{}, map[uint32]walObject{}
	newest, directory := uint32(0), "" // the directory of WAL with the highest timeline
	for o, err := range s.listLevel(ctx, s.key("wals/")) {
		if err != nil {
			return nil, err
		}
		if inside, ok := strings.CutSuffix(o.Key, "/"); ok {
			if w, err := parseWALName(path.Base(inside) + "00000000"); err == nil && w.Timeline >= newest {
				newest, directory = w.Timeline, o.Key
			}
			continue
		}
		o := newWALObject(o)
		if w, err := parseWALName(o.Name); err == nil && w.Kind == walHistory {
			histories[w.Timeline], stored[w.Timeline] = nil, o
		}
	}
	wanted := slices.Collect(maps.Keys(stored))
	if goal != nil {
		wanted = nil
		for _, b := range catalog.Backups {
			wanted = append(wanted, goal.targetTimeline(b, histories))
		}
		if _, ok := stored[newest]; !ok && goal.TargetTLI == "latest" && len(wanted) > 0 && newest > slices.Max(wanted) {
			slog.Warn("The archive has WAL of a timeline without its history: no recovery will find it", "timeline", newest,
				"wal", s.URL(directory), "missing", s.URL(s.walPrefix(fmt.Sprintf("%08X.history", newest))))
		}
	}
	var damaged []error
	for _, t := range wanted {
		o, ok := stored[t]
		if !ok || histories[t] != nil {
			continue
		}
		var err error
		histories[t], err = readHistory(ctx, s, o)
		switch {
		case goal == nil && errors.Is(err, errDamaged):
			delete(histories, t)
			damaged = append(damaged, err)
		case err != nil:
			return nil, err
		}
	}
	return histories, errors.Join(damaged...)
}

// ---------------------------------------------------------------------------
// The archives of a backup
// ---------------------------------------------------------------------------

// dataArchive is one tar object of a backup.
type dataArchive struct {
	object
	name   string // without suffixes: data, data_0001, 16384, 16384_0001
	oid    uint32 // of the tablespace; 0 for PGDATA
	number int    // 0 for data.tar, 1 for data_0001.tar, ...
	codec  *codec
}

// dataArchiveForm is the name of a tar object; what follows .tar is the compression suffix.
var dataArchiveForm = regexp.MustCompile(`^((?:data|[1-9]\d*)(?:_\d{4,})?)\.tar(.*)$`)

// listArchives finds the tar objects of a backup and makes sure that the set is
// complete: PGDATA and each tablespace of backup.info has its archives, numbered without gap.
func listArchives(ctx context.Context, s *Store, b *BackupInfo) ([]dataArchive, error) {
	found := map[string]dataArchive{}
	prefix := s.baseKey(b.ID, "")
	for o, err := range s.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		m := dataArchiveForm.FindStringSubmatch(strings.TrimPrefix(o.Key, prefix))
		if m == nil {
			continue // backup.info, annotations, or foreign
		}
		i := slices.IndexFunc(codecs, func(c *codec) bool { return c.suffix == m[2] })
		if i < 0 {
			return nil, fmt.Errorf("%w: the compression %s of %s is not known", errNoRecoverable, m[2], s.URL(o.Key))
		}
		if other, ok := found[m[1]]; ok {
			return nil, fmt.Errorf("%w: %s and %s are the same archive", errNoRecoverable, s.URL(other.Key), s.URL(o.Key))
		}
		found[m[1]] = dataArchive{object: o, name: m[1], codec: codecs[i]}
	}
	var archives []dataArchive
	for _, t := range append([]Tablespace{{}}, b.Tablespaces...) {
		tree, what := "data", "data.tar"
		if t.OID != 0 {
			tree, what = fmt.Sprint(t.OID), fmt.Sprintf("%d.tar (tablespace %q)", t.OID, t.Name)
		}
		n := 0
		for ; found[archiveName(tree, n)].codec != nil; n++ {
			a := found[archiveName(tree, n)]
			a.oid, a.number = t.OID, n
			archives = append(archives, a)
			delete(found, a.name)
		}
		for name, a := range found {
			if strings.HasPrefix(name, tree+"_") {
				return nil, fmt.Errorf("%w: there is %s, but no %s.tar, number %d of its archives", errNoRecoverable, s.URL(a.Key), archiveName(tree, n), n)
			}
		}
		if n == 0 {
			return nil, fmt.Errorf("%w: there is no %s at %s", errNoRecoverable, what, s.URL(prefix))
		}
	}
	for _, a := range found {
		return nil, fmt.Errorf("%w: %s belongs to no tablespace of its backup.info", errNoRecoverable, s.URL(a.Key))
	}
	return archives, nil
}

// checkFirstWAL makes sure that recovery can begin: the archive, or the backup itself,
// has the first segment in some form.
func checkFirstWAL(ctx context.Context, s *Store, b *BackupInfo) error {
	w, err := parseWALName(b.BeginWAL)
	if err != nil || w.Kind != walSegment {
		return fmt.Errorf("%w: its begin_wal %q is not the name of a WAL segment", errNoRecoverable, b.BeginWAL)
	}
	if slices.Contains(b.WALInBackup, b.BeginWAL) {
		return nil
	}
	// A .partial will do: it is handed to PostgreSQL when there is no complete segment.
	objects, err := walObjects(ctx, s, b.BeginWAL, true)
	if err != nil {
		return fmt.Errorf("check that the archive has the first WAL segment %s: %w", b.BeginWAL, err)
	}
	if len(objects) > 0 {
		return nil
	}
	err = fmt.Errorf("%w: the archive does not have its first WAL segment, %s: choose a later backup", errNoRecoverable, s.URL(s.walPrefix(b.BeginWAL)))
	// What says that a standby's backup has it is lost when the bucket is copied without metadata.
	if b.BeginWAL == b.EndWAL && strings.Contains(b.BackupLabel, "\nBACKUP FROM: standby\n") {
		return fmt.Errorf("%w: %w", errOnlyInside, err)
	}
	return err
}

// errOnlyInside says that the first WAL segment is nowhere, unless it is in the archives of the backup.
var errOnlyInside = errors.New("it may be in the backup itself")

// ---------------------------------------------------------------------------
// Restoring a backup
// ---------------------------------------------------------------------------

// restoreOptions say where a backup goes.
type restoreOptions struct {
	Dir         string            // PGDATA: missing or empty
	WALDir      string            // where pg_wal is to be a link to; "" for a directory in PGDATA
	Tablespaces map[string]string // new locations by name, before restoreAdditionalCommandArgs and backup.info
	Jobs        int               // archives in flight at once; 0 means data.jobs
	// SetAside renames tablespace directories that are not empty. The operator does so with
	// PGDATA when it runs a recovery again, in volumes that are the new cluster's own.
	SetAside bool
	// Settings, if there is one, writes the recovery settings into Dir before pg_control makes
	// it a database: interrupted in between, it would be one that knows of no target.
	Settings func() error
}

const (
	// stagedSuffix marks a file that is not yet what its name without it says. PostgreSQL
	// does not start without pg_control, and pg_control is the last to lose the suffix.
	stagedSuffix = ".restoring"
	// incompleteFile lies in each directory that a restore is writing to: by it a later
	// restore tells the leftovers of an interrupted one, which it may remove.
	incompleteFile = "restore.incomplete"

	// Of a file: after so many bytes the kernel begins to write them, and after so many they are synced.
	flushSize, syncSize = 1 << 20, 64 << 20
)

// restoreBackup restores the files of a backup. Nothing is written unless the backup is
// complete, the first WAL segment is there, and the directories are missing or empty.
// When it returns nil everything is on disk; after an error, or when it is interrupted,
// there is no global/pg_control, so that nothing takes the directory for a database.
func restoreBackup(ctx context.Context, s *Store, b *BackupInfo, o restoreOptions) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore backup %s: %w", b.ID, err)
		}
	}()
	archives, err := listArchives(ctx, s, b)
	if err != nil {
		return err
	}
	inside := checkFirstWAL(ctx, s, b)
	if inside != nil && !errors.Is(inside, errOnlyInside) {
		return inside
	}
	r := &restorer{store: s, backup: b, read: startProgress("restore"), tablespaces: map[uint32]*targetDir{}, winners: map[string]int{}}
	defer r.read.stop()
	for _, a := range archives {
		r.read.total.Add(a.Size)
	}
	if err := r.plan(o); err != nil {
		return err
	}
	defer r.close()
	if err := r.open(); err != nil {
		return err
	}
	err = r.extractAll(ctx, archives, max(1, cmp.Or(o.Jobs, s.jobs())), func(err error) error { return err })
	if err == nil {
		_, err = r.sums.check(b.BeginLSN)
	}
	if err == nil && inside != nil && !r.hasWAL(b.BeginWAL) {
		err = inside
	}
	if err == nil && o.Settings != nil {
		err = o.Settings()
	}
	if err == nil {
		err = r.finish()
	}
	if err != nil {
		err = fmt.Errorf("%w (what was restored so far stays in %s, unusable, until it is removed or the restore is run again)", err, strings.Join(r.paths, ", "))
	}
	return err
}

// hasWAL says whether the backup itself had this segment.
func (r *restorer) hasWAL(name string) bool {
	if r.wal != nil {
		return fileExists(filepath.Join(r.wal.path, name))
	}
	return fileExists(filepath.Join(r.data.path, "pg_wal", name))
}

// restorer is one restore in progress.
type restorer struct {
	store       *Store
	backup      *BackupInfo
	data        *targetDir
	wal         *targetDir            // nil when pg_wal is a directory in PGDATA
	tablespaces map[uint32]*targetDir // by OID
	targets     []*targetDir          // all of these, PGDATA first
	paths       []string              // theirs
	// inside are the tablespace directories below PGDATA, and the links to all of them. Barman
	// stores their files in data.tar as well as in their own archives, of which the latter count.
	inside []string
	sums   fileSums
	read   *progress // of the objects

	mu sync.Mutex
	// winners holds, for each staged file of PGDATA, the highest number of an archive
	// that had it: of a file that is stored twice the later one counts, and archives are
	// extracted in parallel.
	winners map[string]int
}

// targetDir is a directory that a restore writes to. Nothing is ever written outside of
// it: os.Root follows no link that leads out.
type targetDir struct {
	path     string
	root     *os.Root
	mark     *os.File       // incompleteFile, locked
	leftover bool           // it holds what an interrupted restore left
	listed   bool           // the mark of PGDATA stands for its own, see finish
	syncs    errgroup.Group // of files that are still being written, one at a time
}

// plan decides which directory each part of the backup goes to, and checks them without
// changing anything in them.
func (r *restorer) plan(o restoreOptions) error {
	target := func(dir string, setAside bool) (*targetDir, error) {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		if slices.Contains(r.paths, dir) {
			return nil, fmt.Errorf("%s would be two of data directory, WAL directory and tablespaces at once: give --tablespace NAME:PATH another path", dir)
		}
		t := &targetDir{path: dir}
		t.syncs.SetLimit(1)
		r.targets, r.paths = append(r.targets, t), append(r.paths, dir)
		if r.data != nil && r.data.leftover {
			note, err := os.ReadFile(filepath.Join(r.data.path, incompleteFile))
			if err != nil {
				return nil, err
			}
			t.listed = slices.Contains(strings.Split(string(note), "\n"), dir)
		}
		if _, err = t.check(); setAside && errors.Is(err, errNotEmpty) {
			aside := dir + time.Now().UTC().Format("_20060102T150405Z")
			slog.Warn("A tablespace directory is not empty; what an earlier recovery left in it is set aside, and can be removed", "directory", dir, "to", aside)
			if err = os.Rename(dir, aside); err == nil {
				_, err = t.check()
			}
		}
		return t, err
	}
	var err error
	if r.data, err = target(o.Dir, false); err != nil {
		return err
	}
	if o.WALDir != "" {
		if r.wal, err = target(o.WALDir, false); err != nil {
			return err
		}
	}
	var known []string
	for _, t := range r.backup.Tablespaces {
		known = append(known, t.Name)
		location := t.Location
		// A tablespace inside PGDATA goes where PGDATA goes; the location of one made
		// with allow_in_place_tablespaces is relative to it.
		if name, inside := below(r.backup.PGData, location); inside {
			location = filepath.Join(r.data.path, name)
		} else if !filepath.IsAbs(location) {
			location = filepath.Join(r.data.path, location)
		}
		location = cmp.Or(o.Tablespaces[t.Name], r.store.dataRestore.Tablespaces[t.Name], location)
		if r.tablespaces[t.OID], err = target(location, o.SetAside); err != nil {
			return fmt.Errorf("tablespace %q: %w", t.Name, err)
		}
		r.inside = append(r.inside, fmt.Sprintf("pg_tblspc/%d", t.OID))
		for _, original := range []string{t.Location, r.tablespaces[t.OID].path} {
			for _, base := range []string{r.backup.PGData, r.data.path} {
				if name, inside := below(base, original); inside {
					r.inside = append(r.inside, name)
				}
			}
		}
	}
	for name := range o.Tablespaces {
		if !slices.Contains(known, name) {
			return fmt.Errorf("the backup has no tablespace %q, only %q", name, slices.Sorted(slices.Values(known)))
		}
	}
	return nil
}

// check makes sure that a directory is missing, or empty, or holds the leftovers of an
// interrupted restore, and returns what is in it. lost+found is the file system's own.
func (t *targetDir) check() ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(t.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return e.Name() == "lost+found" })
	t.leftover = (t.listed || fileExists(filepath.Join(t.path, incompleteFile))) && !fileExists(filepath.Join(t.path, controlFile))
	if len(entries) > 0 && !t.leftover {
		return nil, fmt.Errorf("%s: %w (it has %q): restore into a new or empty directory", t.path, errNotEmpty, entries[0].Name())
	}
	return entries, nil
}

// open makes the directories and claims them for this restore.
func (r *restorer) open() error {
	note := fmt.Sprintf("A restore of backup %s began here at %s and has not ended.\nIf none is running, and there is no global/pg_control, the directory is unusable and can be removed.\n",
		r.backup.ID, time.Now().UTC().Format(time.RFC3339))
	for _, t := range r.targets {
		if err := os.MkdirAll(t.path, minDirMode); err != nil {
			return err
		}
		var err error
		if t.root, err = os.OpenRoot(t.path); err != nil {
			return err
		}
		if err := t.claim(note); err != nil {
			return err
		}
	}
	return nil
}

// claim marks a directory as incomplete, holds a lock on the mark against any other
// restore, and removes what an interrupted one left.
func (t *targetDir) claim(note string) (err error) {
	if _, err := t.check(); err != nil { // again: a tablespace in PGDATA has just been removed with it
		return err
	}
	flags := os.O_WRONLY | os.O_CREATE
	if !t.leftover {
		flags |= os.O_EXCL
	}
	if t.mark, err = t.root.OpenFile(incompleteFile, flags, minFileMode); err != nil {
		return err
	}
	// Only EWOULDBLOCK tells of another holder; not every file system has locks.
	if errors.Is(unix.Flock(int(t.mark.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w: another restore is writing to it", t.path, errNotEmpty)
	}
	if t.leftover {
		entries, err := t.check() // with the lock in hand: the other restore may have ended well
		if err != nil {
			return err
		}
		slog.Info("Removing what an interrupted restore left", "directory", t.path)
		for _, e := range entries {
			if e.Name() != incompleteFile {
				if err := t.root.RemoveAll(e.Name()); err != nil {
					return err
				}
			}
		}
	}
	if err := t.mark.Truncate(0); err != nil {
		return err
	}
	_, err = t.mark.WriteString(note)
	return err
}

func (r *restorer) close() {
	for _, t := range r.targets {
		t.syncs.Wait() // finish has its error
		if t.root != nil {
			t.root.Close()
		}
		if t.mark != nil {
			t.mark.Close() // which gives the lock up
		}
	}
}

// extractAll extracts the archives, several at once, each as one stream. judge says which
// failure ends it.
func (r *restorer) extractAll(ctx context.Context, archives []dataArchive, jobs int, judge func(error) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(jobs)
	for _, a := range archives {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err // another archive has failed
			}
			return judge(r.extract(ctx, a))
		})
	}
	return g.Wait()
}

// extract fetches one archive and unpacks it as it comes.
func (r *restorer) extract(ctx context.Context, a dataArchive) error {
	var body *objectReader
	err := persist(ctx, storePatience, func() (err error) {
		body, err = r.store.Get(ctx, a.Key)
		return err
	})
	if err != nil {
		return err
	}
	defer body.Close()
	body.patience = storePatience
	if body.Size != a.Size {
		return fmt.Errorf("%s: it has %d bytes, and had %d in the listing: somebody is writing to this backup", r.store.URL(a.Key), body.Size, a.Size)
	}
	unpack := func() (err error) {
		defer decoderPanics(&err)
		return r.unpack(a, io.TeeReader(body, r.read))
	}
	return r.store.judged(a.Key, unpack())
}

// unpack reads an archive from its first to its last byte: codec, tar, files.
func (r *restorer) unpack(a dataArchive, stored io.Reader) error {
	z, err := a.codec.newReader(stored)
	if err != nil {
		return err
	}
	stream := fullReader{z}
	archive := tar.NewReader(tarStream{stream})
	buffer := make([]byte, copyBufferSize)
	for {
		entry, err := archive.Next()
		if err == io.EOF {
			// What follows is padding, but only at its very end can the codec check the stream.
			_, err = io.Copy(io.Discard, stream)
			return err
		}
		if err != nil {
			return err
		}
		if err := r.entry(a, entry, archive, buffer); err != nil {
			return fmt.Errorf("entry %q: %w", entry.Name, err)
		}
	}
}

// Write counts what is read of an object, by way of a TeeReader.
func (p *progress) Write(b []byte) (int, error) {
	p.done.Add(int64(len(b)))
	return len(b), nil
}

// tarStream makes an error of its end: archive/tar takes that for the end of the archive,
// which it is not. That is two zero blocks.
type tarStream struct{ io.Reader }

func (s tarStream) Read(b []byte) (int, error) {
	n, err := s.Reader.Read(b)
	if err == io.EOF {
		err = fmt.Errorf("%w: it ends without the end-of-archive mark, so it is not complete", errDamaged)
	}
	return n, err
}

// ---------------------------------------------------------------------------
// The entries of an archive
// ---------------------------------------------------------------------------

// Modes are those of the archive, narrowed to what PostgreSQL accepts of a data
// directory with group access, and with all rights for the owner.
const (
	maxFileMode, minFileMode = 0o640, 0o600
	maxDirMode, minDirMode   = 0o750, 0o700
)

// entry restores one entry of an archive.
func (r *restorer) entry(a dataArchive, h *tar.Header, content io.Reader, buffer []byte) (err error) {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name := path.Clean(h.Name)
	if h.Name == "" || !filepath.IsLocal(name) {
		return fmt.Errorf("%w: its name leads out of the directory", errDamaged)
	}
	listed := name
	if a.oid != 0 {
		listed = fmt.Sprintf("pg_tblspc/%d/%s", a.oid, name)
	}
	t, name := r.route(a, name)
	if h.Typeflag == tar.TypeReg {
		// The size that such a header tells is not bounded by the bytes that follow it.
		for record := range h.PAXRecords {
			if strings.HasPrefix(record, "GNU.sparse.") {
				return fmt.Errorf("%w: it is a sparse file, which no backup has", errDamaged)
			}
		}
		var summed summedFile
		if listed == manifestFile {
			if summed.keep, err = newSpool(); err != nil {
				return err
			}
		}
		content = io.TeeReader(content, &summed)
		if t == nil { // left out, or only to be verified
			_, err = io.Copy(io.Discard, content)
		} else {
			err = r.file(t, a, name, fs.FileMode(h.Mode)&maxFileMode|minFileMode, content, buffer)
		}
		if err == nil {
			r.sums.add(listed, &summed)
		}
		return err
	}
	if t == nil {
		return nil
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return t.directory(name, fs.FileMode(h.Mode)&maxDirMode|minDirMode)
	case tar.TypeSymlink:
		if t == r.data && name == "pg_wal" {
			return nil // the place of pg_wal is decided here
		}
		// A link may point anywhere, as the server's own do to its certificates, since
		// nothing is written through one that leads out.
		return t.replace(name, func() error { return t.root.Symlink(h.Linkname, name) })
	case tar.TypeLink:
		// Barman makes them of files that have several names (Python's tarfile).
		old := path.Clean(h.Linkname)
		if h.Linkname == "" || !filepath.IsLocal(old) {
			return fmt.Errorf("%w: it is a hard link to %q, which leads out of the directory", errDamaged, h.Linkname)
		}
		return t.replace(name, func() error { return t.root.Link(old, name) })
	default:
		return fmt.Errorf("%w: it is of type %q, neither file, directory nor link", errDamaged, h.Typeflag)
	}
}

// route finds the directory that an entry goes to, and its name in it; nil when it is to be left out.
func (r *restorer) route(a dataArchive, name string) (*targetDir, string) {
	if name == incompleteFile || r.wal != nil && name == "pg_wal/"+incompleteFile { // no archive replaces our marks
		return nil, ""
	}
	if a.oid != 0 {
		return r.tablespaces[a.oid], name
	}
	switch name {
	case "postmaster.pid", // of a server that does not run here
		"tablespace_map": // links are made from backup.info; PostgreSQL would undo a relocation (xlogrecovery.c)
		return nil, ""
	}
	for _, dir := range r.inside {
		if name == dir || strings.HasPrefix(name, dir+"/") {
			return nil, ""
		}
	}
	if r.wal != nil {
		if name == "pg_wal" {
			return nil, ""
		}
		if rest, ok := strings.CutPrefix(name, "pg_wal/"); ok {
			return r.wal, rest
		}
	}
	return r.data, name
}

// file writes one file. Those that a backup may hold twice, and pg_control, are staged
// under another name first: the files in the root of PGDATA, where Barman adds the
// server's configuration files and, last of all, the backup_label.
func (r *restorer) file(t *targetDir, a dataArchive, name string, mode fs.FileMode, content io.Reader, buffer []byte) error {
	// Short, whatever the length of the name, and of no other file.
	staged := path.Join(path.Dir(name), fmt.Sprintf("%s.%08x%s", a.name, crc32.Checksum([]byte(name), castagnoli), stagedSuffix))
	if t == r.data && (name == controlFile || !strings.Contains(name, "/")) {
		if err := t.write(staged, mode, content, buffer); err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if winner, ok := r.winners[name]; ok && winner > a.number {
			return t.root.Remove(staged)
		}
		r.winners[name] = a.number
		if name == controlFile {
			name += stagedSuffix
		}
		return t.root.Rename(staged, name)
	}
	err := t.write(name, mode, content, buffer)
	if errors.Is(err, fs.ErrExist) { // stored twice: the other one may still be being written
		if err = t.write(staged, mode, content, buffer); err == nil {
			err = t.root.Rename(staged, name)
		}
	}
	return err
}

// write creates a file. It does not touch one that exists.
func (t *targetDir) write(name string, mode fs.FileMode, content io.Reader, buffer []byte) error {
	var f *os.File
	err := t.withParent(name, func() (err error) {
		f, err = t.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		return err
	})
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(&flushedFile{t: t, f: f}, content, buffer)
	return cmp.Or(err, f.Close()) // the first error
}

// flushedFile goes to the disk while more comes from the network: left alone, the kernel
// would wait with gigabytes for the sync at the end, and a disk that has a cache of its own
// would still have them all to write by then.
type flushedFile struct {
	t                 *targetDir
	f                 *os.File
	end               int64
	flushed, syncedTo int64
}

func (w *flushedFile) Write(b []byte) (n int, err error) {
	n, err = w.f.Write(b)
	w.end += int64(n)
	if w.end-w.flushed < flushSize {
		return n, err
	}
	if err := unix.SyncFileRange(int(w.f.Fd()), w.flushed, w.end-w.flushed, unix.SYNC_FILE_RANGE_WRITE); err != nil {
		slog.Debug("sync_file_range failed", "file", w.f.Name(), "error", err)
	}
	w.flushed = w.end
	if w.end-w.syncedTo >= syncSize && w.t.syncs.TryGo(w.sync) { // or with the next piece
		w.syncedTo = w.end
	}
	return n, err
}

// sync does not mind that the file has been closed meanwhile: finish syncs all of them.
func (w *flushedFile) sync() error {
	if err := w.f.Sync(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// directory makes a directory, or gives one that is there its mode.
func (t *targetDir) directory(name string, mode fs.FileMode) error {
	err := t.withParent(name, func() error { return t.root.Mkdir(name, mode) })
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := t.root.Lstat(name)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%w: something else has the same name", errDamaged)
	}
	return t.root.Chmod(name, mode)
}

// replace makes a link in place of what an earlier entry of this name has left.
func (t *targetDir) replace(name string, link func() error) error {
	err := t.withParent(name, link)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if info, statErr := t.root.Lstat(name); statErr != nil || info.IsDir() {
		return err
	}
	if err := t.root.Remove(name); err != nil {
		return err
	}
	return link()
}

// withParent makes something, and if need be the directory that it is to be in: one of
// several archives may come before the one that has the directories.
func (t *targetDir) withParent(name string, do func() error) error {
	err := do()
	if errors.Is(err, fs.ErrNotExist) {
		if err := t.root.MkdirAll(path.Dir(name), minDirMode); err != nil {
			return err
		}
		err = do()
	}
	return err
}

// ---------------------------------------------------------------------------
// The files and their backup_manifest
// ---------------------------------------------------------------------------

// fileSums holds what was read of each file until the manifest comes, at the very end: 16
// bytes for a file, of which the first half is a hash of its name, and the second made of
// its checksum and size. Safe for concurrent use.
type fileSums struct {
	mu       sync.Mutex
	files    [][2]uint64
	manifest *spool
}

var nameSeed = maphash.MakeSeed()

func fileSum(name string, size int64, crc uint32) [2]uint64 {
	return [2]uint64{maphash.String(nameSeed, name), uint64(crc)<<32 | uint64(uint32(size))}
}

// summedFile has size and CRC-32C of what is written to it.
type summedFile struct {
	size int64
	crc  uint32
	keep *spool // where the manifest goes
}

func (f *summedFile) Write(b []byte) (int, error) {
	f.size += int64(len(b))
	f.crc = crc32.Update(f.crc, castagnoli, b)
	if f.keep != nil {
		return f.keep.z.Write(b)
	}
	return len(b), nil
}

// add remembers a file that was read to its end.
func (s *fileSums) add(name string, f *summedFile) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.keep != nil {
		s.manifest = f.keep
		return
	}
	s.files = append(s.files, fileSum(name, f.size, f.crc))
}

// maxDifferences bounds what one error lists.
const maxDifferences = 10

// check compares the files with the manifest, if there is one and it is of the backup
// that began at that LSN, and says whether it was: Barman stores any manifest that lies in
// PGDATA, for example that of the pg_basebackup which made the server. Of checksums other
// than CRC-32C, which this program does not write, only the size is compared.
func (s *fileSums) check(begin string) (checked bool, err error) {
	if s.manifest == nil {
		return false, nil
	}
	defer s.manifest.b.free()
	text, err := s.manifest.open()
	if err != nil {
		return false, err
	}
	slices.SortFunc(s.files, func(a, b [2]uint64) int { return cmp.Compare(a[0], b[0]) })
	var differences []string
	different, intact := 0, false
	sum := sha256.New()
	lines := bufio.NewScanner(text)
	for lines.Scan() {
		line := strings.TrimSuffix(lines.Text(), ",")
		switch {
		case strings.HasPrefix(line, `{ "Path"`), strings.HasPrefix(line, `{ "Encoded-Path"`):
			if why := s.compare(line); why != "" {
				if different++; different <= maxDifferences {
					differences = append(differences, why)
				}
			}
		case strings.Contains(line, `"Start-LSN"`):
			var w walRange
			if json.Unmarshal([]byte(line), &w) == nil {
				start, startErr := parseLSN(w.Start)
				first, firstErr := parseLSN(begin) // the digits of the server, which from 19 on have leading zeros
				checked = checked || startErr == nil && firstErr == nil && start == first
			}
		case strings.HasPrefix(line, `"Manifest-Checksum"`):
			intact = line == fmt.Sprintf(`"Manifest-Checksum": "%x"}`, sum.Sum(nil))
		}
		fmt.Fprintln(sum, lines.Text())
	}
	switch {
	case lines.Err() != nil:
		return checked, fmt.Errorf("%s: %w: %w", manifestFile, errDamaged, lines.Err())
	case !checked:
		slog.Info("The backup_manifest in the backup is not its own and says nothing about it")
	case !intact:
		return true, fmt.Errorf("%s: %w: it does not have the checksum that it ends with", manifestFile, errDamaged)
	case different > 0:
		return true, fmt.Errorf("%w: %d files are not what %s says: %s", errDamaged, different, manifestFile, strings.Join(differences, "; "))
	}
	return checked, nil
}

// compare says how a file differs from its line in the manifest; "" when it does not.
func (s *fileSums) compare(line string) string {
	var e manifestEntry
	if err := json.Unmarshal([]byte(line), &e); err != nil {
		return fmt.Sprintf("%.80q: %v", line, err)
	}
	if name, err := hex.DecodeString(e.EncodedPath); err == nil && e.EncodedPath != "" {
		e.Path = string(name)
	}
	wanted := fileSum(e.Path, e.Size, 0)
	i, found := slices.BinarySearchFunc(s.files, wanted[0], func(f [2]uint64, name uint64) int { return cmp.Compare(f[0], name) })
	if !found {
		return e.Path + " is missing"
	}
	for ; i < len(s.files) && s.files[i][0] == wanted[0]; i++ { // Barman stores some files twice
		crc, size := uint32(s.files[i][1]>>32), s.files[i][1]&math.MaxUint32
		if size == wanted[1] && (e.Algorithm != "CRC32C" || e.Checksum == manifestSum(crc)) {
			return ""
		}
	}
	return e.Path + " has another size or checksum"
}

// ---------------------------------------------------------------------------
// The end of a restore
// ---------------------------------------------------------------------------

// finish adds what a backup leaves out, makes everything durable, and only then lets the
// directory be a database: pg_control gets its name.
func (r *restorer) finish() error {
	root := r.data.root
	if _, err := root.Lstat(controlFile + stagedSuffix); err != nil {
		return fmt.Errorf("%w: no archive of the backup has %s", errDamaged, controlFile)
	}
	// Without backup_label PostgreSQL would start from the wrong checkpoint, and silently corrupt.
	if _, err := root.Lstat("backup_label"); errors.Is(err, fs.ErrNotExist) {
		if r.backup.BackupLabel == "" {
			return fmt.Errorf("%w: neither the archives nor backup.info have the backup_label", errDamaged)
		}
		if err := root.WriteFile("backup_label", []byte(r.backup.BackupLabel), minFileMode); err != nil {
			return err
		}
	}
	if r.wal != nil {
		if err := root.Symlink(r.wal.path, "pg_wal"); err != nil {
			return err
		}
		if err := r.wal.root.MkdirAll("archive_status", minDirMode); err != nil {
			return err
		}
	} else if err := root.MkdirAll("pg_wal/archive_status", minDirMode); err != nil {
		return err
	}
	if err := root.MkdirAll("pg_tblspc", minDirMode); err != nil {
		return err
	}
	for oid, t := range r.tablespaces {
		link := fmt.Sprintf("pg_tblspc/%d", oid)
		if t.path == filepath.Join(r.data.path, link) {
			continue // allow_in_place_tablespaces: a directory
		}
		if err := root.Symlink(t.path, link); err != nil {
			return err
		}
	}

	for _, t := range r.targets {
		if err := t.syncs.Wait(); err != nil {
			return err
		}
		// The whole file system, and the errors that writes to it have met since the mark was opened (syncfs(2), since Linux 5.8).
		if err := unix.Syncfs(int(t.mark.Fd())); err != nil {
			return &fs.PathError{Op: "sync the file system of", Path: t.path, Err: err}
		}
	}
	// The mark of PGDATA goes last, when pg_control has made it a database: until then it
	// stands for the others, which it lists, too.
	if _, err := r.data.mark.WriteString(strings.Join(r.paths, "\n")); err != nil {
		return err
	}
	if err := r.data.mark.Sync(); err != nil {
		return err
	}
	for _, t := range r.targets[1:] {
		if err := t.unmark(); err != nil {
			return err
		}
	}
	if err := root.Rename(controlFile+stagedSuffix, controlFile); err != nil {
		return err
	}
	if err := syncDir(root, "global"); err != nil {
		return err
	}
	return r.data.unmark()
}

// unmark says that a directory is complete.
func (t *targetDir) unmark() error {
	if err := t.root.Remove(incompleteFile); err != nil {
		return err
	}
	return syncDir(t.root, ".")
}

// syncDir makes the names in a directory durable.
func syncDir(root *os.Root, name string) error {
	d, err := root.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// ---------------------------------------------------------------------------
// Verifying without restoring
// ---------------------------------------------------------------------------

// verification is what verifyStore has found.
type verification struct {
	ServerName string            `json:"serverName"`
	OK         bool              `json:"ok"`
	Backups    []*verifiedBackup `json:"backups"`
	WAL        verifiedWAL       `json:"wal"`

	store *Store
	mu    sync.Mutex
	read  *progress
}

// verifiedBackup is one backup. Only one that is DONE is read; another has only its status.
type verifiedBackup struct {
	ID       string   `json:"id"`
	Status   string   `json:"status"` // as list has it
	Archives int      `json:"archives"`
	Files    int      `json:"files"`
	Bytes    int64    `json:"bytes"`    // as stored
	Manifest bool     `json:"manifest"` // it has one, and its files were compared with it
	BadPages int      `json:"badPages,omitempty"`
	Problems []string `json:"problems,omitempty"`

	info     *BackupInfo
	archives []dataArchive
}

// verifiedWAL is the WAL from the beginning of the oldest verified backup to the newest
// segment in the archive, along the timelines that lead there.
type verifiedWAL struct {
	From     string   `json:"from,omitempty"`
	To       string   `json:"to,omitempty"`
	Segments int      `json:"segments"`
	Bytes    int64    `json:"bytes"` // as stored
	Problems []string `json:"problems,omitempty"`
}

// summary is what the status of the ObjectStore shows of it.
func (v *verification) summary() *LastVerification {
	l := &LastVerification{Time: metav1.Now(), OK: v.OK, Backups: len(v.Backups), Segments: v.WAL.Segments}
	for _, b := range v.Backups {
		for _, p := range b.Problems {
			l.Problems = append(l.Problems, b.ID+": "+p)
		}
	}
	l.Problems = append(l.Problems, v.WAL.Problems...)
	l.Problems = l.Problems[:min(len(l.Problems), 10)]
	return l
}

// problem adds to a list what is wrong with an object, but returns an error that says
// nothing about it, since the store could not be asked.
func (v *verification) problem(list *[]string, err error) error {
	_, transport := errors.AsType[*storeError](err)
	if transport && !errors.Is(err, errNotFound) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if err != nil {
		v.mu.Lock()
		defer v.mu.Unlock()
		*list, v.OK = append(*list, err.Error()), false
	}
	return nil
}

// verifyStore reads the backup of that id, or all backups, and the WAL that follows, as a
// restore would: every byte is fetched, decompressed and compared with the checksums that
// there are. It returns an error only when it cannot find out.
func verifyStore(ctx context.Context, s *Store, id string) (*verification, error) {
	v := &verification{ServerName: s.Config.ServerName, OK: true, Backups: []*verifiedBackup{}, store: s, read: startProgress("verify")}
	defer v.read.stop()
	catalog, err := s.Catalog(ctx)
	if err != nil {
		return nil, err
	}
	var done []*verifiedBackup
	for _, b := range catalog.all() {
		if id != "" && b.ID != id {
			continue
		}
		verified := &verifiedBackup{ID: b.ID, Status: b.Status, BadPages: b.BadPageCount, info: b}
		if err := catalog.Unreadable[b.ID]; err != nil { // also if the server refuses it: a restore could not use it
			verified.Problems, v.OK = append(verified.Problems, err.Error()), false
		}
		v.Backups = append(v.Backups, verified)
		if b.Done() {
			done = append(done, verified)
		}
	}
	switch {
	case len(v.Backups) > 0:
	case id == "":
		return nil, nothingThere(ctx, s)
	default:
		return nil, fmt.Errorf("%w: there is no backup %s at %s", errNoBackup, id, s.URL(s.key("base/")))
	}

	for _, b := range done {
		b.archives, err = listArchives(ctx, s, b.info)
		if err := v.problem(&b.Problems, err); err != nil {
			return nil, err
		}
		b.Archives = len(b.archives)
		for _, a := range b.archives {
			b.Bytes += a.Size
		}
		v.read.total.Add(b.Bytes)
	}
	wal, systemIDs, err := v.findWAL(ctx, done)
	if err != nil {
		return nil, err
	}
	for _, b := range done {
		if err := v.verifyBackup(ctx, b); err != nil {
			return nil, err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(s.Config.Configuration.WAL.MaxParallel, defaultJobs))
	for _, o := range wal {
		g.Go(func() error {
			defer v.read.done.Add(o.Size)
			name, _ := parseWALName(o.Name) // a segment, see findWAL
			_, err := readSegment(ctx, s, o, name, io.Discard, systemIDs[o.Name])
			return v.problem(&v.WAL.Problems, err)
		})
	}
	err = g.Wait()
	slices.Sort(v.WAL.Problems)
	return v, err
}

// verifyBackup reads the archives of a backup to their ends.
func (v *verification) verifyBackup(ctx context.Context, b *verifiedBackup) error {
	r := &restorer{store: v.store, backup: b.info, read: v.read}
	problem := func(err error) error { return v.problem(&b.Problems, err) }
	if err := r.extractAll(ctx, b.archives, v.store.jobs(), problem); err != nil {
		return err
	}
	b.Files = len(r.sums.files)
	control := fileSum(controlFile, 0, 0)[0]
	if b.archives != nil && !slices.ContainsFunc(r.sums.files, func(f [2]uint64) bool { return f[0] == control }) {
		problem(fmt.Errorf("%w: no archive of the backup has %s: the last one is missing, or cannot be read", errDamaged, controlFile))
	}
	var err error
	b.Manifest, err = r.sums.check(b.info.BeginLSN)
	return problem(err)
}

// maxVerifiedSegments bounds what one name in the bucket can ask for: 16 TiB of WAL in most clusters.
const maxVerifiedSegments = 1 << 20

// findWAL finds out which segments the backups need, tells those that are not there, and
// returns the stored forms of the others, and the system identifiers that they must have.
func (v *verification) findWAL(ctx context.Context, backups []*verifiedBackup) (found []walObject, systemIDs map[string]uint64, err error) {
	stored, newest, histories := map[string][]walObject{}, map[uint32]string{}, timelineHistories{}
	for o, err := range v.store.List(ctx, v.store.key("wals/")) {
		if err != nil {
			return nil, nil, err
		}
		o := newWALObject(o)
		w, err := parseWALName(o.Name)
		switch {
		case err != nil:
		case w.Kind == walSegment:
			stored[o.Name] = append(stored[o.Name], o)
			newest[w.Timeline] = max(newest[w.Timeline], o.Name)
		case w.Kind == walHistory:
			histories[w.Timeline], err = readHistory(ctx, v.store, o)
			if err := v.problem(&v.WAL.Problems, err); err != nil {
				return nil, nil, err
			}
		}
	}
	// Without its history no recovery finds a timeline, and nothing here would miss its WAL.
	for t := range newest {
		if histories[t] == nil && slices.ContainsFunc(backups, func(b *verifiedBackup) bool { return t > timelineOf(b.info.EndWAL, b.info.Timeline) }) {
			v.problem(&v.WAL.Problems, fmt.Errorf("%w: %08X.history, of a timeline that has segments", errWALMissing, t))
		}
	}
	systemIDs = map[string]uint64{} // of the needed segments
	for _, b := range backups {
		begin, beginErr := parseLSN(b.info.BeginLSN)
		end, endErr := parseLSN(b.info.EndLSN)
		size := b.info.WALSegmentSize
		if beginErr != nil || endErr != nil || !validSegmentSize(size) {
			v.problem(&b.Problems, fmt.Errorf("%w: its backup.info has no begin_xlog, end_xlog and xlog_segment_size", errBadBackupInfo))
			continue
		}
		systemID, _ := strconv.ParseUint(b.info.SystemID, 10, 64) // 0 is not compared
		own := timelineOf(b.info.EndWAL, b.info.Timeline)
		timeline := own
		if b.info.Keep != "standalone" { // retention deletes what follows such a one
			for t := range newest {
				if t > timeline && histories.offLine(t, own, end) == "" {
					timeline = t
				}
			}
			if w, err := parseWALName(newest[timeline]); err == nil {
				end = max(end, LSN((w.number(size)+1)*uint64(size)))
			}
		}
		if n := segmentNumber(end, size) - segmentNumber(begin, size); end > begin && n > maxVerifiedSegments {
			v.problem(&b.Problems, fmt.Errorf("%w: %s, the newest segment, is %d segments after its begin: it is another cluster's", errDamaged, newest[timeline], n))
			continue
		}
		for _, name := range requiredSegments(begin, end, timeline, histories[timeline], size) {
			if !slices.Contains(b.info.WALInBackup, name) {
				systemIDs[name] = systemID
			}
		}
	}
	var gap []string
	tell := func() {
		if n := len(gap); n > 0 {
			v.problem(&v.WAL.Problems, fmt.Errorf("%w: %s", errWALMissing, gapName(gap[0], gap[n-1], n)))
		}
		gap = nil
	}
	for _, name := range slices.Sorted(maps.Keys(systemIDs)) {
		v.WAL.From, v.WAL.To = cmp.Or(v.WAL.From, name), name
		if len(stored[name]) == 0 {
			gap = append(gap, name)
			continue
		}
		tell()
		v.WAL.Segments++
		found = append(found, stored[name]...)
		for _, o := range stored[name] {
			v.WAL.Bytes += o.Size
			v.read.total.Add(o.Size)
		}
	}
	tell()
	return found, systemIDs, nil
}

// ---------------------------------------------------------------------------
// Recovery settings
// ---------------------------------------------------------------------------

// restoreCommand makes a restore_command of a program and its arguments, to which
// PostgreSQL adds the name and the destination of each WAL file.
func restoreCommand(program string, args ...string) string {
	var words []string
	for _, w := range append([]string{program}, args...) {
		if w == "" || strings.Trim(w, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:=,+@-") != "" {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		words = append(words, strings.ReplaceAll(w, "%", "%%")) // PostgreSQL expands %f, %p, %r and %%
	}
	// A program that crashes or lacks memory exits with a code that PostgreSQL takes for the end of the archive.
	return strings.Join(append(words, `"%f"`, `"%p"`), " ") + ` || { test $? = 1 && exit 1; exit 130; }`
}

// writeRecoverySettings lets `pg_ctl start` finish a restore into dir: it adds the
// restore_command and the target to postgresql.auto.conf and creates recovery.signal. The
// end of the restore makes them durable, with all the other files.
func writeRecoverySettings(dir string, target *RecoveryTarget, restoreCommand string) error {
	goal, err := parseTarget(target)
	if err != nil {
		return err
	}
	settings := [][2]string{{"restore_command", restoreCommand}, {"recovery_target_timeline", goal.TargetTLI},
		{"recovery_target_action", "promote"}, {"recovery_target_inclusive", strconv.FormatBool(goal.Exclusive == nil || !*goal.Exclusive)}}
	// PostgreSQL refuses to start with two targets, and one may have been left in the
	// backup by an earlier recovery. The empty ones must come first: each assignment is
	// checked against the target so far (guc hooks in xlogrecovery.c).
	for _, none := range []string{"", "_time", "_lsn", "_xid", "_name"} {
		settings = append(settings, [2]string{"recovery_target" + none, ""})
	}
	if goal.setting != "" {
		settings = append(settings, [2]string{goal.setting, goal.value})
	}
	var text strings.Builder
	fmt.Fprintf(&text, "\n# recovery to %s\n", strings.ReplaceAll(goal.words, "\n", " "))
	quote := strings.NewReplacer("'", "''", `\`, `\\`)
	for _, s := range settings {
		if strings.ContainsAny(s[1], "\n\x00") {
			return fmt.Errorf("%w: %s cannot have a newline in it: %q", errBadTarget, s[0], s[1])
		}
		fmt.Fprintf(&text, "%s = '%s'\n", s[0], quote.Replace(s[1]))
	}

	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := root.OpenFile("postgresql.auto.conf", os.O_WRONLY|os.O_CREATE|os.O_APPEND, minFileMode)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text.String())
	if err := cmp.Or(err, f.Close()); err != nil { // the first error
		return err
	}
	if err := root.Remove("standby.signal"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return root.WriteFile("recovery.signal", nil, minFileMode)
}

// ---------------------------------------------------------------------------
// The CNPG-I RestoreJobHooks service
// ---------------------------------------------------------------------------

// walVolume is where CloudNativePG puts pg_wal when the Cluster has walStorage.
const walVolume = "/var/lib/postgresql/wal/pg_wal"

// recoveryConfig is the answer to the operator, which adds the recovery target itself.
// The restore_command is CloudNativePG's own, which comes back to our WAL service.
const recoveryConfig = "recovery_target_action = promote\n" +
	"restore_command = '/controller/manager wal-restore --log-destination /controller/log/postgres.json %f %p'\n"

// restoreJobService restores the data directory of a new cluster.
type restoreJobService struct {
	job.UnimplementedRestoreJobHooksServer
	source configSource
	pgdata string
	walDir string // "" means walVolume
	report *report
}

// GetCapabilities is part of the handshake.
func (r *restoreJobService) GetCapabilities(context.Context, *job.RestoreJobHooksCapabilitiesRequest) (*job.RestoreJobHooksCapabilitiesResult, error) {
	return &job.RestoreJobHooksCapabilitiesResult{
		Capabilities: []*job.RestoreJobHooksCapability{{Kind: job.RestoreJobHooksCapability_KIND_RESTORE}}}, nil
}

// Restore restores the base backup that the Cluster's recovery target asks for.
func (r *restoreJobService) Restore(ctx context.Context, request *job.RestoreRequest) (*job.RestoreResponse, error) {
	cluster, err := DecodeCluster(request.ClusterDefinition)
	if err != nil {
		return nil, grpcError(err)
	}
	err = r.restore(ctx, cluster, request.CheckEmptyWalArchive)
	if ref := cluster.RecoveryStore(); ref != nil {
		// Told while there is somebody to tell it: the Pod, and its log with it, may soon be gone. It goes
		// under the name of the new Cluster, since the server name is that of the old one.
		r.report.found(StoreRef{ref.ObjectStore, cluster.Name}, conditionRestored, "RestoreFailed", err)
		tell, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		if err := r.report.tell(tell); err != nil {
			slog.Warn("Cannot tell how the restore ended", "error", err)
		}
	}
	if err != nil {
		return nil, grpcError(fmt.Errorf("restore Cluster %s: %w", cluster.Name, err))
	}
	return &job.RestoreResponse{RestoreConfig: recoveryConfig}, nil
}

func (r *restoreJobService) restore(ctx context.Context, cluster *Cluster, check *bool) error {
	ref := cluster.RecoveryStore()
	if ref == nil {
		return fmt.Errorf("it has %w for recovery: set spec.bootstrap.recovery.source to the name of an entry of spec.externalClusters whose plugin is %s, "+
			"with the parameter barmanObjectName", errNoStore, PluginName)
	}
	source, err := r.source.Store(ctx, *ref)
	if err != nil {
		return err
	}
	if archive := cluster.ArchiveStore(); archive != nil && checksEmptyArchive(cluster, check, true) {
		if err := r.checkDestination(ctx, source, *archive); err != nil {
			return err
		}
	}
	b, err := findBackup(ctx, source, cluster.Spec.Bootstrap.Recovery.RecoveryTarget)
	if err != nil {
		return err
	}
	o := restoreOptions{Dir: r.pgdata, SetAside: true}
	if cluster.Spec.WALStorage != nil {
		o.WALDir = cmp.Or(r.walDir, walVolume)
	}
	start := time.Now()
	if err := restoreBackup(ctx, source, b, o); err != nil {
		return err
	}
	slog.Info("Restored the base backup", "backupID", b.ID, "pgdata", r.pgdata, "seconds", time.Since(start).Seconds())
	return nil
}

// checkDestination makes sure, before anything is restored, that the new cluster will
// be able to archive: nobody else's WAL is in the way.
func (r *restoreJobService) checkDestination(ctx context.Context, source *Store, ref StoreRef) error {
	destination, err := r.source.Store(ctx, ref)
	if err != nil {
		return err
	}
	_, err = checkEmptyArchive(ctx, destination, "", "")
	if errors.Is(err, errArchiveNotEmpty) && source.place() == destination.place() {
		return fmt.Errorf("the new cluster would archive to the very place that it is restored from, %s: set another serverName in its spec.plugins: %w",
			source.URL(source.key()), err)
	}
	return err
}
