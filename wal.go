// This file is everything about WAL files: their names, archiving one, restoring one,
// and the CNPG-I WAL service.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cloudnative-pg/cnpg-i/pkg/wal"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ---------------------------------------------------------------------------
// Names
// ---------------------------------------------------------------------------

// LSN is a position in the WAL stream, in bytes.
type LSN uint64

// parseLSN reads PostgreSQL's text form, two hexadecimal numbers: 16/B374D848.
func parseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	h, err1 := strconv.ParseUint(hi, 16, 32)
	l, err2 := strconv.ParseUint(lo, 16, 32)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("%q is not an LSN", s)
	}
	return LSN(h<<32 | l), nil
}

func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint64(l)>>32, uint32(l)) }

// walKind is one of the four sorts of file that PostgreSQL archives.
type walKind int

const (
	walSegment       walKind = iota // 24 hex digits
	walPartial                      // the last, incomplete segment of an old timeline
	walBackupHistory                // SEGMENT.OFFSET.backup: notes on a base backup
	walHistory                      // TIMELINE.history: where a timeline left its parent
)

// walName is a parsed WAL file name.
type walName struct {
	Name     string
	Kind     walKind
	Timeline uint32
	Log, Seg uint32 // high and low half of the segment number; 0 for a history file
}

// walNameForm is Barman's (xlog.py): what may lie in a WAL archive.
var walNameForm = regexp.MustCompile(`^([0-9A-F]{8})(?:([0-9A-F]{8})([0-9A-F]{8})(\.[0-9A-F]{8}\.backup|\.partial)?|\.history)$`)

// errWALName says that a name is not one of a WAL file.
var errWALName = errors.New("not the name of a WAL file")

// parseWALName checks and takes apart the base name of a WAL file.
func parseWALName(name string) (walName, error) {
	m := walNameForm.FindStringSubmatch(name)
	if m == nil {
		return walName{}, fmt.Errorf("%q is %w", name, errWALName)
	}
	number := func(hex string) uint32 {
		n, _ := strconv.ParseUint(hex, 16, 32) // the expression admits only 8 hex digits, or none
		return uint32(n)
	}
	w := walName{Name: name, Timeline: number(m[1]), Log: number(m[2]), Seg: number(m[3])}
	switch {
	case m[2] == "":
		w.Kind = walHistory
	case m[4] == ".partial":
		w.Kind = walPartial
	case m[4] != "":
		w.Kind = walBackupHistory
	}
	return w, nil
}

// segmentsPerLog is how many segments of a size share the middle eight digits of their
// name: XLogSegmentsPerXLogId in PostgreSQL's xlog_internal.h.
func segmentsPerLog(size int64) uint64 { return (math.MaxUint32 + 1) / uint64(size) }

// segmentNumber is the segment that holds the byte at l.
func segmentNumber(l LSN, size int64) uint64 { return uint64(l) / uint64(size) }

// segmentName is the file name of a segment.
func segmentName(timeline uint32, number uint64, size int64) string {
	per := segmentsPerLog(size)
	return fmt.Sprintf("%08X%08X%08X", timeline, number/per, number%per)
}

// number is the segment number of a segment's name.
func (w walName) number(size int64) uint64 { return uint64(w.Log)*segmentsPerLog(size) + uint64(w.Seg) }

// validSegmentSize says whether PostgreSQL knows such segments: a power of two from 1 MiB to 1 GiB.
func validSegmentSize(n int64) bool { return n >= 1<<20 && n <= 1<<30 && n&(n-1) == 0 }

// timelineSwitch is one line of a timeline history file: the timeline ended at At.
type timelineSwitch struct {
	Timeline uint32
	At       LSN
}

// parseTimelineHistory reads a history file: the ancestors of a timeline, oldest first
// (PostgreSQL's timeline.c: timeline, LSN and reason separated by white space, # comments).
func parseTimelineHistory(content []byte) ([]timelineSwitch, error) {
	var history []timelineSwitch
	for n, line := range strings.Split(string(content), "\n") {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if len(fields) < 2 {
			return nil, fmt.Errorf("timeline history, line %d: %.60q has no LSN", n+1, line)
		}
		timeline, err := strconv.ParseUint(fields[0], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("timeline history, line %d: %.60q is not a timeline", n+1, fields[0])
		}
		at, err := parseLSN(fields[1])
		if err != nil {
			return nil, fmt.Errorf("timeline history, line %d: %w", n+1, err)
		}
		history = append(history, timelineSwitch{uint32(timeline), at})
	}
	return history, nil
}

// walObject is an object of the WAL archive.
type walObject struct {
	object
	Name  string // without compression suffix
	codec *codec
}

func newWALObject(o object) walObject {
	name, c := splitSuffix(path.Base(o.Key))
	return walObject{object: o, Name: name, codec: c}
}

// walObjects lists the stored forms of one WAL file: the file itself under any compression
// suffix and, if it is asked for, its .partial. The backup history files that share a
// segment's prefix are left out.
func walObjects(ctx context.Context, s *Store, name string, partial bool) ([]walObject, error) {
	var found []walObject
	for o, err := range s.List(ctx, s.walPrefix(name)) {
		if err != nil {
			return nil, err
		}
		if w := newWALObject(o); w.Name == name || partial && w.Name == name+".partial" {
			found = append(found, w)
		}
	}
	return found, nil
}

// readHistory reads a stored history file.
func readHistory(ctx context.Context, s *Store, o walObject) ([]timelineSwitch, error) {
	var content bytes.Buffer
	if _, _, err := readWAL(ctx, s, o, &content); err != nil {
		return nil, err
	}
	history, err := parseTimelineHistory(content.Bytes())
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", s.URL(o.Key), errDamaged, err)
	}
	return history, nil
}

// ---------------------------------------------------------------------------
// The header of a segment
// ---------------------------------------------------------------------------

// walPageMagics are the values of xlp_magic (XLOG_PAGE_MAGIC in PostgreSQL's
// xlog_internal.h) whose page header has the layout read here. A segment with another
// value is of a version that is newer than this program, or from a machine of the other
// byte order, and is handed over unjudged.
var walPageMagics = map[uint16]int{
	0xD101: 12, 0xD106: 13, 0xD10D: 14, 0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18,
}

const (
	walLongHeaderSize = 40     // SizeOfXLogLongPHD
	walLongHeaderFlag = 0x0002 // XLP_LONG_HEADER, set on the first page of each segment
)

// walHeader is the long header at the beginning of a segment (XLogLongPageHeaderData).
// Its timeline is not read: in the first segment after a switch it is the old one.
type walHeader struct {
	Known       bool // whether the magic is one of walPageMagics; if not, nothing else is set
	LongHeader  bool
	PageAddress LSN
	SystemID    uint64
	SegmentSize int64
}

func parseWALHeader(b []byte) walHeader {
	if len(b) < walLongHeaderSize || walPageMagics[binary.LittleEndian.Uint16(b)] == 0 {
		return walHeader{}
	}
	return walHeader{
		Known:       true,
		LongHeader:  binary.LittleEndian.Uint16(b[2:])&walLongHeaderFlag != 0,
		PageAddress: LSN(binary.LittleEndian.Uint64(b[8:])),
		SystemID:    binary.LittleEndian.Uint64(b[24:]),
		SegmentSize: int64(binary.LittleEndian.Uint32(b[32:])),
	}
}

// errDamaged says that an object could be read but is not what its name says.
var errDamaged = errors.New("damaged")

