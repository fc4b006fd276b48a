// This file is everything about taking a base backup: the session that holds PostgreSQL
// in backup mode, the walk over the data directory and the tablespaces, the tar archives
// on their way to the bucket, the WAL that a backup needs, and the CNPG-I Backup service.

package main

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/cloudnative-pg/cnpg-i/pkg/backup"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// backupOptions say how a base backup is taken. The zero value is a backup of the
// server that the environment (PGHOST, PGPORT, ...) leads to.
type backupOptions struct {
	Name string // backup_name of backup.info; may be empty
	// FastCheckpoint asks for a fast checkpoint also where the ObjectStore does not.
	FastCheckpoint bool
	// Connection is a libpq connection string (key=value). What it leaves open comes from
	// libpq's environment variables; without those, user and database are postgres.
	Connection string
	// PGData is where this process sees the data directory; "" is where the server says it is.
	PGData string
	// Archive is where the WAL is archived, when that is not where the backup goes; then
	// the WAL that the backup needs is copied from there.
	Archive *Store
	// StorePatience is how long each request to a store that is away is repeated.
	StorePatience time.Duration
	// WALTimeout is how long archiving may stand still while the backup waits for its WAL.
	WALTimeout time.Duration
	// StandbyPatience is how long a standby waits for its last segment before it stores
	// its own copy of it.
	StandbyPatience time.Duration
	// ReportEvery is the time between two log lines about the same wait.
	ReportEvery time.Duration
}

const (
	defaultWALTimeout      = 10 * time.Minute
	defaultStandbyPatience = 30 * time.Second
	defaultReportEvery     = 10 * time.Second
	walPollInterval        = time.Second
)

// The shape of the archives. A data archive is closed, and the next one opened, at
// maxArchiveSize bytes or before it can reach S3's limit of 10,000 parts. The memory of
// a backup is jobs x 2 parts (each of which is being filled or on its way), and about
// two MiB of buffers for each job: with small parts it is below 64 MiB for the whole
// process, and 16 GiB are still only 3,277 of them.
const (
	maxArchiveSize   = 16 << 30
	maxArchiveParts  = 9_500   // leaves room for the last file
	archiveParts     = 2       // of one archive in memory at once: being filled, or on their way
	bandwidthBurst   = 1 << 20 // bytes that --max-bandwidth lets through at once
	directoryBatch   = 1000    // directory entries read at once
	oldestPostgreSQL = 13
)

// errWALMissing says that WAL which a backup needs is not in the archive.
var errWALMissing = errors.New("WAL is missing in the archive")

// errServer is a failure to reach PostgreSQL, errRefused is its answer to a statement;
// errSetup says that it cannot be backed up as it is set up.
var (
	errServer  = errors.New("PostgreSQL")
	errRefused = errors.New("PostgreSQL")
	errSetup   = errors.New("PostgreSQL cannot be backed up")
)

// ---------------------------------------------------------------------------
// A base backup from its beginning to its end
// ---------------------------------------------------------------------------

// takeBackup stores a base backup that is complete: when it returns without error, every
// archive has been listed with its size, every WAL segment from the first to the last is
// in the bucket (or, on a standby, the last one in the backup itself), and backup.info
// says DONE. After an error, or when ctx ends, nothing remains but a backup.info that says
// FAILED; if the process is killed not even that, and every reader ignores what is left.
func takeBackup(ctx context.Context, s *Store, o backupOptions) (*BackupInfo, error) {
	o.StorePatience = cmp.Or(o.StorePatience, storePatience)
	o.WALTimeout = cmp.Or(o.WALTimeout, defaultWALTimeout)
	o.StandbyPatience = cmp.Or(o.StandbyPatience, defaultStandbyPatience)
	o.ReportEvery = cmp.Or(o.ReportEvery, defaultReportEvery)
	o.FastCheckpoint = o.FastCheckpoint || s.Config.Configuration.Data.ImmediateCheckpoint

	session, err := openSession(ctx, o.Connection)
	if err != nil {
		return nil, fmt.Errorf("back up: %w", err)
	}
	defer session.close()
	b, err := newBaseBackup(ctx, s, o, session)
	if err != nil {
		return nil, fmt.Errorf("back up: %w", err)
	}
	// Whatever fails ends everything else, and the first failure is the one reported.
	ctx, b.fail = context.WithCancelCause(ctx)
	defer b.fail(nil)
	if err := b.run(ctx); err != nil {
		err = fmt.Errorf("backup %s: %w", b.info.ID, cmp.Or(context.Cause(ctx), err))
		b.fail(err)
		session.close()
		b.undo(ctx, err)
		return nil, err
	}
	return b.info, nil
}

// reservedName is an object that makes an id the backup's own until its backup.info is there:
// two instances that begin a backup in the same second would mix their archives.
const reservedName = "reserved"

// maxReservations bounds the attempts at an id, each of which another backup was faster at.
const maxReservations = 20

// nextBackupID reserves the current time in UTC, or one second after the newest id under
// base/: backups are ordered by their ids, and a Barman elsewhere names its own after
// its local time, which may be ahead of UTC.
func nextBackupID(ctx context.Context, s *Store) (string, error) {
	for n := 1; ; n++ {
		ids, err := s.ListDirectories(ctx, s.key("base/"))
		if err != nil {
			return "", err
		}
		now := time.Now().UTC()
		for _, id := range ids {
			if t, err := time.Parse(backupIDLayout, id); err == nil && !now.After(t.Add(time.Second)) {
				now = t.Add(time.Second)
			}
		}
		id := now.Format(backupIDLayout)
		reserved := s.baseKey(id, reservedName)
		switch err = s.Put(ctx, reserved, nil, putOptions{Data: true, IfAbsent: true}); {
		case errors.Is(err, errPrecondition) && n < maxReservations: // another backup has it, and is listed
			err = sleep(ctx, backoff(n))
		case err == nil:
			if _, err = s.Head(ctx, s.baseKey(id, backupInfoFile)); errors.Is(err, errNotFound) {
				return id, nil
			} else if err == nil { // another backup had it, and has ended since the listing
				err = s.Delete(ctx, reserved)
			}
		}
		if err != nil {
			return "", err
		}
	}
}

// release gives the reservation of the id up; backup.info has taken its place.
func (b *baseBackup) release(ctx context.Context) {
	key := b.store.baseKey(b.info.ID, reservedName)
	if err := b.store.Delete(ctx, key); err != nil {
		slog.Warn("An object that has no use any more stays in the bucket", "object", b.store.URL(key), "error", err)
	}
}

// baseBackup is a base backup in progress.
type baseBackup struct {
	store   *Store
	o       backupOptions
	session *session
	info    *BackupInfo
	pgdata  string // as this process sees it, without symbolic links
	jobs    int
	codec   *codec
	limiter *rate.Limiter
	fail    context.CancelCauseFunc
	log     *slog.Logger

	began time.Time
	read  *progress // of the files
	took  []string  // how long each tree took, for copy_stats
	// manifest lists every file as it is stored, walRanges what is to be replayed.
	manifest  manifest
	walRanges []walRange

	start    LSN      // pages that are newer were written during the backup, and its WAL makes them good
	required []string // the WAL files that the backup needs, oldest first
	behind   string   // the newest WAL file seen in the archive that is older than the first one missing: how far the archiver is
	last     *archive // the data archive of the highest number, open for what comes last

	closing  sync.WaitGroup // archives on their way to their end, besides the last one
	mu       sync.Mutex
	archives []*archive
}

// newBaseBackup finds out what there is to back up, and reserves an id for the backup.
func newBaseBackup(ctx context.Context, s *Store, o backupOptions, session *session) (*baseBackup, error) {
	info, err := session.inspect(ctx)
	if err != nil {
		return nil, err
	}
	b := &baseBackup{store: s, o: o, session: session, info: info, began: time.Now(), jobs: s.jobs()}
	if b.codec, err = codecByName(s.Config.Configuration.Data.Compression); err != nil {
		return nil, err
	}
	if bandwidth := s.data.MaxBandwidth; bandwidth > 0 {
		b.limiter = rate.NewLimiter(rate.Limit(bandwidth), bandwidthBurst)
	}
	// A data directory that is itself a symbolic link is followed.
	if b.pgdata, err = filepath.EvalSymlinks(cmp.Or(o.PGData, info.PGData)); err != nil {
		return nil, fmt.Errorf("the data directory of the server is not visible to this process: %w", err)
	}
	if err := session.checkPlace(ctx, b.pgdata); err != nil {
		return nil, err
	}
	if info.ID, err = nextBackupID(ctx, s); err != nil {
		return nil, fmt.Errorf("choose a backup id: %w", err)
	}
	info.BackupName, b.log = o.Name, slog.With("backupID", info.ID)
	return b, nil
}

