# shellcheck shell=bash
# The lab's images: built as plain gzip, converted to eStargz by ctr-remote, pushed to both
# registries, and unpacked by umoci as the truth to compare with.
# shellcheck disable=SC2034,SC2154 # scripts/lab sets and reads what is shared.

readonly originals=$lab_dir/layouts/originals estargz=$lab_dir/layouts/estargz
readonly unpacked=$lab_dir/unpacked
readonly layout_skopeo=$lab_dir/layouts/skopeo layout_umoci=$lab_dir/layouts/umoci
readonly layout_buildah=$lab_dir/layouts/buildah
# What the three tools' layouts are made of.
readonly layout_image=lab/team/app:1
readonly many_image=lab/many:latest large_image=lab/large:latest
# The first image as it is once one package more was asked for: every further layer is the same.
readonly upgraded_image=lab/debian:v1-upgraded upgraded_from=debian-v1 upgraded_with=vim
# Small images, many: what they are pushed as, and what is below those of the second repository.
readonly thousand_repository=lab/thousand fifty_repository=lab/fifty fifty_base=lab/debian:v1
readonly base_packages=python3,perl,git,iputils-ping,libcap2-bin,ca-certificates
readonly wheels=(numpy==1.26.4 scipy==1.11.4)
# A third less work than the default, 9, for layers of nearly the same size.
readonly compression_level=6 small_chunk_bytes=65536
readonly toc_digest=containerd.io/snapshot/stargz/toc.digest

# Each line: layout, tag in the layout, repository and tag in the registries.
readonly published="
originals debian-v1            lab/debian:v1-gzip
originals debian-v2            lab/debian:v2-gzip
originals app-1                lab/team/app:1-gzip
originals app-2                lab/team/app:2-gzip
originals multi                lab/multi:gzip
estargz   debian-v1            lab/debian:v1
estargz   debian-v2            lab/debian:v2
estargz   debian-v1-smallchunk lab/debian:v1-smallchunk
estargz   app-1                lab/team/app:1
estargz   app-2                lab/team/app:2
estargz   multi                lab/multi:latest
"
# Each word: tag in the layout of originals, directory below $unpacked.
readonly unpacked_images="debian-v1=v1 debian-v2=v2 app-1=app-1 app-2=app-2"

# stage NAME INPUTS FUNCTION: runs a function unless it already succeeded for the same inputs.
# The function starts from nothing of its own.
stage() {
    local stamp=$lab_dir/stamps/$1 key
    key=$(sha256sum <<<"$2")
    [[ $(cat "$stamp" 2>/dev/null) != "$key" ]] || return 0
    rm -f "$stamp"
    say "building: $1"
    # Not as a condition, where bash would ignore failing commands inside.
    "$3"
    printf '%s\n' "$key" >"$stamp"
}

# debian_root PACKAGES TAR: a root filesystem of Debian.
debian_root() {
    # The build date as the time of all generated files makes equal builds equal.
    SOURCE_DATE_EPOCH=1700000000 mmdebstrap --mode=root --variant=minbase --quiet \
        --include="$1" bookworm "$2" </dev/null
}

make_base() {
    debian_root "$base_packages" "$lab_dir/base.tar"
}

make_wheels() {
    rm -rf "$lab_dir/wheels"
    "$python" -m pip install --quiet --root-user-action=ignore --no-compile \
        --only-binary=:all: --target "$lab_dir/wheels" "${wheels[@]}" </dev/null
}

make_originals() {
    rm -rf "$originals"
    "$python" "$repo_root/scripts/lib/build_originals.py" --base "$lab_dir/base.tar" \
        --wheels "$lab_dir/wheels" --out "$originals"
}

make_unpacked() {
    local image
    rm -rf "$unpacked"
    mkdir -p "$unpacked"
    for image in $unpacked_images; do
        umoci raw unpack --image "$originals:${image%=*}" "$unpacked/${image#*=}" \
            >>"$log_dir/umoci.log" 2>&1 || die "umoci failed: see $log_dir/umoci.log"
    done
}

ctr() {
    ctr-remote --address "$run_dir/containerd.sock" --namespace lab "$@"
}

