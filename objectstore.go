// This file is everything about the object store: the ObjectStore API types and the
// part of a Cluster that refers to them, the S3 client, the layout of the bucket, the
// compression codecs and the backup catalog (backup.info).
//
// It knows nothing of PostgreSQL's protocol and nothing of the Kubernetes API server;
// every other file of the data plane is built on it.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/bzip2"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	s3types "github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	bzip2w "github.com/dsnet/compress/bzip2"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"golang.org/x/crypto/x509roots/fallback/bundle"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// PluginName is the name under which CloudNativePG knows this plugin: the label of the
// Service, the file name of the socket and the name in a Cluster's plugin entries. It
// is the original's, so that the same manifests work.
const PluginName = "barman-cloud.cloudnative-pg.io"

// ---------------------------------------------------------------------------
// API types: ObjectStore (barmancloud.cnpg.io/v1)
// ---------------------------------------------------------------------------

// ObjectStore is one S3 destination and how to use it. The schema that the API server
// enforces is crd.yaml; the names and JSON shapes are the original plugin's.
type ObjectStore struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   ObjectStoreSpec   `json:"spec"`
	Status ObjectStoreStatus `json:"status,omitzero"`
}

// ObjectStoreSpec is what the user asks for.
type ObjectStoreSpec struct {
	Configuration Configuration `json:"configuration"`
	// RetentionPolicy is the recovery window as <n>d, <n>w or <n>m (31 days); "" keeps everything.
	RetentionPolicy              string                       `json:"retentionPolicy,omitempty"`
	InstanceSidecarConfiguration InstanceSidecarConfiguration `json:"instanceSidecarConfiguration,omitzero"`
}

// InstanceSidecarConfiguration shapes the container that is injected beside PostgreSQL.
type InstanceSidecarConfiguration struct {
	Env                            []corev1.EnvVar             `json:"env,omitempty"`
	RetentionPolicyIntervalSeconds int                         `json:"retentionPolicyIntervalSeconds,omitempty"`
	Resources                      corev1.ResourceRequirements `json:"resources,omitzero"`
	AdditionalContainerArgs        []string                    `json:"additionalContainerArgs,omitempty"`
	LogLevel                       string                      `json:"logLevel,omitempty"`
}

// Configuration is the barmanObjectStore stanza: where the objects go and in which form.
type Configuration struct {
	DestinationPath string                    `json:"destinationPath"` // s3://bucket[/path]
	EndpointURL     string                    `json:"endpointURL,omitempty"`
	EndpointCA      *corev1.SecretKeySelector `json:"endpointCA,omitempty"`
	// ServerName exists in the schema only to be refused: it is a plugin parameter.
	ServerName  string         `json:"serverName,omitempty"`
	Credentials *S3Credentials `json:"s3Credentials,omitempty"`
	// Azure and Google are admitted by old manifests; they are refused with a clear error.
	Azure  *json.RawMessage `json:"azureCredentials,omitempty"`
	Google *json.RawMessage `json:"googleCredentials,omitempty"`

	WAL  WALConfiguration  `json:"wal,omitzero"`
	Data DataConfiguration `json:"data,omitzero"`
	// Tags go on every object, HistoryTags replace them on timeline history files.
	Tags        map[string]string `json:"tags,omitempty"`
	HistoryTags map[string]string `json:"historyTags,omitempty"`
}

// S3Credentials says where keys come from: Secrets in the ObjectStore's namespace, or with
// InheritFromIAMRole the AWS SDK's default chain, in which case every other field is ignored.
type S3Credentials struct {
	AccessKeyID        *corev1.SecretKeySelector `json:"accessKeyId,omitempty"`
	SecretAccessKey    *corev1.SecretKeySelector `json:"secretAccessKey,omitempty"`
	Region             *corev1.SecretKeySelector `json:"region,omitempty"`
	SessionToken       *corev1.SecretKeySelector `json:"sessionToken,omitempty"`
	InheritFromIAMRole bool                      `json:"inheritFromIAMRole,omitempty"`
}

// WALConfiguration is how WAL is stored.
type WALConfiguration struct {
	Compression                  string   `json:"compression,omitempty"`
	Encryption                   string   `json:"encryption,omitempty"`
	MaxParallel                  int      `json:"maxParallel,omitempty"`
	ArchiveAdditionalCommandArgs []string `json:"archiveAdditionalCommandArgs,omitempty"`
	RestoreAdditionalCommandArgs []string `json:"restoreAdditionalCommandArgs,omitempty"`
}

// DataConfiguration is how base backups are taken and stored.
type DataConfiguration struct {
	Compression                  string   `json:"compression,omitempty"`
	Encryption                   string   `json:"encryption,omitempty"`
	Jobs                         int      `json:"jobs,omitempty"`
	ImmediateCheckpoint          bool     `json:"immediateCheckpoint,omitempty"`
	AdditionalCommandArgs        []string `json:"additionalCommandArgs,omitempty"`
	RestoreAdditionalCommandArgs []string `json:"restoreAdditionalCommandArgs,omitempty"`
}

// ObjectStoreStatus is written by the sidecars, each under its own server name, and by the
// operator mode: the conditions, and what can be said of all servers, for kubectl's columns.
type ObjectStoreStatus struct {
	Conditions               []metav1.Condition `json:"conditions,omitempty"`
	LastBackup               *metav1.Time       `json:"lastBackup,omitempty"`
	FirstRecoverabilityPoint *metav1.Time       `json:"firstRecoverabilityPoint,omitempty"`

	ServerRecoveryWindow map[string]RecoveryWindow `json:"serverRecoveryWindow,omitempty"`
	Servers              map[string]ServerStatus   `json:"servers,omitempty"`
}

// ofAllServers is the last backup that is the oldest, and the first point of recovery that
// is the newest: what is true of every server that has any.
func (s *ObjectStoreStatus) ofAllServers() (last, first *metav1.Time) {
	for _, w := range s.ServerRecoveryWindow {
		if t := w.LastSuccessfulBackupTime; t != nil && (last == nil || t.Before(last)) {
			last = t
		}
		if t := w.FirstRecoverabilityPoint; t != nil && (first == nil || first.Before(t)) {
			first = t
		}
	}
	return last, first
}

// ServerStatus is what the sidecars of one server report. What changes all the time, such
// as the last archived segment, is brought up to date every few minutes.
type ServerStatus struct {
	LastArchivedWAL    string       `json:"lastArchivedWAL,omitempty"`
	LastArchivedTime   *metav1.Time `json:"lastArchivedTime,omitempty"`
	OldestWaitingWAL   string       `json:"oldestWaitingWAL,omitempty"` // of the files that wait to be archived
	OldestWaitingSince *metav1.Time `json:"oldestWaitingSince,omitempty"`
	// WALGaps are ranges of segments that are missing between the oldest backup and the
	// newest segment; MissingWAL is how many segments that are.
	WALGaps          []string           `json:"walGaps,omitempty"`
	MissingWAL       int                `json:"missingWAL,omitempty"`
	LastBackup       *LastBackup        `json:"lastBackup,omitempty"`
	LastFailure      *LastFailure       `json:"lastFailure,omitempty"`
	LastVerification *LastVerification  `json:"lastVerification,omitempty"`
	Conditions       []metav1.Condition `json:"conditions,omitempty"`
}

// LastBackup is the newest backup that the plugin took.
type LastBackup struct {
	ID          string `json:"id"`
	Instance    string `json:"instance,omitempty"`
	Seconds     int64  `json:"seconds"`
	Bytes       int64  `json:"bytes"`       // read from PostgreSQL's files
	StoredBytes int64  `json:"storedBytes"` // in the bucket
	BadPages    int    `json:"badPages,omitempty"`
}

// LastFailure is the last thing that went wrong; the conditions tell whether it still does.
type LastFailure struct {
	Time    metav1.Time `json:"time"`
	Reason  string      `json:"reason"`
	Message string      `json:"message"`
}

// LastVerification is what `verify`, run in a Pod of the cluster, has found.
type LastVerification struct {
	Time     metav1.Time `json:"time"`
	OK       bool        `json:"ok"`
	Backups  int         `json:"backups"`
	Segments int         `json:"segments"`
	Problems []string    `json:"problems,omitempty"` // the first few
}

// RecoveryWindow is what `kubectl cnpg status` and dashboards read.
type RecoveryWindow struct {
	// FirstRecoverabilityPoint is the end time of the oldest backup that is done.
	FirstRecoverabilityPoint *metav1.Time `json:"firstRecoverabilityPoint,omitempty"`
	// LastSuccessfulBackupTime is the end time of the newest backup that is done.
	LastSuccessfulBackupTime *metav1.Time `json:"lastSuccessfulBackupTime,omitempty"`
	LastFailedBackupTime     *metav1.Time `json:"lastFailedBackupTime,omitempty"`
}

// ---------------------------------------------------------------------------
// The part of a Cluster (postgresql.cnpg.io/v1) that refers to object stores
// ---------------------------------------------------------------------------

// Cluster is what this plugin reads of a CloudNativePG Cluster. Unknown fields are
// ignored and everything is optional, so that future operators and re-branded API
// groups decode too.
type Cluster struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec struct {
		Plugins          []PluginConfiguration `json:"plugins,omitempty"`
		ExternalClusters []ExternalCluster     `json:"externalClusters,omitempty"`
		Bootstrap        struct {
			Recovery struct {
				Source         string          `json:"source,omitempty"`
				RecoveryTarget *RecoveryTarget `json:"recoveryTarget,omitempty"`
			} `json:"recovery,omitzero"`
		} `json:"bootstrap,omitzero"`
		Replica struct {
			Self    string `json:"self,omitempty"`
			Primary string `json:"primary,omitempty"`
			Source  string `json:"source,omitempty"` // required: empty where there is no replica stanza
			Enabled *bool  `json:"enabled,omitempty"`
		} `json:"replica,omitzero"`
		ServiceAccountName string           `json:"serviceAccountName,omitempty"`
		WALStorage         *json.RawMessage `json:"walStorage,omitempty"`
	} `json:"spec"`

	Status struct {
		CurrentPrimary string `json:"currentPrimary,omitempty"`
	} `json:"status,omitzero"`
}

// PluginConfiguration is one entry of a Cluster's spec.plugins, or the plugin of an external cluster.
type PluginConfiguration struct {
	Name          string            `json:"name"`
	Enabled       *bool             `json:"enabled,omitempty"` // unset means true
	IsWALArchiver *bool             `json:"isWALArchiver,omitempty"`
	Parameters    map[string]string `json:"parameters,omitempty"`
}

// ExternalCluster is one entry of a Cluster's spec.externalClusters.
type ExternalCluster struct {
	Name                 string               `json:"name"`
	ConnectionParameters map[string]string    `json:"connectionParameters,omitempty"`
	Plugin               *PluginConfiguration `json:"plugin,omitempty"`
}

// RecoveryTarget says where point-in-time recovery ends, and with BackupID from which backup it starts.
type RecoveryTarget struct {
	BackupID        string `json:"backupID,omitempty"`
	TargetTLI       string `json:"targetTLI,omitempty"`
	TargetXID       string `json:"targetXID,omitempty"`
	TargetName      string `json:"targetName,omitempty"`
	TargetLSN       string `json:"targetLSN,omitempty"`
	TargetTime      string `json:"targetTime,omitempty"`
	TargetImmediate *bool  `json:"targetImmediate,omitempty"`
	Exclusive       *bool  `json:"exclusive,omitempty"`
}

// errBadRequest says that a CNPG-I request cannot be read, errNoStore that its Cluster names no store.
var (
	errBadRequest = errors.New("decode the Cluster of the request")
	errNoStore    = errors.New("no object store")
)

// DecodeCluster reads the Cluster of a CNPG-I request.
func DecodeCluster(definition []byte) (*Cluster, error) {
	var c Cluster
	if err := json.Unmarshal(definition, &c); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if c.Name == "" {
		return nil, fmt.Errorf("%w: it has no metadata.name", errBadRequest)
	}
	return &c, nil
}

// archiveOf reads the Cluster of a request that needs its archive store.
func archiveOf(definition []byte) (*Cluster, *StoreRef, error) {
	c, err := DecodeCluster(definition)
	if err != nil {
		return nil, nil, err
	}
	ref := c.ArchiveStore()
	if ref == nil {
		err = fmt.Errorf("%w: Cluster %s has no enabled plugin %s with the parameter barmanObjectName in spec.plugins", errNoStore, c.Name, PluginName)
	}
	return c, ref, err
}

// StoreRef names the ObjectStore (in the Cluster's namespace) and the server name
// under which one cluster's objects lie in it.
type StoreRef struct {
	ObjectStore string
	ServerName  string
}

// ArchiveStore is the store of the enabled spec.plugins entry: where WAL and backups
// go. nil when the cluster has none. Of several entries with our name the last one
// counts, as with the original.
func (c *Cluster) ArchiveStore() *StoreRef {
	for _, p := range slices.Backward(c.Spec.Plugins) {
		if ref := c.storeRef(&p); ref != nil {
			return ref
		}
	}
	return nil
}

// RecoveryStore is the store that the cluster is (or was) bootstrapped from, nil when there is none.
func (c *Cluster) RecoveryStore() *StoreRef {
	return c.externalStore(c.Spec.Bootstrap.Recovery.Source)
}

// ReplicaSourceStore is the store that a replica cluster follows, nil when there is none.
func (c *Cluster) ReplicaSourceStore() *StoreRef {
	return c.externalStore(c.Spec.Replica.Source)
}

