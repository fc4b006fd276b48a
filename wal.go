// This file is everything about WAL files: their names, archiving one, restoring one,
// and the CNPG-I WAL service.

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path"
	"regexp"
	"strconv"
	"strings"
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

// walObjects lists the stored forms of one WAL file: the file itself under any
// compression suffix and, for a segment, its .partial. The backup history files that
// share a segment's prefix are left out.
func walObjects(ctx context.Context, s *Store, name string) ([]walObject, error) {
	var found []walObject
	for o, err := range s.List(ctx, s.walPrefix(name)) {
		if err != nil {
			return nil, err
		}
		base, c := splitSuffix(path.Base(o.Key))
		if base == name || base == name+".partial" {
			found = append(found, walObject{object: o, Name: base, codec: c})
		}
	}
	return found, nil
}

// walObject is an object of the WAL archive.
type walObject struct {
	object
	Name  string // without compression suffix
	codec *codec
}

// walPresent says whether a WAL file is in the archive; a .partial does not count as its segment.
func walPresent(ctx context.Context, s *Store, name string) (bool, error) {
	objects, err := walObjects(ctx, s, name)
	for _, o := range objects {
		if o.Name == name {
			return true, nil
		}
	}
	return false, err
}