// checkSegment judges a whole segment of size bytes by its name and header. systemID is
// that of the data directory, 0 when it is not known.
func checkSegment(name walName, header []byte, size int64, systemID uint64) error {
	if !validSegmentSize(size) {
		return fmt.Errorf("%w: %d bytes is not the size of a WAL segment", errDamaged, size)
	}
	h := parseWALHeader(header)
	switch start := LSN(name.number(size) * uint64(size)); {
	case !h.Known:
		return nil
	case !h.LongHeader:
		return fmt.Errorf("%w: no long page header at its beginning", errDamaged)
	case h.SegmentSize != size:
		return fmt.Errorf("%w: it has %d bytes, and its header says %d", errDamaged, size, h.SegmentSize)
	case h.PageAddress != start:
		return fmt.Errorf("%w: its header says that it starts at %s, its name says %s", errDamaged, h.PageAddress, start)
	case systemID != 0 && h.SystemID != systemID:
		return fmt.Errorf("%w: it is of the cluster with system identifier %d, and the data directory is of %d: serverName points at the WAL of another cluster",
			errDamaged, h.SystemID, systemID)
	}
	return nil
}

const controlFile = "global/pg_control"

// systemIdentifier reads the system identifier of a data directory: the first eight
// bytes of global/pg_control, in every version. 0 when there is none yet.
func systemIdentifier(pgdata string) uint64 {
	f, err := os.Open(filepath.Join(pgdata, controlFile))
	if err != nil {
		return 0
	}
	defer f.Close()
	var b [8]byte
	if _, err := io.ReadFull(f, b[:]); err != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

// ---------------------------------------------------------------------------
// Archive
// ---------------------------------------------------------------------------

// errDifferent says that the archive holds other content under the same name.
var errDifferent = errors.New("the archive already holds different content under this name")

const (
	// A WAL file up to walSinglePut bytes goes in one request; the part size leaves
	// room for what an incompressible segment grows by. Larger segments go in parts.
	walSinglePut  = 16 << 20
	walSinglePart = walSinglePut + 1<<20
	walPartSize   = minPartSize
	walParts      = 3
	// However many files are in flight, walCompressing of them are being compressed, and all
	// together have walMemory bytes. That is enough for those at their worst, so that they
	// come to their ends, and to the end of a transfer the others come by themselves.
	walCompressing = 2
	walMemory      = walCompressing * walSinglePart
)

var (
	walCompressors = semaphore.NewWeighted(walCompressing)
	walBuffers     = semaphore.NewWeighted(walMemory)
)

// archiveWAL stores the WAL file at path. When it returns nil the object is durable, and
// it has the content of the file: a name that is already in the archive is never
// overwritten with other content (errDifferent), whatever its compression suffix, and
// one that holds the same content is a success. A .partial is the exception, of which
// the newest counts.
//
// Where the server has no conditional PUT, two writers that archive the same name in
// the same moment are not told apart; every server of today has it.
func archiveWAL(ctx context.Context, s *Store, file string) error {
	return archiveWALInTurn(ctx, s, file, "", func() {})
}

// archiveWALInTurn is archiveWAL that says when it compresses the file, so that others that
// ask after that are behind it, and nothing in the archive is in its way. Of a history file
// it says nothing: the segments of a timeline are no use without it. owner goes into the metadata.
func archiveWALInTurn(ctx context.Context, s *Store, file, owner string, begun func()) (err error) {
	start := time.Now()
	name, err := parseWALName(filepath.Base(file))
	if err != nil {
		return fmt.Errorf("archive %s: %w", file, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("archive %s: %w", name.Name, err)
		}
	}()
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := walFileSize(f, name)
	if err != nil {
		return err
	}
	codec, err := codecByName(s.Config.Configuration.WAL.Compression)
	if err != nil {
		return err
	}

	weight := int64(1)
	if codec.alone {
		weight = walCompressing
	}
	if err := walCompressors.Acquire(ctx, weight); err != nil {
		return err
	}
	compressed := sync.OnceFunc(func() { walCompressors.Release(weight) })
	defer compressed()
	// What is there already is asked for while the file is being compressed.
	ctx, cancel := context.WithCancel(ctx)
	var there []walObject
	var listErr error
	var listing sync.WaitGroup
	defer func() { cancel(); listing.Wait() }()
	if name.Kind == walHistory {
		begun = func() {}
	}
	if name.Kind == walPartial {
		begun()
	} else {
		listing.Go(func() {
			if there, listErr = walObjects(ctx, s, name.Name, false); listErr == nil && len(there) == 0 {
				begun()
			}
		})
	}

	key := s.walPrefix(name.Name) + codec.suffix
	o := putOptions{IfAbsent: name.Kind != walPartial, History: name.Kind == walHistory, PartSize: walSinglePart, Memory: walBuffers, Metadata: map[string]string{}}
	if owner != "" {
		o.Metadata[walOwner] = owner
	}
	var sum string
	// Parts are sent before the end of the file is seen, and S3 wants metadata first. A file
	// that is sent as it is, in one request, is read twice rather than kept in memory. (An empty
	// one has no end that could be held back.)
	parts, asIs := size > walSinglePut, codec.name == "" && size > 0 && size <= walSinglePut
	if parts || asIs {
		read := crc32.New(castagnoli)
		if _, err = io.CopyBuffer(read, struct{ io.Reader }{f}, make([]byte, copyBufferSize)); err == nil {
			_, err = f.Seek(0, io.SeekStart)
		}
		if err != nil {
			return err
		}
		sum = hexSum(read)
		o.Metadata[contentSum] = sum
		if asIs {
			o.Body = read
		}
	}
	if parts {
		o.PartSize, o.Parts = walPartSize, walParts
	}
	w := s.NewWriter(ctx, key, o)
	defer w.Abort()
	send, stored := w.Close, w.size.Load
	if asIs {
		compressed()
		sending, giveUp := context.WithCancel(ctx)
		defer giveUp()
		err := s.put(sending, key, &heldBack{io.NewSectionReader(f, 0, size), size, func() error {
			if listing.Wait(); listErr != nil || len(there) > 0 {
				giveUp() // or the request would be tried again
				return context.Canceled
			}
			return nil
		}}, o)
		send = func() error { return err }
		stored = func() int64 { return size }
	} else {
		read, err := compressFile(w, f, codec, s.walArchive.CompressionLevel)
		if err != nil {
			return err
		}
		if parts && sum != read {
			return fmt.Errorf("%s changed while it was being read", file)
		}
		o.Metadata[contentSum] = read
	}
	compressed()

	if listing.Wait(); listErr != nil {
		return listErr
	}
	if len(there) > 0 {
		w.Abort()
		if err := sameContent(ctx, s, name, there, f); err != nil {
			return err
		}
		begun()
		slog.Info("WAL file was in the archive already, with the same content", "walName", name.Name)
		return nil
	}
	if err := send(); err != nil {
		if name.Kind == walPartial || ctx.Err() != nil {
			return err
		}
		// Somebody was faster, or the reply to a request of ours that succeeded was lost:
		// what lies there now decides.
		there, listErr = walObjects(ctx, s, name.Name, false)
		if listErr != nil || len(there) == 0 {
			return err
		}
		if err := sameContent(ctx, s, name, there, f); err != nil {
			return err
		}
	}
	// The segment will not be read again: leave the page cache to PostgreSQL.
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		slog.Debug("posix_fadvise failed", "file", file, "error", err)
	}
	slog.Info("Archived WAL file", "walName", name.Name, "object", s.URL(key), "bytes", size, "stored", stored(),
		"seconds", time.Since(start).Seconds())
	return nil
}

// walFileSize is the size of an open WAL file. A segment that has not the size of one is refused.
func walFileSize(f *os.File, name walName) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	switch {
	case !info.Mode().IsRegular():
		return 0, fmt.Errorf("%s is not a regular file", f.Name())
	case (name.Kind == walSegment || name.Kind == walPartial) && !validSegmentSize(info.Size()):
		return 0, fmt.Errorf("%s has %d bytes, which is not the size of a WAL segment", f.Name(), info.Size())
	}
	return info.Size(), nil
}

// compressFile writes a file to w through a codec and returns the checksum of its content.
func compressFile(w io.Writer, f *os.File, c *codec, level string) (string, error) {
	z, err := c.compress(w, level)
	if err != nil {
		return "", err
	}
	sum := crc32.New(castagnoli)
	_, err = io.CopyBuffer(io.MultiWriter(z, sum), struct{ io.Reader }{f}, make([]byte, copyBufferSize))
	if closeErr := z.Close(); err == nil {
		err = closeErr
	}
	return hexSum(sum), err
}