// IsReplica says whether the whole cluster follows another one (CloudNativePG's
// Cluster.IsReplica: an explicit enabled wins, otherwise primary differs from self).
func (c *Cluster) IsReplica() bool {
	r := &c.Spec.Replica
	switch {
	case r.Enabled != nil:
		return *r.Enabled
	case r.Source == "":
		return false
	case r.Self != "":
		return r.Self != r.Primary
	default:
		return c.Name != r.Primary
	}
}

func (c *Cluster) externalStore(name string) *StoreRef {
	for _, e := range c.Spec.ExternalClusters {
		if name != "" && e.Name == name && e.Plugin != nil {
			return c.storeRef(e.Plugin)
		}
	}
	return nil
}

// storeRef reads the parameters of a plugin entry; nil when the entry is another
// plugin's, disabled, or names no store. The server name defaults to the cluster's own
// name in every role; an empty one counts as unset.
func (c *Cluster) storeRef(p *PluginConfiguration) *StoreRef {
	if p.Name != PluginName || (p.Enabled != nil && !*p.Enabled) || p.Parameters["barmanObjectName"] == "" {
		return nil
	}
	return &StoreRef{ObjectStore: p.Parameters["barmanObjectName"], ServerName: cmp.Or(p.Parameters["serverName"], c.Name)}
}

// ---------------------------------------------------------------------------
// Configuration as the data plane sees it: plain values
// ---------------------------------------------------------------------------

// StoreConfig is an ObjectStore with its secrets resolved, for one server name. Two
// equal StoreConfigs address the same objects with the same rights.
type StoreConfig struct {
	Name            string // namespace/name of the ObjectStore, for messages
	ServerName      string
	Configuration   Configuration
	RetentionPolicy string // as it was written: enforceRetention checks it

	AccessKeyID     string // empty with inheritFromIAMRole
	SecretAccessKey string
	SessionToken    string
	Region          string
	CA              []byte // PEM, added to the system's roots
}

// ResolveStore checks an ObjectStore and reads the secrets that it names. secret
// returns one key of one Secret and words its own error.
func ResolveStore(o *ObjectStore, serverName string, secret func(corev1.SecretKeySelector) ([]byte, error)) (StoreConfig, error) {
	name := path.Join(o.Namespace, o.Name)
	c := StoreConfig{Name: name, ServerName: serverName, Configuration: o.Spec.Configuration, RetentionPolicy: o.Spec.RetentionPolicy}
	fail := func(format string, a ...any) (StoreConfig, error) {
		return StoreConfig{}, fmt.Errorf("ObjectStore %s: "+format, append([]any{name}, a...)...)
	}
	conf := &o.Spec.Configuration
	switch cred := conf.Credentials; {
	case conf.Azure != nil || conf.Google != nil:
		return fail("azureCredentials and googleCredentials are not supported: this plugin is S3 only, use an S3-compatible endpoint with s3Credentials")
	case conf.ServerName != "":
		return fail("remove configuration.serverName and set the plugin parameter serverName in the Cluster")
	case serverName == "" || serverName == "." || serverName == ".." || strings.Contains(serverName, "/"):
		return fail("%q is not a server name: set the plugin parameter serverName in the Cluster", serverName)
	case cred == nil:
		return fail("no credentials defined: set s3Credentials to accessKeyId and secretAccessKey, or to inheritFromIAMRole")
	case cred.InheritFromIAMRole:
		// the default chain of the SDK; region and sessionToken are ignored, as with the original
	case cred.AccessKeyID == nil:
		return fail("missing access key ID: set s3Credentials.accessKeyId")
	case cred.SecretAccessKey == nil:
		return fail("missing secret access key: set s3Credentials.secretAccessKey")
	default:
		for _, field := range []struct {
			selector *corev1.SecretKeySelector
			value    *string
		}{
			{cred.AccessKeyID, &c.AccessKeyID}, {cred.SecretAccessKey, &c.SecretAccessKey},
			{cred.SessionToken, &c.SessionToken}, {cred.Region, &c.Region},
		} {
			if field.selector == nil {
				continue
			}
			b, err := secret(*field.selector)
			if err != nil {
				return StoreConfig{}, fmt.Errorf("ObjectStore %s: %w", name, err)
			}
			// A trailing newline from `echo key | base64` is never part of a key.
			*field.value = strings.TrimSpace(string(b))
		}
	}
	if conf.EndpointCA != nil {
		ca, err := secret(*conf.EndpointCA)
		if err != nil {
			return StoreConfig{}, fmt.Errorf("ObjectStore %s: endpointCA: %w", name, err)
		}
		c.CA = ca
	}
	if _, _, err := splitDestination(conf.DestinationPath); err != nil {
		return fail("%w", err)
	}
	return c, nil
}

// splitDestination cuts s3://bucket[/path] into bucket and path without outer slashes.
// The path is taken literally, as Barman does: %20 in it stays %20 in the keys.
func splitDestination(destination string) (bucket, prefix string, err error) {
	rest, ok := strings.CutPrefix(destination, "s3://")
	bucket, prefix, _ = strings.Cut(rest, "/")
	if !ok || bucket == "" || strings.ContainsAny(rest, "?#") {
		return "", "", fmt.Errorf("destinationPath %q is not s3://bucket[/path]", destination)
	}
	return bucket, strings.Trim(prefix, "/"), nil
}

// commandArgs are the arguments that users of Barman put into additionalCommandArgs
// and its sisters, parsed natively. The zero value means that none was given.
type commandArgs struct {
	AddressingStyle  string // auto, path, virtual
	Profile          string
	ReadTimeout      time.Duration
	Encryption       string // AES256, aws:kms
	KMSKeyID         string
	CompressionLevel string // low, medium, high or a number
	MinChunkSize     int64  // bytes
	MaxArchiveSize   int64  // bytes
	MaxBandwidth     int64  // bytes per second
	NoPartial        bool
	Tablespaces      map[string]string // name -> location
	Tags             map[string]string
	HistoryTags      map[string]string
}

// parseCommandArgs reads one of the additionalCommandArgs lists. Both spellings work,
// --flag=value in one element and --flag, value in two. An unknown argument is an error that names it.
func parseCommandArgs(field string, args []string) (commandArgs, error) {
	c := commandArgs{Tablespaces: map[string]string{}, Tags: map[string]string{}, HistoryTags: map[string]string{}}
	fs := flag.NewFlagSet(field, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	add := func(set func(string) error, names ...string) {
		for _, n := range names {
			fs.Func(n, "", set)
		}
	}
	text := func(p *string, allowed ...string) func(string) error {
		return func(v string) error {
			if allowed != nil && !slices.Contains(allowed, v) {
				return fmt.Errorf("must be one of %s", strings.Join(allowed, ", "))
			}
			*p = v
			return nil
		}
	}
	size := func(p *int64) func(string) error {
		return func(v string) (err error) { *p, err = parseSize(v); return err }
	}
	add(text(&c.AddressingStyle, "auto", "path", "virtual"), "addressing-style")
	add(text(&c.Profile), "aws-profile", "P", "profile")
	add(text(&c.Encryption, "AES256", "aws:kms"), "encryption", "e")
	add(text(&c.KMSKeyID), "sse-kms-key-id")
	add(text(&c.CompressionLevel), "compression-level")
	add(size(&c.MinChunkSize), "min-chunk-size")
	add(size(&c.MaxArchiveSize), "max-archive-size", "S")
	add(size(&c.MaxBandwidth), "max-bandwidth")
	add(pairInto(c.Tablespaces, ":"), "tablespace")
	add(pairInto(c.Tags, ","), "tag", "tags")
	add(pairInto(c.HistoryTags, ","), "history-tag", "history-tags")
	fs.BoolVar(&c.NoPartial, "no-partial", false, "")
	fs.Func("read-timeout", "", func(v string) error {
		n, err := strconv.Atoi(v)
		if err != nil || n <= 0 {
			return errors.New("must be a number of seconds")
		}
		c.ReadTimeout = time.Duration(n) * time.Second
		return nil
	})
	// Accepted for the sake of old manifests, without effect here: verbosity is the
	// sidecar's log level; the others are settings of Azure and of Python's thread pool.
	for _, n := range []string{"v", "verbose", "vv", "q", "quiet", "qq"} {
		fs.Bool(n, false, "")
	}
	add(text(new(string)), "max-concurrency", "max-single-put-size", "max-block-size", "cloud-provider")

	if err := fs.Parse(args); err != nil {
		return c, fmt.Errorf("%s: %w", field, err)
	}
	if fs.NArg() > 0 {
		return c, fmt.Errorf("%s: %q is not an argument: write --name=value, or --name and value as two list elements", field, fs.Arg(0))
	}
	return c, nil
}

// pairInto reads a flag that may be repeated, each time with a key and a value.
func pairInto(m map[string]string, separator string) func(string) error {
	return func(v string) error {
		key, value, ok := strings.Cut(v, separator)
		if !ok {
			return fmt.Errorf("must be KEY%sVALUE", separator)
		}
		m[key] = value
		return nil
	}
}

// parseSize reads a size as Barman does, where GB and G mean 2^30 and GiB means 10^9
// (barman.utils: check_size), except that we read GiB as 2^30 too.
func parseSize(s string) (int64, error) {
	m := regexp.MustCompile(`(?i)^\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])i?)?b?\s*$`).FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("%q is not a size such as 20MB", s)
	}
	f, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		return 0, err
	}
	shift := 10 * strings.Index(" kmgt", strings.ToLower(m[2])) // 0 without a unit
	if f *= float64(int64(1) << shift); f < math.MaxInt64 {
		return int64(f), nil
	}
	return 0, fmt.Errorf("%q is too large", s)
}

// ---------------------------------------------------------------------------
// The S3 client
// ---------------------------------------------------------------------------

// Limits that keep a half-dead network from hanging an archive for ever. A write that
// makes no progress for writeStall, or a reply that does not begin within readStall
// (a server may work that long to join a large multipart upload), breaks the
// connection; a body that stops flowing for bodyStall is opened again where it stopped.
const (
	dialTimeout    = 10 * time.Second
	writeStall     = 60 * time.Second
	readStall      = 5 * time.Minute
	bodyStall      = 30 * time.Second
	requestTimeout = 2 * time.Minute  // one small request, its retries included
	maxAttempts    = 5                // of one request, by the SDK
	maxBackoff     = 5 * time.Second  // between two attempts
	cleanupTimeout = 30 * time.Second // for work that follows a cancellation
)

// connBuffer is the size of each buffer of a connection.
const connBuffer = 64 << 10

// Store reads and writes the objects of one server in one bucket. It is safe for
// concurrent use.
type Store struct {
	Config StoreConfig

	client         *s3.Client
	bucket, prefix string
	// The arguments of each command. Those for writing have the tags and the encryption of the configuration too.
	walArchive, walRestore, data, dataRestore commandArgs
	// How to reach the store is one matter for all requests, whichever command's arguments say it.
	addressing, profile string
	readTimeout         time.Duration
	// conditionsRefused is how often in a row the server answered that it has no If-None-Match.
	conditionsRefused atomic.Int32
	// noBatchDelete is set when the server refused DeleteObjects as such.
	noBatchDelete atomic.Bool
	// tellsChecksums is set when the server answered with a checksum that nobody had asked for.
	tellsChecksums atomic.Bool
	// checksumsRefused is how often in a row it failed with ours; maxRefusals: it gets none any more.
	checksumsRefused atomic.Int32
	answered         atomic.Bool  // as S3 does, at least once
	certificateEnd   atomic.Int64 // of the server's TLS certificate, in Unix seconds; 0: not seen yet
}

// OpenStore makes the S3 client for a configuration. It sends nothing.
func OpenStore(ctx context.Context, c StoreConfig) (*Store, error) {
	s, err := newStore(c)
	if err != nil {
		return nil, err
	}
	if s.client, err = s.newClient(ctx); err != nil {
		return nil, fmt.Errorf("ObjectStore %s: %w", c.Name, err)
	}
	return s, nil
}

// newStore is a Store that has no client yet: everything that can be told to be wrong
// with a configuration without a network is told here.
func newStore(c StoreConfig) (*Store, error) {
	s := &Store{Config: c}
	var err error
	if s.bucket, s.prefix, err = splitDestination(c.Configuration.DestinationPath); err != nil {
		return nil, fmt.Errorf("ObjectStore %s: %w", c.Name, err)
	}
	conf := &c.Configuration
	for _, a := range []struct {
		field string
		list  []string
		into  *commandArgs
	}{
		{"wal.archiveAdditionalCommandArgs", conf.WAL.ArchiveAdditionalCommandArgs, &s.walArchive},
		{"wal.restoreAdditionalCommandArgs", conf.WAL.RestoreAdditionalCommandArgs, &s.walRestore},
		{"data.additionalCommandArgs", conf.Data.AdditionalCommandArgs, &s.data},
		{"data.restoreAdditionalCommandArgs", conf.Data.RestoreAdditionalCommandArgs, &s.dataRestore},
	} {
		if *a.into, err = parseCommandArgs(a.field, a.list); err != nil {
			return nil, fmt.Errorf("ObjectStore %s: %w", c.Name, err)
		}
		s.addressing = cmp.Or(s.addressing, a.into.AddressingStyle)
		s.profile = cmp.Or(s.profile, a.into.Profile)
		s.readTimeout = cmp.Or(s.readTimeout, a.into.ReadTimeout)
		maps.Copy(a.into.Tags, conf.Tags)
		maps.Copy(a.into.HistoryTags, conf.HistoryTags)
	}
	s.walArchive.Encryption = cmp.Or(conf.WAL.Encryption, s.walArchive.Encryption)
	s.data.Encryption = cmp.Or(conf.Data.Encryption, s.data.Encryption)
	for field, compression := range map[string]string{"wal": conf.WAL.Compression, "data": conf.Data.Compression} {
		if _, err := codecByName(compression); err != nil {
			return nil, fmt.Errorf("ObjectStore %s: %s.compression: %w", c.Name, field, err)
		}
	}
	if conf.Data.Compression == "xz" { // Barman has no such base backups
		return nil, fmt.Errorf("ObjectStore %s: data.compression: xz is for WAL only: choose bzip2, gzip, lz4, snappy or zstd", c.Name)
	}
	if u, err := url.Parse(conf.EndpointURL); err != nil || conf.EndpointURL != "" && (u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
		return nil, fmt.Errorf("ObjectStore %s: endpointURL %q is not http://HOST[:PORT] or https://HOST[:PORT]", c.Name, conf.EndpointURL)
	}
	if len(c.CA) > 0 && !x509.NewCertPool().AppendCertsFromPEM(c.CA) {
		return nil, fmt.Errorf("ObjectStore %s: endpointCA (key %s of Secret %s) holds no PEM certificate", c.Name, conf.EndpointCA.Key, conf.EndpointCA.Name)
	}
	return s, nil
}

