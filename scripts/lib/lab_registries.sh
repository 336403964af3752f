# shellcheck shell=bash
# The lab's two registries: one speaks plain HTTP, one TLS under the lab's own CA and wants a
# password.
# shellcheck disable=SC2034,SC2154,SC2129 # scripts/lab sets and reads what is shared.

readonly plain_port=${LAB_PLAIN_PORT:-15000} tls_port=${LAB_TLS_PORT:-15443}
readonly plain_registry=127.0.0.1:$plain_port tls_registry=localhost:$tls_port
readonly lab_user=lab lab_password=lab-password
readonly ca_dir=$lab_dir/ca
readonly ca_file=$ca_dir/ca.pem skopeo_certs=$ca_dir/skopeo

make_ca() {
    local log=$log_dir/openssl.log
    # A running registry would go on with the old certificate.
    process_stop registry-tls
    install -d -m 755 "$ca_dir"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
        -subj "/CN=registryfs lab CA" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$ca_dir/ca.key" -out "$ca_file" 2>>"$log"
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=localhost" \
        -keyout "$ca_dir/server.key" -out "$ca_dir/server.csr" 2>>"$log"
    openssl x509 -req -days 3650 -in "$ca_dir/server.csr" -CA "$ca_file" -CAkey "$ca_dir/ca.key" \
        -CAcreateserial -out "$ca_dir/server.pem" -extfile /dev/stdin 2>>"$log" <<-EOF
		basicConstraints = critical,CA:FALSE
		extendedKeyUsage = serverAuth
		subjectAltName = DNS:localhost,IP:127.0.0.1
	EOF
    # skopeo takes a directory and knows a CA by the name's ending.
    install -D -m 644 "$ca_file" "$ca_dir/skopeo/ca.crt"
    htpasswd -Bbn "$lab_user" "$lab_password" >"$ca_dir/htpasswd"
}

# registry_config NAME PORT: prints the configuration of docker-registry.
registry_config() {
    cat <<-EOF
		version: 0.1
		log:
		  level: warn
		  accesslog:
		    disabled: false
		storage:
		  filesystem:
		    rootdirectory: $lab_dir/registry-$1
		  cache:
		    blobdescriptor: inmemory
		  delete:
		    enabled: true
		http:
		  addr: 127.0.0.1:$2
		  secret: lab
	EOF
    [[ $1 == tls ]] || return 0
    cat <<-EOF
		  tls:
		    certificate: $ca_dir/server.pem
		    key: $ca_dir/server.key
		auth:
		  htpasswd:
		    realm: lab
		    path: $ca_dir/htpasswd
	EOF
}

registry_answers() {
    process_pid registry-plain >/dev/null || die "a registry ended at once: see $log_dir"
    curl -fsS -o /dev/null "http://$plain_registry/v2/" 2>/dev/null
}

tls_registry_answers() {
    process_pid registry-tls >/dev/null || die "a registry ended at once: see $log_dir"
    curl -fsS -o /dev/null --cacert "$ca_file" -u "$lab_user:$lab_password" \
        "https://$tls_registry/v2/" 2>/dev/null
}

# start_registry NAME PORT: leaves a running one alone.
start_registry() {
    local name=registry-$1 port=$2 config=$lab_dir/registry-$1.yml
    if process_pid "$name" >/dev/null; then
        [[ $(registry_config "$1" "$port") == "$(cat "$config")" ]] ||
            die "$name runs with another configuration: \`scripts/lab down\` first"
        return
    fi
    ! port_answers "$port" ||
        die "port $port is taken by a process that is not the lab's: set LAB_${1^^}_PORT"
    registry_config "$1" "$port" >"$config"
    process_start "$name" "$log_dir/$name.log" docker-registry serve "$config"
}

start_registries() {
    start_registry plain "$plain_port"
    start_registry tls "$tls_port"
    wait_until 20 "the plain registry" registry_answers
    wait_until 20 "the TLS registry" tls_registry_answers
}

registries_run() {
    process_pid registry-plain >/dev/null && process_pid registry-tls >/dev/null
}

stop_registries() {
    process_stop registry-plain
    process_stop registry-tls
}