// heldBack is a body of size bytes whose end is read only after release has agreed: a request
// may begin before it is known whether it should, and is void if it should not.
type heldBack struct {
	io.ReadSeeker
	size    int64
	release func() error
}

func (h *heldBack) Read(p []byte) (int, error) {
	at, err := h.Seek(0, io.SeekCurrent)
	if err == nil && at+int64(len(p)) >= h.size {
		err = h.release()
	}
	if err != nil {
		return 0, err
	}
	return h.ReadSeeker.Read(p)
}

// sameContent compares what the archive holds under a name with the local file, byte by
// byte: nil when every form of it has the same uncompressed content, errDifferent when one has not.
func sameContent(ctx context.Context, s *Store, name walName, objects []walObject, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	end, err := timelineEnd(filepath.Dir(f.Name()), name, info.Size())
	if err != nil {
		return err
	}
	for _, o := range objects {
		local := &comparison{f: f, end: end}
		header, size, err := readWAL(ctx, s, o, local)
		switch {
		case errors.Is(err, errDamaged):
			return fmt.Errorf("%w, which cannot be read: %w. Nothing was overwritten; if it is not needed, remove the object", errDifferent, err)
		case err != nil:
			return err
		case local.different || size != info.Size():
			return fmt.Errorf("%w: %s is not what %s has. %s", errDifferent, s.URL(o.Key), f.Name(), explainDifference(name, header, f))
		}
	}
	return nil
}

// timelineEnd is up to which byte a file is WAL of its timeline: its size, unless a history
// file beside it says that the timeline ends inside. Where archive_mode is always, as in replica
// clusters, PostgreSQL archives such a segment more than once, first as it was received and
// then as it was restored from the source's .partial, each time with another remainder.
func timelineEnd(pgWAL string, name walName, size int64) (int64, error) {
	if name.Kind != walSegment {
		return size, nil
	}
	histories, err := fs.Glob(os.DirFS(pgWAL), "????????.history")
	if err != nil {
		return 0, err
	}
	for _, file := range histories {
		content, err := os.ReadFile(filepath.Join(pgWAL, file))
		if err != nil {
			return 0, err
		}
		switches, err := parseTimelineHistory(content)
		if err != nil {
			continue // PostgreSQL will say so
		}
		for _, ancestor := range switches {
			inside := int64(uint64(ancestor.At) % uint64(size))
			if inside > 0 && ancestor.Timeline == name.Timeline && segmentName(name.Timeline, segmentNumber(ancestor.At, size), size) == name.Name {
				return inside, nil
			}
		}
	}
	return size, nil
}

// comparison notes whether what is written to it differs from a file.
type comparison struct {
	f         *os.File
	end       int64 // what follows does not count
	local     []byte
	size      int64
	different bool
}

func (c *comparison) Write(b []byte) (int, error) {
	c.local = slices.Grow(c.local[:0], len(b))[:len(b)]
	n, err := c.f.ReadAt(c.local, c.size)
	if err != nil && err != io.EOF {
		return 0, err
	}
	counts := int(min(max(c.end-c.size, 0), int64(len(b))))
	c.different = c.different || !bytes.Equal(c.local[:min(n, counts)], b[:counts])
	c.size += int64(len(b))
	return len(b), nil
}

// checkSystem refuses to continue the archive of another database system. A major upgrade in
// place makes a new one, which begins with timeline 1 again: its segments may have names of
// their own, but a recovery would follow the timelines of the old one. Whose archive it is,
// the newest backup says; without any there is nothing to recover.
func checkSystem(ctx context.Context, s *Store, systemID uint64) error {
	ids, err := s.ListDirectories(ctx, s.key("base/"))
	if err != nil {
		return fmt.Errorf("check whose archive it is: %w", err)
	}
	slices.Sort(ids)
	var refused error
	for _, id := range slices.Backward(ids) {
		b, err := s.ReadBackupInfo(ctx, id)
		switch {
		case errors.Is(err, errNotFound), errors.Is(err, errBadBackupInfo):
		case errors.Is(err, errTransient), ctx.Err() != nil:
			return fmt.Errorf("check whose archive it is: %w", err)
		case err != nil: // an older one may do
			refused = fmt.Errorf("check whose archive it is: %w", err)
		case !b.Done() || b.SystemID == "":
		case systemID != 0 && b.SystemID != strconv.FormatUint(systemID, 10):
			return fmt.Errorf("%w: %s is of system identifier %s, this cluster has %d: it was upgraded to a new major version, which makes a new system identifier, "+
				"or another cluster was here. Give it another serverName (plugin parameter), and take a base backup", errArchiveNotEmpty, s.URL(s.baseKey(id, "")), b.SystemID, systemID)
		default:
			return nil
		}
	}
	return refused
}

// explainDifference says whose segment lies in the archive and what to do about it.
func explainDifference(name walName, stored []byte, f *os.File) string {
	const cure = "Nothing was overwritten. Give this cluster another serverName (plugin parameter), under which it begins an archive of its own, and take a base backup"
	var local [walLongHeaderSize]byte
	if _, err := f.ReadAt(local[:], 0); err == nil && name.Kind == walSegment {
		theirs, ours := parseWALHeader(stored), parseWALHeader(local[:])
		if theirs.Known && ours.Known && theirs.SystemID != ours.SystemID {
			return fmt.Sprintf("The archived one is of system identifier %d, this cluster has %d: another cluster writes to the same place, or this one was upgraded to a new major version, which makes a new system identifier. %s",
				theirs.SystemID, ours.SystemID, cure)
		}
	}
	return "Two clusters with the same origin write to the same place. " + cure
}

// ---------------------------------------------------------------------------
// What the archive has
// ---------------------------------------------------------------------------

// timelineWAL is the WAL of one timeline from the first segment that a backup needs.
type timelineWAL struct {
	Timeline uint32   `json:"timeline"`
	First    string   `json:"first"`
	Last     string   `json:"last"`
	Segments int      `json:"segments"`
	Missing  int      `json:"missing"`
	Gaps     []string `json:"gaps,omitempty"` // FIRST to LAST, the first maxGaps of them

	from, until uint64 // what lies between must be there even if nothing follows
	next        uint64 // the first that is not yet looked for
	size        int64  // bytes of each
	lastGap     [2]uint64
}

// maxGaps bounds the list of gaps of one timeline.
const maxGaps = 20

// skip notes that the segments from t.next up to but not including n are not there. That
// the first of them are absent may be no gap.
func (t *timelineWAL) skip(n uint64, absent []string) {
	for t.next < n && slices.Contains(absent, segmentName(t.Timeline, t.next, t.size)) {
		t.next++
	}
	if n <= t.next {
		return
	}
	t.Missing += int(n - t.next)
	t.lastGap = [2]uint64{t.next, n}
	if len(t.Gaps) < maxGaps {
		t.Gaps = append(t.Gaps, gapName(segmentName(t.Timeline, t.next, t.size), segmentName(t.Timeline, n-1, t.size), int(n-t.next)))
	}
	t.next = n
}

// gapName names n missing segments.
func gapName(first, last string, n int) string {
	if n == 1 {
		return first
	}
	return fmt.Sprintf("%s to %s (%d segments)", first, last, n)
}