const (
	defaultJobs    = 2         // data.jobs where it is not set
	copyBufferSize = 256 << 10 // per job

	roleRenewal = 5 * time.Minute // before the credentials of a role end
)

// jobs is how many archives of a backup are in flight at once.
func (s *Store) jobs() int { return max(1, cmp.Or(s.Config.Configuration.Data.Jobs, defaultJobs)) }

// newClient is the only place where an S3 client is made. The SDK's environment
// variables (AWS_*, HTTPS_PROXY, NO_PROXY) keep their meaning wherever the ObjectStore
// says nothing else.
func (s *Store) newClient(ctx context.Context) (*s3.Client, error) {
	embeddedRoots()
	conf := &s.Config.Configuration
	httpClient := awshttp.NewBuildableClient().WithDialerOptions(func(d *net.Dialer) {
		d.Timeout = dialTimeout
	}).WithTransportOptions(func(t *http.Transport) {
		dial := t.DialContext
		stall := cmp.Or(s.readTimeout, readStall)
		t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			if err := unacknowledged(conn, 2*writeStall); err != nil {
				slog.Debug("No TCP_USER_TIMEOUT", "error", err)
			}
			return &stallConn{Conn: conn, in: bufio.NewReaderSize(conn, connBuffer), read: stall, write: writeStall}, nil
		}
		if len(s.Config.CA) > 0 {
			t.TLSClientConfig.RootCAs, _ = x509.SystemCertPool() // embeddedRoots has seen to it that there is one
			t.TLSClientConfig.RootCAs.AppendCertsFromPEM(s.Config.CA)
		}
		t.TLSClientConfig.VerifyConnection = func(c tls.ConnectionState) error { // once it has been verified
			s.certificateEnd.Store(c.PeerCertificates[0].NotAfter.Unix())
			return nil
		}
		t.DisableCompression = true // net/http would ask for it, and unpack what is compressed
		t.ForceAttemptHTTP2 = false // parallel parts want connections of their own
		t.MaxIdleConnsPerHost = 64
		t.WriteBufferSize, t.ReadBufferSize = connBuffer, connBuffer
	})
	var keys aws.CredentialsProvider
	if cred := conf.Credentials; cred != nil && !cred.InheritFromIAMRole {
		if s.Config.AccessKeyID == "" || s.Config.SecretAccessKey == "" { // the SDK would look for other credentials
			return nil, fmt.Errorf("key %s of Secret %s or key %s of Secret %s is empty",
				cred.AccessKeyID.Key, cred.AccessKeyID.Name, cred.SecretAccessKey.Key, cred.SecretAccessKey.Name)
		}
		keys = credentials.NewStaticCredentialsProvider(s.Config.AccessKeyID, s.Config.SecretAccessKey, s.Config.SessionToken)
	}
	// What is empty here counts as not set.
	cfg, err := config.LoadDefaultConfig(ctx, config.WithHTTPClient(httpClient), config.WithCredentialsProvider(keys),
		config.WithRegion(s.Config.Region), config.WithSharedConfigProfile(s.profile),
		// The keys of a role are renewed before they end: the server's clock may be ahead.
		config.WithCredentialsCacheOptions(func(o *aws.CredentialsCacheOptions) { o.ExpiryWindow = roleRenewal }))
	if err != nil {
		return nil, fmt.Errorf("load the S3 configuration from the environment: %w", err)
	}
	cfg.Region = cmp.Or(cfg.Region, "us-east-1")
	if cfg.RequestChecksumCalculation == aws.RequestChecksumCalculationWhenRequired { // the environment, or its profile, wants none
		s.checksumsRefused.Store(maxRefusals)
	}
	return s3.NewFromConfig(cfg, func(o *s3.Options) {
		attempts := func(r *retry.StandardOptions) {
			r.MaxAttempts, r.MaxBackoff = cmp.Or(cfg.RetryMaxAttempts, maxAttempts), maxBackoff
			// The budget is the number of attempts; a bucket of tokens shared by all
			// requests would make one bad minute fail the requests of the next one.
			r.RateLimiter = ratelimit.None
		}
		o.Retryer = loggedRetryer{retry.NewStandard(attempts)}
		if cfg.RetryMode == aws.RetryModeAdaptive {
			o.Retryer = loggedRetryer{retry.NewAdaptiveMode(func(a *retry.AdaptiveModeOptions) { a.StandardOptions = append(a.StandardOptions, attempts) })}
		}
		o.DisableLogOutputChecksumValidationSkipped = true
		// Waiting for "100 Continue" costs a round trip for each segment.
		o.ContinueHeaderThresholdBytes = -1
		if conf.EndpointURL != "" {
			o.BaseEndpoint = aws.String(conf.EndpointURL)
			o.APIOptions = append(o.APIOptions, withoutAcceptEncoding)
		}
		if conf.EndpointURL != "" && !ofAWS(conf.EndpointURL) {
			// Many S3-compatible servers refuse the checksums that the SDK adds by default.
			if os.Getenv("AWS_REQUEST_CHECKSUM_CALCULATION") == "" {
				o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
			}
			if os.Getenv("AWS_RESPONSE_CHECKSUM_VALIDATION") == "" {
				o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
			}
		}
		o.UsePathStyle = s.addressing == "path" || s.addressing != "virtual" && conf.EndpointURL != ""
	}), nil
}

// ofAWS says whether an endpoint is one of AWS: of a region, or of a VPC. A bucket with object lock wants checksums there.
func ofAWS(endpoint string) bool {
	u, err := url.Parse(endpoint)
	return err == nil && (strings.HasSuffix(u.Hostname(), ".amazonaws.com") || strings.HasSuffix(u.Hostname(), ".amazonaws.com.cn"))
}

// withoutAcceptEncoding takes out what adds that header to a request, and to its signature: Google's
// and Cloudflare's front ends change it, whereupon the store behind them would refuse the request.
func withoutAcceptEncoding(stack *middleware.Stack) error {
	_, err := stack.Finalize.Remove("DisableAcceptEncodingGzip")
	return err
}

// loggedRetryer says why a request is sent again: five attempts at a server that hangs take long.
type loggedRetryer struct{ aws.RetryerV2 }

func (r loggedRetryer) RetryDelay(attempt int, err error) (time.Duration, error) {
	delay, delayErr := r.RetryerV2.RetryDelay(attempt, err)
	slog.Info("A request to the store failed, trying again", "attempt", attempt, "delay", delay.Round(time.Millisecond).String(), "error", describe(err))
	return delay, delayErr
}

// embeddedRoots has the public CAs trusted where the system has none, as in the image. The
// package above this one would parse all of them when the program starts, which takes
// longer than everything else that a sidecar does until it listens.
var embeddedRoots = sync.OnceFunc(func() {
	pool := x509.NewCertPool()
	for root := range bundle.Roots() {
		cert, err := x509.ParseCertificate(root.Certificate)
		if err != nil {
			panic(err) // a bundle that was built broken
		}
		pool.AddCertWithConstraint(cert, root.Constraint)
	}
	x509.SetFallbackRoots(pool)
})

// unacknowledged breaks a connection whose peer takes nothing of what was sent for that long
// (TCP_USER_TIMEOUT, tcp(7)): a network that is gone is known by that, while a server that has
// taken a request may work on it in silence.
func unacknowledged(conn net.Conn, limit time.Duration) error {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(limit.Milliseconds()))
	})
	return cmp.Or(err, failed)
}

// stallConn breaks a connection on which a read or a write makes no progress. It reads ahead,
// since TLS would ask the kernel for one record of 16 KiB after the other.
type stallConn struct {
	net.Conn
	in          *bufio.Reader
	read, write time.Duration
}

func (c *stallConn) Read(b []byte) (int, error) {
	if c.in.Buffered() == 0 {
		if err := c.SetReadDeadline(time.Now().Add(c.read)); err != nil {
			return 0, err
		}
	}
	return c.in.Read(b)
}

func (c *stallConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(c.write)); err != nil {
		return 0, err
	}
	defer func() { c.SetReadDeadline(time.Now().Add(c.read)) }() // net/http waits for the reply from before the request on
	return c.Conn.Write(b)
}

// ---------------------------------------------------------------------------
// Errors
// ---------------------------------------------------------------------------

// What a request to the store can come to, for errors.Is. Anything else is neither
// known to be permanent nor known to pass.
var (
	errNotFound     = errors.New("no such object")
	errNoBucket     = errors.New("no such bucket")
	errDenied       = errors.New("access denied")
	errPrecondition = errors.New("precondition failed")
	errUnsupported  = errors.New("not supported by the server")
	errUntrusted    = errors.New("certificate not trusted")
	errTransient    = errors.New("transient failure")
	errNotS3        = errors.New("the reply is a success, but has nothing of what S3 replies") // a page of a gateway, or of a console
)

// storeError is a failed request: what was asked of which object, what the server said, and what to do.
type storeError struct {
	op, url string
	kind    error // one of the above, or nil
	hint    string
	err     error
}

func (e *storeError) Unwrap() []error { return []error{e.kind, e.err} }

func (e *storeError) Error() string {
	text := fmt.Sprintf("%s %s: %s", e.op, e.url, describe(e.err))
	if e.hint != "" {
		text += " (" + e.hint + ")"
	}
	return text
}

// describe shortens the SDK's error to status, code, message and request id.
func describe(err error) string {
	response, answered := errors.AsType[*awshttp.ResponseError](err)
	if api, ok := errors.AsType[smithy.APIError](err); ok && answered {
		text := fmt.Sprintf("%d %s", response.HTTPStatusCode(), api.ErrorCode())
		if m := api.ErrorMessage(); m != "" && m != api.ErrorCode() {
			text += ": " + m
		}
		if id := response.ServiceRequestID(); id != "" {
			text += ", request id " + id
		}
		return text
	}
	// There was no reply: what the SDK puts around such an error says nothing more.
	if unsent, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		return unsent.Err.Error()
	}
	if operation, ok := errors.AsType[*smithy.OperationError](err); ok {
		return operation.Err.Error()
	}
	return err.Error()
}

