// cnpg-barman-s3 is the backup plugin for CloudNativePG: it archives WAL, takes base
// backups and restores them, to and from S3-compatible storage, in Barman's layout.
//
// This file is the way in: the table of subcommands, flags, logging and signals. It knows
// nothing of PostgreSQL, S3 or Kubernetes.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// version is set by the linker.
var version = "dev"

const usage = `cnpg-barman-s3 backs up PostgreSQL to S3-compatible storage, in Barman's layout.

In Kubernetes, as a CloudNativePG plugin:
  operator      run beside the CloudNativePG operator: inject sidecars, keep their permissions
  sidecar       run beside PostgreSQL: archive WAL, take base backups, restore
  healthcheck   ask a sidecar whether it serves

By hand, with an ObjectStore and its Secrets in a YAML file, or without FLAGS in a Pod of the
cluster (kubectl exec POD -c plugin-barman-cloud -- /cnpg-barman-s3 list):
  check         try all that a store has to do        check FLAGS
  wal-archive   store one WAL file                    wal-archive FLAGS PATH
  wal-restore   fetch one WAL file                    wal-restore FLAGS NAME DESTINATION
  backup        take a base backup                    backup FLAGS
  list          list the base backups and the WAL     list FLAGS
  verify        read backups and their WAL, check     verify FLAGS [BACKUP]
                everything, without restoring
  retention     delete what the retention policy no   retention FLAGS
                longer keeps; --dry-run says what
  restore       restore a base backup into an empty   restore FLAGS DIRECTORY
                directory, ready for recovery

  version       print the version

cnpg-barman-s3 SUBCOMMAND --help lists the flags of a subcommand.
`

// subcommands is the program's table of contents.
var subcommands = map[string]func(ctx context.Context, args []string) error{
	"operator":    runOperator,
	"sidecar":     runSidecar,
	"healthcheck": runHealthcheck,
	"wal-archive": runWALArchive,
	"wal-restore": runWALRestore,
	"backup":      runBackup,
	"check":       runCheck,
	"list":        runList,
	"verify":      runVerify,
	"retention":   runRetention,
	"restore":     runRestore,
	"version":     func(context.Context, []string) error { fmt.Println(version); return nil },
}

// Exit codes. PostgreSQL goes on without a WAL file when restore_command ends with 1,
// and gives recovery up when it ends with more than 125 (manual, Continuous Archiving).
const (
	exitFailed    = 1
	exitUsage     = 2
	exitNoAttempt = 130 // wal-restore could not find out whether the archive has the file
)

func main() {
	if len(os.Args) < 2 || os.Args[1] == "help" || os.Args[1] == "-h" || os.Args[1] == "--help" {
		fmt.Print(usage)
		if len(os.Args) < 2 {
			os.Exit(exitUsage)
		}
		return
	}
	run, ok := subcommands[os.Args[1]]
	if !ok {
		fmt.Fprintf(os.Stderr, "cnpg-barman-s3: there is no subcommand %q; see cnpg-barman-s3 --help\n", os.Args[1])
		os.Exit(exitUsage)
	}
	setLogger("info", logFormat())
	if os.Getenv("GOGC") == "" {
		// What is live is small and what passes through is large: collecting twice as often
		// as by default costs little and keeps the peak within 64 MiB.
		debug.SetGCPercent(50)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[2:])
	stop()
	os.Exit(exitCode(os.Args[1], err))
}

// usageError is an error of the command line: its exit code is exitUsage.
type usageError struct{ error }

// exitStatus is an error that has already been told and only carries an exit code.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// exitCode tells the error and chooses the exit code.
func exitCode(subcommand string, err error) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if code, ok := errors.AsType[exitStatus](err); ok {
		return int(code)
	}
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(os.Stderr, "cnpg-barman-s3: %v\n", err)
		return exitUsage
	}
	slog.Error(subcommand+" failed", "error", err)
	return exitFailed
}

// ---------------------------------------------------------------------------
// Flags and logging
// ---------------------------------------------------------------------------

