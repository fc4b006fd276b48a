// socketclient plays CloudNativePG's instance manager: it opens a plugin's Unix socket,
// goes through the same handshake, and makes one request. It is what archive_command
// and restore_command call in the demo, where no Kubernetes is.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cloudnative-pg/cnpg-i/pkg/backup"
	"github.com/cloudnative-pg/cnpg-i/pkg/identity"
	"github.com/cloudnative-pg/cnpg-i/pkg/metrics"
	restore "github.com/cloudnative-pg/cnpg-i/pkg/restore/job"
	"github.com/cloudnative-pg/cnpg-i/pkg/wal"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const usage = `Usage: socketclient --socket PATH --cluster FILE REQUEST

FILE is the Cluster, in JSON. REQUEST is one of

  archive PATH          archive a WAL file
  restore NAME DEST     fetch a WAL file
  backup                take a base backup; prints the reply as JSON
  restore-job           restore a base backup into the sidecar's PGDATA; prints the
                        recovery settings that go into the configuration

Options:
`

func main() {
	socket := flag.String("socket", "", "the plugin's Unix `path`")
	cluster := flag.String("cluster", "", "a `file` with the Cluster in JSON")
	empty := flag.Bool("check-empty-archive", false, "archive, restore-job: ask the plugin to make sure that the archive is empty")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage); flag.PrintDefaults() }
	flag.Parse()
	if *socket == "" || *cluster == "" || flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := request(*socket, *cluster, *empty, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "socketclient:", err)
		os.Exit(1)
	}
}

func request(socket, clusterFile string, empty bool, args []string) error {
	cluster, err := os.ReadFile(clusterFile)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx := context.Background()
	if err := handshake(ctx, conn); err != nil {
		return fmt.Errorf("handshake on %s: %w", socket, err)
	}

	switch {
	case args[0] == "archive" && len(args) == 2:
		path, err := filepath.Abs(args[1]) // %p is relative to PGDATA, the request's path is not
		if err != nil {
			return err
		}
		_, err = wal.NewWALClient(conn).Archive(ctx, &wal.WALArchiveRequest{
			ClusterDefinition: cluster, SourceFileName: path, CheckEmptyWalArchive: &empty,
		})
		return err
	case args[0] == "restore" && len(args) == 3:
		path, err := filepath.Abs(args[2])
		if err != nil {
			return err
		}
		_, err = wal.NewWALClient(conn).Restore(ctx, &wal.WALRestoreRequest{
			ClusterDefinition: cluster, SourceWalName: args[1], DestinationFileName: path, Mode: wal.WALRestoreRequest_MODE_RECOVERY,
		})
		return err
	case args[0] == "backup" && len(args) == 1:
		reply, err := backup.NewBackupClient(conn).Backup(ctx, &backup.BackupRequest{
			ClusterDefinition: cluster,
			BackupDefinition:  []byte(`{"apiVersion":"postgresql.cnpg.io/v1","kind":"Backup","metadata":{"name":"socketclient"},"spec":{"method":"plugin"}}`),
		})
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(reply)
	case args[0] == "restore-job" && len(args) == 1:
		reply, err := restore.NewRestoreJobHooksClient(conn).Restore(ctx, &restore.RestoreRequest{
			ClusterDefinition: cluster, CheckEmptyWalArchive: &empty,
		})
		if err != nil {
			return err
		}
		fmt.Print(reply.RestoreConfig)
		return nil
	}
	flag.Usage()
	os.Exit(2)
	return nil
}

// handshake asks what CloudNativePG asks on every new connection, in the same order,
// and wants the answers that it could not work without.
func handshake(ctx context.Context, conn *grpc.ClientConn) error {
	id := identity.NewIdentityClient(conn)
	metadata, err := id.GetPluginMetadata(ctx, &identity.GetPluginMetadataRequest{})
	if err != nil {
		return fmt.Errorf("GetPluginMetadata: %w", err)
	}
	if metadata.Name == "" {
		return fmt.Errorf("GetPluginMetadata: the plugin has no name")
	}
	capabilities, err := id.GetPluginCapabilities(ctx, &identity.GetPluginCapabilitiesRequest{})
	if err != nil {
		return fmt.Errorf("GetPluginCapabilities: %w", err)
	}
	announced := map[identity.PluginCapability_Service_Type]bool{}
	for _, c := range capabilities.Capabilities {
		announced[c.GetService().GetType()] = true
	}
	if announced[identity.PluginCapability_Service_TYPE_WAL_SERVICE] {
		if _, err := wal.NewWALClient(conn).GetCapabilities(ctx, &wal.WALCapabilitiesRequest{}); err != nil {
			return fmt.Errorf("WAL.GetCapabilities: %w", err)
		}
	}
	if announced[identity.PluginCapability_Service_TYPE_BACKUP_SERVICE] {
		if _, err := backup.NewBackupClient(conn).GetCapabilities(ctx, &backup.BackupCapabilitiesRequest{}); err != nil {
			return fmt.Errorf("Backup.GetCapabilities: %w", err)
		}
	}
	if announced[identity.PluginCapability_Service_TYPE_RESTORE_JOB] {
		if _, err := restore.NewRestoreJobHooksClient(conn).GetCapabilities(ctx, &restore.RestoreJobHooksCapabilitiesRequest{}); err != nil {
			return fmt.Errorf("RestoreJobHooks.GetCapabilities: %w", err)
		}
	}
	if announced[identity.PluginCapability_Service_TYPE_METRICS] {
		if _, err := metrics.NewMetricsClient(conn).GetCapabilities(ctx, &metrics.MetricsCapabilitiesRequest{}); err != nil {
			return fmt.Errorf("Metrics.GetCapabilities: %w", err)
		}
	}
	if _, err := id.Probe(ctx, &identity.ProbeRequest{}); err != nil {
		return fmt.Errorf("Probe: %w", err)
	}
	return nil
}