// wrap turns an error of the SDK into a storeError; nil stays nil.
func (s *Store) wrap(op, key string, err error) error {
	if err == nil {
		s.answered.Store(true)
		return nil
	}
	e := &storeError{op: op, url: s.URL(key), err: err}
	status, code := 0, ""
	if response, ok := errors.AsType[*awshttp.ResponseError](err); ok {
		status = response.HTTPStatusCode()
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		code = api.ErrorCode()
	}
	where := cmp.Or(s.Config.Configuration.EndpointURL, "AWS")
	var unknownCA x509.UnknownAuthorityError
	var hostname x509.HostnameError
	switch {
	case code == "NoSuchBucket":
		e.kind = errNoBucket
		e.hint = fmt.Sprintf("bucket %q does not exist at %s: create it, or correct destinationPath of ObjectStore %s", s.bucket, where, s.Config.Name)
	// The code decides, not the status: PostgreSQL takes "not found" for the end of the
	// archive, and versitygw answers an unknown access key with a 404 too.
	// A HEAD has no body for a code. A list of nothing is empty, whatever else answers 404.
	case op != "list" && (code == "NoSuchKey" || code == "NoSuchUpload"), op == "head" && code == "NotFound":
		e.kind = errNotFound
	case status == http.StatusPreconditionFailed, code == "ConditionalRequestConflict":
		e.kind = errPrecondition
	case status == http.StatusNotImplemented, code == "NotImplemented":
		e.kind = errUnsupported
	case code == "RequestTimeTooSkewed":
		e.hint = "the clocks here and there differ: correct the one that is wrong"
	case status == http.StatusForbidden, status == http.StatusUnauthorized,
		code == "InvalidAccessKeyId", code == "SignatureDoesNotMatch", code == "XAdminUserNotFound":
		e.kind = errDenied
		e.hint = fmt.Sprintf("check the credentials that ObjectStore %s names, and what they may do in bucket %q", s.Config.Name, s.bucket)
		if c := s.Config.Configuration.Credentials; c != nil && c.AccessKeyID != nil && !c.InheritFromIAMRole {
			e.hint = fmt.Sprintf("check the keys in Secret %s that ObjectStore %s names, and what they may do in bucket %q", c.AccessKeyID.Name, s.Config.Name, s.bucket)
		}
	case status == http.StatusMovedPermanently, code == "AuthorizationHeaderMalformed", code == "IllegalLocationConstraintException":
		e.hint = fmt.Sprintf("set the region of bucket %q: s3Credentials.region of ObjectStore %s", s.bucket, s.Config.Name)
	case code == "InvalidRequest" && strings.Contains(err.Error(), "x-amz-checksum"):
		e.hint = "the bucket has object lock: set AWS_REQUEST_CHECKSUM_CALCULATION=when_supported in the environment of this program"
	case status == http.StatusNotFound, errors.Is(err, errNotS3):
		if s.answered.Load() { // a gateway in a bad moment
			e.kind = errTransient
		}
		e.hint = fmt.Sprintf("that is no answer of an S3 server: check endpointURL of ObjectStore %s, and what stands in front of %s", s.Config.Name, where)
	case errors.As(err, &unknownCA), errors.As(err, &hostname):
		e.kind = errUntrusted
		e.hint = fmt.Sprintf("set endpointCA of ObjectStore %s to the CA that signed the certificate of %s", s.Config.Name, where)
	case errors.Is(err, context.Canceled):
	case status >= 500 || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout,
		slices.Contains([]string{"SlowDown", "RequestTimeout", "OperationAborted"}, code),
		slices.Contains([]string{"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}, code), // damaged on the way
		status >= 200 && status < 300: // the reply began, and broke off
		e.kind = errTransient
	case status == 0:
		// no reply at all: name resolution, connection, reset, deadline
		e.kind = errTransient
		e.hint = "is " + where + " reachable from here?"
	}
	if e.kind != errNotFound && e.kind != errPrecondition && !errors.Is(err, context.Canceled) {
		s3Errors.add(cmp.Or(code, "NoReply"))
	}
	return e
}

// errorCounts counts failed requests by S3's code.
type errorCounts struct {
	mu sync.Mutex
	n  map[string]float64
}

// s3Errors are those of this process, for the metrics.
var s3Errors = errorCounts{n: map[string]float64{}}

// maxErrorCodes bounds the codes that are told apart, whatever a server may answer.
const maxErrorCodes = 50

func (e *errorCounts) add(code string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, known := e.n[code]; !known && len(e.n) >= maxErrorCodes {
		code = "other"
	}
	e.n[code]++
}

func (e *errorCounts) all() map[string]float64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.n)
}

// ---------------------------------------------------------------------------
// The layout of the bucket (FORMAT: the same as Barman's). Keys are made only here.
// ---------------------------------------------------------------------------

// key joins the path of the destination, the server name and parts. There is never a
// leading slash, and nothing is cleaned: a path such as a//b means those very keys.
func (s *Store) key(parts ...string) string {
	k := strings.Join(append([]string{s.Config.ServerName}, parts...), "/")
	if s.prefix != "" {
		k = s.prefix + "/" + k
	}
	return k
}

// walPrefix is the key of a WAL file without compression suffix, and so the prefix under
// which every form of it is listed: segments, .partial and .backup files lie in a
// directory named by the first 16 digits, history files directly under wals/.
func (s *Store) walPrefix(name string) string {
	if strings.HasSuffix(name, ".history") {
		return s.key("wals", name)
	}
	return s.key("wals", name[:16], name)
}

// baseKey is the key of a file of base backup id; with an empty file, the backup's directory.
func (s *Store) baseKey(id, file string) string {
	return s.key("base", id, file)
}

// place names where this server's objects lie: endpoint, bucket, path and server name.
func (s *Store) place() string {
	return cmp.Or(s.Config.Configuration.EndpointURL, "AWS") + " " + s.URL(s.key())
}

// layoutKey takes a key of this server apart: the backup id, or the segment whose name a
// WAL file begins with. Both are "" for history files and for whatever is not of the layout,
// which nothing here ever deletes.
func (s *Store) layoutKey(key string) (id, segment string) {
	rest, ok := strings.CutPrefix(key, s.key(""))
	area, rest, _ := strings.Cut(rest, "/")
	directory, file, _ := strings.Cut(rest, "/")
	switch {
	case !ok:
	case area == "base" && backupIDForm.MatchString(directory) &&
		(file == backupInfoFile || file == keepFile || file == reservedName || file == "backup_label" || dataArchiveForm.MatchString(file)):
		return directory, ""
	case area == "wals":
		base, _ := splitSuffix(file)
		if w, err := parseWALName(base); err == nil && w.Kind != walHistory && base[:16] == directory {
			return "", base[:24]
		}
	}
	return "", ""
}

// archiveName is the name, without suffixes, of the n-th archive of a tree: data, data_0001, ..., or 16384, 16384_0001, ...
func archiveName(tree string, n int) string {
	if n == 0 {
		return tree
	}
	return fmt.Sprintf("%s_%04d", tree, n)
}

// URL is how messages name an object.
func (s *Store) URL(key string) string { return "s3://" + s.bucket + "/" + key }

// ---------------------------------------------------------------------------
// Objects
// ---------------------------------------------------------------------------

// contentSum is the name of the user metadata under which our objects carry the CRC-32C of
// their uncompressed content, in hex: every processor of today computes it faster than it
// reads, and it is there to find damage, not forgery. Barman ignores user metadata.
const contentSum = "content-crc32c"

// object is one entry of a listing.
type object struct {
	Key      string
	Size     int64
	Modified time.Time
}

// List yields the objects under a prefix in the order of their keys, page by page, so
// that memory stays flat at any number of objects, up to the first error.
func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[object, error] {
	return s.list(ctx, &s3.ListObjectsV2Input{Prefix: &prefix})
}

// ListAfter is List from behind a key on. A server that does not know of that lists everything.
func (s *Store) ListAfter(ctx context.Context, prefix, key string) iter.Seq2[object, error] {
	return s.list(ctx, &s3.ListObjectsV2Input{Prefix: &prefix, StartAfter: &key})
}

// listLevel yields what lies directly under a prefix that ends in a slash; of a directory
// only the key, which ends in a slash too.
func (s *Store) listLevel(ctx context.Context, prefix string) iter.Seq2[object, error] {
	return s.list(ctx, &s3.ListObjectsV2Input{Prefix: &prefix, Delimiter: aws.String("/")})
}

func (s *Store) list(ctx context.Context, input *s3.ListObjectsV2Input) iter.Seq2[object, error] {
	return func(yield func(object, error) bool) {
		input.Bucket = &s.bucket
		pages := s3.NewListObjectsV2Paginator(s.client, input, func(o *s3.ListObjectsV2PaginatorOptions) { o.StopOnDuplicateToken = true })
		for pages.HasMorePages() {
			page, err := s.nextPage(ctx, pages, *input.Prefix)
			if err == nil && aws.ToBool(page.IsTruncated) && !pages.HasMorePages() {
				err = fmt.Errorf("list %s: the server says that there is more, and not where it goes on", s.URL(*input.Prefix))
			}
			if err != nil {
				yield(object{}, err)
				return
			}
			for _, p := range page.CommonPrefixes {
				if !yield(object{Key: *p.Prefix}, nil) {
					return
				}
			}
			for _, o := range page.Contents {
				if !yield(object{Key: *o.Key, Size: aws.ToInt64(o.Size), Modified: aws.ToTime(o.LastModified)}, nil) {
					return
				}
			}
		}
	}
}

func (s *Store) nextPage(ctx context.Context, pages *s3.ListObjectsV2Paginator, prefix string) (*s3.ListObjectsV2Output, error) {
	page, err := inTime(ctx, pages.NextPage)
	if err == nil && page.Name == nil && page.IsTruncated == nil {
		err = errNotS3 // the SDK reads anything as an empty listing
	}
	return page, s.wrap("list", prefix, err)
}

// inTime asks for one page of a listing.
func inTime[P any](ctx context.Context, next func(context.Context, ...func(*s3.Options)) (P, error)) (P, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return next(ctx)
}

// ListDirectories returns the names of the directories directly under a prefix that ends in a slash.
func (s *Store) ListDirectories(ctx context.Context, prefix string) (names []string, err error) {
	for o, err := range s.listLevel(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		if name, ok := strings.CutSuffix(strings.TrimPrefix(o.Key, prefix), "/"); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// ServerTime is the clock of the store, as its answers carry it; zero when they do not.
func (s *Store) ServerTime(ctx context.Context) (time.Time, error) {
	prefix := s.key("")
	pages := s3.NewListObjectsV2Paginator(s.client, &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: &prefix, Delimiter: aws.String("/")})
	page, err := s.nextPage(ctx, pages, prefix)
	if err != nil {
		return time.Time{}, err
	}
	t, _ := awsmiddleware.GetServerTime(page.ResultMetadata)
	return t, nil
}

// maxServerNames is how many directories ServerNames looks into.
const maxServerNames = 100

// ServerNames returns the server names that have WAL or backups under the destination
// path, for the message that the configured one has none.
func (s *Store) ServerNames(ctx context.Context) ([]string, error) {
	root := strings.TrimSuffix(s.key(""), s.Config.ServerName+"/")
	directories, err := s.ListDirectories(ctx, root)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, name := range directories[:min(len(directories), maxServerNames)] {
		inside, err := s.ListDirectories(ctx, root+name+"/")
		if err != nil {
			return nil, err
		}
		if slices.Contains(inside, "base") || slices.Contains(inside, "wals") {
			names = append(names, name)
		}
	}
	return names, nil
}

// head is what the store says of one object.
type head struct {
	Size     int64
	Metadata map[string]string // user metadata; the SDK puts its keys in lower case
}

// Head asks for size and user metadata; errNotFound when there is no such object.
func (s *Store) Head(ctx context.Context, key string) (head, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	out, err := s.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &s.bucket, Key: &key})
	if err != nil {
		return head{}, s.wrap("head", key, err)
	}
	return head{Size: aws.ToInt64(out.ContentLength), Metadata: out.Metadata}, nil
}

// CreateBucket makes the bucket in the configured region. That it exists already is no error.
func (s *Store) CreateBucket(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	input := &s3.CreateBucketInput{Bucket: &s.bucket}
	// us-east-1 is the one region that must not be named (S3 API, CreateBucket).
	if region := s.client.Options().Region; region != "us-east-1" {
		input.CreateBucketConfiguration = &s3types.CreateBucketConfiguration{LocationConstraint: s3types.BucketLocationConstraint(region)}
	}
	_, err := s.client.CreateBucket(ctx, input)
	if _, owned := errors.AsType[*s3types.BucketAlreadyOwnedByYou](err); owned {
		return nil
	}
	return s.wrap("create bucket", "", err)
}

// Get opens an object for reading from its beginning. A connection that breaks or
// stalls in the middle is opened again at the offset that was reached (and only if the
// object is still the same), so a reader sees either the whole object or an error.
func (s *Store) Get(ctx context.Context, key string) (*objectReader, error) {
	r := &objectReader{ctx: ctx, store: s, key: key}
	if err := r.open(); err != nil {
		return nil, err
	}
	return r, nil
}

// read returns the user metadata and the content of a small object, of which no more than limit bytes.
func (s *Store) read(ctx context.Context, key string, limit int64) (content []byte, metadata map[string]string, err error) {
	r, err := s.Get(ctx, key)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	content, err = io.ReadAll(io.LimitReader(r, limit))
	return content, r.Metadata, err
}

// objectReader is an open object. It must be closed.
type objectReader struct {
	Size     int64
	Metadata map[string]string

	ctx      context.Context
	store    *Store
	key      string
	etag     *string
	offset   int64
	resumed  bool // the body begins in the middle
	failures int  // since the last byte that came
	broke    time.Time
	patience time.Duration // for how long it is opened again, if that is longer than maxAttempts take
	err      error         // that ended the reading: some decompressors ask again and again
	body     io.ReadCloser
	cancel   context.CancelFunc
	watchdog *time.Timer
}

func (r *objectReader) open() error {
	ctx, cancel := context.WithCancel(r.ctx)
	input := &s3.GetObjectInput{Bucket: &r.store.bucket, Key: &r.key}
	if r.offset > 0 {
		input.Range = aws.String(fmt.Sprintf("bytes=%d-", r.offset))
		input.IfMatch = r.etag
	}
	// The watchdog guards the wait for the reply too; each attempt of the SDK resets nothing,
	// so it allows for all of them.
	watchdog := time.AfterFunc(requestTimeout, cancel)
	out, err := r.store.client.GetObject(ctx, input)
	fired := !watchdog.Stop()
	from := fmt.Sprintf("bytes %d-", r.offset)
	switch {
	case err != nil && fired && r.ctx.Err() == nil:
		err = fmt.Errorf("no reply within %s: %w", requestTimeout, os.ErrDeadlineExceeded)
	case err == nil && r.offset > 0 && !strings.HasPrefix(aws.ToString(out.ContentRange), from):
		out.Body.Close()
		err = fmt.Errorf("the server ignores Range: it answered %q where %s was asked for", aws.ToString(out.ContentRange), from)
	}
	if err != nil {
		cancel()
		return r.store.wrap("get", r.key, err)
	}
	if r.resumed = r.offset > 0; !r.resumed {
		r.Size, r.Metadata, r.etag = aws.ToInt64(out.ContentLength), out.Metadata, out.ETag
	}
	r.body, r.cancel, r.watchdog = out.Body, cancel, watchdog
	return nil
}

