#!/usr/bin/env bash
# image.sh BINARY ARCH REFERENCE ARCHIVE - put one static binary into an image archive.
#
# The image is the binary and nothing else: no shell, no libraries, no user database. The
# archive is an OCI image layout that is a `docker save` archive too (manifest.json names
# the same blobs), so that `ctr images import`, `kind load image-archive`, k3s's image
# folder and `docker load` of any version take it. Needs GNU tar, gzip, sha256sum and no
# container engine. The same binary gives the same bytes: SOURCE_DATE_EPOCH, or 0, is
# the time of everything.
set -euo pipefail
[ $# = 4 ] || { sed -n '2p' "$0" >&2; exit 2; }
binary=$1 arch=$2 reference=$3 archive=$4
epoch=${SOURCE_DATE_EPOCH:-0}
created=$(date -u -d "@$epoch" +%Y-%m-%dT%H:%M:%SZ)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
layout=$work/layout
blobs=$layout/blobs/sha256
mkdir -p "$blobs" "$work/rootfs" "$(dirname "$archive")"

pack() { # pack DIRECTORY NAME...: a tar stream that depends on the content only
    tar -C "$1" --sort=name --format=ustar --mtime="@$epoch" --owner=0 --group=0 --numeric-owner -cf - "${@:2}"
}
blob() { # blob FILE: move it to its place, print its digest without the algorithm
    local digest
    digest=$(sha256sum "$1" | cut -d' ' -f1)
    mv "$1" "$blobs/$digest"
    echo "$digest"
}
size() { stat -c %s "$blobs/$1"; }

install -m 0755 "$binary" "$work/rootfs/cnpg-barman-s3"
pack "$work/rootfs" cnpg-barman-s3 >"$work/layer.tar"
diff_id=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
gzip -9 -n "$work/layer.tar"
layer=$(blob "$work/layer.tar.gz")
[ "$(size "$layer")" -le 20971520 ] || { echo "image.sh: the layer has $(size "$layer") bytes compressed; 20 MiB is what the image may have" >&2; exit 1; }

# A numeric user: the kubelet cannot check runAsNonRoot against a name.
cat >"$work/config.json" <<JSON
{"created":"$created","architecture":"$arch","os":"linux","config":{"User":"65532:65532","Entrypoint":["/cnpg-barman-s3"],"WorkingDir":"/"},"rootfs":{"type":"layers","diff_ids":["sha256:$diff_id"]},"history":[{"created":"$created","created_by":"image.sh"}]}
JSON
config=$(blob "$work/config.json")

cat >"$work/manifest.json" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:$config","size":$(size "$config")},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:$layer","size":$(size "$layer")}]}
JSON
manifest=$(blob "$work/manifest.json")

# containerd names the image after the first annotation, other readers after the second.
cat >"$layout/index.json" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:$manifest","size":$(size "$manifest"),"platform":{"architecture":"$arch","os":"linux"},"annotations":{"io.containerd.image.name":"$reference","org.opencontainers.image.ref.name":"${reference##*:}"}}]}
JSON
echo '{"imageLayoutVersion":"1.0.0"}' >"$layout/oci-layout"
cat >"$layout/manifest.json" <<JSON
[{"Config":"blobs/sha256/$config","RepoTags":["$reference"],"Layers":["blobs/sha256/$layer"]}]
JSON

pack "$layout" blobs index.json manifest.json oci-layout >"$archive"
echo "$archive: $reference, linux/$arch, $(stat -c %s "$archive") bytes compressed, manifest sha256:$manifest"
