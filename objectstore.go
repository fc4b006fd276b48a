// This file is everything about the object store: the ObjectStore API types and the
// part of a Cluster that refers to them, the S3 client, the layout of the bucket, the
// compression codecs and the backup catalog (backup.info).
//
// It knows nothing of PostgreSQL's protocol and nothing of the Kubernetes API server;
// every other file of the data plane is built on it.

package main

import (
	"encoding/json"
	"fmt"

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
	DestinationPath string             `json:"destinationPath"` // s3://bucket[/path]
	EndpointURL     string             `json:"endpointURL,omitempty"`
	EndpointCA      *SecretKeySelector `json:"endpointCA,omitempty"`
	// ServerName exists in the schema only to be refused: it is a plugin parameter.
	ServerName  string         `json:"serverName,omitempty"`
	Credentials *S3Credentials `json:"s3Credentials,omitempty"`
	// Azure and Google are admitted by old manifests; they are refused with a clear error.
	Azure  *json.RawMessage `json:"azureCredentials,omitempty"`
	Google *json.RawMessage `json:"googleCredentials,omitempty"`

	WAL  *WALConfiguration  `json:"wal,omitempty"`
	Data *DataConfiguration `json:"data,omitempty"`
	// Tags go on every object, HistoryTags replace them on timeline history files.
	Tags        map[string]string `json:"tags,omitempty"`
	HistoryTags map[string]string `json:"historyTags,omitempty"`
}

// SecretKeySelector names one key of a Secret in the ObjectStore's namespace.
type SecretKeySelector struct {
	Name string `json:"name"`
	Key  string `json:"key"`
}

// S3Credentials says where keys come from: Secrets, or with InheritFromIAMRole the
// AWS SDK's default chain, in which case every other field is ignored.
type S3Credentials struct {
	AccessKeyID        *SecretKeySelector `json:"accessKeyId,omitempty"`
	SecretAccessKey    *SecretKeySelector `json:"secretAccessKey,omitempty"`
	Region             *SecretKeySelector `json:"region,omitempty"`
	SessionToken       *SecretKeySelector `json:"sessionToken,omitempty"`
	InheritFromIAMRole bool               `json:"inheritFromIAMRole,omitempty"`
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

// ObjectStoreStatus is written by the sidecars, each under its own server name.
type ObjectStoreStatus struct {
	ServerRecoveryWindow map[string]RecoveryWindow `json:"serverRecoveryWindow,omitempty"`
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
			Recovery *struct {
				Source         string          `json:"source,omitempty"`
				RecoveryTarget *RecoveryTarget `json:"recoveryTarget,omitempty"`
			} `json:"recovery,omitempty"`
		} `json:"bootstrap,omitzero"`
		Replica *struct {
			Self    string `json:"self,omitempty"`
			Primary string `json:"primary,omitempty"`
			Source  string `json:"source,omitempty"`
			Enabled *bool  `json:"enabled,omitempty"`
		} `json:"replica,omitempty"`
		ServiceAccountName string           `json:"serviceAccountName,omitempty"`
		WALStorage         *json.RawMessage `json:"walStorage,omitempty"`
	} `json:"spec"`

	Status struct {
		CurrentPrimary string `json:"currentPrimary,omitempty"`
		TimelineID     int    `json:"timelineID,omitempty"`
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

// DecodeCluster reads the Cluster of a CNPG-I request.
func DecodeCluster(definition []byte) (*Cluster, error) {
	var c Cluster
	if err := json.Unmarshal(definition, &c); err != nil {
		return nil, fmt.Errorf("decode the Cluster of the request: %w", err)
	}
	if c.Name == "" {
		return nil, fmt.Errorf("decode the Cluster of the request: it has no metadata.name")
	}
	return &c, nil
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
	var ref *StoreRef
	for i := range c.Spec.Plugins {
		if r := c.storeRef(&c.Spec.Plugins[i]); r != nil {
			ref = r
		}
	}
	return ref
}

// RecoveryStore is the store that the cluster is (or was) bootstrapped from, nil when there is none.
func (c *Cluster) RecoveryStore() *StoreRef {
	if c.Spec.Bootstrap.Recovery == nil {
		return nil
	}
	return c.externalStore(c.Spec.Bootstrap.Recovery.Source)
}

// ReplicaSourceStore is the store that a replica cluster follows, nil when there is none.
func (c *Cluster) ReplicaSourceStore() *StoreRef {
	if c.Spec.Replica == nil {
		return nil
	}
	return c.externalStore(c.Spec.Replica.Source)
}

// IsReplica says whether the whole cluster follows another one (CloudNativePG's
// Cluster.IsReplica: an explicit enabled wins, otherwise primary differs from self).
func (c *Cluster) IsReplica() bool {
	r := c.Spec.Replica
	switch {
	case r == nil:
		return false
	case r.Enabled != nil:
		return *r.Enabled
	case r.Self != "":
		return r.Self != r.Primary
	default:
		return c.Name != r.Primary
	}
}

func (c *Cluster) externalStore(name string) *StoreRef {
	for i := range c.Spec.ExternalClusters {
		if e := &c.Spec.ExternalClusters[i]; name != "" && e.Name == name && e.Plugin != nil {
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
	ref := &StoreRef{ObjectStore: p.Parameters["barmanObjectName"], ServerName: p.Parameters["serverName"]}
	if ref.ServerName == "" {
		ref.ServerName = c.Name
	}
	return ref
}