func (r *objectReader) Read(p []byte) (n int, err error) {
	for r.err == nil {
		if r.body == nil { // broken before: go on where it stopped
			if err = r.open(); err != nil && !errors.Is(err, errTransient) {
				r.err = err
				break
			}
		}
		if r.body != nil {
			r.watchdog.Reset(bodyStall)
			n, err = r.body.Read(p)
			r.watchdog.Stop()
		}
		switch {
		case n > 0: // what else there is to say comes with the next Read
			r.offset, r.failures = r.offset+int64(n), 0
			return n, nil
		case err == nil, err == io.EOF && r.offset == r.Size:
			return 0, err
		case r.body != nil && !r.resumed && r.Size > 0 && r.offset == r.Size: // all of it came, and the SDK has computed something else
			r.err = fmt.Errorf("%w: %s: %w", errDamaged, r.store.URL(r.key), err)
		default:
			r.err = r.retry(err)
		}
	}
	return 0, r.err
}

// retry waits before the next attempt, or returns the error that ends the reading.
func (r *objectReader) retry(err error) error {
	r.Close()
	if r.failures++; r.failures == 1 {
		r.broke = time.Now()
	}
	if r.failures >= maxAttempts && time.Since(r.broke) >= r.patience || r.ctx.Err() != nil {
		if cause := r.ctx.Err(); cause != nil {
			err = cause
		} else if err == io.EOF {
			err = io.ErrUnexpectedEOF
		} else if errors.Is(err, context.Canceled) { // by the watchdog
			err = fmt.Errorf("no data for %s: %w", bodyStall, os.ErrDeadlineExceeded)
		}
		return r.store.wrap("get", r.key, fmt.Errorf("broke off after %d of %d bytes: %w", r.offset, r.Size, err))
	}
	slog.Warn("Reading an object broke off, resuming", "object", r.store.URL(r.key), "offset", r.offset, "size", r.Size, "error", err)
	return sleep(r.ctx, backoff(r.failures))
}

// Close ends the request, if there is one. It never fails.
func (r *objectReader) Close() error {
	if r.body != nil {
		r.watchdog.Stop()
		r.body.Close()
		r.cancel()
		r.body = nil
	}
	return nil
}

// backoff is the wait before the n-th retry (n from 1): 0.2 s, 0.4 s, ... at most maxBackoff.
func backoff(n int) time.Duration {
	return min(100*time.Millisecond<<min(n, 10), maxBackoff)
}

// storePatience is how long a base backup or a restore, which may be hours old, bears with
// a store that is away, for example while it is restarted: longer than the SDK's attempts.
const storePatience = 10 * time.Minute

// persist calls do again while it fails with errTransient, for as long as patience says.
func persist(ctx context.Context, patience time.Duration, do func() error) error {
	began := time.Now()
	for n := 1; ; n++ {
		err := do()
		if !errors.Is(err, errTransient) || time.Since(began) >= patience || ctx.Err() != nil {
			return err
		}
		slog.Warn("The store does not answer as it should, trying again", "since", began.UTC().Format(time.RFC3339), "limit", patience.String(), "error", err)
		if sleep(ctx, backoff(n)) != nil {
			return err
		}
	}
}

// sleep waits, or returns the context's error.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// chunkSize is the unit in which part buffers grow: a part holds memory for the bytes
// it has, not for the size it might reach.
const chunkSize = 256 << 10

// chunks are the memory of all part buffers. It is mapped by itself: the garbage collector,
// which lets a heap grow by half before it looks at it, neither counts nor keeps it. A chunk
// is used again, since the first touch of fresh memory costs more than to copy into it, and
// when the last one is given back, all are unmapped.
var chunks struct {
	mu    sync.Mutex
	free  [][]byte
	inUse int
}

func takeChunk() (chunk []byte, err error) {
	chunks.mu.Lock()
	defer chunks.mu.Unlock()
	if n := len(chunks.free); n > 0 {
		chunk, chunks.free = chunks.free[n-1], chunks.free[:n-1]
	} else if chunk, err = unix.Mmap(-1, 0, chunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE); err != nil {
		return nil, fmt.Errorf("memory for a buffer: %w", err)
	}
	chunks.inUse++
	return chunk, nil
}

func giveChunks(back [][]byte) {
	chunks.mu.Lock()
	defer chunks.mu.Unlock()
	chunks.free = append(chunks.free, back...)
	if chunks.inUse -= len(back); chunks.inUse == 0 {
		for _, c := range chunks.free {
			unix.Munmap(c) // which cannot fail
		}
		chunks.free = nil
	}
}

// partBuffer collects the bytes of one part or of one small object.
type partBuffer struct {
	mu     sync.RWMutex // a request that was given up may still read while the buffer is freed
	chunks [][]byte
	size   int
	budget *semaphore.Weighted // bytes that several buffers share; nil: there is no limit
}

// write waits until the budget has room.
func (b *partBuffer) write(ctx context.Context, p []byte) error {
	for done := 0; done < len(p); {
		if b.size == len(b.chunks)*chunkSize {
			if b.budget != nil {
				if err := b.budget.Acquire(ctx, chunkSize); err != nil {
					return context.Cause(ctx)
				}
			}
			chunk, err := takeChunk()
			if err != nil {
				if b.budget != nil {
					b.budget.Release(chunkSize)
				}
				return err
			}
			b.chunks = append(b.chunks, chunk)
		}
		n := copy(b.chunks[b.size/chunkSize][b.size%chunkSize:], p[done:])
		b.size += n
		done += n
	}
	return nil
}

func (b *partBuffer) Write(p []byte) (int, error) { return len(p), b.write(context.Background(), p) }

// ReadAt lets a body be sent again from any point, as a retry needs it.
func (b *partBuffer) ReadAt(p []byte, off int64) (int, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	n := 0
	for n < len(p) && int(off) < b.size {
		chunk := b.chunks[off/chunkSize][:min(chunkSize, b.size-int(off)/chunkSize*chunkSize)]
		c := copy(p[n:], chunk[off%chunkSize:])
		n += c
		off += int64(c)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (b *partBuffer) free() {
	b.mu.Lock()
	defer b.mu.Unlock()
	giveChunks(b.chunks)
	if b.budget != nil {
		b.budget.Release(int64(len(b.chunks)) * chunkSize)
	}
	b.chunks, b.size = nil, 0
}

// putOptions say how an object is written.
type putOptions struct {
	Metadata map[string]string // read when the upload begins: in Close, or with the second part
	IfAbsent bool              // refuse with errPrecondition if the key exists, where the server can tell
	Data     bool              // base backup rather than WAL: chooses encryption and arguments
	History  bool              // timeline history file: chooses the tags
	PartSize int               // bytes; an object of at most this size is sent in one request
	Parts    int               // parts in memory at once, each of which is being filled or on its way
	Body     hash.Hash32       // CRC-32C of the body, where it is known: for servers that check it
	Patience time.Duration     // for how long each request is repeated while the store is away
	Limiter  *rate.Limiter
	Memory   *semaphore.Weighted // bytes that all writers with this budget share; nil: no limit but the parts
}

// minPartSize is the smallest part that S3 accepts, except for the last one.
const minPartSize = 5 << 20

// maxParts is the largest number of parts of one object (S3 limits).
const maxParts = 10_000

// Put stores a small object in one request.
func (s *Store) Put(ctx context.Context, key string, content []byte, o putOptions) error {
	return s.put(ctx, key, bytes.NewReader(content), o)
}

// put stores an object, which body has from its beginning on, in one request. A server that gets
// no checksum and tells one all the same has computed it: from then on it gets one with each
// request, so that it finds what changed on the way, and has less to do.
func (s *Store) put(ctx context.Context, key string, body io.ReadSeeker, o putOptions) error {
	input := &s3.PutObjectInput{Bucket: &s.bucket, Key: &key, Metadata: o.Metadata}
	input.ServerSideEncryption, input.SSEKMSKeyId, input.Tagging = s.encryptionAndTags(o)
	sum, offered := o.Body, !s.sendsChecksums() && s.tellsChecksums.Load() && s.checksumsRefused.Load() < maxRefusals
	if sum == nil && offered {
		sum = crc32.New(castagnoli)
		if _, err := io.Copy(sum, body); err != nil {
			return err
		}
	}
	if sum != nil && (offered || s.sendsChecksums()) {
		input.ChecksumCRC32C = aws.String(base64.StdEncoding.EncodeToString(sum.Sum(nil)))
	}
	once := func() error {
		if _, err := body.Seek(0, io.SeekStart); err != nil {
			return err
		}
		input.Body = body
		out, err := s.client.PutObject(ctx, input)
		if err == nil && out.ETag == nil {
			err = errNotS3
		}
		if err == nil && input.ChecksumCRC32C == nil && cmp.Or(out.ChecksumCRC64NVME, out.ChecksumCRC32, out.ChecksumCRC32C) != nil {
			s.tellsChecksums.Store(true)
		}
		return s.wrap("put", key, err)
	}
	return s.conditionally(o.IfAbsent, func(condition *string) error {
		input.IfNoneMatch = condition
		err := once()
		switch {
		case !offered || input.ChecksumCRC32C == nil || errors.Is(err, errPrecondition):
			return err
		case err == nil:
			s.checksumsRefused.Store(0)
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errTransient): // it may be meant for the checksum all the same, if it goes on like that
			s.checksumsRefused.Add(1)
			return err
		}
		input.ChecksumCRC32C = nil
		if err = once(); err == nil || errors.Is(err, errPrecondition) {
			s.checksumsRefused.Store(maxRefusals)
		}
		return err
	})
}

// sendsChecksums says whether the server gets a checksum with what is sent: AWS does, others if they are told so.
func (s *Store) sendsChecksums() bool {
	return s.client.Options().RequestChecksumCalculation == aws.RequestChecksumCalculationWhenSupported
}

// NewWriter starts writing an object. The writer must be ended by Close, after which
// the object is durable, or by Abort, after which nothing of it remains.
func (s *Store) NewWriter(ctx context.Context, key string, o putOptions) *objectWriter {
	o.PartSize = max(o.PartSize, minPartSize)
	o.Parts = max(o.Parts, 1)
	ctx, cancel := context.WithCancelCause(ctx)
	return &objectWriter{ctx: ctx, cancel: cancel, store: s, key: key, o: o, slots: semaphore.NewWeighted(int64(o.Parts)), part: &partBuffer{budget: o.Memory}}
}

// objectWriter sends an object part by part while it is being written, or in one
// request when it is small. Not safe for concurrent use.
type objectWriter struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	store  *Store
	key    string
	o      putOptions
	size   atomic.Int64 // bytes written

	part     *partBuffer
	uploadID *string
	slots    *semaphore.Weighted // one for each part in memory
	workers  sync.WaitGroup
	mu       sync.Mutex
	parts    []s3types.CompletedPart
}

func (w *objectWriter) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		// A part is sent only when more bytes come, so that an object of exactly one
		// part still goes in one request.
		err := context.Cause(w.ctx)
		if err == nil && w.part.size == w.o.PartSize {
			err = w.flush()
		}
		if err == nil && w.part.size == 0 && w.slots.Acquire(w.ctx, 1) != nil {
			err = context.Cause(w.ctx)
		}
		n := min(len(p)-done, w.o.PartSize-w.part.size)
		if err == nil {
			err = w.part.write(w.ctx, p[done:done+n])
		}
		if err != nil {
			w.cancel(err) // lest a Close in spite of it store half of the object
			return done, err
		}
		done += n
		w.size.Add(int64(n))
	}
	return len(p), nil
}