// run takes the backup. The order is PostgreSQL's (manual, "Making a Base Backup Using
// the Low Level API"): start, copy, stop; pg_control is read last of all files, since a
// standby's recovery is complete at the point that pg_control names (do_pg_backup_stop
// in xlog.c), and before the stop, so that the stop is not before that point.
func (b *baseBackup) run(ctx context.Context) error {
	b.log.Info("Starting backup", "backupName", b.info.BackupName, "destination", b.store.URL(b.store.baseKey(b.info.ID, "")),
		"standby", b.session.inRecovery, "bytes", b.session.size, "jobs", b.jobs, "compression", cmp.Or(b.codec.name, "none"))
	for _, f := range b.info.IncludedFiles {
		if _, inside := below(b.info.PGData, f); !inside {
			b.log.Warn("A configuration file outside the data directory, included from another one, is not in the backup: keep a copy", "path", f)
		}
	}
	for _, step := range []func(context.Context) error{
		b.begin, b.copyFiles, b.stop,
		b.waitForWAL, b.patiently(b.checkOwner), b.patiently(b.copyWAL),
		b.seal, b.patiently(b.checkArchives), b.commit,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	b.log.Info("Backup completed", "backupName", b.info.BackupName, "beginWAL", b.info.BeginWAL, "endWAL", b.info.EndWAL, "bytes", b.info.bytes,
		"bytesStored", b.info.storedBytes, "archives", len(b.archives), "seconds", time.Since(b.began).Seconds())
	return nil
}

// patiently makes a step that does nothing but ask the store one that outlasts its absence.
func (b *baseBackup) patiently(step func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		return persist(ctx, b.o.StorePatience, func() error { return step(ctx) })
	}
}

// begin brings the server into backup mode, which begins with a checkpoint.
func (b *baseBackup) begin(ctx context.Context) error {
	began := time.Now()
	quiet := every(b.o.ReportEvery, func() {
		if b.o.FastCheckpoint {
			b.log.Info("Waiting for the checkpoint that a backup starts with", "waited", time.Since(began).Round(time.Second).String())
			return
		}
		b.log.Info("Waiting for the checkpoint that a backup starts with, which the server spreads over time; "+
			"set data.immediateCheckpoint: true in the ObjectStore to start at once",
			"waited", time.Since(began).Round(time.Second).String(), "mayTake", b.session.checkpointDuration.String())
	})
	err := b.session.startBackup(ctx, b.info, b.o.FastCheckpoint)
	quiet()
	if err == nil {
		b.start, err = parseLSN(b.info.BeginLSN)
	}
	return err
}

// stop ends backup mode and works out what WAL the backup needs.
func (b *baseBackup) stop(ctx context.Context) error {
	endTimeline, err := b.session.stopBackup(ctx, b.info)
	if err != nil {
		return err
	}
	end, err := parseLSN(b.info.EndLSN)
	if err != nil {
		return err
	}
	// The label holds the timeline of the checkpoint that recovery starts from.
	if m := regexp.MustCompile(`(?m)^START TIMELINE: (\d+)$`).FindStringSubmatch(b.info.BackupLabel); m != nil {
		if b.info.Timeline, err = strconv.Atoi(m[1]); err != nil {
			return fmt.Errorf("backup label: %w", err)
		}
	}
	timeline := uint32(b.info.Timeline)
	var history []timelineSwitch
	if endTimeline = cmp.Or(endTimeline, timeline); endTimeline != timeline {
		if history, err = b.timelineHistory(ctx, endTimeline); err != nil {
			return err
		}
		b.required = append(b.required, fmt.Sprintf("%08X.history", endTimeline))
	}
	size := b.info.WALSegmentSize
	from := b.start
	for _, ancestor := range history {
		if ancestor.At > from {
			b.walRanges = append(b.walRanges, walRange{ancestor.Timeline, from.String(), ancestor.At.String()})
			from = ancestor.At
		}
	}
	b.walRanges = append(b.walRanges, walRange{endTimeline, from.String(), end.String()})
	segments := requiredSegments(b.start, end, endTimeline, history, size)
	b.info.BeginWAL = segmentName(timeline, segmentNumber(b.start, size), size)
	b.info.BeginOffset = int64(uint64(b.start) % uint64(size))
	b.info.EndWAL = segments[len(segments)-1]
	b.info.EndOffset = int64(uint64(end) % uint64(size))
	b.required = append(b.required, segments...)
	return nil
}

// seal adds what is not copied from the server as it is now, and closes the last archive.
func (b *baseBackup) seal(ctx context.Context) error {
	for _, name := range b.info.WALInBackup {
		b.log.Info("Storing the standby's own copy of the last WAL segment in the backup, since the primary has not archived it: "+
			"an idle primary does not switch to the next segment", "walFile", name)
		if err := b.addFile(ctx, b.last, "pg_wal/"+name, filepath.Join(b.pgdata, "pg_wal", name), make([]byte, copyBufferSize)); err != nil {
			return err
		}
	}
	label := []byte(b.info.BackupLabel)
	header := tar.Header{Name: "backup_label", Mode: 0o600, Uid: os.Getuid(), Gid: os.Getgid(), ModTime: b.info.EndTime}
	if err := b.manifest.add(header.Name, int64(len(label)), header.ModTime, crc32.Checksum(label, castagnoli)); err != nil {
		return err
	}
	if err := b.addManifest(b.last); err != nil {
		return err
	}
	if err := b.last.add(header, label); err != nil {
		return err
	}
	return b.last.close()
}

// commit says that the backup is DONE.
func (b *baseBackup) commit(ctx context.Context) error {
	b.info.Status = statusDone
	b.info.CopyStats = fmt.Sprintf("{'total_time': %.6f, 'number_of_workers': %d, 'copy_time_per_item': {%s}}", // as Barman's
		time.Since(b.began).Seconds(), b.jobs, strings.Join(b.took, ", "))
	b.info.bytes, b.info.place = b.read.done.Load(), b.store.place()
	// No cancellation any more: the server may still carry out a request that was given up,
	// and the DONE would come after the FAILED of undo.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	if err := b.store.WriteBackupInfo(ctx, b.info); err != nil {
		return err
	}
	b.release(ctx)
	return nil
}

// undo removes what a failed backup has stored and leaves a backup.info that says why it
// failed. It has a time limit of its own, since ctx is over.
func (b *baseBackup) undo(ctx context.Context, cause error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*cleanupTimeout)
	defer cancel()
	b.closing.Wait() // soon: their context is over
	var workers sync.WaitGroup
	for _, a := range b.archives {
		workers.Go(a.abort)
	}
	workers.Wait()
	b.info.Status, b.info.Error, b.info.EndTime = statusFailed, cause.Error(), time.Time{}
	if err := b.store.WriteBackupInfo(ctx, b.info); err != nil {
		// If only the reply to a DONE was lost, then that backup is whole, and stays so.
		slog.Warn("The failed backup could not be marked as failed; without a backup.info it is ignored, and its objects may be deleted",
			"backupID", b.info.ID, "objects", b.store.URL(b.store.baseKey(b.info.ID, "")), "error", err)
		return
	}
	b.release(ctx)
	for _, a := range b.archives {
		if !a.closed {
			continue
		}
		if err := b.store.Delete(ctx, a.key); err != nil {
			slog.Warn("An archive of a failed backup stays in the bucket; it may be deleted", "object", b.store.URL(a.key), "error", err)
		}
	}
}

// checkArchives compares what the bucket lists with what was sent, before anything calls
// the backup done, and adds it up.
func (b *baseBackup) checkArchives(ctx context.Context) error {
	b.closing.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	sizes := map[string]int64{}
	for o, err := range b.store.List(ctx, b.store.baseKey(b.info.ID, "")) {
		if err != nil {
			return err
		}
		sizes[o.Key] = o.Size
	}
	b.info.storedBytes = 0
	for _, a := range b.archives {
		switch size, ok := sizes[a.key]; {
		case !ok:
			return fmt.Errorf("%s is not in the bucket although its upload was acknowledged", b.store.URL(a.key))
		case size != a.object.size.Load():
			return fmt.Errorf("%s has %d bytes in the bucket, but %d were sent", b.store.URL(a.key), size, a.object.size.Load())
		default:
			b.info.storedBytes += size
		}
	}
	return nil
}

// ---------------------------------------------------------------------------
// The session with PostgreSQL
// ---------------------------------------------------------------------------

// session is the connection that holds backup mode: when it ends, so does the backup
// (non-exclusive backups, PostgreSQL manual). Not safe for concurrent use.
type session struct {
	conn *pgx.Conn

	major, catalog     int // version, and that of the catalog
	inRecovery         bool
	size               int64 // bytes, of all tablespaces
	checkpointDuration time.Duration
	checksums          bool  // data_checksums
	blockSize          int64 // bytes
	blocksPerFile      int64 // segment_size: a larger relation goes on in FILENODE.1, .2, ...
}

func openSession(ctx context.Context, connection string) (*session, error) {
	config, err := pgx.ParseConfig(connection)
	if err != nil {
		return nil, fmt.Errorf("connection to %w: %w", errServer, err)
	}
	// ParseConfig falls back to the name of the process's user, libpq's default. The
	// instances of CloudNativePG map every local user to postgres (pg_ident).
	if os.Getenv("PGUSER") == "" && !strings.Contains(connection, "user=") {
		config.User = "postgres"
	}
	config.Database = cmp.Or(config.Database, "postgres")
	config.RuntimeParams["application_name"] = "barman_cloud_backup" // the original's, known to monitoring
	config.RuntimeParams["client_encoding"] = "UTF8"
	config.ConnectTimeout = cmp.Or(config.ConnectTimeout, dialTimeout)
	config.DefaultQueryExecMode = pgx.QueryExecModeDescribeExec // each statement runs once
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("connection to %w (PGHOST %s, PGPORT %d, user %s): %w", errServer, config.Host, config.Port, config.User, err)
	}
	return &session{conn: conn}, nil
}