// logFlags adds the flags that every subcommand has.
func logFlags(fs *flag.FlagSet) {
	format := logFormat()
	level := "info"
	fs.Func("log-level", "tell `LEVEL` and above: error, warning, info, debug, trace (default info)", func(v string) error {
		level = v
		return setLogger(level, format)
	})
	fs.Func("log-format", "write logs as `FORMAT`: json or text (default text on a terminal, otherwise json)", func(v string) error {
		if v != "json" && v != "text" {
			return errors.New("must be json or text")
		}
		format = v
		return setLogger(level, format)
	})
}

// parseFlags reads the flags and checks that arguments of these names follow them; one in brackets may be left out.
func parseFlags(fs *flag.FlagSet, args []string, names ...string) error {
	fs.Usage = func() {
		fmt.Fprintf(fs.Output(), "Usage: cnpg-barman-s3 %s\n\n", strings.Join(append([]string{fs.Name(), "FLAGS"}, names...), " "))
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return exitStatus(exitUsage) // the flag package has told it
	}
	least := len(slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name[0] == '[' }))
	if n := len(names); fs.NArg() > n || fs.NArg() < least {
		return usageError{fmt.Errorf("%s takes %d arguments after its flags (%s), not %d; see cnpg-barman-s3 %s --help",
			fs.Name(), n, strings.Join(names, " "), fs.NArg(), fs.Name())}
	}
	return nil
}

func logFormat() string {
	if term.IsTerminal(int(os.Stderr.Fd())) {
		return "text"
	}
	return "json"
}

// levelTrace is below slog's own levels.
const levelTrace = slog.Level(-8)

var levels = map[string]slog.Level{"error": slog.LevelError, "warning": slog.LevelWarn, "info": slog.LevelInfo, "debug": slog.LevelDebug, "trace": levelTrace}

// setLogger writes logs to standard error in the shape of CloudNativePG's own: level,
// ts, msg, logger, logging_pod, and the caller at debug and trace.
func setLogger(name, format string) error {
	level, ok := levels[name]
	if !ok {
		return fmt.Errorf("%q is not one of error, warning, info, debug, trace", name)
	}
	o := &slog.HandlerOptions{Level: level, AddSource: level <= slog.LevelDebug, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) > 0 {
			return a
		}
		switch v := a.Value.Any().(type) {
		case time.Time:
			if a.Key == slog.TimeKey {
				return slog.String("ts", v.UTC().Format(time.RFC3339Nano))
			}
		case slog.Level:
			for name, level := range levels {
				if a.Key == slog.LevelKey && level == v {
					return slog.String(slog.LevelKey, name)
				}
			}
		case *slog.Source:
			return slog.String("caller", fmt.Sprintf("%s:%d", filepath.Base(v.File), v.Line))
		}
		return a
	}}
	var handler slog.Handler = slog.NewTextHandler(os.Stderr, o)
	if format == "json" {
		handler = slog.NewJSONHandler(os.Stderr, o)
		fields := []slog.Attr{slog.String("logger", PluginName)}
		if pod := os.Getenv("POD_NAME"); pod != "" {
			fields = append(fields, slog.String("logging_pod", pod))
		}
		handler = handler.WithAttrs(fields)
	}
	slog.SetDefault(slog.New(handler))
	return nil
}

// storeCommand is a subcommand that works on one server in one store, which its flags name.
type storeCommand struct {
	*flag.FlagSet
	file, name, server string
	source             configSource
}

func newStoreCommand(name string) *storeCommand {
	f := &storeCommand{FlagSet: flag.NewFlagSet(name, flag.ContinueOnError)}
	logFlags(f.FlagSet)
	f.StringVar(&f.file, "objectstore", "", "the YAML `file` with the ObjectStore and its Secrets; not needed in a Pod of the cluster")
	f.StringVar(&f.name, "objectstore-name", "", "the `name` of the ObjectStore, when the file holds several")
	f.StringVar(&f.server, "server-name", "", "the server `name` under which the cluster's objects lie")
	return f
}