start_containerd() {
    ((${#run_dir} < 80)) || die "LAB_DIR is too long for the path of a socket: $lab_dir"
    cat >"$run_dir/containerd.toml" <<-EOF
		version = 2
		root = "$lab_dir/containerd"
		state = "$run_dir/containerd"
		disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
		[grpc]
		  address = "$run_dir/containerd.sock"
		[ttrpc]
		  address = "$run_dir/containerd.sock.ttrpc"
	EOF
    process_start containerd "$log_dir/containerd.log" \
        containerd --config "$run_dir/containerd.toml"
    wait_until 30 containerd containerd_answers
}

containerd_answers() {
    process_pid containerd >/dev/null || die "containerd ended at once: see $log_dir"
    ctr version >/dev/null 2>&1
}

# convert SOURCE TARGET OPTION…: eStargz of an original, under a tag of its own.
convert() {
    local source=$1 target=$2
    shift 2
    ctr images convert --estargz --oci --estargz-compression-level "$compression_level" \
        "$@" "lab/original:$source" "lab/estargz:$target" >/dev/null
}

# containerd only lends its content store: nothing is unpacked, so it needs no snapshotter.
containerd_import() {
    rm -rf "$lab_dir/containerd"
    start_containerd
    tar -C "$1" -cf - . |
        ctr images import --no-unpack --all-platforms --base-name lab/original - >/dev/null
}

# containerd_export LAYOUT TAG…: ends containerd with it.
containerd_export() {
    local layout=$1
    shift
    rm -rf "$layout"
    mkdir -p "$layout"
    ctr images export --all-platforms --skip-manifest-json "$lab_dir/estargz.tar" "${@/#/lab/estargz:}"
    tar -C "$layout" -xf "$lab_dir/estargz.tar"
    rm -f "$lab_dir/estargz.tar"
    process_stop containerd
    rm -rf "$lab_dir/containerd"
}

make_estargz() {
    local tag tags=(debian-v1 debian-v2 app-1 app-2)
    containerd_import "$originals"
    for tag in "${tags[@]}"; do
        convert "$tag" "$tag"
    done
    convert multi multi --all-platforms
    convert debian-v1 debian-v1-smallchunk --estargz-chunk-size "$small_chunk_bytes"
    containerd_export "$estargz" "${tags[@]}" multi debian-v1-smallchunk
}

# The images that only scripts/bench needs are apart, because they take a while, and in the plain registry only.
build_many() {
    stage many "$many_image $compression_level $(sha256sum <"$repo_root/scripts/lib/build_many.py")" make_many
}

make_many() {
    make_apart many "$many_image" "$repo_root/scripts/lib/build_many.py"
}

build_large() {
    stage large "$large_image $compression_level $(sha256sum <"$repo_root/scripts/lib/build_large.py")" make_large
}

make_large() {
    make_apart large "$large_image" "$repo_root/scripts/lib/build_large.py"
}

build_upgraded() {
    local key
    key="$upgraded_image $upgraded_with $(cat "$lab_dir"/stamps/{base,estargz} \
        "$repo_root/scripts/lib/build_upgraded.py" | sha256sum)"
    stage upgraded-base "$key" make_upgraded_base
    stage upgraded "$key" make_upgraded
}

make_upgraded_base() {
    debian_root "$base_packages,$upgraded_with" "$lab_dir/upgraded-base.tar"
}

make_upgraded() {
    make_apart upgraded "$upgraded_image" "$repo_root/scripts/lib/build_upgraded.py" \
        --base "$lab_dir/upgraded-base.tar" --image "$originals:$upgraded_from"
    rm -f "$lab_dir/upgraded-base.tar"
}

build_thousand() {
    local key
    key="$thousand_repository $fifty_repository $fifty_base $(cat "$lab_dir/stamps/push-plain" \
        "$repo_root/scripts/lib/push_thousand.py" | sha256sum)"
    stage thousand "$key" make_thousand
}

make_thousand() {
    "$python" -B "$repo_root/scripts/lib/push_thousand.py" --registry "$plain_registry" \
        --small "$thousand_repository" --over "$fifty_repository" --base "$fifty_base"
}

# make_apart TAG REFERENCE BUILDER…: builds a layout with one image, and pushes it as eStargz.
make_apart() {
    local tag=$1 reference=$2 scratch=$lab_dir/$1
    shift 2
    rm -rf "$scratch"
    mkdir -p "$scratch"
    "$python" -B "$@" --out "$scratch/original"
    containerd_import "$scratch/original"
    convert "$tag" "$tag"
    containerd_export "$scratch/estargz" "$tag"
    skopeo --insecure-policy copy --quiet --preserve-digests --dest-tls-verify=false \
        "oci:$scratch/estargz:$tag" "docker://$plain_registry/$reference" </dev/null
    check_manifest "${reference%:*}" "${reference##*:}"
    rm -rf "$scratch"
}

# push_all DESTINATION OPTION…: copies every image without changing a byte of it.
push_all() {
    local destination=$1 layout tag reference
    shift
    while read -r layout tag reference; do
        [[ -n $layout ]] || continue
        skopeo --insecure-policy copy --quiet --all --preserve-digests "$@" \
            "oci:$lab_dir/layouts/$layout:$tag" "docker://$destination/$reference" </dev/null
    done <<<"$published"
}

push_plain() {
    push_all "$plain_registry" --dest-tls-verify=false
}

push_tls() {
    push_all "$tls_registry" --dest-cert-dir "$skopeo_certs" --dest-creds "$lab_user:$lab_password"
}

# check_estargz: every layer that the plain registry serves for a converted image must carry the
# TOC digest, without which nothing in it can be verified before it is read.
check_estargz() {
    local layout _ reference
    while read -r layout _ reference; do
        [[ $layout == estargz ]] || continue
        check_manifest "${reference%:*}" "${reference##*:}"
    done <<<"$published"
}

check_manifest() {
    local body child missing
    body=$(curl -fsS -H 'Accept: application/vnd.oci.image.index.v1+json' \
        -H 'Accept: application/vnd.oci.image.manifest.v1+json' \
        "http://$plain_registry/v2/$1/manifests/$2")
    for child in $(jq -r '.manifests[]?.digest' <<<"$body"); do
        check_manifest "$1" "$child"
    done
    missing=$(jq --arg key "$toc_digest" '[.layers[]? | select(.annotations[$key] | not)] | length' \
        <<<"$body")
    ((missing == 0)) || die "$1:$2: $missing layers have no TOC digest"
}

make_layout_skopeo() {
    rm -rf "$layout_skopeo"
    skopeo --insecure-policy copy --quiet --preserve-digests --src-tls-verify=false \
        "docker://$plain_registry/$layout_image" "oci:$layout_skopeo:1"
}

# umoci writes the configuration, the manifest and the index of `2`, and leaves layers as they are.
make_layout_umoci() {
    rm -rf "$layout_umoci"
    cp -r "$layout_skopeo" "$layout_umoci"
    umoci config --image "$layout_umoci:1" --tag 2 --config.label lab=umoci
}

# A list is copied as it is: `1` is an index of the eStargz image. An image goes through buildah's storage, which
# keeps unpacked layers and compresses them anew: `rewritten` is plain gzip.
make_layout_buildah() {
    rm -rf "$layout_buildah" "$lab_dir/buildah"
    buildah_in_lab manifest create lab >/dev/null
    buildah_in_lab manifest add --tls-verify=false lab "docker://$plain_registry/$layout_image" >/dev/null
    buildah_in_lab manifest push --quiet --tls-verify=false --all lab "oci:$layout_buildah:1" >/dev/null
    buildah_in_lab pull --quiet --tls-verify=false "$plain_registry/$layout_image" >/dev/null
    buildah_in_lab push --quiet "$plain_registry/$layout_image" "oci:$layout_buildah:rewritten"
    rm -rf "$lab_dir/buildah"
}

buildah_in_lab() {
    buildah --root "$lab_dir/buildah/storage" --runroot "$lab_dir/buildah/run" --storage-driver vfs "$@"
}

build_images() {
    local lib=$repo_root/scripts/lib base_key wheels_key originals_key estargz_key push_key
    base_key="$base_packages"
    wheels_key="${wheels[*]}"
    originals_key="$base_key $wheels_key $(cat "$lib"/{build_originals,fixture_layers,oci_layout}.py | sha256sum)"
    estargz_key="$originals_key $compression_level $small_chunk_bytes"
    push_key="$estargz_key $published"
    stage base "$base_key" make_base
    stage wheels "$wheels_key" make_wheels
    stage originals "$originals_key" make_originals
    stage unpacked "$originals_key $unpacked_images" make_unpacked
    stage estargz "$estargz_key" make_estargz
    stage push-plain "$push_key" push_plain
    stage push-tls "$push_key" push_tls
    stage check "$push_key" check_estargz
    stage layout-skopeo "$push_key $layout_image" make_layout_skopeo
    stage layout-umoci "$push_key $layout_image" make_layout_umoci
    stage layout-buildah "$push_key $layout_image" make_layout_buildah
}