// row reads the one row that a query returns. When ctx ends, the running statement is
// cancelled and the session closed.
func (s *session) row(ctx context.Context, sql string, values ...any) error {
	return answered(s.conn.QueryRow(ctx, sql).Scan(values...))
}

// answered tells what the server refuses from a failure to ask it.
func answered(err error) error {
	if _, refused := errors.AsType[*pgconn.PgError](err); refused {
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errServer, err)
	}
	return nil
}

// close ends the session and with it backup mode. It may be called twice.
func (s *session) close() {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	s.conn.Close(ctx) // all that can fail is the farewell
	select {
	case <-s.conn.PgConn().CleanupDone(): // after a cancelled statement: the server has heard of it
	case <-ctx.Done():
	}
}

// inspect reads what a backup needs to know of the server, and returns what backup.info says of it.
func (s *session) inspect(ctx context.Context) (*BackupInfo, error) {
	// The checkpoint may take long, and the session is idle while files are copied. Not every
	// version has all of these.
	if _, err := s.conn.Exec(ctx, `SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN
		('statement_timeout', 'lock_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout')`); err != nil {
		return nil, answered(err)
	}
	info := &BackupInfo{ServerName: "cloud"}
	var archiveMode string
	var seconds float64
	err := s.row(ctx, `
		SELECT current_setting('server_version_num')::int, current_setting('data_directory'),
			current_setting('config_file'), current_setting('hba_file'), current_setting('ident_file'),
			pg_is_in_recovery(), current_setting('archive_mode'),
			(SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
			system_identifier::text, catalog_version_no, (SELECT timeline_id FROM pg_control_checkpoint()),
			(SELECT sum(pg_tablespace_size(oid))::bigint FROM pg_tablespace),
			(SELECT setting::float8 FROM pg_settings WHERE name = 'checkpoint_timeout')
				* current_setting('checkpoint_completion_target')::float8,
			current_setting('data_checksums')::bool, current_setting('block_size')::bigint,
			(SELECT setting::bigint FROM pg_settings WHERE name = 'segment_size')
		FROM pg_control_system()`,
		&info.Version, &info.PGData, &info.ConfigFile, &info.HBAFile, &info.IdentFile, &s.inRecovery, &archiveMode, &info.WALSegmentSize,
		&info.SystemID, &s.catalog, &info.Timeline, &s.size, &seconds, &s.checksums, &s.blockSize, &s.blocksPerFile)
	if err != nil {
		return nil, err
	}
	s.checkpointDuration = time.Duration(seconds * float64(time.Second)).Round(time.Second)
	s.major = info.Version / 10000
	if s.major < oldestPostgreSQL {
		return nil, fmt.Errorf("%w: version %d is older than %d", errSetup, s.major, oldestPostgreSQL)
	}
	if !s.inRecovery && archiveMode == "off" {
		return nil, fmt.Errorf("%w: archive_mode is off, and without its WAL no backup can be restored: set archive_mode and archive_command", errSetup)
	}
	rows, _ := s.conn.Query(ctx, `SELECT DISTINCT sourcefile FROM pg_settings
		WHERE sourcefile IS NOT NULL AND sourcefile <> current_setting('config_file') ORDER BY 1`) // CollectRows has the error, too
	info.IncludedFiles, err = pgx.CollectRows(rows, pgx.RowTo[string])
	return info, answered(err)
}

// checkPlace makes sure that a directory is that of the server: PGHOST may name another host
// that has its own at the same place, even a primary and its standby. They never agree on
// when pg_control was written and which checkpoint it has (at these offsets since version 11).
func (s *session) checkPlace(ctx context.Context, pgdata string) error {
	name := filepath.Join(pgdata, controlFile)
	for n := 1; ; n++ {
		var systemID, written int64
		var checkpoint string
		err := s.row(ctx, `SELECT system_identifier, extract(epoch FROM pg_control_last_modified)::bigint, checkpoint_lsn::text
			FROM pg_control_system(), pg_control_checkpoint()`, &systemID, &written, &checkpoint)
		if err != nil {
			return err
		}
		lsn, err := parseLSN(checkpoint)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return fmt.Errorf("the data directory of the server is not visible to this process: %w", err)
		}
		if len(content) < 40 {
			return fmt.Errorf("%s has %d bytes: it is damaged", name, len(content))
		}
		field := func(at int) uint64 { return binary.NativeEndian.Uint64(content[at:]) }
		if int64(field(0)) == systemID && int64(field(24)) == written && LSN(field(32)) == lsn {
			return nil
		}
		if n == controlFileReads/10 { // each time it was written in between
			return fmt.Errorf("%w: %s is not of the server that was connected to (system identifier %d, checkpoint at %s): run the backup on the host of that server, or set PGHOST",
				errSetup, name, systemID, checkpoint)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// startBackup enters backup mode and sets the begin of the backup and the tablespaces in info.
func (s *session) startBackup(ctx context.Context, info *BackupInfo, immediate bool) error {
	start := "SELECT now(), pg_backup_start($1, $2)::text"
	if s.major < 15 {
		start = "SELECT now(), pg_start_backup($1, $2, false)::text" // the last argument: not exclusive
	}
	err := s.conn.QueryRow(ctx, start, "Barman backup cloud "+info.ID, immediate).Scan(&info.BeginTime, &info.BeginLSN)
	if err != nil {
		return fmt.Errorf("start the backup: %w", answered(err))
	}
	// Only now: the WAL of the backup makes tablespaces that come later, but not one that
	// came while the checkpoint was being waited for. One with a relative location
	// (allow_in_place_tablespaces) is an ordinary directory below pg_tblspc.
	rows, _ := s.conn.Query(ctx, `SELECT spcname, oid, pg_tablespace_location(oid) FROM pg_tablespace
		WHERE pg_tablespace_location(oid) LIKE '/%' ORDER BY spcname`)
	if info.Tablespaces, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Tablespace]); err != nil {
		return fmt.Errorf("list the tablespaces: %w", answered(err))
	}
	return nil
}

// stopBackup leaves backup mode without waiting for the archiver, sets the end and the
// label in info, and returns the timeline of the end, which is 0 on a primary: there it is
// the one of the start.
func (s *session) stopBackup(ctx context.Context, info *BackupInfo) (timeline uint32, err error) {
	function := "pg_backup_stop(false)"
	if s.major < 15 {
		function = "pg_stop_backup(false, false)"
	}
	// The time is taken after the function has run, so that a recovery to any later time
	// is past the end of the backup.
	stop := "SELECT lsn::text, labelfile, clock_timestamp() FROM " + function
	err = s.row(ctx, stop, &info.EndLSN, &info.BackupLabel, &info.EndTime)
	if err == nil && s.inRecovery {
		// On a standby the end is the minimum recovery point of pg_control, which may be
		// on another timeline than the start.
		err = s.row(ctx, "SELECT min_recovery_end_timeline FROM pg_control_recovery()", &timeline)
	}
	if err != nil {
		return 0, fmt.Errorf("stop the backup: %w", err)
	}
	return timeline, nil
}

// ---------------------------------------------------------------------------
// The WAL that a backup needs
// ---------------------------------------------------------------------------

// requiredSegments names the segments that hold the WAL from begin up to end, where
// timeline is that of the end and history its ancestors. A segment in which a timeline
// begins is the one of the new timeline: it starts with a copy of the old one's WAL, and
// it is what recovery reads (XLogFileReadAnyTLI in xlogrecovery.c tries the newest first).
func requiredSegments(begin, end LSN, timeline uint32, history []timelineSwitch, size int64) []string {
	first := segmentNumber(begin, size)
	last := max(first, segmentNumber(max(end, 1)-1, size)) // end is the byte after the last
	var names []string
	for n := first; n <= last; n++ {
		on := timeline
		for _, ancestor := range slices.Backward(history) {
			if n >= segmentNumber(ancestor.At, size) {
				break
			}
			on = ancestor.Timeline
		}
		names = append(names, segmentName(on, n, size))
	}
	return names
}

// timelineHistory reads the ancestors of a timeline from pg_wal, or else from the archive.
func (b *baseBackup) timelineHistory(ctx context.Context, timeline uint32) ([]timelineSwitch, error) {
	name := fmt.Sprintf("%08X.history", timeline)
	content, err := os.ReadFile(filepath.Join(b.pgdata, "pg_wal", name))
	if err == nil {
		return parseTimelineHistory(content)
	}
	var objects []walObject
	if errors.Is(err, fs.ErrNotExist) {
		objects, err = walObjects(ctx, b.archive(), name, false)
	}
	if err == nil && len(objects) > 0 {
		return readHistory(ctx, b.archive(), objects[0])
	}
	if err == nil {
		err = fmt.Errorf("%w: %s is neither in pg_wal nor in %s", errWALMissing, name, b.archive().URL(b.archive().walPrefix(name)))
	}
	return nil, fmt.Errorf("history of timeline %d, on which the backup ended: %w", timeline, err)
}