// open reads the command line as parseFlags does, and opens the store.
func (f *storeCommand) open(ctx context.Context, args []string, names ...string) (*Store, error) {
	if err := parseFlags(f.FlagSet, args, names...); err != nil {
		return nil, err
	}
	switch {
	case f.file == "" && os.Getenv("NAMESPACE") != "" && os.Getenv("CLUSTER_NAME") != "":
		return f.openInPod(ctx)
	case f.file == "":
		return nil, usageError{errors.New("--objectstore FILE is missing: a YAML file with the ObjectStore and its Secrets")}
	case f.server == "":
		return nil, usageError{errors.New("--server-name NAME is missing: the name of the Cluster, unless its plugin parameter serverName says otherwise")}
	}
	source, err := newFileSource(f.file)
	if err != nil {
		return nil, err
	}
	if f.name == "" {
		names := source.names()
		if len(names) > 1 {
			return nil, usageError{fmt.Errorf("%s holds several ObjectStores: choose one with --objectstore-name: %s", f.file, strings.Join(names, ", "))}
		}
		f.name = names[0]
	}
	f.source = source
	return source.Store(ctx, f.ref())
}

func (f *storeCommand) ref() StoreRef { return StoreRef{ObjectStore: f.name, ServerName: f.server} }

// openInPod opens the store that the Cluster of this Pod archives to, or else is recovered
// from, unless the flags name another one that the Pod may read.
func (f *storeCommand) openInPod(ctx context.Context) (*Store, error) {
	kube, err := newKubeSource(ctx, os.Getenv("NAMESPACE"))
	if err != nil {
		return nil, err
	}
	f.source = kube
	cluster, err := kube.ownCluster(ctx)
	if err != nil {
		return nil, err
	}
	if own := cmp.Or(cluster.ArchiveStore(), cluster.RecoveryStore(), cluster.ReplicaSourceStore()); own != nil {
		f.name, f.server = cmp.Or(f.name, own.ObjectStore), cmp.Or(f.server, own.ServerName)
	}
	return kube.Store(ctx, f.ref())
}

// ---------------------------------------------------------------------------
// Subcommands
// ---------------------------------------------------------------------------

func runWALArchive(ctx context.Context, args []string) error {
	fs := newStoreCommand("wal-archive")
	empty := fs.Bool("check-empty", false, "first make sure that the WAL archive is empty, as for the first file of a new cluster")
	s, err := fs.open(ctx, args, "PATH")
	if err != nil {
		return err
	}
	if *empty {
		if _, err := checkEmptyArchive(ctx, s, fs.Arg(0), ""); err != nil {
			return err
		}
	}
	return archiveWAL(ctx, s, fs.Arg(0))
}

func runWALRestore(ctx context.Context, args []string) error {
	err := walRestore(ctx, args)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return err
	case errors.Is(err, errNotFound): // as at the end of every recovery
		slog.Info("Not found", "error", err)
		return exitStatus(exitFailed)
	}
	slog.Error("wal-restore failed", "error", err)
	return exitStatus(exitNoAttempt) // also for a bad command line, which must not look like the end of the archive
}

func walRestore(ctx context.Context, args []string) error {
	fs := newStoreCommand("wal-restore")
	patience := fs.Duration("patience", 10*time.Minute, "retry a store that cannot be reached for this long")
	s, err := fs.open(ctx, args, "NAME", "DESTINATION")
	if err != nil {
		return err
	}
	pgdata := filepath.Dir(filepath.Dir(fs.Arg(1))) // DESTINATION is pg_wal/RECOVERYXLOG
	return restoreWAL(ctx, s, fs.Arg(0), fs.Arg(1), restoreWALOptions{SystemID: systemIdentifier(pgdata), Patience: *patience})
}

func runBackup(ctx context.Context, args []string) error {
	fs := newStoreCommand("backup")
	name := fs.String("name", "", "give the backup this `name`")
	immediate := fs.Bool("immediate-checkpoint", false, "do not wait for a spread checkpoint (also: data.immediateCheckpoint of the ObjectStore)")
	s, err := fs.open(ctx, args)
	if err != nil {
		return err
	}
	info, err := takeBackup(ctx, s, backupOptions{Name: *name, FastCheckpoint: *immediate})
	if err != nil {
		return err
	}
	fmt.Println(info.ID)
	return nil
}