// flush hands the current part to a worker.
func (w *objectWriter) flush() error {
	// The SDK sends checksums with the parts by itself, but S3 takes them only of the kind
	// that the upload was begun with.
	var checksum s3types.ChecksumAlgorithm
	if w.store.sendsChecksums() {
		checksum = s3types.ChecksumAlgorithmCrc32c
	}
	if w.uploadID == nil {
		input := &s3.CreateMultipartUploadInput{Bucket: &w.store.bucket, Key: &w.key, Metadata: w.o.Metadata, ChecksumAlgorithm: checksum}
		input.ServerSideEncryption, input.SSEKMSKeyId, input.Tagging = w.store.encryptionAndTags(w.o)
		err := persist(w.ctx, w.o.Patience, func() error {
			// Not ended by the writer's context: a request that was cancelled while the server
			// worked on it would leave an upload whose id nobody knows.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), requestTimeout)
			defer cancel()
			defer context.AfterFunc(w.ctx, func() { time.AfterFunc(cleanupTimeout, cancel) })()
			out, err := w.store.client.CreateMultipartUpload(ctx, input)
			if err == nil && aws.ToString(out.UploadId) == "" {
				err = errNotS3
			}
			if err == nil {
				w.uploadID = out.UploadId
			}
			return w.store.wrap("create multipart upload", w.key, err)
		})
		if err != nil {
			return err
		}
	}
	number := int32(len(w.parts) + 1)
	if number > maxParts {
		return fmt.Errorf("put %s: more than %d parts of %d bytes", w.store.URL(w.key), maxParts, w.o.PartSize)
	}
	w.mu.Lock()
	w.parts = append(w.parts, s3types.CompletedPart{})
	w.mu.Unlock()
	part := w.part
	w.part = &partBuffer{budget: w.o.Memory}
	w.workers.Go(func() {
		defer w.slots.Release(1)
		defer part.free()
		if err := w.throttle(part.size); err != nil {
			w.cancel(err)
			return
		}
		var out *s3.UploadPartOutput
		err := persist(w.ctx, w.o.Patience, func() (err error) {
			out, err = w.store.client.UploadPart(w.ctx, &s3.UploadPartInput{Bucket: &w.store.bucket, Key: &w.key, UploadId: w.uploadID,
				PartNumber: &number, Body: io.NewSectionReader(part, 0, int64(part.size)), ChecksumAlgorithm: checksum})
			return w.store.wrap(fmt.Sprintf("upload part %d of", number), w.key, err)
		})
		if err != nil {
			w.cancel(err)
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.parts[number-1] = s3types.CompletedPart{PartNumber: &number, ETag: out.ETag}
		if checksum != "" { // a server may compute some that it was not asked for, and does not want back
			w.parts[number-1].ChecksumCRC32C = out.ChecksumCRC32C
		}
	})
	return nil
}

// throttle waits until the bandwidth limit admits n more bytes.
func (w *objectWriter) throttle(n int) error {
	for l := w.o.Limiter; l != nil && n > 0; {
		step := min(n, l.Burst())
		if err := l.WaitN(w.ctx, step); err != nil {
			return err
		}
		n -= step
	}
	return nil
}

// Close sends what is left. Success means that the server has acknowledged the whole
// object; after any error nothing of it is left behind. errPrecondition means that
// IfAbsent was asked for and the key exists.
func (w *objectWriter) Close() (err error) {
	defer func() {
		if err != nil {
			w.Abort()
		}
		w.cancel(nil)
	}()
	if err := context.Cause(w.ctx); err != nil {
		return err
	}
	if w.uploadID == nil {
		defer w.part.free()
		if err := w.throttle(w.part.size); err != nil {
			return err
		}
		return persist(w.ctx, w.o.Patience, func() error {
			return w.store.put(w.ctx, w.key, io.NewSectionReader(w.part, 0, int64(w.part.size)), w.o)
		})
	}
	if w.part.size > 0 {
		if err := w.flush(); err != nil {
			return err
		}
	}
	w.workers.Wait()
	if err := context.Cause(w.ctx); err != nil {
		return err
	}
	err = persist(w.ctx, w.o.Patience, func() error {
		err := w.store.conditionally(w.o.IfAbsent, func(condition *string) error {
			out, err := w.store.client.CompleteMultipartUpload(w.ctx, &s3.CompleteMultipartUploadInput{Bucket: &w.store.bucket, Key: &w.key,
				UploadId: w.uploadID, IfNoneMatch: condition, MultipartUpload: &s3types.CompletedMultipartUpload{Parts: w.parts}})
			if err == nil && out.ETag == nil {
				err = errNotS3
			}
			return w.store.wrap("complete multipart upload of", w.key, err)
		})
		if errors.Is(err, errNotFound) {
			// "No such upload" after a lost reply: an attempt of ours may have completed it.
			switch h, headErr := w.store.Head(w.ctx, w.key); {
			case errors.Is(headErr, errTransient):
				return headErr
			case headErr == nil && h.Size == w.size.Load() && h.Metadata[contentSum] == w.o.Metadata[contentSum]:
				return nil
			}
		}
		return err
	})
	if err == nil {
		w.uploadID = nil
	}
	return err
}

// maxRefusals is how often a server may refuse If-None-Match until it is not asked any more:
// one answer may be that of a proxy in a bad moment.
const maxRefusals = 3

// conditionally sends a request with If-None-Match where that was asked for, and without
// it to a server that does not have it.
func (s *Store) conditionally(ifAbsent bool, send func(condition *string) error) error {
	if refused := &s.conditionsRefused; ifAbsent && refused.Load() < maxRefusals {
		if err := send(aws.String("*")); !errors.Is(err, errUnsupported) {
			refused.Store(0)
			return err
		}
		refused.Add(1)
	}
	return send(nil)
}

// Abort ends the upload and removes its parts from the server, also when the context of
// the writer is over. It does nothing after Close.
func (w *objectWriter) Abort() {
	w.cancel(context.Canceled)
	w.workers.Wait()
	w.part.free()
	if w.uploadID == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.ctx), cleanupTimeout)
	defer cancel()
	if err := w.store.AbortUpload(ctx, upload{key: w.key, id: *w.uploadID}); err != nil {
		slog.Warn("An unfinished upload stays in the bucket, where its parts take space until it is aborted",
			"object", w.store.URL(w.key), "uploadID", *w.uploadID, "error", err)
	}
	w.uploadID = nil
}

// Delete removes an object. That there is none is no error.
func (s *Store) Delete(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err := s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.bucket, Key: &key})
	if err = s.wrap("delete", key, err); errors.Is(err, errNotFound) {
		return nil
	}
	return err
}

// deleteBatch is the largest number of objects that DeleteObjects takes (S3 API).
const deleteBatch = 1000

// DeleteAll removes objects, up to deleteBatch in one request. What the server refuses to
// delete for reasons of the object (rights, an object lock) is returned by key; an error
// means that some may still be there. That there is no such object counts as deleted.
func (s *Store) DeleteAll(ctx context.Context, keys []string) (refused map[string]error, err error) {
	refused = map[string]error{}
	for batch := range slices.Chunk(keys, deleteBatch) {
		if !s.noBatchDelete.Load() {
			if err := s.deleteBatch(ctx, batch, refused); !s.noBatchDelete.Load() {
				if err != nil {
					return refused, err
				}
				continue
			}
		}
		for _, key := range batch {
			switch err := s.Delete(ctx, key); {
			case errors.Is(err, errDenied):
				refused[key] = err
			case err != nil:
				return refused, err
			}
		}
	}
	return refused, nil
}

func (s *Store) deleteBatch(ctx context.Context, keys []string, refused map[string]error) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	input := &s3.DeleteObjectsInput{Bucket: &s.bucket, Delete: &s3types.Delete{Quiet: aws.Bool(true)}}
	for _, key := range keys {
		input.Delete.Objects = append(input.Delete.Objects, s3types.ObjectIdentifier{Key: aws.String(key)})
	}
	out, err := s.client.DeleteObjects(ctx, input, withContentMD5)
	if err != nil {
		var api smithy.APIError
		if err = s.wrap("delete objects", keys[0], err); errors.Is(err, errUnsupported) || errors.As(err, &api) &&
			slices.Contains([]string{"NotImplemented", "MethodNotAllowed", "MissingContentMD5", "MalformedXML", "InvalidRequest"}, api.ErrorCode()) {
			s.noBatchDelete.Store(true)
		}
		return err
	}
	for _, e := range out.Errors {
		if code := aws.ToString(e.Code); code != "NoSuchKey" {
			key := aws.ToString(e.Key)
			refused[key] = fmt.Errorf("delete %s: %s: %s", s.URL(key), code, aws.ToString(e.Message))
		}
	}
	return nil
}

// withContentMD5 sends Content-MD5, which every server takes for DeleteObjects, in place of
// the CRC that the SDK sends and older servers do not know (as the SDK's documentation
// advises under "Data Integrity Protection").
func withContentMD5(o *s3.Options) {
	o.APIOptions = append(o.APIOptions, func(stack *middleware.Stack) error {
		stack.Initialize.Remove("AWSChecksum:SetupInputContext")
		stack.Build.Remove("AWSChecksum:RequestMetricsTracking")
		stack.Finalize.Remove("AWSChecksum:ComputeInputPayloadChecksum")
		stack.Finalize.Remove("addInputChecksumTrailer")
		return smithyhttp.AddContentChecksumMiddleware(stack)
	})
}

// upload is a multipart upload that was neither completed nor aborted.
type upload struct {
	key, id string
	active  time.Time // when it began, or its last part was stored
}

// Uploads lists the unfinished multipart uploads under a prefix.
func (s *Store) Uploads(ctx context.Context, prefix string) ([]upload, error) {
	var uploads []upload
	pages := s3.NewListMultipartUploadsPaginator(s.client, &s3.ListMultipartUploadsInput{Bucket: &s.bucket, Prefix: &prefix})
	for pages.HasMorePages() {
		page, err := inTime(ctx, pages.NextPage)
		if err != nil {
			return nil, s.wrap("list multipart uploads of", prefix, err)
		}
		for _, u := range page.Uploads {
			// A server may take the prefix for a key (MinIO), or ignore it.
			if strings.HasPrefix(aws.ToString(u.Key), prefix) {
				uploads = append(uploads, upload{*u.Key, aws.ToString(u.UploadId), aws.ToTime(u.Initiated)})
			}
		}
	}
	for i := range uploads {
		u := &uploads[i]
		parts := s3.NewListPartsPaginator(s.client, &s3.ListPartsInput{Bucket: &s.bucket, Key: &u.key, UploadId: &u.id})
		for parts.HasMorePages() {
			page, err := inTime(ctx, parts.NextPage)
			if err = s.wrap("list the parts of", u.key, err); errors.Is(err, errNotFound) {
				break // ended since
			} else if err != nil {
				return nil, err
			}
			for _, p := range page.Parts {
				if t := aws.ToTime(p.LastModified); t.After(u.active) {
					u.active = t
				}
			}
		}
	}
	return uploads, nil
}

// AbortUpload removes an unfinished upload and its parts. That there is none is no error.
func (s *Store) AbortUpload(ctx context.Context, u upload) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	_, err := s.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &s.bucket, Key: &u.key, UploadId: &u.id})
	if err = s.wrap("abort multipart upload of", u.key, err); errors.Is(err, errNotFound) {
		return nil
	}
	return err
}

// encryptionAndTags returns the server-side encryption that an object is to have, the key of KMS,
// and its x-amz-tagging header. The history tags replace the others on history files.
func (s *Store) encryptionAndTags(o putOptions) (encryption s3types.ServerSideEncryption, kmsKey, tags *string) {
	args := &s.walArchive
	if o.Data {
		args = &s.data
	}
	if args.KMSKeyID != "" {
		kmsKey = &args.KMSKeyID
	}
	set := args.Tags
	if o.History && len(args.HistoryTags) > 0 {
		set = args.HistoryTags
	}
	if len(set) > 0 {
		values := url.Values{}
		for k, v := range set {
			values.Set(k, v)
		}
		tags = aws.String(values.Encode())
	}
	return s3types.ServerSideEncryption(args.Encryption), kmsKey, tags
}

// describe says how the store is reached.
func (s *Store) describe() string {
	o := s.client.Options()
	return fmt.Sprintf("%s at %s, region %s, %s addressing", s.URL(s.key()), cmp.Or(s.Config.Configuration.EndpointURL, "AWS"), o.Region,
		map[bool]string{true: "path-style", false: "virtual-host"}[o.UsePathStyle])
}

// maxSkew is how far our clock may be from the server's: S3 refuses requests beyond 15 minutes.
const maxSkew = time.Minute

// checkStore tries with small objects whatever the plugin asks of a store, and tells of each
// thing whether it works. It leaves nothing behind. Without access it stops at once.
func checkStore(ctx context.Context, s *Store, tell func(what, note string, err error)) {
	tellOf := func(what, permission string, err error) {
		if errors.Is(err, errDenied) {
			err = fmt.Errorf("%w; needed is %s", err, permission)
		}
		tell(what, "", err)
	}
	server, err := s.ServerTime(ctx)
	if err != nil {
		// The other addressing style may be the one that the server knows.
		other := &Store{Config: s.Config, bucket: s.bucket, prefix: s.prefix,
			client: s3.New(s.client.Options(), func(o *s3.Options) { o.UsePathStyle, o.RetryMaxAttempts = !o.UsePathStyle, 1 })}
		if _, otherErr := other.ServerTime(ctx); otherErr == nil {
			style := map[bool]string{true: "virtual", false: "path"}[s.client.Options().UsePathStyle]
			err = fmt.Errorf("%w; it works with the other addressing style: add --addressing-style=%s to wal.archiveAdditionalCommandArgs", err, style)
		}
	}
	tellOf("access, list", "s3:ListBucket", err)
	if err != nil {
		return
	}
	skew := time.Since(server).Round(time.Second)
	if server.IsZero() {
		tell("clock", "the server does not tell its time", nil)
	} else if skew.Abs() > maxSkew {
		tell("clock", "", fmt.Errorf("this clock differs by %s from the server's: synchronise it (NTP); S3 refuses requests beyond 15 minutes", skew))
	} else {
		tell("clock", "differs by "+skew.String(), nil)
	}

	key := s.key("check-" + strconv.FormatInt(time.Now().UnixNano(), 36))
	small, large := key, key+"-parts"
	defer func() { // whatever happened, also when ctx has ended
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		refused, err := s.DeleteAll(ctx, []string{small, large})
		if err = errors.Join(append(slices.Collect(maps.Values(refused)), err)...); err == nil {
			for _, k := range []string{small, large} {
				if _, headErr := s.Head(ctx, k); !errors.Is(headErr, errNotFound) {
					err = errors.Join(err, fmt.Errorf("%s is still there after its deletion: %w", s.URL(k), cmp.Or(headErr, errors.New("is there an object lock?"))))
				}
			}
		}
		tellOf("delete", "s3:DeleteObject", err)
	}()
	content := []byte(key)
	err = s.Put(ctx, small, content, putOptions{Metadata: map[string]string{contentSum: sumOf(content)}})
	tellOf("write", "s3:PutObject, with tags s3:PutObjectTagging, with aws:kms the use of the key", err)
	if err != nil {
		return
	}
	got, metadata, err := s.read(ctx, small, 2*int64(len(content)))
	switch {
	case err != nil:
	case !bytes.Equal(got, content):
		err = fmt.Errorf("%s reads as other content than was written: what stands between here and the store changes it", s.URL(small))
	case metadata[contentSum] != sumOf(content):
		err = fmt.Errorf("%s has lost its user metadata: what stands between here and the store drops x-amz-meta-* headers", s.URL(small))
	}
	tellOf("read", "s3:GetObject", err)
	err = s.Put(ctx, small, content, putOptions{IfAbsent: true})
	note := ""
	if err == nil {
		note = "this server overwrites in spite of If-None-Match: two writers that archive the same name at the same moment are not told apart"
	} else if errors.Is(err, errPrecondition) {
		err = nil
	}
	tell("conditional write", note, err)
	w := s.NewWriter(ctx, large, putOptions{Data: true})
	if _, err = w.Write(make([]byte, minPartSize+1)); err != nil {
		w.Abort()
	} else if err = w.Close(); err == nil {
		var h head
		if h, err = s.Head(ctx, large); err == nil && h.Size != minPartSize+1 {
			err = fmt.Errorf("%s has %d bytes instead of %d", s.URL(large), h.Size, minPartSize+1)
		}
	}
	tellOf("multipart upload", "s3:PutObject and s3:AbortMultipartUpload", err)
	_, err = s.Uploads(ctx, key)
	tellOf("list uploads", "s3:ListBucketMultipartUploads", err)
}