// archive is where the server's WAL is.
func (b *baseBackup) archive() *Store { return cmp.Or(b.o.Archive, b.store) }

// checkOwner reads the first and the last segment as a restore would: another cluster's
// have the same names, and where those are in the way, our own are not archived.
func (b *baseBackup) checkOwner(ctx context.Context) error {
	systemID, err := strconv.ParseUint(b.info.SystemID, 10, 64)
	for _, name := range slices.Compact([]string{b.info.BeginWAL, b.info.EndWAL}) {
		w, _ := parseWALName(name) // made here
		objects, listErr := walObjects(ctx, b.archive(), name, false)
		err = cmp.Or(err, listErr)
		for i := 0; i < len(objects) && err == nil; i++ {
			_, err = readSegment(ctx, b.archive(), objects[i], w, io.Discard, systemID)
		}
	}
	return err
}

// copyWAL gives a backup that lies elsewhere than the archive the WAL without which it cannot be restored.
func (b *baseBackup) copyWAL(ctx context.Context) error {
	if b.o.Archive == nil {
		return nil
	}
	dir, err := os.MkdirTemp("", "backup-wal-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, name := range b.required {
		w, err := parseWALName(name)
		if err != nil || slices.Contains(b.info.WALInBackup, name) {
			continue
		}
		path := filepath.Join(dir, name)
		if _, _, err := fetchWAL(ctx, b.o.Archive, w, path, 0, true); err != nil {
			return err
		}
		if err := archiveWAL(ctx, b.store, path); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return nil
}

// waitForWAL waits until the archive has the files. On a standby whose archive lacks the
// last segment only, it gives up waiting for that one after StandbyPatience and leaves it to
// seal, if the standby has it: the standby has received at least the part of it that
// the backup needs, and nothing but activity makes the primary archive it.
func (b *baseBackup) waitForWAL(ctx context.Context) error {
	began, reported, moved := time.Now(), time.Now(), time.Now()
	names := b.required
	first, last, archived := names[0], names[len(names)-1], ""
	for {
		left, err := b.missingWAL(ctx, names)
		switch {
		case errors.Is(err, errTransient) && time.Since(moved) < b.o.WALTimeout:
			b.log.Warn("Cannot see which WAL is in the archive, trying again", "error", err)
		case err != nil:
			return err
		default:
			// An archiver with a backlog comes to the WAL of the backup late, but it comes;
			// one that is past it already archives to another place.
			now, _ := b.archiver(ctx)
			if now = cmp.Or(now, b.behind); len(left) < len(names) || now != archived && now < names[0] {
				archived, moved = now, time.Now()
			}
			names = left
		}
		if len(names) == 0 {
			return nil
		}
		waited := time.Since(began)
		if b.session.inRecovery && names[0] == last && waited >= b.o.StandbyPatience && fileExists(filepath.Join(b.pgdata, "pg_wal", last)) {
			b.info.WALInBackup = names
			return nil
		}
		if time.Since(moved) >= b.o.WALTimeout {
			_, state := b.archiver(ctx)
			if b.unarchived(names[0]) {
				state = "the server has not archived it (if another one is there by that name, it is of another server of the same origin); " + state
			}
			return fmt.Errorf("%w: %s (the first of %d missing files; the backup needs %s to %s) is not in %s after %s: %s",
				errWALMissing, names[0], len(names), first, last, b.archive().URL(b.archive().key("wals/")), waited.Round(time.Second), state)
		}
		if time.Since(reported) >= b.o.ReportEvery {
			reported = time.Now()
			if err := b.contested(ctx, names[0]); err != nil {
				return err
			}
			b.log.Info("Waiting for the WAL of the backup to be archived", "walFile", names[0], "missing", len(names),
				"waited", waited.Round(time.Second).String(), "limit", b.o.WALTimeout.String())
		}
		// the archiver mostly needs no more than a moment
		if err := sleep(ctx, min(walPollInterval, walPollInterval/20+waited/2)); err != nil {
			return err
		}
	}
}

// missingWAL takes the names that the archive has off the beginning of the list. It
// lists the directory of the first name, and the next directory once that one is complete.
func (b *baseBackup) missingWAL(ctx context.Context, names []string) ([]string, error) {
	for len(names) > 0 {
		prefix := b.archive().walPrefix(names[0])
		if !strings.HasSuffix(prefix, ".history") { // a segment, with its neighbours
			prefix = path.Dir(prefix) + "/"
		}
		present := map[string]bool{}
		for o, err := range b.archive().List(ctx, prefix) {
			if err != nil {
				return nil, err
			}
			name := newWALObject(o).Name
			present[name] = true
			if name < names[0] {
				b.behind = max(b.behind, name)
			}
		}
		n := 0
		for n < len(names) && present[names[n]] && !b.unarchived(names[n]) {
			n++
		}
		if n == 0 {
			return names, nil
		}
		names = names[n:]
	}
	return nil, nil
}

// unarchived says that a primary has not archived a WAL file of its own yet. What the
// archive has by that name is then of a server of the same origin that went another way.
func (b *baseBackup) unarchived(name string) bool {
	return !b.session.inRecovery && fileExists(filepath.Join(b.pgdata, "pg_wal", "archive_status", name+".ready"))
}

// contested compares a file that waits to be archived with what the archive has by its name:
// errDifferent means that it never will be.
func (b *baseBackup) contested(ctx context.Context, name string) error {
	if !b.unarchived(name) {
		return nil
	}
	f, err := os.Open(filepath.Join(b.pgdata, "pg_wal", name))
	if err != nil {
		return nil // removed: it has just been archived
	}
	defer f.Close()
	w, err := parseWALName(name)
	if err != nil {
		return err
	}
	objects, err := walObjects(ctx, b.archive(), name, false)
	if err == nil && len(objects) > 0 {
		err = sameContent(ctx, b.archive(), w, objects, f)
	}
	if !errors.Is(err, errDifferent) {
		return nil // the waiting goes on, and ends with an error of its own
	}
	return fmt.Errorf("the WAL of this backup cannot be archived: %s: %w", name, err)
}

// archiver asks the server what it last archived, and where to look when WAL does not
// arrive. The former is "" on a standby, or when the server does not say: what counts then is
// what arrives.
func (b *baseBackup) archiver(ctx context.Context) (last, state string) {
	if b.session.inRecovery {
		return "", "see why the primary does not archive it (its log, its pg_stat_archiver, and the log of container plugin-barman-cloud in its Pod)"
	}
	var failed string
	err := b.session.row(ctx, "SELECT coalesce(last_archived_wal, ''), coalesce(last_failed_wal, 'nothing') FROM pg_stat_archiver", &last, &failed)
	if err != nil {
		return "", "see why it is not archived (log of the server): " + err.Error()
	}
	return last, fmt.Sprintf("pg_stat_archiver says that the server last archived %s and last failed to archive %s; see its log, and that of the archive_command",
		cmp.Or(last, "nothing"), failed)
}

// ---------------------------------------------------------------------------
// The files
// ---------------------------------------------------------------------------

// tree is a directory tree that is stored in a series of archives of its own.
type tree struct {
	name        string          // of the archives: data, or the OID of a tablespace
	root        string          // absolute, without symbolic links
	top         string          // below root, where the tree begins; "." for the data directory
	skip        map[string]bool // names below root that are stored elsewhere or last
	directories []tar.Header    // top-down
}

// Names that never belong into a backup. The lists are PostgreSQL's own
// (excludeDirContents, excludeFiles in basebackup.c, the manual's "Low Level API") with
// what Barman adds (postgres_plumbing.py); backup_manifest and the like would belong to
// an older backup that this directory was restored from.
var (
	// emptyDirectories are kept, but not what is in them.
	emptyDirectories = map[string]bool{
		"pg_wal": true, "pg_xlog": true, "pg_replslot": true, "pg_dynshmem": true, "pg_notify": true, "pg_serial": true,
		"pg_snapshots": true, "pg_stat_tmp": true, "pg_subtrans": true, "log": true, "pg_log": true,
	}
	// transientFiles lie directly in the data directory.
	transientFiles = map[string]bool{
		"postmaster.pid": true, "postmaster.opts": true, "current_logfiles": true, "current_logfiles.tmp": true,
		"postgresql.auto.conf.tmp": true, "recovery.conf": true, "recovery.signal": true, "standby.signal": true,
		"backup_manifest": true, "backup_manifest.tmp": true, "backup_label": true, "backup_label.old": true,
		"tablespace_map": true, "tablespace_map.old": true, "lost+found": true, emptyArchiveMarker: true, incompleteFile: true,
	}
	// temporaryRelation is a relation of one session: t<backend>_<filenode>, with fork and segment.
	temporaryRelation = regexp.MustCompile(`^t\d+_\d+(_[a-z]+)?(\.\d+)?$`)
	databaseDirectory = regexp.MustCompile(`(^|/)\d+$`)
	// relationFork is a file of a relation: filenode, fork, segment.
	relationFork = regexp.MustCompile(`^(\d+)(_[a-z]+)?(\.\d+)?$`)
)

// excluded says whether a name below the root is left out, with all that is below it.
func (t *tree) excluded(name string) bool {
	dir, base := path.Split(name)
	return t.skip[name] ||
		dir == "" && t.top == "." && transientFiles[base] ||
		strings.HasPrefix(base, "pgsql_tmp") ||
		base == "pg_internal.init" || strings.HasPrefix(base, "pg_internal.init.") ||
		temporaryRelation.MatchString(base) && databaseDirectory.MatchString(path.Clean(dir))
}

// unlogged finds the relations of a directory that have an init fork. Of those nothing else
// is stored: they are not in the WAL, and recovery makes them again from that fork.
func (t *tree) unlogged(dir string) (relations map[string]bool, err error) {
	relations = map[string]bool{}
	if !databaseDirectory.MatchString(dir) {
		return relations, nil
	}
	for e, err := range readDirectory(filepath.Join(t.root, dir)) {
		if err != nil {
			return nil, err
		}
		if m := relationFork.FindStringSubmatch(e.Name()); m != nil && m[2] == "_init" {
			relations[m[1]] = true
		}
	}
	return relations, nil
}

// contentsExcluded says whether a directory is stored empty.
func (t *tree) contentsExcluded(name string) bool { return t.top == "." && emptyDirectories[name] }

// readDirectory returns the entries of a directory, read in batches: a directory may hold
// a hundred thousand files. One that vanishes is empty.
func readDirectory(name string) iter.Seq2[fs.DirEntry, error] {
	return func(yield func(fs.DirEntry, error) bool) {
		d, err := os.Open(name)
		if err == nil {
			defer d.Close()
		}
		for err == nil {
			var entries []fs.DirEntry
			entries, err = d.ReadDir(directoryBatch)
			for _, e := range entries {
				if !yield(e, nil) {
					return
				}
			}
		}
		if err != io.EOF && !errors.Is(err, fs.ErrNotExist) {
			yield(nil, err)
		}
	}
}

// findDirectories adds a directory and what is below it to t.directories; above are those
// that lead to it. Directories that appear later are none of ours: the WAL of the backup makes
// them again. The data directory itself is "./" with mode 0700, which gives the restored
// directory the mode that PostgreSQL wants.
func (t *tree) findDirectories(name string, above ...fs.FileInfo) error {
	info, err := os.Stat(filepath.Join(t.root, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if slices.ContainsFunc(above, func(a fs.FileInfo) bool { return os.SameFile(a, info) }) {
		return nil // a symbolic link that leads back up
	}
	header := headerOf(name+"/", info)
	if name == "." {
		header.Mode = 0o700
	}
	t.directories = append(t.directories, header)
	if t.contentsExcluded(name) {
		return nil
	}
	var children []string
	for e, err := range readDirectory(filepath.Join(t.root, name)) {
		if err != nil {
			return err
		}
		child := path.Join(name, e.Name())
		if (e.IsDir() || e.Type() == fs.ModeSymlink && t.follows(child)) && !t.excluded(child) {
			children = append(children, child)
		}
	}
	for _, child := range children {
		if err := t.findDirectories(child, append(above, info)...); err != nil {
			return err
		}
	}
	return nil
}

// follows says whether a symbolic link is stored as the directory that it leads to. That
// is so for PostgreSQL's own directories, which people move to other volumes (pg_wal above
// all); the links in pg_tblspc are made again from backup.info when the backup is restored.
func (t *tree) follows(name string) bool {
	info, err := os.Stat(filepath.Join(t.root, name))
	if err != nil || !info.IsDir() || path.Dir(name) == "pg_tblspc" {
		return false
	}
	top, _, _ := strings.Cut(name, "/")
	if t.top != "." || top == "base" || top == "global" || strings.HasPrefix(top, "pg_") || emptyDirectories[top] {
		return true
	}
	if !t.excluded(name) {
		slog.Warn("A symbolic link to a directory is not in the backup, since it is none of PostgreSQL's own", "path", filepath.Join(t.root, name))
	}
	return false
}

// findFiles sends the names of the files of all directories.
func (t *tree) findFiles(ctx context.Context, files chan<- string) error {
	for _, header := range t.directories {
		dir := path.Clean(header.Name)
		if t.contentsExcluded(dir) {
			continue
		}
		unlogged, err := t.unlogged(dir)
		if err != nil {
			return err
		}
		for e, err := range readDirectory(filepath.Join(t.root, dir)) {
			if err != nil {
				return err
			}
			name := path.Join(dir, e.Name())
			if !e.Type().IsRegular() && e.Type() != fs.ModeSymlink || t.excluded(name) {
				continue // sockets, pipes, directories
			}
			if m := relationFork.FindStringSubmatch(e.Name()); m != nil && unlogged[m[1]] && m[2] != "_init" {
				continue
			}
			if e.Type() == fs.ModeSymlink {
				if info, err := os.Stat(filepath.Join(t.root, name)); dir == "pg_tblspc" || err == nil && info.IsDir() {
					continue // see follows
				}
			}
			select {
			case files <- name:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	return nil
}

// trees are the tablespaces and, last, the data directory.
func (b *baseBackup) trees() ([]*tree, error) {
	data := &tree{name: "data", root: b.pgdata, top: ".", skip: map[string]bool{controlFile: true}}
	var trees []*tree
	for _, space := range b.info.Tablespaces {
		root, err := filepath.EvalSymlinks(space.Location)
		if err != nil {
			return nil, fmt.Errorf("tablespace %s: its location is not visible to this process: %w", space.Name, err)
		}
		// One inside the data directory must not be stored twice.
		if name, inside := below(b.pgdata, root); inside {
			data.skip[name] = true
		}
		// Versions of PostgreSQL can share a location, each in a directory of its own.
		trees = append(trees, &tree{name: strconv.FormatUint(uint64(space.OID), 10), root: root,
			top: fmt.Sprintf("PG_%d_%d", b.session.major, b.session.catalog)})
	}
	for _, f := range b.externalFiles() {
		data.skip[path.Base(f)] = true // one of the same name in the data directory is not in use
	}
	return append(trees, data), nil
}

// externalFiles are the configuration files outside the data directory, which a restored
// server finds inside it (as with Barman). Files that they include are not stored.
func (b *baseBackup) externalFiles() (files []string) {
	for _, f := range []string{b.info.ConfigFile, b.info.HBAFile, b.info.IdentFile} {
		if _, inside := below(b.info.PGData, f); f != "" && !inside {
			files = append(files, f)
		}
	}
	return files
}

// below says whether a path is that of a directory or below it, and how it is called there.
func below(dir, path string) (name string, ok bool) {
	name, err := filepath.Rel(dir, path)
	return name, err == nil && dir != "" && filepath.IsLocal(name)
}

// copyFiles stores all trees, and leaves the last archive open for what comes last.
func (b *baseBackup) copyFiles(ctx context.Context) error {
	trees, err := b.trees()
	if err != nil {
		return err
	}
	b.read = startProgress("backup")
	defer b.read.stop()
	b.read.total.Store(b.session.size)
	// A server that stops ends the backup: better to know now than after hours of copying.
	defer every(b.o.ReportEvery, func() {
		if err := b.session.conn.Ping(ctx); err != nil {
			b.fail(fmt.Errorf("the server has ended the session that held the backup: %w", answered(err)))
		}
	})()
	for _, t := range trees {
		if b.last != nil {
			b.closeArchive(b.last)
			b.closing.Wait() // for the memory
		}
		if err := b.copyTree(ctx, t); err != nil {
			return err
		}
	}
	buffer := make([]byte, copyBufferSize)
	for _, f := range b.externalFiles() {
		real, err := filepath.EvalSymlinks(f)
		if errors.Is(err, fs.ErrNotExist) { // pg_ident.conf may be missing
			slog.Warn("A configuration file outside the data directory is not in the backup, since this process does not see it", "path", f)
			continue
		}
		if err != nil {
			return err
		}
		if err := b.addFile(ctx, b.last, path.Base(f), real, buffer); err != nil {
			return err
		}
	}
	if n := b.info.BadPageCount; n > 0 {
		b.log.Warn("The server has damaged pages, and the backup stores them as they are: find their relations with pg_filenode_relation, "+
			"and restore from an earlier backup what is lost", "badPages", n)
	}
	return b.addControlFile(ctx, b.last)
}

// copyTree stores a tree: its directories in the first archive, then its files by
// several jobs at once, each into an archive of its own. It has them all closed but the
// one of the highest number, b.last.
func (b *baseBackup) copyTree(ctx context.Context, t *tree) error {
	began := time.Now()
	if err := t.findDirectories(t.top); err != nil {
		return err
	}
	first, err := b.openArchive(ctx, t.name, 0)
	if err != nil {
		return err
	}
	for _, header := range t.directories {
		if err := first.add(header, nil); err != nil {
			return err
		}
	}
	files := make(chan string, 64)
	archives := make([]*archive, b.jobs)
	archives[0] = first
	var workers sync.WaitGroup
	fail := func(err error) {
		if err != nil {
			b.fail(err) // so that the others stop too
		}
	}
	workers.Go(func() {
		defer close(files)
		fail(t.findFiles(ctx, files))
	})
	for job := range b.jobs {
		workers.Go(func() {
			buffer := make([]byte, copyBufferSize)
			for name := range files {
				if ctx.Err() == nil { // else drain
					fail(b.copyFile(ctx, t, &archives[job], name, buffer))
				}
			}
			b.mu.Lock()
			newest := b.archives[len(b.archives)-1]
			b.mu.Unlock()
			if a := archives[job]; a != nil && a != newest && ctx.Err() == nil { // the newest stays open
				archives[job] = nil
				b.closeArchive(a)
			}
		})
	}
	workers.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	b.last = b.archives[len(b.archives)-1]
	for _, a := range archives {
		if a != nil && a != b.last {
			b.closeArchive(a)
		}
	}
	b.took = append(b.took, fmt.Sprintf("'%s': %.6f", t.name, time.Since(began).Seconds()))
	return context.Cause(ctx)
}

// closeArchive has an archive closed in the background: a server may need as long for putting
// the parts together as for taking them, and what comes next need not wait for that.
func (b *baseBackup) closeArchive(a *archive) {
	b.closing.Go(func() {
		if err := a.close(); err != nil {
			b.fail(err)
		}
	})
}

// copyFile stores one file of a tree in the job's archive, which it closes and replaces
// by the next one when it is full. A file is never split.
func (b *baseBackup) copyFile(ctx context.Context, t *tree, a **archive, name string, buffer []byte) error {
	path := filepath.Join(t.root, name)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // vanished since it was listed
	}
	if err != nil {
		return err
	}
	if *a != nil && !(*a).hasRoom(info.Size()) {
		if err := (*a).close(); err != nil {
			return err
		}
		*a = nil
	}
	if *a == nil {
		if *a, err = b.openArchive(ctx, t.name, info.Size()); err != nil {
			return err
		}
	}
	if err := b.addFile(ctx, *a, name, path, buffer); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// addFile adds a regular file or a symbolic link to an archive. The server goes on
// writing meanwhile, and the WAL of the backup makes good for what is read in between; but
// a tar header is written first and its size binds: a file that shrinks is filled up with
// zeros, and one that grows is cut. fs.ErrNotExist says that there is no such file.
func (b *baseBackup) addFile(ctx context.Context, a *archive, name, path string, buffer []byte) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ELOOP) { // it is a symbolic link
		target, err := os.Readlink(path)
		if err != nil {
			return err
		}
		return a.add(tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777, Uid: os.Getuid(), Gid: os.Getgid()}, nil)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	header := headerOf(name, info)
	header.Size = info.Size()
	if err := a.tar.WriteHeader(&header); err != nil {
		return a.failed(err)
	}
	forget := pageCacheKeeper(f, header.Size)
	defer forget()
	firstBlock, pages := b.relationFile(name)
	var sum uint32
	for at := int64(0); at < header.Size; {
		piece := buffer[:min(header.Size-at, int64(len(buffer)))]
		n, err := io.ReadFull(f, piece)
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return err // names the file
		}
		clear(piece[n:]) // it has shrunk
		if pages {
			b.checkPages(ctx, f, a.fullName(name), piece, at, firstBlock)
		}
		if _, err := a.tar.Write(piece); err != nil {
			return a.failed(err)
		}
		sum = crc32.Update(sum, castagnoli, piece)
		at += int64(len(piece))
		b.read.done.Add(int64(len(piece)))
	}
	return b.manifest.add(a.fullName(name), header.Size, header.ModTime, sum)
}

// relationFileForm is a file of pages: its fork does not matter, its segment does.
var relationFileForm = regexp.MustCompile(`^(?:global|(?:base|(?:pg_tblspc/\d+/)?PG_[^/]+)/\d+)/\d+(?:_[a-z]+)?(?:\.(\d+))?$`)

// relationFile says whether a file has pages with checksums, and the number of the first.
func (b *baseBackup) relationFile(name string) (firstBlock int64, pages bool) {
	m := relationFileForm.FindStringSubmatch(name)
	if m == nil || !b.session.checksums {
		return 0, false
	}
	segment, _ := strconv.ParseInt("0"+m[1], 10, 32)
	return segment * b.session.blocksPerFile, true
}

const (
	pageReads = 5 // of a page whose checksum is wrong, which may be one that is being written
	// maxBadPages are named; all are counted.
	maxBadPages = 100
)

// checkPages verifies the checksums of the pages in a piece of a file at an offset. A
// wrong one does not fail the backup: better a backup with a damaged page than none.
func (b *baseBackup) checkPages(ctx context.Context, f *os.File, name string, piece []byte, at, block int64) {
	size := b.session.blockSize
	block += at / size
	for ; int64(len(piece)) >= size; piece, at, block = piece[size:], at+size, block+1 {
		if pageIntact(piece[:size], uint32(block), b.start) || b.intactWhenReadAgain(ctx, f, at, uint32(block)) {
			continue
		}
		b.mu.Lock()
		b.info.BadPageCount++
		if b.info.BadPageCount <= maxBadPages {
			b.info.BadPages = append(b.info.BadPages, fmt.Sprintf("%s:%d", name, block))
			slog.Warn("A page of the database has a wrong checksum", "backupID", b.info.ID, "file", name, "block", block)
		}
		b.mu.Unlock()
	}
}

func (b *baseBackup) intactWhenReadAgain(ctx context.Context, f *os.File, at int64, block uint32) bool {
	page := make([]byte, b.session.blockSize)
	b.mu.Lock()
	patient := b.info.BadPageCount < maxBadPages // so many are not just being written
	b.mu.Unlock()
	for reads := 0; reads == 0 || patient && reads < pageReads; reads++ {
		if reads > 0 && sleep(ctx, 10*time.Millisecond) != nil {
			return true // nobody will read this backup
		}
		if n, err := f.ReadAt(page, at); n < len(page) {
			return err == io.EOF // cut off meanwhile
		}
		if pageIntact(page, block, b.start) {
			return true
		}
	}
	return false
}

// pageIntact says whether a page has the checksum that it should have. A page that is new,
// or was written after start, needs none: the first is empty, the second is in the WAL
// (PageIsVerified in bufpage.c, verify_page_checksum in basebackup.c). The header begins
// with LSN (two words, high first), checksum, flags, lower, upper (bufpage.h).
func pageIntact(page []byte, block uint32, start LSN) bool {
	order := binary.NativeEndian
	lsn := LSN(order.Uint32(page))<<32 | LSN(order.Uint32(page[4:]))
	return order.Uint16(page[14:]) == 0 || lsn >= start || order.Uint16(page[8:]) == pageChecksum(page, block)
}

// pageChecksum is PostgreSQL's (checksum_impl.h): 32 sums in the manner of FNV-1a, of
// which each takes every 32nd word of the page, with the field of the checksum as zero.
// Eight at a time they fit into the registers of the processor.
func pageChecksum(page []byte, block uint32) uint16 {
	const prime, row = 16777619, 32 * 4
	order := binary.NativeEndian
	defer order.PutUint16(page[8:], order.Uint16(page[8:]))
	clear(page[8:10])
	var all uint32
	for lane := 0; lane < len(pageChecksumSeeds); lane += 8 {
		seeds := (*[8]uint32)(pageChecksumSeeds[lane:])
		a, b, c, d, e, f, g, h := seeds[0], seeds[1], seeds[2], seeds[3], seeds[4], seeds[5], seeds[6], seeds[7]
		for at := lane * 4; at+32 <= len(page); at += row {
			w := (*[32]byte)(page[at:])
			a ^= order.Uint32(w[0:])
			b ^= order.Uint32(w[4:])
			c ^= order.Uint32(w[8:])
			d ^= order.Uint32(w[12:])
			e ^= order.Uint32(w[16:])
			f ^= order.Uint32(w[20:])
			g ^= order.Uint32(w[24:])
			h ^= order.Uint32(w[28:])
			a, b, c, d = a*prime^a>>17, b*prime^b>>17, c*prime^c>>17, d*prime^d>>17
			e, f, g, h = e*prime^e>>17, f*prime^f>>17, g*prime^g>>17, h*prime^h>>17
		}
		for _, sum := range [8]uint32{a, b, c, d, e, f, g, h} {
			for range 2 { // two rows of zeros
				sum = sum*prime ^ sum>>17
			}
			all ^= sum
		}
	}
	return uint16((all^block)%65535) + 1
}

// pageChecksumSeeds are where the 32 sums begin.
var pageChecksumSeeds = [32]uint32{
	0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
	0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
	0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
	0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
}

// headerOf is the tar header of a file without its size. That a name with a slash at its end
// is a directory, archive/tar knows.
func headerOf(name string, info fs.FileInfo) tar.Header {
	owner := info.Sys().(*syscall.Stat_t)
	// Whole seconds: a fraction would cost a record of 1 KiB for each file.
	return tar.Header{Name: name, Mode: int64(info.Mode().Perm()), ModTime: info.ModTime().Truncate(time.Second),
		Uid: int(owner.Uid), Gid: int(owner.Gid)}
}

// pageCacheKeeper returns a function that gives back the page cache which reading f has
// filled, so that a backup does not push out what the server works with. If most of the
// file was cached before, it is the server's and stays.
func pageCacheKeeper(f *os.File, size int64) (forget func()) {
	// Counting takes a byte for each page: of a file that is larger than any of a relation, the first GiB will do.
	if cached, err := cachedPages(f, min(size, 1<<30)); err != nil || cached*int64(os.Getpagesize()) > size/2 {
		return func() {}
	}
	return func() { unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) } // only advice
}

// cachedPages counts the pages of a file that are in memory, by mincore(2): every Linux has
// it, unlike cachestat(2). The mapping is not touched.
func cachedPages(f *os.File, size int64) (n int64, err error) {
	if size == 0 {
		return 0, nil
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(memory)
	pages := make([]byte, (len(memory)+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&memory[0])), uintptr(len(memory)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		return 0, errno
	}
	for _, page := range pages {
		n += int64(page & 1)
	}
	return n, nil
}

// controlFileReads is how often pg_control is read, every 50 ms, until it is intact.
const controlFileReads = 100

// addControlFile adds global/pg_control. The server rewrites it in place, so that a
// reader may see half of the old and half of the new; it is read until its CRC holds.
func (b *baseBackup) addControlFile(ctx context.Context, a *archive) error {
	name := filepath.Join(b.pgdata, controlFile)
	for range controlFileReads {
		info, err := os.Stat(name)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if controlFileIntact(content) {
			header := headerOf(controlFile, info)
			if err := b.manifest.add(header.Name, int64(len(content)), header.ModTime, crc32.Checksum(content, castagnoli)); err != nil {
				return err
			}
			return a.add(header, content)
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: its CRC was wrong in %d reads: the file is damaged, check the disk and compare with pg_controldata", name, controlFileReads)
}

// controlFileIntact says whether the CRC of a pg_control is right. The CRC-32C is the
// last field of ControlFileData (pg_control.h) and covers all before it; where it lies
// depends on the version, but it is always within the first sector, since
// PG_CONTROL_MAX_SAFE_SIZE is 512. So every offset is tried: that one of a hundred wrong
// ones fits by chance is as likely as 1 in 40 million.
func controlFileIntact(content []byte) bool {
	const smallest, sector = 128, 512
	for n := smallest; n+4 <= min(len(content), sector); n += 4 {
		if crc32.Checksum(content[:n], castagnoli) == binary.NativeEndian.Uint32(content[n:]) {
			return true
		}
	}
	return false
}

// ---------------------------------------------------------------------------
// backup_manifest
// ---------------------------------------------------------------------------

// manifestFile lies in the root of a restored directory, where pg_verifybackup looks for it.
const manifestFile = "backup_manifest"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// manifest is a backup_manifest of version 1, which PostgreSQL 13 and later read (manual,
// "Backup Manifest Format"). Its checksums are CRC-32C, as pg_basebackup's are unless it
// is told otherwise: a processor that does not have SHA-256 in hardware would need more
// time for that than for all the rest of a backup. The zero value is an empty one; safe
// for concurrent use.
type manifest struct {
	mu   sync.Mutex
	text *spool
	sum  hash.Hash // of the text so far
	size int64
}

// walRange is an element of "WAL-Ranges".
type walRange struct {
	Timeline uint32 `json:"Timeline"`
	Start    string `json:"Start-LSN"`
	End      string `json:"End-LSN"`
}

// manifestEntry is an element of "Files".
type manifestEntry struct {
	Path        string `json:"Path"`
	EncodedPath string `json:"Encoded-Path"` // in hex, where the name is not UTF-8
	Size        int64  `json:"Size"`
	Algorithm   string `json:"Checksum-Algorithm"`
	Checksum    string `json:"Checksum"`
}

// manifestSum is the text of a CRC-32C: its bytes in the order of memory (pg_checksum_final).
func manifestSum(crc uint32) string {
	return hex.EncodeToString(binary.LittleEndian.AppendUint32(nil, crc))
}

func (m *manifest) add(name string, size int64, modified time.Time, crc uint32) error {
	field := fmt.Sprintf(`"Encoded-Path": "%x"`, name)
	if utf8.ValidString(name) {
		quoted, _ := json.Marshal(name) // a string can be marshalled
		field = `"Path": ` + string(quoted)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	separator := ",\n"
	if m.text == nil {
		separator = "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n"
	}
	return m.write(fmt.Sprintf(`%s{ %s, "Size": %d, "Last-Modified": "%s", "Checksum-Algorithm": "CRC32C", "Checksum": "%s" }`,
		separator, field, size, modified.UTC().Format("2006-01-02 15:04:05 GMT"), manifestSum(crc)))
}

func (m *manifest) write(text string) (err error) {
	if m.text == nil {
		if m.text, err = newSpool(); err != nil {
			return err
		}
		m.sum = sha256.New()
	}
	m.size += int64(len(text))
	io.WriteString(m.sum, text) // which never fails
	_, err = io.WriteString(m.text.z, text)
	return err
}

// addManifest ends the manifest and adds it to an archive.
func (b *baseBackup) addManifest(a *archive) error {
	var ranges []string
	for _, r := range slices.Backward(b.walRanges) {
		ranges = append(ranges, fmt.Sprintf(`{ "Timeline": %d, "Start-LSN": "%s", "End-LSN": "%s" }`, r.Timeline, r.Start, r.End))
	}
	m := &b.manifest
	if err := m.write("\n],\n\"WAL-Ranges\": [\n" + strings.Join(ranges, ",\n") + "\n],\n"); err != nil {
		return err
	}
	if err := m.write(fmt.Sprintf("\"Manifest-Checksum\": \"%x\"}\n", m.sum.Sum(nil))); err != nil {
		return err
	}
	text, err := m.text.open()
	if err != nil {
		return err
	}
	header := tar.Header{Name: manifestFile, Mode: 0o600, Uid: os.Getuid(), Gid: os.Getgid(), ModTime: b.info.EndTime, Size: m.size}
	if err = a.tar.WriteHeader(&header); err == nil {
		_, err = io.Copy(a.tar, text)
	}
	m.text.b.free()
	return a.failed(err)
}

// spool keeps a text in memory, compressed: of the 30 MB that the manifest of 200,000
// files has, about 4 are left. There may be no disk that may be written to.
type spool struct {
	b partBuffer
	c *codec
	z io.WriteCloser
}

func newSpool() (s *spool, err error) {
	s = &spool{}
	runtime.SetFinalizer(s, func(s *spool) { s.b.free() }) // if something fails, nobody else does
	if s.c, err = codecByName("zstd"); err == nil {
		s.z, err = s.c.compress(&s.b, "low")
	}
	return s, err
}

// open ends the writing and reads from the beginning.
func (s *spool) open() (io.Reader, error) {
	if err := s.z.Close(); err != nil {
		return nil, err
	}
	return s.c.newReader(io.NewSectionReader(&s.b, 0, int64(s.b.size)))
}

// ---------------------------------------------------------------------------
// Archives
// ---------------------------------------------------------------------------

// archive is one tar on its way to the bucket: tar, then codec, then upload. Not safe
// for concurrent use; only object.size, its bytes as stored, may be read at any time.
type archive struct {
	key    string
	tree   string
	number int   // within its tree, from 0
	limit  int64 // bytes after which the next file goes into another one
	tar    *tar.Writer
	codec  io.WriteCloser
	object *objectWriter
	closed bool // it is in the bucket, or may be
}

// openArchive opens the next archive of a tree: data.tar, data_0001.tar, ... first is
// the size of its first file; for a file that is too large for the parts that S3
// allows, the parts are larger.
func (b *baseBackup) openArchive(ctx context.Context, tree string, first int64) (*archive, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := &archive{tree: tree}
	for _, other := range b.archives {
		if other.tree == tree {
			a.number++
		}
	}
	a.key = b.store.baseKey(b.info.ID, archiveName(tree, a.number)+".tar"+b.codec.suffix)
	args := &b.store.data
	part := max(args.MinChunkSize, minPartSize, first/maxArchiveParts+1)
	a.limit = min(cmp.Or(args.MaxArchiveSize, maxArchiveSize), maxArchiveParts*part)
	a.object = b.store.NewWriter(ctx, a.key, putOptions{Data: true, PartSize: int(part), Parts: archiveParts, Limiter: b.limiter, Patience: b.o.StorePatience})
	var err error
	if a.codec, err = b.codec.compress(a.object, args.CompressionLevel); err != nil {
		a.object.Abort()
		return nil, fmt.Errorf("data.additionalCommandArgs: %w", err)
	}
	a.tar = tar.NewWriter(a.codec)
	b.archives = append(b.archives, a)
	return a, nil
}

// fullName is the name, seen from the data directory, of an entry of the archive.
func (a *archive) fullName(name string) string {
	if a.tree == "data" {
		return name
	}
	return "pg_tblspc/" + a.tree + "/" + name
}

// hasRoom says whether a file of this size may still be added.
func (a *archive) hasRoom(size int64) bool {
	stored := a.object.size.Load()
	// No codec makes much more of a file than it is: half of the spare parts are left for that.
	return stored < a.limit && stored+size <= (maxArchiveParts+(maxParts-maxArchiveParts)/2)*int64(a.object.o.PartSize)
}

// add adds an entry whose content is in memory.
func (a *archive) add(header tar.Header, content []byte) error {
	header.Size = int64(len(content))
	err := a.tar.WriteHeader(&header)
	if err == nil {
		_, err = a.tar.Write(content)
	}
	return a.failed(err)
}

// failed names the archive in an error.
func (a *archive) failed(err error) error {
	if _, named := errors.AsType[*storeError](err); err == nil || named {
		return err
	}
	return fmt.Errorf("write %s: %w", path.Base(a.key), err)
}

// close ends the archive; after success it is durable in the bucket.
func (a *archive) close() error {
	err := a.tar.Close()
	if err == nil {
		err = a.codec.Close()
	}
	if err == nil {
		a.closed = true
		err = a.object.Close()
	}
	return a.failed(err)
}

// abort ends the upload of an archive that is not closed and removes its parts. The
// context of its writer must be over.
func (a *archive) abort() {
	if !a.closed {
		a.codec.Close() // for its goroutines and tables; what it still has to write is refused
	}
	a.object.Abort()
}

// ---------------------------------------------------------------------------
// The CNPG-I Backup service
// ---------------------------------------------------------------------------

// backupService takes base backups of the instance that shares the Pod.
type backupService struct {
	backup.UnimplementedBackupServer
	source   configSource
	instance string // the name of this Pod
	pgdata   string
	report   *report
	running  atomic.Bool
}

// GetCapabilities is part of each handshake: it only hands out a constant.
func (s *backupService) GetCapabilities(context.Context, *backup.BackupCapabilitiesRequest) (*backup.BackupCapabilitiesResult, error) {
	return &backup.BackupCapabilitiesResult{Capabilities: []*backup.BackupCapability{
		{Type: &backup.BackupCapability_Rpc{Rpc: &backup.BackupCapability_RPC{Type: backup.BackupCapability_RPC_TYPE_BACKUP}}},
	}}, nil
}

// Backup takes a base backup into the cluster's archive store. The operator sets no
// deadline; the call ends early when the connection does.
func (s *backupService) Backup(ctx context.Context, r *backup.BackupRequest) (*backup.BackupResult, error) {
	cluster, ref, err := archiveOf(r.ClusterDefinition)
	if err != nil {
		return nil, grpcError(fmt.Errorf("back up: %w", err))
	}
	place, err := backupPlace(cluster, *ref, r.Parameters)
	var info *BackupInfo
	if err == nil {
		info, err = s.backup(ctx, *ref, place)
	}
	tell, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	s.record(tell, place, info, err)
	if err != nil {
		slog.Error("Backup failed", "cluster", cluster.Name, "objectStore", place.ObjectStore, "serverName", place.ServerName, "error", err)
		return nil, grpcError(err)
	}
	plugin := pluginMetadata()
	return &backup.BackupResult{
		BackupId: info.ID, BackupName: info.BackupName, StartedAt: info.BeginTime.Unix(), StoppedAt: info.EndTime.Unix(),
		BeginWal: info.BeginWAL, EndWal: info.EndWAL, BeginLsn: info.BeginLSN, EndLsn: info.EndLSN,
		InstanceId: s.instance, Online: true,
		// The keys are the original's, but for the place; clusterUID, pluginName and place
		// tell whose Backup objects may be removed when their backup has left the catalog.
		Metadata: map[string]string{
			"timeline": strconv.Itoa(info.Timeline), "clusterUID": string(cluster.UID), "pluginName": plugin.Name,
			"name": plugin.Name, "displayName": plugin.DisplayName, "version": plugin.Version, placeMetadata: info.place,
		},
	}, nil
}

// placeMetadata is the key under which the metadata of a Backup object say where its backup is.
const placeMetadata = "place"

// record brings the status of the ObjectStore up to date after a backup. That it cannot is
// no reason to call a good backup failed: the primary's next maintenance does it.
func (s *backupService) record(ctx context.Context, ref StoreRef, info *BackupInfo, err error) {
	s.report.found(ref, conditionBackup, "BackupFailed", err)
	var catalog *Catalog
	var listErr error
	if err == nil {
		var damage error
		if info.BadPageCount > 0 {
			damage = fmt.Errorf("backup %s holds %d pages with a wrong checksum, the first as FILE:BLOCK %s: find their relations with pg_filenode_relation; "+
				"an earlier backup may have them whole", info.ID, info.BadPageCount, strings.Join(info.BadPages[:min(10, len(info.BadPages))], " "))
		}
		s.report.found(ref, conditionPages, "BadPages", damage)
		var store *Store
		if store, listErr = s.source.Store(ctx, ref); listErr == nil {
			catalog, listErr = store.Catalog(ctx)
		}
	}
	now := metav1.Now()
	statusErr := s.source.UpdateStatus(ctx, ref, func(w *RecoveryWindow, st *ServerStatus) {
		if err != nil {
			w.LastFailedBackupTime = &now
			return
		}
		if listErr == nil {
			w.FirstRecoverabilityPoint, w.LastSuccessfulBackupTime = catalog.recoverability()
		}
		st.LastBackup = &LastBackup{ID: info.ID, Instance: s.instance, Seconds: int64(info.EndTime.Sub(info.BeginTime).Seconds()),
			Bytes: info.bytes, StoredBytes: info.storedBytes, BadPages: info.BadPageCount}
	})
	if err := errors.Join(listErr, statusErr, s.report.tell(ctx)); err != nil {
		slog.Warn("The status of the ObjectStore could not be updated; the primary's sidecar tries again",
			"objectStore", ref.ObjectStore, "serverName", ref.ServerName, "error", err)
	}
}

// errBusy and errParameters refuse a request.
var (
	errBusy       = errors.New("another backup of this instance is running: wait for it to end")
	errParameters = errors.New("parameters of the Backup")
)

// backup takes one backup to a place, if no other one is running.
func (s *backupService) backup(ctx context.Context, archive, place StoreRef) (*BackupInfo, error) {
	if !s.running.CompareAndSwap(false, true) {
		return nil, errBusy
	}
	defer s.running.Store(false)
	store, err := s.source.Store(ctx, place)
	if err != nil {
		return nil, fmt.Errorf("back up: %w", err)
	}
	o := backupOptions{Name: "backup-" + time.Now().UTC().Format("20060102150405"), PGData: s.pgdata}
	if place != archive {
		if o.Archive, err = s.source.Store(ctx, archive); err == nil {
			err = checkSystem(ctx, store, systemIdentifier(s.pgdata))
		}
		if err != nil {
			return nil, fmt.Errorf("back up: %w", err)
		}
	}
	return takeBackup(ctx, store, o)
}

// backupPlace is where a Backup goes, and where an error is reported: to the archive of the cluster, unless its parameters
// name another store that the Cluster refers to, or another server name. Not to the server
// that the cluster is recovered from or follows, though: its backups are another cluster's.
func backupPlace(cluster *Cluster, archive StoreRef, parameters map[string]string) (StoreRef, error) {
	for _, name := range slices.Sorted(maps.Keys(parameters)) {
		if name != "barmanObjectName" && name != "serverName" {
			slog.Warn("A parameter of the Backup is not known and has no effect", "parameter", name)
		}
	}
	place := StoreRef{cmp.Or(parameters["barmanObjectName"], archive.ObjectStore), cmp.Or(parameters["serverName"], archive.ServerName)}
	stores := []string{archive.ObjectStore}
	for _, other := range []*StoreRef{cluster.RecoveryStore(), cluster.ReplicaSourceStore()} {
		if other == nil {
			continue
		}
		if stores = append(stores, other.ObjectStore); place == *other && place != archive {
			return archive, fmt.Errorf("%w: server name %q in ObjectStore %q is that of the cluster that this one comes from: choose another serverName",
				errParameters, place.ServerName, place.ObjectStore)
		}
	}
	if !slices.Contains(stores, place.ObjectStore) {
		return archive, fmt.Errorf("%w: barmanObjectName is %q, which Cluster %s does not refer to; it refers to %s",
			errParameters, place.ObjectStore, cluster.Name, strings.Join(slices.Compact(slices.Sorted(slices.Values(stores))), ", "))
	}
	return place, nil
}

// recoverability is the end of the oldest and of the newest backup that is done, nil
// without any: only from the end of a backup on can a recovery stop.
func (c *Catalog) recoverability() (first, last *metav1.Time) {
	var ends []time.Time
	for _, b := range c.Backups {
		if b.Done() {
			ends = append(ends, b.EndTime)
		}
	}
	if len(ends) == 0 {
		return nil, nil
	}
	slices.SortFunc(ends, time.Time.Compare)
	return new(metav1.NewTime(ends[0])), new(metav1.NewTime(ends[len(ends)-1]))
}