func runRestore(ctx context.Context, args []string) error {
	fs := newStoreCommand("restore")
	var target RecoveryTarget
	fs.StringVar(&target.TargetTime, "target-time", "", "recover up to this `time`, UTC unless it names another zone")
	fs.StringVar(&target.TargetLSN, "target-lsn", "", "recover up to this `LSN`")
	fs.StringVar(&target.TargetXID, "target-xid", "", "recover up to the commit of this transaction `ID`")
	fs.StringVar(&target.TargetName, "target-name", "", "recover up to the restore point of this `name`")
	immediate := fs.Bool("target-immediate", false, "recover only until the backup is consistent")
	exclusive := fs.Bool("target-exclusive", false, "stop just before the target rather than just after it")
	fs.StringVar(&target.TargetTLI, "target-timeline", "", "recover along this `timeline`: a number, current, or latest (default latest)")
	fs.StringVar(&target.BackupID, "backup-id", "", "start from the backup of this `ID` (default: the newest that fits the target)")
	o := restoreOptions{Tablespaces: map[string]string{}}
	fs.Func("tablespace", "restore a tablespace to another path, `NAME:PATH`; may be repeated", pairInto(o.Tablespaces, ":"))
	fs.IntVar(&o.Jobs, "jobs", 0, "fetch up to `N` archives of the backup at once (default data.jobs of the ObjectStore)")
	s, err := fs.open(ctx, args, "DIRECTORY")
	if err != nil {
		return err
	}
	target.TargetImmediate, target.Exclusive = immediate, exclusive
	o.Dir = fs.Arg(0)
	b, err := findBackup(ctx, s, &target)
	if err != nil {
		return err
	}
	if fs.file == "" {
		return usageError{errors.New("--objectstore FILE is missing: the restored server needs it for its WAL, also in a Pod")}
	}
	file, err := filepath.Abs(fs.file)
	if err != nil {
		return err
	}
	o.Settings = func() error {
		return writeRecoverySettings(o.Dir, &target, restoreCommand(binaryPath(), "wal-restore",
			"--objectstore", file, "--objectstore-name", fs.name, "--server-name", fs.server))
	}
	if err := restoreBackup(ctx, s, b, o); err != nil {
		return err
	}
	goal, _ := parseTarget(&target) // findBackup has checked it
	fmt.Printf("restored backup %s; start PostgreSQL on %s to recover to %s\n", b.ID, o.Dir, goal.words)
	return nil
}

func runList(ctx context.Context, args []string) error {
	fs := newStoreCommand("list")
	output := fs.String("o", "table", "print as `FORMAT`: table or json")
	s, err := fs.open(ctx, args)
	switch {
	case err != nil:
		return err
	case *output != "table" && *output != "json":
		return usageError{fmt.Errorf("list: -o must be table or json, not %q", *output)}
	}
	c, err := s.Catalog(ctx)
	if err != nil {
		return err
	}
	timelines, err := walCoverage(ctx, s, c)
	if err != nil {
		return err
	}
	rows := listRows(c)
	if len(rows) == 0 {
		slog.Warn("There is no backup", "reason", nothingThere(ctx, s))
	}
	first, last := c.recoverability()
	if *output == "json" {
		return printJSON(map[string]any{"serverName": s.Config.ServerName, "backups": rows, "wal": timelines,
			"firstRecoverabilityPoint": first, "lastSuccessfulBackupTime": last})
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tNAME\tSTATUS\tBEGIN\tEND\tTIMELINE\tBEGIN WAL\tEND WAL\tSIZE\tBAD PAGES")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\t%d\n", r.ID, cmp.Or(r.Name, "-"), r.Status, cmp.Or(r.BeginTime, "-"), cmp.Or(r.EndTime, "-"),
			r.Timeline, cmp.Or(r.BeginWAL, "-"), cmp.Or(r.EndWAL, "-"), byteCount(r.Size), r.BadPageCount)
	}
	w.Flush()
	if first != nil {
		fmt.Printf("Recovery is possible from %s on.\n", timestamp(first.Time))
	}
	for _, t := range timelines {
		fmt.Printf("WAL of timeline %d: %s to %s, %d segments, %d missing\n", t.Timeline, cmp.Or(t.First, "-"), cmp.Or(t.Last, "-"), t.Segments, t.Missing)
		for _, gap := range t.Gaps {
			fmt.Printf("  missing: %s\n", gap)
		}
	}
	return nil
}