// walCoverage says which WAL there is for the backups that are done, by timeline: from the
// oldest segment that one of them needs, across the switches to other timelines. Memory
// does not grow with the number of segments: the listing comes in the order of the names.
// absent are segments whose absence is no gap.
func walCoverage(ctx context.Context, s *Store, catalog *Catalog, absent ...string) ([]*timelineWAL, error) {
	var size int64
	timelines := map[uint32]*timelineWAL{}
	need := func(timeline uint32, from uint64) {
		if t := timelines[timeline]; t == nil || from < t.from {
			timelines[timeline] = &timelineWAL{Timeline: timeline, from: from, next: from, size: size}
		}
	}
	for _, b := range slices.Backward(catalog.Backups) {
		w, err := parseWALName(b.BeginWAL)
		if !b.Done() || err != nil || !validSegmentSize(b.WALSegmentSize) || b.Keep == "standalone" && size > 0 {
			continue // retention deletes what follows a backup that is kept standalone
		}
		if size = cmp.Or(size, b.WALSegmentSize); size == b.WALSegmentSize { // else of another life
			need(w.Timeline, w.number(size))
		}
		absent = append(absent, b.WALInBackup...)
	}
	if size == 0 {
		return nil, nil
	}
	histories, err := readHistories(ctx, s, catalog, nil)
	if err != nil {
		return nil, err
	}
	for _, timeline := range slices.Sorted(maps.Keys(histories)) {
		history := histories[timeline]
		if len(history) == 0 {
			continue
		}
		last := history[len(history)-1]
		at := segmentNumber(last.At, size) // the first segment of the new timeline
		if parent := timelines[last.Timeline]; parent != nil && parent.from <= at {
			parent.until = max(parent.until, at)
			need(timeline, at)
		}
	}
	newest := slices.Max(slices.Collect(maps.Keys(timelines)))
	for o, err := range s.List(ctx, s.key("wals/")) {
		if err != nil {
			return nil, err
		}
		w, err := parseWALName(newWALObject(o).Name)
		t := timelines[w.Timeline]
		if _, ok := histories[w.Timeline]; t == nil && !ok && err == nil && w.Kind == walSegment && w.Timeline > newest {
			// No recovery finds this timeline: PostgreSQL archives its history before its first segment.
			history := fmt.Sprintf("%08X.history", w.Timeline)
			objects, err := walObjects(ctx, s, history, false)
			if err != nil {
				return nil, err
			}
			if histories[w.Timeline] = nil; len(objects) == 0 { // else it has come since
				t = &timelineWAL{Timeline: w.Timeline, next: w.number(size), size: size, Missing: 1, Gaps: []string{history}}
				timelines[w.Timeline] = t
			}
		}
		if err != nil || w.Kind != walSegment || t == nil || w.number(size) < t.next {
			continue // not needed, or another form of the same segment
		}
		t.skip(w.number(size), absent)
		t.First, t.Last = cmp.Or(t.First, w.Name), w.Name
		t.Segments++
		t.next++
	}
	var found []*timelineWAL
	for _, number := range slices.Sorted(maps.Keys(timelines)) {
		t := timelines[number]
		t.skip(t.until, absent)
		if t.Segments > 0 || t.until > 0 {
			found = append(found, t)
		}
		// Segments are stored several at once: one may have been on its way while a later one was listed.
		if from, to := t.lastGap[0], t.lastGap[1]; t.Missing > 0 && to-from <= 32 {
			for n := from; n < to; n++ {
				objects, err := walObjects(ctx, s, segmentName(number, n, size), false)
				if err != nil {
					return nil, err
				}
				if len(objects) > 0 {
					t.Missing--
				}
			}
			if t.Missing == 0 {
				t.Gaps = nil
			}
		}
	}
	return found, nil
}

// ---------------------------------------------------------------------------
// Archive look-ahead
// ---------------------------------------------------------------------------

// archiver archives WAL files one after the other, as PostgreSQL asks for it, and
// meanwhile stores the next ones that wait (maxParallel files in flight in all). One that
// was stored ahead answers at once when its turn comes; if storing it ahead failed, it is
// simply archived then, and nobody else hears of it.
//
// What was stored ahead is known in memory only: after a restart a file is sent again
// and found to be there.
type archiver struct {
	life context.Context // of the uploads in the background

	mu      sync.Mutex
	workers sync.WaitGroup
	uploads map[string]*aheadUpload // by name
	// All of them go to one place, so that another store never acknowledges what it does not
	// hold. When the place changes they end: a store that hangs would keep the memory that the next one needs.
	place  string
	flight context.Context // of these uploads
	cancel context.CancelFunc
	// Of the last success, for drain:
	last  *Store
	owner string // UID of the Cluster, "" outside Kubernetes
	wals  string // pg_wal
}

// aheadUpload is a file that is being, or has been, stored ahead of its turn.
type aheadUpload struct {
	file fs.FileInfo
	done chan struct{}
	err  error // once done is closed
}

func newArchiver(life context.Context) *archiver {
	return &archiver{life: life, cancel: func() {}}
}

// archive stores the WAL file at path as archiveWAL does, for the Cluster with the UID owner.
// With ahead, what waits behind it is stored too. Not so the first file of a cluster: if storing
// that one failed, the check of the archive would find its neighbours, and take them for another cluster's.
func (a *archiver) archive(ctx context.Context, s *Store, owner, path string, ahead bool) error {
	name, place := filepath.Base(path), s.place()
	a.mu.Lock()
	if place != a.place {
		a.cancel()
		a.flight, a.cancel = context.WithCancel(a.life)
		a.place, a.uploads = place, map[string]*aheadUpload{}
	}
	u := a.uploads[name]
	delete(a.uploads, name)
	a.mu.Unlock()
	next := func() {
		if ahead {
			a.lookAhead(s, owner, path)
		}
	}
	if u != nil {
		select {
		case <-u.done:
		default:
			next()
		}
		select {
		case <-u.done:
		case <-ctx.Done():
			return fmt.Errorf("archive %s: %w", name, ctx.Err())
		}
		if u.err == nil {
			next()
		}
		if info, err := os.Stat(path); err == nil && u.err == nil && sameFile(info, u.file) {
			a.remember(s, owner, path)
			return nil
		}
	}
	if err := archiveWALInTurn(ctx, s, path, owner, next); err != nil {
		return err
	}
	a.remember(s, owner, path)
	return nil
}

func (a *archiver) remember(s *Store, owner, path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last, a.owner, a.wals = s, owner, filepath.Dir(path)
}

