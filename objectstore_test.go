package main

import (
	"testing"
)

// testStore opens a store on a bucket of a test server, as the subcommands do: through a
// file with ObjectStore and Secrets. Lines of configuration are added, as for storeFile.
func testStore(t testing.TB, s *s3Server, bucket, server string, configuration ...string) *Store {
	t.Helper()
	return testStoreFile(t, storeFile(t, s, bucket, configuration...), server)
}

// testStoreAt is testStore through another endpoint, such as a fault proxy's.
func testStoreAt(t testing.TB, s *s3Server, endpoint, bucket, server string, configuration ...string) *Store {
	t.Helper()
	return testStoreFile(t, storeFileAt(t, s, endpoint, "s3://"+bucket, configuration...), server)
}

func testStoreFile(t testing.TB, file, server string) *Store {
	t.Helper()
	source, err := newFileSource(file)
	if err != nil {
		t.Fatal(err)
	}
	store, err := source.Store(t.Context(), StoreRef{ObjectStore: "store", ServerName: server})
	if err != nil {
		t.Fatal(err)
	}
	return store
}