func runCheck(ctx context.Context, args []string) error {
	fs := newStoreCommand("check")
	s, err := fs.open(ctx, args)
	if err != nil {
		return err
	}
	fmt.Println(s.describe())
	failed := false
	checkStore(ctx, s, func(what, note string, err error) {
		switch {
		case err != nil:
			failed = true
			fmt.Printf("FAILED  %-17s %v\n", what, err)
		default:
			fmt.Printf("ok      %-17s %s\n", what, note)
		}
	})
	if failed {
		return exitStatus(exitFailed)
	}
	return nil
}

func runVerify(ctx context.Context, args []string) error {
	fs := newStoreCommand("verify")
	asJSON := fs.Bool("json", false, "print as JSON")
	s, err := fs.open(ctx, args, "[BACKUP]")
	if err != nil {
		return err
	}
	v, err := verifyStore(ctx, s, fs.Arg(0))
	if err != nil {
		return err
	}
	if err := fs.source.UpdateStatus(ctx, fs.ref(), func(_ *RecoveryWindow, st *ServerStatus) { st.LastVerification = v.summary() }); err != nil {
		slog.Warn("The status of the ObjectStore does not show this verification", "error", err)
	}
	if *asJSON {
		err = printJSON(v)
	} else {
		printVerification(v)
	}
	if err == nil && !v.OK {
		err = exitStatus(exitFailed)
	}
	return err
}

func printJSON(v any) error {
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

func printVerification(v *verification) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	verdict := func(problems []string) string {
		if len(problems) == 0 {
			return "ok"
		}
		return fmt.Sprintf("%d problems", len(problems))
	}
	var problems []string
	fmt.Fprintln(w, "ID\tSTATUS\tARCHIVES\tFILES\tSIZE\tMANIFEST\tBAD PAGES\tVERDICT")
	for _, b := range v.Backups {
		result := verdict(b.Problems)
		if b.Status != statusDone && len(b.Problems) == 0 {
			result = "-"
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%t\t%d\t%s\n", b.ID, b.Status, b.Archives, b.Files, byteCount(b.Bytes), b.Manifest, b.BadPages, result)
		for _, p := range b.Problems {
			problems = append(problems, b.ID+": "+p)
		}
	}
	w.Flush()
	fmt.Printf("WAL from %s to %s: %d segments, %s: %s\n", cmp.Or(v.WAL.From, "-"), cmp.Or(v.WAL.To, "-"), v.WAL.Segments, byteCount(v.WAL.Bytes), verdict(v.WAL.Problems))
	for _, p := range append(problems, v.WAL.Problems...) {
		fmt.Println(p)
	}
}

func runRetention(ctx context.Context, args []string) error {
	fs := newStoreCommand("retention")
	o := retentionOptions{Now: time.Now()}
	fs.StringVar(&o.Policy, "policy", "", "keep a recovery window of this `length`, such as 30d, 4w or 3m (default retentionPolicy of the ObjectStore)")
	fs.BoolVar(&o.DryRun, "dry-run", false, "only say what would go, and why")
	asJSON := fs.Bool("json", false, "print as JSON")
	s, err := fs.open(ctx, args)
	if err != nil {
		return err
	}
	if o.Policy = cmp.Or(o.Policy, s.Config.RetentionPolicy); o.Policy == "" {
		return usageError{fmt.Errorf("retention: ObjectStore %s has no retentionPolicy: set it there, or --policy", s.Config.Name)}
	}
	r, err := s.enforceRetention(ctx, o)
	if err != nil {
		return err
	}
	if len(r.Backups) == 0 {
		slog.Warn("There is no backup", "reason", nothingThere(ctx, s))
	}
	if *asJSON {
		err = printJSON(r)
	} else {
		printRetention(r)
	}
	if err == nil && len(r.Problems) > 0 {
		err = exitStatus(exitFailed)
	}
	return err
}

func printRetention(r *retentionReport) {
	verb := map[bool]string{true: "would go", false: "gone"}[r.DryRun]
	fmt.Printf("The recovery window of %s begins at %s.\n", r.Policy, timestamp(*r.Since))
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "BACKUP\tSTATUS\tVERDICT\tWHY")
	for _, v := range r.Backups {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", v.ID, v.Status, map[bool]string{true: verb, false: "stays"}[v.Delete], v.Why)
	}
	w.Flush()
	for _, g := range r.WAL {
		fmt.Printf("WAL of timeline %d, %s to %s: %d objects, %s, %s: no backup needs it\n", g.Timeline, g.First, g.Last, g.Objects, byteCount(g.Bytes), verb)
	}
	for _, d := range r.Debris {
		fmt.Printf("%s %s: abandoned by a backup that was killed\n", d, verb)
	}
	fmt.Printf("%d objects in all, %s, %s; %d refused by the server\n", r.Objects, byteCount(r.Bytes), verb, r.Refused)
	for _, p := range r.Problems {
		fmt.Println(p)
	}
}