func sameFile(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// waitingWAL lists the WAL files in a pg_wal that PostgreSQL has marked as ready to be
// archived, in the order in which it archives them: history files first (pgarch.c). The last,
// partial segment of a timeline is left out: it may still be replaced.
func waitingWAL(pgWAL string) ([]string, error) {
	d, err := os.Open(filepath.Join(pgWAL, "archive_status"))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	entries, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		name, ready := strings.CutSuffix(e, ".ready")
		if !ready {
			continue
		}
		if w, err := parseWALName(name); err == nil && w.Kind != walPartial {
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if history := strings.HasSuffix(a, ".history"); history != strings.HasSuffix(b, ".history") {
			if history {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	return names, nil
}

// lookAhead starts to store files that wait behind the one at path.
func (a *archiver) lookAhead(s *Store, owner, path string) {
	ahead := s.Config.Configuration.WAL.MaxParallel - 1
	if ahead < 1 || a.life.Err() != nil {
		return
	}
	pgWAL := filepath.Dir(path)
	names, err := waitingWAL(pgWAL)
	if err != nil {
		slog.Debug("No look-ahead", "error", err) // not in a data directory: the file itself will do
		return
	}
	place := s.place()
	a.mu.Lock()
	defer a.mu.Unlock()
	if place != a.place {
		return // the store was switched meanwhile
	}
	flight, flying := a.flight, 0
	for name, u := range a.uploads {
		select {
		case <-u.done:
			if !slices.Contains(names, name) { // PostgreSQL has lost interest in it
				delete(a.uploads, name)
			}
		default:
			flying++
		}
	}
	for _, name := range names[slices.Index(names, filepath.Base(path))+1:] {
		// What is stored and not yet asked for is bounded too, lest a slow archiver be outrun without end.
		if flying >= ahead || len(a.uploads) >= 4*ahead {
			return
		}
		if a.uploads[name] != nil {
			continue
		}
		file := filepath.Join(pgWAL, name)
		info, err := os.Stat(file)
		if err != nil {
			continue // archived and removed in between
		}
		u := &aheadUpload{file: info, done: make(chan struct{})}
		a.uploads[name] = u
		flying++
		a.workers.Go(func() {
			defer close(u.done)
			if u.err = archiveWALInTurn(flight, s, file, owner, func() {}); u.err != nil && flight.Err() == nil {
				slog.Info("A WAL file could not be stored ahead of its turn; it will be tried again when PostgreSQL asks for it",
					"walName", name, "error", u.err)
			}
		})
	}
}

// drain stores what still waits to be archived when PostgreSQL has stopped, so that an
// archive has no gap while a cluster is hibernated. Only an instance that has archived
// before does so: it was the primary, and knows its store. PostgreSQL finds the files
// in the archive when it comes back.
func (a *archiver) drain(ctx context.Context) {
	a.mu.Lock()
	s, owner, pgWAL := a.last, a.owner, a.wals
	a.mu.Unlock()
	if s == nil {
		return
	}
	names, err := waitingWAL(pgWAL)
	if err != nil {
		slog.Warn("Cannot see whether WAL files wait to be archived", "error", err)
		return
	}
	for i, name := range names {
		// After a crash a mark may stand for a segment that is gone (pgarch.c): PostgreSQL passes it over too.
		if err := a.archive(ctx, s, owner, filepath.Join(pgWAL, name), true); err != nil && !errors.Is(err, fs.ErrNotExist) {
			slog.Error("WAL files stay behind in pg_wal; they are archived when the instance is back", "first", name, "files", len(names)-i, "error", err)
			return
		}
	}
}

// errArchiveNotEmpty is what the empty-archive check says. Barman's words come first since alerts look for them.
var errArchiveNotEmpty = errors.New("Expected empty archive")

// walOwner is the name of the user metadata that holds the UID of the Cluster which archived a file.
const walOwner = "cluster-uid"

// checkEmptyArchive makes sure that a new cluster begins with an empty WAL archive:
// errArchiveNotEmpty if any WAL file is there, except for the one that is just being archived
// (file, may be ""), whose content is compared then. An archive that owner ("" for nobody) has
// begun may go on, though it is not empty: a standby may be promoted that was made before its
// primary's first success, and still has the marker of the check. A missing bucket is made.
func checkEmptyArchive(ctx context.Context, s *Store, file, owner string) (empty bool, err error) {
	prefix := s.key("wals/")
	for o, err := range s.List(ctx, prefix) {
		if errors.Is(err, errNoBucket) {
			if createErr := s.CreateBucket(ctx); createErr != nil {
				return false, fmt.Errorf("%w; making it failed: %w", err, createErr)
			}
			slog.Warn("The bucket did not exist and was created; if its name is a typing error, correct destinationPath",
				"bucket", s.bucket, "objectStore", s.Config.Name)
			return true, nil
		}
		if err != nil {
			return false, fmt.Errorf("check that the WAL archive is empty: %w", err)
		}
		name := newWALObject(o).Name
		if _, err := parseWALName(name); err != nil || name == filepath.Base(file) {
			continue // no business of ours
		}
		if owner != "" {
			h, err := s.Head(ctx, o.Key)
			if err != nil {
				return false, fmt.Errorf("check whose archive it is: %w", err)
			}
			if h.Metadata[walOwner] == owner {
				return false, nil
			}
		}
		return false, fmt.Errorf("%w: %s is there. Another cluster has archived to %s: set a serverName (plugin parameter) that was not used before, "+
			"or, if you are sure that this archive is to be continued, annotate the Cluster with %s=enabled",
			errArchiveNotEmpty, s.URL(o.Key), s.URL(prefix), skipEmptyArchiveAnnotation)
	}
	return true, nil
}

// ---------------------------------------------------------------------------
// Restore
// ---------------------------------------------------------------------------

// forever is the patience of a recovery that would otherwise end too early.
const forever = time.Duration(math.MaxInt64)

// restoreWALOptions say how a WAL file is fetched.
type restoreWALOptions struct {
	SystemID uint64 // of the data directory; 0: not checked
	// Patience is how long a failure that is not "not found" is retried. PostgreSQL
	// takes any error as the end of the archive, so with forever even a failure that
	// looks permanent (access denied, a damaged object) holds recovery, loudly, rather
	// than ending it with less data than there is.
	Patience time.Duration
}

// maxRetryPause bounds the pause between two rounds of restoreWAL.
const maxRetryPause = 10 * time.Second

// restoreWAL fetches a WAL file to the path destination, which appears complete and
// checked or not at all. errNotFound means that the archive does not have it.
func restoreWAL(ctx context.Context, s *Store, file, destination string, o restoreWALOptions) error {
	name, err := parseWALName(file)
	if err != nil {
		return fmt.Errorf("restore %s: %w", file, err)
	}
	return patiently(ctx, file, o.Patience, func(ctx context.Context) error {
		_, err := restoreOnce(ctx, s, name, destination, o.SystemID)
		return err
	})
}

// restoreOnce is one attempt to restore a WAL file. It returns the size of the file.
func restoreOnce(ctx context.Context, s *Store, name walName, destination string, systemID uint64) (int64, error) {
	start := time.Now()
	object, size, err := fetchWAL(ctx, s, name, destination, systemID, s.walRestore.NoPartial)
	if err == nil {
		logRestored(name.Name, object, false, start)
	}
	return size, err
}

// logRestored is for files that PostgreSQL gets: what was prefetched may never be asked for.
func logRestored(name, object string, prefetched bool, start time.Time) {
	slog.Info("Restored WAL file", "walName", name, "object", object, "prefetched", prefetched, "seconds", time.Since(start).Seconds())
}

// answerBy is the key of a context's time by which a store must have begun to answer. A
// transfer that is under way may take longer.
type answerBy struct{}

// patiently runs attempts to restore a WAL file until one succeeds, says errNotFound or
// errEndOfWAL, or fails for longer than the patience: a promotion asks for several files, and
// a store that hangs would hold it up for minutes with each of them.
func patiently(ctx context.Context, file string, patience time.Duration, fetch func(context.Context) error) error {
	begin := time.Now()
	for attempt := 1; ; attempt++ {
		limited := ctx
		if patience != forever {
			limited = context.WithValue(ctx, answerBy{}, time.Now().Add(max(patience-time.Since(begin), dialTimeout)))
		}
		err := fetch(limited)
		if err == nil {
			return nil
		}
		err = fmt.Errorf("restore %s: %w", file, err)
		hold := errors.Is(err, errTransient) || patience == forever
		pause := min(2*backoff(attempt), maxRetryPause)
		if errors.Is(err, errNotFound) || errors.Is(err, errEndOfWAL) || !hold || ctx.Err() != nil || time.Since(begin)+pause > patience {
			return err
		}
		slog.Warn("Could not restore a WAL file, trying again: PostgreSQL would take the failure for the end of the archive",
			"walName", file, "attempt", attempt, "error", err)
		if sleep(ctx, pause) != nil {
			return err
		}
	}
}

// fetchWAL tries every stored form of a WAL file, the best one first, and returns the URL
// of the object that it took and the size of the file.
func fetchWAL(ctx context.Context, s *Store, name walName, destination string, systemID uint64, noPartial bool) (string, int64, error) {
	listing, listed := ctx, context.CancelFunc(func() {})
	if by, limited := ctx.Value(answerBy{}).(time.Time); limited {
		listing, listed = context.WithDeadline(ctx, by)
	}
	objects, err := walObjects(listing, s, name.Name, !noPartial)
	listed()
	if err != nil {
		return "", 0, err
	}
	// The segment itself before its .partial, and of several .partial the newest.
	slices.SortStableFunc(objects, func(a, b walObject) int {
		if a.Name != b.Name {
			return len(a.Name) - len(b.Name)
		}
		return b.Modified.Compare(a.Modified)
	})
	var damaged []error
	for _, o := range objects {
		if len(damaged) > 0 && o.Name != objects[0].Name {
			break // recovery would end where the .partial does, as if the segment had never been
		}
		var size int64
		err := writeWhole(destination, func(f *os.File) (err error) {
			size, err = readSegment(ctx, s, o, name, f, systemID)
			return err
		})
		switch {
		case err == nil:
			return s.URL(o.Key), size, nil
		case errors.Is(err, errDamaged):
			damaged = append(damaged, err)
		case errors.Is(err, errNotFound): // deleted since the listing? The next one tells
			return "", 0, fmt.Errorf("%w: %s is listed, but cannot be read: %v", errTransient, s.URL(o.Key), err)
		default:
			return "", 0, err
		}
	}
	if len(damaged) > 0 {
		return "", 0, errors.Join(damaged...)
	}
	return "", 0, fmt.Errorf("%w: wal %q not found at %s", errNotFound, name.Name, s.URL(s.walPrefix(name.Name)))
}

// temporaryWAL begins the names of files that are being fetched.
const temporaryWAL = ".cnpg-"

// writeWhole makes a file, in place of one that is there, that appears complete or not at all.
// It is not synced: PostgreSQL does that itself when it keeps a restored segment
// (durable_rename in KeepFileRestoredFromArchive).
func writeWhole(destination string, fill func(*os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(destination), temporaryWAL+"*")
	if err != nil {
		return err
	}
	err = fill(f)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), destination)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// readSegment reads a stored form of a WAL file, and judges it if it is to be a segment.
func readSegment(ctx context.Context, s *Store, o walObject, name walName, w io.Writer, systemID uint64) (size int64, err error) {
	header, size, err := readWAL(ctx, s, o, w)
	if err == nil && name.Kind == walSegment {
		if err = checkSegment(name, header, size, systemID); err != nil {
			err = fmt.Errorf("%s: %w", s.URL(o.Key), err)
		}
	}
	return size, err
}

// maxWALFile is the largest segment that PostgreSQL knows: more than that is no WAL file.
const maxWALFile = 1 << 30

// readWAL writes the uncompressed content of a stored WAL file to w, and returns its first
// bytes and its size. errDamaged means that it cannot be decompressed, is too long, or does
// not have the checksum that it carries.
func readWAL(ctx context.Context, s *Store, o walObject, w io.Writer) (header []byte, size int64, err error) {
	r, err := s.Get(ctx, o.Key)
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	defer func() { err = s.judged(o.Key, err) }()
	defer decoderPanics(&err)
	z, err := o.codec.newReader(r)
	if err != nil {
		return nil, 0, err
	}
	var begin beginning
	sum := crc32.New(castagnoli)
	size, err = io.CopyBuffer(io.MultiWriter(w, sum, &begin), fullReader{io.LimitReader(z, maxWALFile+1)}, make([]byte, copyBufferSize))
	switch {
	case err != nil:
		return nil, 0, err
	case size > maxWALFile:
		return nil, 0, fmt.Errorf("more than %d bytes", maxWALFile)
	}
	if want := r.Metadata[contentSum]; want != "" && want != hexSum(sum) {
		return nil, 0, fmt.Errorf("its content does not have the CRC-32C %s that it was stored with", want)
	}
	return begin, size, nil
}

// decoderPanics, deferred, makes an error of a panic: a decoder that stumbles over a damaged
// object is to end neither the process nor, for want of an answer, a recovery.
func decoderPanics(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: its decoder panicked: %v, at %s", errDamaged, p, debug.Stack())
	}
}

// beginning keeps what is written to it first: the header of a segment.
type beginning []byte

func (b *beginning) Write(p []byte) (int, error) {
	*b = append(*b, p[:min(len(p), walLongHeaderSize-len(*b))]...)
	return len(p), nil
}

// judged names an object in an error of its reading. One that is neither of the transport
// nor of the local disk is a judgement on the object: it is errDamaged.
func (s *Store) judged(key string, err error) error {
	var transport *storeError
	var file *fs.PathError
	var link *os.LinkError
	switch {
	case err == nil || errors.As(err, &transport):
		return err
	case errors.As(err, &file), errors.As(err, &link), errors.Is(err, errDamaged),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w", s.URL(key), err)
	}
	return fmt.Errorf("%s: %w: %w", s.URL(key), errDamaged, err)
}

// ---------------------------------------------------------------------------
// Restore prefetch
// ---------------------------------------------------------------------------

const (
	// missingLife is how long a WAL file that was not there is taken to be missing still.
	missingLife = time.Second
	// streamEndLife is how long the end that a prefetch has found stands for standbys
	// that can stream: the next request for it is answered without asking the store.
	streamEndLife = 5 * time.Second
	// prefetchIdle is when files that nobody has asked for are given up.
	prefetchIdle = time.Minute
)

// errEndOfWAL says that a standby should stream now.
var errEndOfWAL = errors.New("end of WAL reached")

// aheadKey names a file at its place, so that what is of another store is never handed out.
type aheadKey struct{ place, name string }

// prefetcher fetches the segments that follow the one that was asked for, in the
// background and all the time, so that replay does not wait for the store. A segment is
// never fetched twice: a request for one in flight waits for it. All its state is in
// memory but the segments themselves, which lie in a spool directory of its own.
type prefetcher struct {
	life  context.Context
	spool string // "" switches prefetching off

	mu      sync.Mutex
	workers sync.WaitGroup
	entries map[aheadKey]*prefetched
	missing aheadKey // the first segment that was not there
	ahead   bool     // a prefetch found that, not a request
	since   time.Time
	idle    *time.Timer
	begun   int // prefetches, each of which has a file of its own
}

// prefetched is a segment in the spool, or on its way there.
type prefetched struct {
	path   string
	cancel context.CancelFunc
	done   chan struct{}
	object string // where it is from, once done is closed
	err    error  // the same
}

// newPrefetcher empties the spool of an earlier life.
func newPrefetcher(life context.Context, spool string) (*prefetcher, error) {
	p := &prefetcher{life: life, entries: map[aheadKey]*prefetched{}}
	if spool == "" {
		return p, nil
	}
	p.spool = filepath.Join(spool, "prefetch")
	if err := os.RemoveAll(p.spool); err != nil {
		return nil, fmt.Errorf("empty the spool: %w", err)
	}
	if err := os.MkdirAll(p.spool, 0o700); err != nil {
		return nil, fmt.Errorf("make the spool: %w", err)
	}
	return p, nil
}

// take moves a prefetched segment to its destination, waiting for it if it is on its
// way; false means that the caller has to fetch it.
func (p *prefetcher) take(ctx context.Context, s *Store, name, destination string) bool {
	start, key := time.Now(), aheadKey{s.place(), name}
	p.mu.Lock()
	e := p.entries[key]
	delete(p.entries, key)
	p.mu.Unlock()
	if e == nil {
		return false
	}
	select {
	case <-e.done:
	case <-ctx.Done():
		p.discard(e)
		return false
	}
	if e.err != nil {
		return false
	}
	defer os.Remove(e.path)
	if err := moveFile(e.path, destination); err != nil {
		slog.Warn("A prefetched WAL file could not be used and is fetched again", "walName", name, "error", err)
		return false
	}
	logRestored(name, e.object, true, start)
	return true
}

// moveFile renames a file, or copies it when the destination is on another volume.
func moveFile(from, to string) error {
	if err := os.Rename(from, to); !errors.Is(err, unix.EXDEV) {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	return writeWhole(to, func(out *os.File) error {
		_, err := io.Copy(out, in)
		return err
	})
}

// known says, without a request, what the last answers of the store imply for a WAL
// file: errNotFound, errEndOfWAL if the caller can stream instead, or nil for "ask".
func (p *prefetcher) known(s *Store, name string, canStream bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.missing != (aheadKey{s.place(), name}) {
		return nil
	}
	age := time.Since(p.since)
	switch {
	case p.ahead && canStream && age < streamEndLife:
		p.missing = aheadKey{} // the request after this one asks the store again
		return fmt.Errorf("%w: %s was not in the archive %s ago", errEndOfWAL, name, age.Round(time.Millisecond))
	case !p.ahead && age < missingLife: // a prefetch leaves a .partial to the request
		return fmt.Errorf("%w: wal %q not found at %s %s ago", errNotFound, name, s.URL(s.walPrefix(name)), age.Round(time.Millisecond))
	}
	return nil
}

// notFound notes that a WAL file is not there. Of the ends that prefetches find the first counts.
func (p *prefetcher) notFound(s *Store, name string, ahead bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := aheadKey{s.place(), name}
	if ahead && p.ahead && p.missing.place == key.place && p.missing.name < name && time.Since(p.since) < streamEndLife {
		return
	}
	p.missing, p.ahead, p.since = key, ahead, time.Now()
}

// follow starts to fetch what comes after a segment of that size, up to maxParallel
// segments in all, and gives up everything else.
func (p *prefetcher) follow(s *Store, name walName, size int64, systemID uint64) {
	n := s.Config.Configuration.WAL.MaxParallel
	if p.spool == "" || n < 2 || name.Kind != walSegment || !validSegmentSize(size) || p.life.Err() != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.idle == nil {
		p.idle = time.AfterFunc(prefetchIdle, p.reset)
	} else {
		p.idle.Reset(prefetchIdle)
	}
	var wanted []aheadKey
	for i := range uint64(n - 1) {
		wanted = append(wanted, aheadKey{s.place(), segmentName(name.Timeline, name.number(size)+1+i, size)})
	}
	for key, e := range p.entries {
		if !slices.Contains(wanted, key) {
			delete(p.entries, key)
			p.discard(e)
		}
	}
	for _, next := range wanted {
		if next == p.missing && time.Since(p.since) < streamEndLife {
			return // there is nothing behind the end
		}
		if p.entries[next] != nil {
			continue
		}
		ctx, cancel := context.WithCancel(p.life)
		p.begun++
		e := &prefetched{path: filepath.Join(p.spool, fmt.Sprintf("%s.%d", next.name, p.begun)), cancel: cancel, done: make(chan struct{})}
		p.entries[next] = e
		p.workers.Go(func() {
			defer close(e.done)
			defer cancel()
			w, _ := parseWALName(next.name)                                                 // it was made by segmentName
			prompt := context.WithValue(ctx, answerBy{}, time.Now().Add(streamingPatience)) // who asks for it waits too
			e.object, _, e.err = fetchWAL(prompt, s, w, e.path, systemID, true)
			switch {
			case e.err == nil || ctx.Err() != nil:
				return
			case errors.Is(e.err, errNotFound):
				p.notFound(s, next.name, true)
			default:
				slog.Debug("A WAL file could not be prefetched", "walName", next.name, "error", e.err)
			}
			p.forget(next, e)
		})
	}
}

// forget takes a failed entry out, so that a request for it asks the store.
func (p *prefetcher) forget(key aheadKey, e *prefetched) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.entries[key] == e {
		delete(p.entries, key)
	}
}

// discard ends a fetch that nobody waits for and removes what it has fetched.
func (p *prefetcher) discard(e *prefetched) {
	e.cancel()
	p.workers.Go(func() {
		<-e.done
		os.Remove(e.path)
	})
}

// reset gives up everything that was prefetched and forgets the end of the archive.
func (p *prefetcher) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, e := range p.entries {
		delete(p.entries, key)
		p.discard(e)
	}
	p.missing = aheadKey{}
}

// ---------------------------------------------------------------------------
// The CNPG-I WAL service
// ---------------------------------------------------------------------------

const (
	// skipEmptyArchiveAnnotation on the Cluster, set to "enabled", switches the empty-archive check off.
	skipEmptyArchiveAnnotation = "cnpg.io/skipEmptyWalArchiveCheck"
	// emptyArchiveMarker in PGDATA asks for the check. The instance manager makes it
	// when a data directory is born, and removes it some time after the first success.
	emptyArchiveMarker = ".check-empty-wal-archive"
)

// switchedEvery is how often a file on its way looks whether its store is still the right one.
const switchedEvery = 2 * time.Second

// How long a failing WAL restore is retried before PostgreSQL hears of it.
const (
	streamingPatience = 20 * time.Second // it can go on by streaming
	restorePatience   = time.Minute      // a standby or pg_rewind asks again by itself
)

// walService archives and restores for the instance manager that shares the Pod.
type walService struct {
	wal.UnimplementedWALServer
	source   configSource
	instance string // the name of this Pod
	pgdata   string
	archiver *archiver
	prefetch *prefetcher
	report   *report
	// continued holds the places (Store.place) whose archive is known to be of this database system.
	continued sync.Map
	holes     sync.Map // the missing segments behind which was looked
}

// newWALService makes the service; its background work ends with life. spool is a
// directory for prefetched segments, "" for none.
func newWALService(life context.Context, source configSource, instance, pgdata, spool string) (*walService, error) {
	prefetch, err := newPrefetcher(life, spool)
	if err != nil {
		return nil, err
	}
	// What a killed predecessor was fetching; nobody else would ever remove it.
	pgWAL := filepath.Join(pgdata, "pg_wal")
	leftovers, _ := fs.Glob(os.DirFS(pgWAL), temporaryWAL+"*")
	for _, name := range leftovers {
		os.Remove(filepath.Join(pgWAL, name))
	}
	return &walService{source: source, instance: instance, pgdata: pgdata, archiver: newArchiver(life), prefetch: prefetch,
		report: newReport(source, pgdata)}, nil
}

// wait returns when the background work has ended.
func (w *walService) wait() {
	w.archiver.workers.Wait()
	w.prefetch.reset()
	w.prefetch.workers.Wait()
}

var walCapabilities = &wal.WALCapabilitiesResult{Capabilities: []*wal.WALCapability{
	{Type: &wal.WALCapability_Rpc{Rpc: &wal.WALCapability_RPC{Type: wal.WALCapability_RPC_TYPE_ARCHIVE_WAL}}},
	{Type: &wal.WALCapability_Rpc{Rpc: &wal.WALCapability_RPC{Type: wal.WALCapability_RPC_TYPE_RESTORE_WAL}}},
}}

// GetCapabilities is part of the handshake before each WAL file: it only hands out a constant.
func (w *walService) GetCapabilities(context.Context, *wal.WALCapabilitiesRequest) (*wal.WALCapabilitiesResult, error) {
	return walCapabilities, nil
}

// Archive stores one WAL file of the cluster in its archive store. Success means that
// the object is durable. It serves whoever asks: also a former primary that drains its
// WAL and the designated primary of a replica cluster.
func (w *walService) Archive(ctx context.Context, r *wal.WALArchiveRequest) (*wal.WALArchiveResult, error) {
	cluster, ref, err := archiveOf(r.ClusterDefinition)
	if err != nil {
		return nil, grpcError(fmt.Errorf("archive %s: %w", filepath.Base(r.SourceFileName), err))
	}
	began := time.Now()
	err = w.archive(ctx, cluster, *ref, r)
	w.report.archived(cluster, *ref, r.SourceFileName, time.Since(began), err)
	return &wal.WALArchiveResult{}, grpcError(err)
}

func (w *walService) archive(ctx context.Context, cluster *Cluster, ref StoreRef, r *wal.WALArchiveRequest) (err error) {
	s, err := w.source.Store(ctx, ref)
	if err != nil {
		return err
	}
	// A request to a store that hangs would go on for half an hour after the ObjectStore was corrected.
	ctx, cancel := context.WithCancelCause(ctx)
	stop := every(switchedEvery, func() {
		if now, err := w.source.Store(ctx, ref); err == nil && now.place() != s.place() {
			cancel(fmt.Errorf("ObjectStore %s leads to %s now", ref.ObjectStore, now.place()))
		}
	})
	defer func() {
		if cause := context.Cause(ctx); err != nil && cause != ctx.Err() {
			err = fmt.Errorf("%w: %w", err, cause)
		}
		cancel(nil)
		stop()
	}()
	check := checksEmptyArchive(cluster, r.CheckEmptyWalArchive, fileExists(filepath.Join(w.pgdata, emptyArchiveMarker)))
	empty := false
	if check {
		if empty, err = checkEmptyArchive(ctx, s, r.SourceFileName, string(cluster.UID)); err != nil {
			return fmt.Errorf("archive %s: %w", filepath.Base(r.SourceFileName), err)
		}
	}
	if _, known := w.continued.Load(s.place()); !empty && !known && cluster.Annotations[skipEmptyArchiveAnnotation] != "enabled" {
		if err := checkSystem(ctx, s, systemIdentifier(w.pgdata)); err != nil {
			return fmt.Errorf("archive %s: %w", filepath.Base(r.SourceFileName), err)
		}
	}
	w.continued.Store(s.place(), true)
	if err := w.archiver.archive(ctx, s, string(cluster.UID), r.SourceFileName, !check); err != nil {
		return err
	}
	// The next segment may come before the instance manager removes the marker, and
	// would then find an archive that is not empty any more.
	if err := os.Remove(filepath.Join(w.pgdata, emptyArchiveMarker)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("archive %s: stored, but the marker of the empty-archive check stays: %w", filepath.Base(r.SourceFileName), err)
	}
	return nil
}

// checksEmptyArchive says whether the archive must be empty: as the operator asks, which
// leaves the decision to us before 1.30.
func checksEmptyArchive(c *Cluster, asked *bool, otherwise bool) bool {
	if asked != nil {
		return *asked
	}
	return otherwise && c.Annotations[skipEmptyArchiveAnnotation] != "enabled"
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Restore fetches one WAL file. The error code NotFound means that the archive does not have it.
func (w *walService) Restore(ctx context.Context, r *wal.WALRestoreRequest) (*wal.WALRestoreResult, error) {
	return &wal.WALRestoreResult{}, grpcError(w.restore(ctx, r))
}

func (w *walService) restore(ctx context.Context, r *wal.WALRestoreRequest) error {
	cluster, err := DecodeCluster(r.ClusterDefinition)
	if err != nil {
		return err
	}
	ref := restoreStore(cluster, w.instance)
	if ref == nil {
		return fmt.Errorf("%w: wal %q not found: Cluster %s names no object store to read it from", errNotFound, r.SourceWalName, cluster.Name)
	}
	name, err := parseWALName(r.SourceWalName)
	if err != nil {
		return fmt.Errorf("restore %s: %w", r.SourceWalName, err)
	}
	canStream, patience, rewind := streamingAvailable(cluster, w.instance), restorePatience, r.Mode == wal.WALRestoreRequest_MODE_REWIND
	switch {
	case rewind:
	case cluster.Status.CurrentPrimary == "":
		patience = forever // a new cluster would open with what it has got so far
	case canStream:
		patience = streamingPatience
	}
	systemID := systemIdentifier(w.pgdata)
	began := time.Now()
	return patiently(ctx, name.Name, patience, func(ctx context.Context) (err error) {
		defer func() {
			atEnd := errors.Is(err, errNotFound) || errors.Is(err, errEndOfWAL) || ctx.Err() != nil
			if passing := errors.Is(err, errTransient) && time.Since(began) < passingPatience; patience == forever && !atEnd && !passing {
				w.report.found(StoreRef{ref.ObjectStore, cluster.Name}, conditionRestored, "RestoreFailed", err) // else nobody hears of it
			}
		}()
		s, err := w.source.Store(ctx, *ref)
		if err != nil {
			return err
		}
		if rewind { // goes backwards, and must see what is there now
			taken := w.prefetch.take(ctx, s, name.Name, r.DestinationFileName)
			w.prefetch.reset()
			if taken {
				return nil
			}
			_, err := restoreOnce(ctx, s, name, r.DestinationFileName, systemID)
			return err
		}
		if w.prefetch.take(ctx, s, name.Name, r.DestinationFileName) {
			info, err := os.Stat(r.DestinationFileName)
			if err == nil {
				w.prefetch.follow(s, name, info.Size(), systemID)
			}
			return err
		}
		if err := w.prefetch.known(s, name.Name, canStream); err != nil {
			return err
		}
		size, err := restoreOnce(ctx, s, name, r.DestinationFileName, systemID)
		switch {
		case err == nil:
			w.prefetch.follow(s, name, size, systemID)
		case errors.Is(err, errNotFound):
			w.prefetch.notFound(s, name.Name, false)
			if patience == forever && (name.Kind == walSegment || name.Kind == walHistory) {
				w.lookBehind(ctx, s, name)
			}
		}
		return err
	})
}

// lookBehind tells of segments that come after a missing one, or are of a timeline whose
// history is missing: PostgreSQL takes that for the end of the archive, and a new cluster opens
// with less than the archive has. It looks once behind each file, unless it cannot.
func (w *walService) lookBehind(ctx context.Context, s *Store, name walName) {
	if _, looked := w.holes.LoadOrStore(name, true); looked {
		return
	}
	for o, err := range s.ListAfter(ctx, s.key("wals", name.Name[:8]), s.walPrefix(name.Name)) {
		if err != nil {
			w.holes.Delete(name)
			slog.Warn("Cannot see whether the archive goes on behind a missing WAL file", "walName", name.Name, "error", err)
			return
		}
		later := newWALObject(o)
		if l, err := parseWALName(later.Name); err != nil || l.Kind != walSegment || name.Kind == walSegment && later.Name <= name.Name {
			continue
		}
		text := fmt.Sprintf("recovery ends before WAL file %s, which is not in the archive, although %s is: what was written from there on is missing", name.Name, s.URL(o.Key))
		slog.Warn("There is a gap in the WAL archive: " + text)
		if err := w.source.Tell(ctx, "Warning", "WALGap", text); err != nil {
			slog.Warn("Could not write an Event", "reason", "WALGap", "error", err)
		}
		return
	}
}

// restoreStore chooses the store that an instance reads WAL from: the store that a
// replica cluster follows for its (designated) primary, also while it is being
// promoted; the recovery store while the cluster is being bootstrapped; otherwise the
// cluster's own archive. What is not configured falls back to the next one.
func restoreStore(c *Cluster, instance string) *StoreRef {
	archive, recovery, source := c.ArchiveStore(), c.RecoveryStore(), c.ReplicaSourceStore()
	switch c.Status.CurrentPrimary {
	case instance:
		return cmp.Or(source, archive)
	case "":
		return cmp.Or(recovery, source, archive)
	}
	return cmp.Or(archive, source)
}

// streamingAvailable says whether PostgreSQL can get WAL by streaming too: a standby of
// a primary in the cluster, or the designated primary with a connection to its source.
func streamingAvailable(c *Cluster, instance string) bool {
	if c.Status.CurrentPrimary == "" {
		return false
	}
	if c.Status.CurrentPrimary != instance {
		return true
	}
	return c.IsReplica() && slices.ContainsFunc(c.Spec.ExternalClusters, func(e ExternalCluster) bool {
		return e.Name == c.Spec.Replica.Source && len(e.ConnectionParameters) > 0
	})
}

// grpcCodes are the codes of the errors of the data plane; the first that fits counts.
var grpcCodes = []struct {
	code codes.Code
	errs []error
}{
	{codes.Canceled, []error{context.Canceled}}, // whatever else it broke
	{codes.InvalidArgument, []error{errBadRequest, errWALName, errBadTarget, errParameters}},
	{codes.OutOfRange, []error{errEndOfWAL}},
	{codes.FailedPrecondition, []error{errForbidden, errNoObject, errNoStore, errNoBucket, errArchiveNotEmpty, errDifferent,
		errBusy, errWALMissing, errSetup, errRefused, errNotEmpty, errNoRecoverable}},
	{codes.DataLoss, []error{errDamaged}},
	{codes.PermissionDenied, []error{errDenied}},
	{codes.NotFound, []error{errNotFound, errNoBackup}},
	{codes.Unavailable, []error{errTransient, errServer, context.DeadlineExceeded}},
}

// grpcError gives an error its gRPC code; nil stays nil. The operator shows only the text;
// the codes are for people and for operators to come.
func grpcError(err error) error {
	if err == nil {
		return nil
	}
	for _, c := range grpcCodes {
		if slices.ContainsFunc(c.errs, func(kind error) bool { return errors.Is(err, kind) }) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}