// sumOf is the checksum of content under contentSum.
func sumOf(content []byte) string {
	return fmt.Sprintf("%08x", crc32.Checksum(content, castagnoli))
}

// hexSum is a checksum of what has passed as it stands under contentSum.
func hexSum(sum hash.Hash32) string { return fmt.Sprintf("%08x", sum.Sum32()) }

// ---------------------------------------------------------------------------
// Compression codecs
// ---------------------------------------------------------------------------

// codec is one compression format. Readers choose it by the suffix of the object's
// name, never by the configuration, which may have changed since.
type codec struct {
	name, suffix string
	newWriter    func(w io.Writer, level int) (io.WriteCloser, error)
	newReader    func(r io.Reader) (io.Reader, error) // without goroutines: it needs no Close
	// levels are what Barman's --compression-level words, low, medium and high, mean here: not
	// its numbers, since other implementations stand behind them, but much the same sizes. On
	// the WAL of pgbench, medium is within 7 % of the size that Barman's default reaches.
	levels [3]int
	alone  bool // no two writers at once: one has tables of tens of MiB, or two cores
}

// What bounds the memory of the codecs: window and dictionary of what we write, and of
// what we are ready to read (zstd at its highest level asks for 128 MiB).
const (
	zstdWindow    = 512 << 10
	zstdMaxWindow = 128 << 20
	xzDictionary  = 1 << 20
)

// codecs are all formats, "none" first. WAL may have any of them, base backups those
// that crd.yaml admits.
var codecs = []*codec{
	{name: "", suffix: "",
		newWriter: func(w io.Writer, _ int) (io.WriteCloser, error) { return nopWriteCloser{w}, nil },
		newReader: func(r io.Reader) (io.Reader, error) { return r, nil }},
	{name: "gzip", suffix: ".gz", levels: [3]int{1, 5, 9}, alone: true,
		// One member, whose blocks are compressed in parallel: Barman cannot read several (FORMAT section 4).
		newWriter: func(w io.Writer, level int) (io.WriteCloser, error) {
			z, err := pgzip.NewWriterLevel(w, level)
			if err == nil {
				err = z.SetConcurrency(chunkSize/2, 2)
			}
			return gzipWriter{z}, err
		},
		newReader: func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	{name: "bzip2", suffix: ".bz2", levels: [3]int{1, 5, 9}, alone: true,
		newWriter: func(w io.Writer, level int) (io.WriteCloser, error) {
			return bzip2w.NewWriter(w, &bzip2w.WriterConfig{Level: level})
		},
		newReader: func(r io.Reader) (io.Reader, error) { return bzip2.NewReader(r), nil }},
	{name: "lz4", suffix: ".lz4", levels: [3]int{0, 0, 9},
		newWriter: func(w io.Writer, level int) (io.WriteCloser, error) {
			if level < 0 || level > 9 {
				return nil, errors.New("must be 0 to 9")
			}
			compression := lz4.Fast
			if level > 0 {
				compression = lz4.CompressionLevel(1 << (8 + level)) // lz4.Level1 to lz4.Level9
			}
			z := lz4.NewWriter(w)
			return z, z.Apply(lz4.CompressionLevelOption(compression), lz4.BlockSizeOption(lz4.Block256Kb), lz4.ConcurrencyOption(1))
		},
		newReader: func(r io.Reader) (io.Reader, error) { return lz4.NewReader(r), nil }},
	{name: "snappy", suffix: ".snappy", // the framing format; it has no levels
		newWriter: func(w io.Writer, _ int) (io.WriteCloser, error) {
			return s2.NewWriter(w, s2.WriterSnappyCompat(), s2.WriterConcurrency(1)), nil
		},
		newReader: func(r io.Reader) (io.Reader, error) { return s2.NewReader(r, s2.ReaderMaxBlockSize(64<<10)), nil }},
	{name: "xz", suffix: ".xz", levels: [3]int{1, 1, 1}, alone: true, // the library has one level
		newWriter: func(w io.Writer, _ int) (io.WriteCloser, error) {
			return xz.WriterConfig{DictCap: xzDictionary}.NewWriter(w)
		},
		newReader: func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) }},
	{name: "zstd", suffix: ".zst", levels: [3]int{1, 4, 19},
		newWriter: newZstdWriter,
		newReader: func(r io.Reader) (io.Reader, error) {
			return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdMaxWindow))
		}},
}

// fullReader fills what it is given, up to the end: what it comes from has small pieces, such
// as the records of TLS, and each costs whoever takes it.
type fullReader struct{ io.Reader }

func (r fullReader) Read(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var more int
		more, err = r.Reader.Read(b[n:])
		n += more
	}
	return n, err
}

// zstdWriter gives its encoder, whose tables are expensive to make, back to the pool.
type zstdWriter struct {
	*zstd.Encoder
	pool *sync.Pool
}

var zstdEncoders [zstd.SpeedBestCompression + 1]sync.Pool

func newZstdWriter(w io.Writer, level int) (io.WriteCloser, error) {
	if level < 1 || level > 22 {
		return nil, errors.New("must be 1 to 22")
	}
	speed := zstd.EncoderLevelFromZstd(level)
	pool := &zstdEncoders[speed]
	if z, ok := pool.Get().(*zstd.Encoder); ok {
		z.Reset(w)
		return &zstdWriter{z, pool}, nil
	}
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(speed), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(zstdWindow))
	if err != nil {
		return nil, err
	}
	return &zstdWriter{z, pool}, nil
}

// Close ends the frame. From then on the encoder is another writer's: nothing here must touch it.
func (z *zstdWriter) Close() error {
	if z.Encoder == nil {
		return nil
	}
	err := z.Encoder.Close()
	z.Encoder.Reset(nil)
	z.pool.Put(z.Encoder)
	z.Encoder = nil
	return err
}

// gzipWriter ends the goroutines of its writer also when it fails.
type gzipWriter struct{ *pgzip.Writer }

func (z gzipWriter) Close() error {
	err := z.Writer.Close()
	if err != nil {
		z.Writer.Reset(io.Discard)
	}
	return err
}

type nopWriteCloser struct{ io.Writer }

func (nopWriteCloser) Close() error { return nil }

// codecByName finds a codec by its name in the configuration.
func codecByName(name string) (*codec, error) {
	for _, c := range codecs {
		if c.name == name {
			return c, nil
		}
	}
	return nil, fmt.Errorf("compression %q is not known", name)
}

// splitSuffix takes a known compression suffix off a file name.
func splitSuffix(name string) (string, *codec) {
	for _, c := range codecs[1:] {
		if base, ok := strings.CutSuffix(name, c.suffix); ok {
			return base, c
		}
	}
	return name, codecs[0]
}

// compress opens a writer at a level given in Barman's words: low, medium (the default), high, or a number.
func (c *codec) compress(w io.Writer, level string) (io.WriteCloser, error) {
	level = cmp.Or(level, "medium")
	n, err := strconv.Atoi(level)
	if i := slices.Index([]string{"low", "medium", "high"}, level); i >= 0 {
		n = c.levels[i]
	} else if err != nil {
		return nil, fmt.Errorf("--compression-level %q is not low, medium, high or a number", level)
	}
	z, err := c.newWriter(w, n)
	if err != nil {
		return nil, fmt.Errorf("--compression-level %s for %s: %w", level, cmp.Or(c.name, "none"), err)
	}
	return z, nil
}

// ---------------------------------------------------------------------------
// backup.info
// ---------------------------------------------------------------------------

// The states of a backup that reach the bucket.
const (
	statusDone   = "DONE"
	statusFailed = "FAILED"
)

const backupInfoFile = "backup.info"

// keepFile is the annotation of barman-cloud-backup-keep: full or standalone.
const keepFile = "annotations/keep"

// BackupInfo is one backup.info. Lines that are not known here are passed over; only new files are written.
type BackupInfo struct {
	ID string // the directory under base/; not in the file

	BackupLabel    string
	BackupName     string
	BeginOffset    int64
	BeginTime      time.Time
	BeginWAL       string
	BeginLSN       string // %X/%X
	ConfigFile     string
	CopyStats      string // a Python literal
	EndOffset      int64
	EndTime        time.Time
	EndWAL         string
	EndLSN         string
	Error          string
	HBAFile        string
	IdentFile      string
	IncludedFiles  []string
	PGData         string
	ServerName     string // "cloud" for every backup in an object store
	Status         string
	SystemID       string
	Tablespaces    []Tablespace
	Timeline       int
	Version        int   // server_version_num
	WALSegmentSize int64 // bytes

	// WALInBackup are segments that lie in pg_wal/ of the data archive since the WAL
	// archive did not have them. It travels in the user metadata of the object.
	WALInBackup []string
	// BadPages are pages with a wrong checksum that the backup holds, as FILE:BLOCK. They
	// travel in the same way, as far as there is room; BadPageCount is how many there are.
	BadPages     []string
	BadPageCount int

	// Keep is what its annotation says: full, standalone (without the WAL that follows), or "".
	Keep string

	// barmanOnly are the lines of newer Barmans that say what we can neither restore nor delete: a chain of
	// incremental backups, or disk snapshots.
	barmanOnly map[string]string

	// Of a backup that was just taken: read from PostgreSQL's files, stored, and where.
	bytes, storedBytes int64
	place              string
}

// Tablespace is a tablespace outside the data directory's base/ and global/.
type Tablespace struct {
	Name     string
	OID      uint32
	Location string
}

// Done says whether the backup may be restored from.
func (b *BackupInfo) Done() bool {
	return b.Status == statusDone && !b.BeginTime.IsZero() && !b.EndTime.IsZero()
}

// walInBackup is the name of the user metadata that carries BackupInfo.WALInBackup.
const walInBackup = "wal-in-backup"

// badPages is the name of the user metadata that carries the bad pages: their count and,
// separated by spaces, as many of their names as fit into maxBadPagesText bytes (S3 takes
// 2 KB of user metadata in all).
const (
	badPages        = "bad-pages"
	maxBadPagesText = 1500
)

// fields ties each line of the file to a field, or to nil where there is nothing to say. The
// set is that of Barman 3.4, since a Barman refuses fields that it does not know (FORMAT section 3).
func (b *BackupInfo) fields() map[string]any {
	return map[string]any{
		"backup_label": (*pythonString)(&b.BackupLabel), "backup_name": &b.BackupName, "begin_offset": &b.BeginOffset,
		"begin_time": &b.BeginTime, "begin_wal": &b.BeginWAL, "begin_xlog": &b.BeginLSN, "compression": nil,
		"config_file": &b.ConfigFile, "copy_stats": &b.CopyStats, "deduplicated_size": nil, "end_offset": &b.EndOffset,
		"end_time": &b.EndTime, "end_wal": &b.EndWAL, "end_xlog": &b.EndLSN, "error": &b.Error, "hba_file": &b.HBAFile,
		"ident_file": &b.IdentFile, "included_files": &b.IncludedFiles, "mode": nil, "pgdata": &b.PGData,
		"server_name": &b.ServerName, "size": nil, "status": &b.Status, "systemid": &b.SystemID,
		"tablespaces": &b.Tablespaces, "timeline": &b.Timeline, "version": &b.Version, "xlog_segment_size": &b.WALSegmentSize,
	}
}

// pythonString is a line that holds a string as Python's repr writes it, unlike other text.
type pythonString string

// formatField and parseField are mirror images; "" is written as None, and None is not parsed.
func formatField(field any) string {
	var items []string
	switch f := field.(type) {
	case *string:
		return strings.NewReplacer("\n", " ", "\r", " ").Replace(*f) // no more than its line
	case *int:
		return strconv.Itoa(*f)
	case *int64:
		return strconv.FormatInt(*f, 10)
	case *time.Time:
		if !f.IsZero() {
			return f.UTC().Format("2006-01-02 15:04:05.000000-07:00")
		}
	case *pythonString:
		if *f != "" {
			return pythonRepr(string(*f))
		}
	case *[]string:
		for _, s := range *f {
			items = append(items, pythonRepr(s))
		}
	case *[]Tablespace:
		for _, t := range *f {
			items = append(items, fmt.Sprintf("(%s, %d, %s)", pythonRepr(t.Name), t.OID, pythonRepr(t.Location)))
		}
	}
	if items == nil {
		return ""
	}
	return "[" + strings.Join(items, ", ") + "]"
}