// listRow is one backup as `list` shows it. Size is the bytes that its objects take in the bucket.
type listRow struct {
	ID        string `json:"id"`
	Name      string `json:"name,omitempty"`
	Status    string `json:"status"` // of backup.info, or UNREADABLE, or INCOMPLETE where there is none
	Error     string `json:"error,omitempty"`
	BeginTime string `json:"beginTime,omitempty"`
	EndTime   string `json:"endTime,omitempty"`
	Timeline  int    `json:"timeline,omitempty"`
	BeginWAL  string `json:"beginWAL,omitempty"`
	EndWAL    string `json:"endWAL,omitempty"`
	BeginLSN  string `json:"beginLSN,omitempty"`
	EndLSN    string `json:"endLSN,omitempty"`
	Size      int64  `json:"size"`
	Keep      string `json:"keep,omitempty"` // the annotation of barman-cloud-backup-keep: full or standalone
	// Pages with a wrong checksum, seen while the backup was taken: how many, and the first of them as FILE:BLOCK.
	BadPageCount int      `json:"badPageCount,omitempty"`
	BadPages     []string `json:"badPages,omitempty"`
}

func listRows(c *Catalog) []listRow {
	rows := []listRow{}
	for _, b := range c.all() {
		rows = append(rows, listRow{ID: b.ID, Name: b.BackupName, Status: b.Status, Error: b.Error,
			BeginTime: timestamp(b.BeginTime), EndTime: timestamp(b.EndTime), Timeline: b.Timeline,
			BeginWAL: b.BeginWAL, EndWAL: b.EndWAL, BeginLSN: b.BeginLSN, EndLSN: b.EndLSN, Size: c.objects[b.ID].size, Keep: b.Keep,
			BadPageCount: b.BadPageCount, BadPages: b.BadPages})
	}
	return rows
}

func timestamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

func runHealthcheck(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("healthcheck", flag.ContinueOnError)
	logFlags(fs)
	socket := fs.String("socket", pluginSocket, "ask the sidecar on this unix `socket`")
	if err := parseFlags(fs, args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	reply, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return fmt.Errorf("ask %s: %w", *socket, err)
	}
	switch reply.Status {
	case grpc_health_v1.HealthCheckResponse_SERVING:
		return nil
	case grpc_health_v1.HealthCheckResponse_UNKNOWN:
		return exitStatus(2)
	case grpc_health_v1.HealthCheckResponse_NOT_SERVING:
		return exitStatus(3)
	default:
		return exitStatus(125)
	}
}

// binaryPath is how a recovery configuration names this program.
func binaryPath() string {
	path, _ := os.Executable()
	return cmp.Or(path, os.Args[0])
}
