# shellcheck shell=bash
# One image, a Debian and wheels, in every format that a real writer here can make, and the cases of merging layers: in
# the plain registry only.
#
# What the writers write, as seen on the blobs:
#   gzip                 skopeo 1.9.3: deflated in blocks by several threads (pgzip), one member, other bytes than zlib's
#   gzip-docker          skopeo --format v2s2: those blobs below a Docker schema 2 manifest
#   zstd                 skopeo: one frame a layer, no content size, a window of 8 MiB, a checksum
#   tar                  skopeo --dest-decompress
#   estargz              ctr-remote 0.12: chunks of 4 MiB, a member a file, 51-byte footer, annotated TOC digest
#   zstd-chunked         ctr-remote --zstdchunked: 40-byte footer, the annotations io.containers.zstd-chunked.manifest-checksum
#                        and -position, and eStargz's TOC digest beside them; chunks as in eStargz, no tar-split
#   zstd-chunked-skopeo  skopeo: the same footer and prefix, no other annotation; chunks where the content says, no tar-split
# For the formats that none of them writes there is examples/lab_formats.rs, with our own writers.
# shellcheck disable=SC2034,SC2154 # scripts/lab sets and reads what is shared.

readonly formats_repository=lab/formats merge_repository=lab/merge
readonly formats_source=debian-v1
# At the default level it takes three times as long for a blob of nearly the same size.
readonly zstd_chunked_level=3

skopeo_copy() {
    skopeo --insecure-policy copy --quiet "$@" </dev/null
}

# push_format SOURCE TAG: without changing a byte.
push_format() {
    skopeo_copy --preserve-digests --src-tls-verify=false --dest-tls-verify=false \
        "$1" "docker://$plain_registry/$formats_repository:$2"
}

# All that skopeo compresses goes into a layout first: into a registry it would put blobs that it remembers having seen,
# whatever the format that is asked for.
make_formats() {
    local scratch=$lab_dir/formats tag
    local plain=dir:$scratch/plain layout=oci:$scratch/layout
    rm -rf "$scratch"
    mkdir -p "$scratch"
    skopeo_copy --dest-decompress "oci:$originals:$formats_source" "$plain"
    push_format "$plain" tar
    skopeo_copy "$plain" "$layout:gzip"
    skopeo_copy --dest-compress-format zstd "$plain" "$layout:zstd"
    skopeo_copy --dest-compress-format zstd:chunked --dest-compress-level "$zstd_chunked_level" \
        "$plain" "$layout:zstd-chunked-skopeo"
    for tag in gzip zstd zstd-chunked-skopeo; do
        push_format "$layout:$tag" "$tag"
    done
    skopeo_copy --format v2s2 --dest-tls-verify=false \
        "$layout:gzip" "docker://$plain_registry/$formats_repository:gzip-docker"
    push_format "oci:$estargz:$formats_source" estargz
    rm -rf "$scratch"
}

make_formats_ctr() {
    local scratch=$lab_dir/formats-ctr
    containerd_import "$originals"
    ctr images convert --zstdchunked --oci "lab/original:$formats_source" lab/estargz:zstd-chunked >/dev/null
    containerd_export "$scratch" zstd-chunked
    push_format "oci:$scratch:zstd-chunked" zstd-chunked
    rm -rf "$scratch"
}

# check_format TAG FILTER: what a manifest must be like for the format to be the one that is meant.
check_format() {
    curl -fsS -H 'Accept: application/vnd.oci.image.manifest.v1+json' \
        -H 'Accept: application/vnd.docker.distribution.manifest.v2+json' \
        "http://$plain_registry/v2/$formats_repository/manifests/$1" |
        jq -e "[.layers[] | $2] | all" >/dev/null || die "$formats_repository:$1 is not what it should be"
}

check_formats() {
    local oci=application/vnd.oci.image.layer.v1.tar chunked
    chunked='.annotations["io.containers.zstd-chunked.manifest-position"]'
    check_format tar ".mediaType == \"$oci\""
    check_format gzip ".mediaType == \"$oci+gzip\" and .annotations == null"
    check_format gzip-docker '.mediaType == "application/vnd.docker.image.rootfs.diff.tar.gzip"'
    check_format zstd ".mediaType == \"$oci+zstd\" and .annotations == null"
    check_format estargz ".annotations[\"$toc_digest\"]"
    check_format zstd-chunked "$chunked and .annotations[\"$toc_digest\"]"
    check_format zstd-chunked-skopeo "$chunked and (.annotations[\"$toc_digest\"] | not)"
}

make_merge_images() {
    local layout=$lab_dir/layouts/merge name
    rm -rf "$layout"
    "$python" -B "$repo_root/scripts/lib/merge_images.py" write "$layout"
    for name in $("$python" -B "$repo_root/scripts/lib/merge_images.py" names); do
        skopeo_copy --preserve-digests --dest-tls-verify=false \
            "oci:$layout:$name" "docker://$plain_registry/$merge_repository:$name"
    done
}

# The images that those of all formats are made of are the ones that the last build gave.
formats_key() {
    printf '%s ' "$formats_repository" "$formats_source"
    cat "$lab_dir"/stamps/{originals,estargz}
}

build_formats() {
    local key merge_key skopeo
    key=$(formats_key)
    merge_key=$(cat "$repo_root"/scripts/lib/{merge_images,oci_layout}.py | sha256sum)
    # Each of them keeps one core busy for most of its time.
    stage formats "$key $zstd_chunked_level" make_formats &
    skopeo=$!
    stage formats-ctr "$key" make_formats_ctr
    wait "$skopeo"
    stage formats-check "$key $zstd_chunked_level" check_formats
    stage merge "$merge_repository $merge_key" make_merge_images
}

# Apart, because it needs the writers compiled.
build_own_formats() {
    local writers
    writers=$(find "$repo_root"/examples "$repo_root"/src/{demo,layer} -type f \
        \( -path '*writer*' -o -name images.rs -o -name lab_formats.rs \) -exec sha256sum {} + | sort)
    stage formats-own "$(formats_key) $writers" make_own_formats
}

make_own_formats() {
    (cd "$repo_root" && cargo run --locked --quiet --example lab_formats -- \
        "$originals" "$formats_source" "$plain_registry/$formats_repository")
}