func parseField(field any, v string) (err error) {
	switch f := field.(type) {
	case nil:
	case *string:
		*f = v
	case *int:
		*f, err = strconv.Atoi(v)
	case *int64:
		*f, err = strconv.ParseInt(v, 10, 64)
	case *time.Time:
		*f, err = parsePythonTime(v)
	default:
		err = parsePython(v, field)
	}
	return err
}

// parsePythonTime reads what Barman of any age writes. A time without zone is taken as UTC.
func parsePythonTime(v string) (time.Time, error) {
	if t, err := time.Parse(time.ANSIC, v); err == nil {
		return t, nil
	}
	return parseTargetTime(v)
}

// marshal writes the file: one key=value line each, keys in alphabetical order.
func (b *BackupInfo) marshal() []byte {
	var out bytes.Buffer
	fields := b.fields()
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		value := formatField(fields[key])
		if value == "" && key == "backup_name" {
			continue // Barman leaves this line out, and only this one
		}
		fmt.Fprintf(&out, "%s=%s\n", key, cmp.Or(value, "None"))
	}
	return out.Bytes()
}

// parseBackupInfo reads the file of backup id. Fields that are missing keep their zero
// value; the segment size defaults to 16 MiB, as with Barman.
func parseBackupInfo(id string, content []byte) (*BackupInfo, error) {
	b := &BackupInfo{ID: id, WALSegmentSize: 16 << 20}
	fields, empty := b.fields(), true
	for n, line := range strings.Split(string(content), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, ";") || strings.HasPrefix(line, "#") {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("line %d is not key=value: %.60q", n+1, line)
		}
		empty = false
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if value == "None" {
			continue
		}
		if key == "parent_backup_id" || key == "children_backup_ids" || key == "snapshots_info" {
			if b.barmanOnly == nil {
				b.barmanOnly = map[string]string{}
			}
			b.barmanOnly[key] = value
		}
		if err := parseField(fields[key], value); err != nil {
			return nil, fmt.Errorf("%s=%.60s: %w", key, value, err)
		}
	}
	if empty {
		return nil, errors.New("it is empty")
	}
	return b, nil
}

// pythonRepr writes a string as Python's repr does: single quotes unless it holds one and no
// double quote. Python knows all escapes that Go writes.
func pythonRepr(s string) string {
	quoted := strconv.Quote(s)
	if strings.Contains(s, "'") && !strings.Contains(s, `"`) {
		return quoted
	}
	return "'" + strings.NewReplacer(`\"`, `"`, `'`, `\'`).Replace(quoted[1:len(quoted)-1]) + "'"
}

// pythonToken is what Python writes otherwise than JSON: strings, None, tuples, and a comma before an end.
var pythonToken = regexp.MustCompile(`'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|[()]|,\s*[)\]]`)

// parsePython reads a Python literal made of strings, integers, None, lists and tuples.
func parsePython(literal string, into any) error {
	text := pythonToken.ReplaceAllStringFunc(literal, func(token string) string {
		switch token[0] {
		case 'N':
			return "null"
		case '(':
			return "["
		case ')', ',':
			return "]"
		}
		var content []rune
		for rest := token[1 : len(token)-1]; rest != ""; {
			r, _, tail, err := strconv.UnquoteChar(rest, token[0])
			if err != nil {
				return token // which is no JSON
			}
			content, rest = append(content, r), tail
		}
		quoted, _ := json.Marshal(string(content)) // a string can be marshalled
		return string(quoted)
	})
	if err := json.Unmarshal([]byte(text), into); err != nil {
		return fmt.Errorf("not the Python literal that is expected: %w", err)
	}
	return nil
}

// UnmarshalJSON reads a tuple (name, oid, location).
func (t *Tablespace) UnmarshalJSON(tuple []byte) error {
	parts := []any{&t.Name, &t.OID, &t.Location}
	if err := json.Unmarshal(tuple, &parts); err != nil {
		return err
	}
	if len(parts) != 3 || t.OID == 0 {
		return errors.New("not a tuple of name, oid and location")
	}
	return nil
}

// ---------------------------------------------------------------------------
// The backup catalog
// ---------------------------------------------------------------------------

// Catalog is what lies under base/ of one server.
type Catalog struct {
	Backups    []*BackupInfo    // every readable backup.info, in the order of the ids
	Incomplete []string         // ids without backup.info: a backup in progress, or an abandoned one
	Unreadable map[string]error // ids whose backup.info is there but cannot be understood

	objects map[string]*backupObjects // by id
}

// backupObjects is what a listing says of the objects of one backup.
type backupObjects struct {
	size    int64
	written time.Time // the last time
	ours    bool      // some are of the layout
	info    bool      // backup.info is among them
	keep    string    // the annotation: full, standalone, or "" where there is none
}

// backupIDForm is a backup id: the time of its start, by whose text backups are ordered.
var backupIDForm = regexp.MustCompile(`^\d{8}T\d{6}$`)

const backupIDLayout = "20060102T150405"

// catalogReaders is how many backup.info are fetched at once.
const catalogReaders = 8

// Catalog lists what lies under base/ and reads every backup.info of the server. One that
// cannot be understood, or that the server will not hand out (moved to cold storage, or
// encrypted with a key that is gone), does not hide the others.
func (s *Store) Catalog(ctx context.Context) (*Catalog, error) {
	c := &Catalog{Unreadable: map[string]error{}, objects: map[string]*backupObjects{}}
	prefix := s.key("base/")
	for o, err := range s.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		id, file, ok := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
		if !ok || !backupIDForm.MatchString(id) {
			continue
		}
		if c.objects[id] == nil {
			c.objects[id] = &backupObjects{}
		}
		b := c.objects[id]
		b.size += o.Size
		if o.Modified.After(b.written) {
			b.written = o.Modified
		}
		if ours, _ := s.layoutKey(o.Key); ours == id {
			b.ours = true
		}
		b.info = b.info || file == backupInfoFile
		if file == keepFile {
			switch content, _, err := s.read(ctx, o.Key, 64); {
			case errors.Is(err, errNotFound): // taken back since the listing
			case errors.Is(err, errTransient), ctx.Err() != nil:
				return nil, err
			case err != nil:
				slog.Warn("Why a backup is to be kept cannot be read; it is kept", "backupID", id, "error", err)
				b.keep = "full"
			case string(content) == "standalone":
				b.keep = "standalone"
			default: // whatever it says
				b.keep = "full"
			}
		}
	}
	ids := slices.Sorted(maps.Keys(c.objects))
	infos, errs := make([]*BackupInfo, len(ids)), make([]error, len(ids))
	var readers errgroup.Group
	readers.SetLimit(catalogReaders)
	for i, id := range ids {
		readers.Go(func() error { infos[i], errs[i] = s.ReadBackupInfo(ctx, id); return nil })
	}
	readers.Wait()
	var refused error
	for i, id := range ids {
		switch err := errs[i]; {
		case err == nil:
			infos[i].Keep = c.objects[id].keep
			c.Backups = append(c.Backups, infos[i])
		case errors.Is(err, errNotFound):
			c.Incomplete = append(c.Incomplete, id)
		case errors.Is(err, errTransient), ctx.Err() != nil:
			return nil, err
		default:
			c.Unreadable[id] = err
			if !errors.Is(err, errBadBackupInfo) {
				refused = err
			}
		}
	}
	if len(c.Backups) == 0 && refused != nil {
		return nil, refused // more likely a matter of all than of each
	}
	return c, nil
}

// all lists every backup in the order of the ids, those without a backup.info that can be read too.
func (c *Catalog) all() []*BackupInfo {
	all := slices.Clone(c.Backups)
	for _, id := range c.Incomplete {
		all = append(all, &BackupInfo{ID: id, Status: "INCOMPLETE"})
	}
	for id, err := range c.Unreadable {
		all = append(all, &BackupInfo{ID: id, Status: "UNREADABLE", Error: err.Error()})
	}
	slices.SortFunc(all, func(a, b *BackupInfo) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// errBadBackupInfo says that a backup.info could be read but not understood.
var errBadBackupInfo = errors.New("cannot be understood")

// maxBackupInfo bounds the memory that a backup.info can take; real ones have a few kB.
const maxBackupInfo = 4 << 20

// ReadBackupInfo reads one backup.info: errNotFound when it is not there,
// errBadBackupInfo when its text is damaged.
func (s *Store) ReadBackupInfo(ctx context.Context, id string) (*BackupInfo, error) {
	key := s.baseKey(id, backupInfoFile)
	content, metadata, err := s.read(ctx, key, maxBackupInfo+1)
	if err != nil {
		return nil, err
	}
	var b *BackupInfo
	switch sum := metadata[contentSum]; {
	case len(content) > maxBackupInfo:
		err = fmt.Errorf("it is larger than %d bytes", maxBackupInfo)
	case sum != "" && sum != sumOf(content):
		err = fmt.Errorf("its content does not match its checksum %s", sum)
	default:
		b, err = parseBackupInfo(id, content)
	}
	if err != nil {
		return nil, fmt.Errorf("%s %w: %w", s.URL(key), errBadBackupInfo, err)
	}
	if list := metadata[walInBackup]; list != "" {
		b.WALInBackup = strings.Split(list, ",")
	}
	if list := strings.Fields(metadata[badPages]); len(list) > 0 {
		b.BadPages = list[1:]
		b.BadPageCount, _ = strconv.Atoi(list[0])
	}
	return b, nil
}

// WriteBackupInfo stores a backup.info. It is the last object of a backup to be written, and
// the first one stays: a DONE that a gateway delivers late does not replace a FAILED.
func (s *Store) WriteBackupInfo(ctx context.Context, b *BackupInfo) error {
	content := b.marshal()
	metadata := map[string]string{contentSum: sumOf(content)}
	if len(b.WALInBackup) > 0 {
		metadata[walInBackup] = strings.Join(b.WALInBackup, ",")
	}
	if b.BadPageCount > 0 {
		list := strconv.Itoa(b.BadPageCount)
		for _, page := range b.BadPages {
			if len(list)+1+len(page) > maxBadPagesText {
				break
			}
			list += " " + page
		}
		metadata[badPages] = list
	}
	key := s.baseKey(b.ID, backupInfoFile)
	err := s.Put(ctx, key, content, putOptions{Data: true, Metadata: metadata, IfAbsent: true})
	if errors.Is(err, errPrecondition) { // an attempt of ours may have stored it, and its reply was lost
		if stored, _, readErr := s.read(ctx, key, maxBackupInfo+1); readErr == nil && bytes.Equal(stored, content) {
			return nil
		}
	}
	return err
}

// ---------------------------------------------------------------------------
// Progress
// ---------------------------------------------------------------------------

// progress tells how far a backup or a restore has come: in place on a terminal, elsewhere by a log line every ten seconds.
type progress struct {
	done, total atomic.Int64 // bytes
	stop        func()       // ends the display; may be called twice
}

func startProgress(what string) *progress {
	p, start, interval := &progress{}, time.Now(), 10*time.Second
	terminal := term.IsTerminal(int(os.Stderr.Fd()))
	if terminal {
		interval = 200 * time.Millisecond
	}
	stop := every(interval, func() {
		done := p.done.Load()
		if done == 0 {
			return
		}
		total, rate := max(done, p.total.Load()), float64(done)/time.Since(start).Seconds()
		left := time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second)
		if !terminal {
			slog.Info("Progress", "of", what, "bytes", done, "total", total, "bytesPerSecond", int64(rate), "left", left.String())
			return
		}
		fmt.Fprintf(os.Stderr, "\r%s: %s of %s, %s/s, %s left   ", what, byteCount(done), byteCount(total), byteCount(int64(rate)), left)
	})
	p.stop = sync.OnceFunc(func() {
		if stop(); terminal {
			fmt.Fprintln(os.Stderr)
		}
	})
	return p
}

// byteCount prints a size with three digits or so.
func byteCount(n int64) string {
	f, unit := float64(n), 0
	for f >= 1000 && unit < 5 {
		f /= 1024
		unit++
	}
	if unit == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTP"[unit-1])
}

// every calls f at each interval until stop is called, which waits for a call in progress.
func every(interval time.Duration, f func()) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var loop sync.WaitGroup
	loop.Go(func() {
		for sleep(ctx, interval) == nil {
			f()
		}
	})
	return func() { cancel(); loop.Wait() }
}

// ---------------------------------------------------------------------------
// Where the services get their stores
// ---------------------------------------------------------------------------

// configSource gives the CNPG-I services their stores and takes what they have to say
// about them. sidecar.go has the two of them: the Kubernetes API and manifest files.
type configSource interface {
	// Store returns the open store for a reference, with the configuration of now. Its
	// errors name the object that is missing or wrong and wrap errNoObject or errForbidden.
	Store(ctx context.Context, ref StoreRef) (*Store, error)
	// Status returns the status of an ObjectStore as it was last seen.
	Status(ctx context.Context, objectStore string) (ObjectStoreStatus, error)
	// UpdateStatus changes what the status says of one server and leaves the others alone.
	// When change changes nothing, nothing is written.
	UpdateStatus(ctx context.Context, ref StoreRef, change func(*RecoveryWindow, *ServerStatus)) error
	// Tell writes an Event on the Cluster, where there is one.
	Tell(ctx context.Context, eventType, reason, message string) error
}

// What can be wrong with the configuration, for errors.Is.
var (
	errNoObject  = errors.New("not found")
	errForbidden = errors.New("forbidden")
)
