# shellcheck shell=bash
# The lab's servers behind nginx, which counts every request: registries with tokens, with redirects, with URLs that
# expire, and a mirror. All serve the images of the plain registry. docker-registry and the two servers in Python
# listen on sockets in $run_dir; only nginx has ports.
# shellcheck disable=SC2034,SC2154,SC2129 # scripts/lab sets and reads what is shared.

# Their default ports; LAB_SERVER_PORT changes one.
declare -A server_ports=(
    [token]=15001 [token-short]=15002 [redirect]=15003 [token-redirect]=15004 [mirror]=15005
    [signed]=15006 [signed-opaque]=15007 [auth]=15010 [blobs]=15011 [signed-blobs]=15012
)
# In the order in which they are shown.
readonly counted_servers=(
    token token-short redirect token-redirect mirror signed signed-opaque auth blobs signed-blobs
)
readonly docker_registries=(token token-short redirect token-redirect mirror)
# Below this anonymous clients may pull where tokens are asked for; the rest needs the lab's user.
readonly public_namespace=lab/team
readonly token_s=${LAB_TOKEN_S:-60} short_token_s=${LAB_SHORT_TOKEN_S:-5}
readonly signed_url_s=${LAB_SIGNED_URL_S:-5}
readonly token_key=$ca_dir/token.key token_certificate=$ca_dir/token.pem
readonly nginx_dir=$lab_dir/nginx ledger=$log_dir/ledger.jsonl

# The name of a server as in environment variables.
env_name() {
    local name=${1^^}
    printf 'LAB_%s\n' "${name//-/_}"
}

set_ports() {
    local server variable
    for server in "${counted_servers[@]}"; do
        variable=$(env_name "$server")_PORT
        server_ports[$server]=${!variable:-${server_ports[$server]}}
    done
    readonly server_ports
}
set_ports

server_address() {
    printf '127.0.0.1:%s\n' "${server_ports[$1]}"
}

# The authority that the registries trust for tokens is the certificate that signs them. What runs has read the old one.
make_token_key() {
    local server
    process_stop token-server
    for server in "${docker_registries[@]}"; do
        [[ $server != token* ]] || process_stop "registry-$server"
    done
    rm -f "$token_key" "$token_certificate"
    openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=registryfs lab tokens" \
        -addext "basicConstraints=critical,CA:TRUE" -keyout "$token_key" -out "$token_certificate" \
        2>>"$log_dir/openssl.log"
}

# counted_registry_config NAME: prints the configuration of a docker-registry behind nginx.
counted_registry_config() {
    local storage=$lab_dir/registry-plain token_path
    [[ $1 != mirror ]] || storage=$lab_dir/registry-mirror
    cat <<-EOF
		version: 0.1
		log:
		  level: warn
		  accesslog:
		    disabled: true
		storage:
		  filesystem:
		    rootdirectory: $storage
		http:
		  net: unix
		  addr: $run_dir/registry-$1.sock
		  secret: lab
	EOF
    case $1 in
        *redirect)
            cat <<-EOF
				middleware:
				  storage:
				    - name: redirect
				      options:
				        baseurl: http://$(server_address blobs)
			EOF
            ;;
    esac
    case $1 in
        token*)
            token_path=/token/$token_s
            # The client is not told when the token ends, so it meets one that is refused.
            [[ $1 != token-short ]] || token_path=/token/$short_token_s/none
            cat <<-EOF
				auth:
				  token:
				    realm: http://$(server_address auth)$token_path
				    service: lab
				    issuer: lab-auth
				    rootcertbundle: $token_certificate
			EOF
            ;;
        mirror)
            cat <<-EOF
				proxy:
				  remoteurl: http://$plain_registry
			EOF
            ;;
    esac
}

# nginx_server NAME: prints the beginning of a server block; its locations and the brace follow.
nginx_server() {
    printf 'server {\n    listen 127.0.0.1:%s;\n    set $lab_server %s;\n' "${server_ports[$1]}" "$1"
}

# nginx_upstream NAME ADDRESS: with connections that stay open, as few have in a day.
nginx_upstream() {
    printf 'upstream %s {\n    server %s;\n    keepalive 16;\n}\n' "$1" "$2"
}

nginx_config() {
    local server style
    cat <<-EOF
		daemon off;
		user root;
		# One process: the lines of its log are in order, and killing it leaves none behind.
		master_process off;
		pid "$run_dir/nginx.own-pid";
		error_log "$log_dir/nginx.log" warn;
		events { worker_connections 1024; }
		http {
		    map \$http_authorization \$lab_authorization {
		        default none;
		        ~*^basic basic;
		        ~*^bearer bearer;
		    }
		    log_format ledger escape=json '{"server":"\$lab_server","ends":\$msec,"seconds":\$request_time,'
		        '"method":"\$request_method","uri":"\$request_uri","status":\$status,"range":"\$http_range",'
		        '"bytes":\$body_bytes_sent,"authorization":"\$lab_authorization","connection":\$connection}';
		    access_log "$ledger" ledger;
		    # Whoever asks for TLS first belongs to no server yet.
		    uninitialized_variable_warn off;
		    client_body_temp_path "$nginx_dir/body";
		    proxy_temp_path "$nginx_dir/proxy";
		    fastcgi_temp_path "$nginx_dir/fastcgi";
		    uwsgi_temp_path "$nginx_dir/uwsgi";
		    scgi_temp_path "$nginx_dir/scgi";
		    default_type application/octet-stream;
		    sendfile on;
		    tcp_nodelay on;
		    keepalive_requests 100000;
		    client_max_body_size 0;
		    proxy_http_version 1.1;
		    proxy_set_header Host \$http_host;
		    proxy_set_header Connection "";
		    proxy_max_temp_file_size 0;
		    proxy_buffers 16 64k;
		    proxy_read_timeout 300s;
	EOF
    nginx_upstream plain "$plain_registry"
    nginx_upstream token-server "\"unix:$run_dir/token-server.sock\""
    nginx_upstream url-signer "\"unix:$run_dir/url-signer.sock\""
    for server in "${docker_registries[@]}"; do
        nginx_upstream "$server" "\"unix:$run_dir/registry-$server.sock\""
        nginx_server "$server"
        printf '    location / { proxy_pass http://%s; }\n}\n' "$server"
    done
    nginx_server auth
    printf '    location / { proxy_pass http://token-server; }\n}\n'
    # docker-registry puts the path in its storage behind the baseurl.
    nginx_server blobs
    printf '    location /docker/registry/v2/blobs/ { root "%s"; }\n' "$lab_dir/registry-plain"
    printf '    location = /complete { access_log off; return 204; }\n'
    printf '    location / { return 404; }\n}\n'
    for server in signed signed-opaque; do
        style=
        [[ $server == signed ]] || style=1
        nginx_server "$server"
        printf '    location / { proxy_pass http://plain; }\n'
        printf '    location ~ ^/v2/.+/blobs/sha256:[0-9a-f]+$ {\n'
        printf '        proxy_set_header X-Lab-Opaque "%s";\n' "$style"
        printf '        proxy_pass http://url-signer;\n    }\n}\n'
    done
    nginx_server signed-blobs
    printf '    location / { proxy_pass http://url-signer; }\n'
    printf '    location /storage/ { internal; alias "%s/docker/registry/v2/"; }\n}\n}\n' \
        "$lab_dir/registry-plain"
}

# start_counted NAME CONFIGURATION COMMAND…: starts a server, or again if it runs with another configuration.
start_counted() {
    local name=$1 configuration=$2 config=$run_dir/$1.conf
    shift 2
    if process_pid "$name" >/dev/null; then
        [[ $configuration != "$(cat "$config" 2>/dev/null)" ]] || return 0
        process_stop "$name"
    fi
    printf '%s\n' "$configuration" >"$config"
    process_start "$name" "$log_dir/$name.log" "$@"
}

start_token_server() {
    local server=(
        "$python" "$repo_root/scripts/lib/token_server.py" --socket "$run_dir/token-server.sock"
        --key "$token_key" --certificate "$token_certificate" --issuer lab-auth --service lab
        --user "$lab_user" --password "$lab_password" --public "$public_namespace"
    )
    start_counted token-server "${server[*]} $(own_servers_key)" "${server[@]}"
}

start_url_signer() {
    local server=(
        "$python" "$repo_root/scripts/lib/url_signer.py" --socket "$run_dir/url-signer.sock"
        --storage "$lab_dir/registry-plain/docker/registry/v2"
        --base "http://$(server_address signed-blobs)" --seconds "$signed_url_s"
    )
    start_counted url-signer "${server[*]} $(own_servers_key)" "${server[@]}"
}

# Servers of ours that were changed start anew.
own_servers_key() {
    cat "$repo_root"/scripts/lib/{unix_http,token_server,url_signer}.py | sha256sum
}

start_mirror_empty() {
    process_pid registry-mirror >/dev/null || rm -rf "$lab_dir/registry-mirror"
}

start_nginx() {
    local server configuration
    configuration=$(nginx_config)
    if ! process_pid nginx >/dev/null; then
        for server in "${counted_servers[@]}"; do
            ! port_answers "${server_ports[$server]}" ||
                die "port ${server_ports[$server]} is taken by a process that is not the lab's: set $(env_name "$server")_PORT"
        done
    fi
    mkdir -p "$nginx_dir"
    start_counted nginx "$configuration" nginx -e "$log_dir/nginx.log" -p "$nginx_dir" -c "$run_dir/nginx.conf"
}

start_counted_servers() {
    local server
    ((${#run_dir} < 80)) || die "LAB_DIR is too long for the path of a socket: $lab_dir"
    stage token-key "$ca_dir" make_token_key
    start_token_server
    start_url_signer
    start_mirror_empty
    for server in "${docker_registries[@]}"; do
        start_counted "registry-$server" "$(counted_registry_config "$server")" \
            docker-registry serve "$run_dir/registry-$server.conf"
    done
    start_nginx
    for server in "${counted_servers[@]}"; do
        wait_until 20 "$server" counted_server_answers "$server"
    done
}

# Whether the server behind nginx answers, whatever it says.
counted_server_answers() {
    local status
    process_pid nginx >/dev/null || die "nginx ended at once: see $log_dir/nginx.log"
    status=$(curl -sS -o /dev/null -w '%{http_code}' "http://$(server_address "$1")/v2/" 2>/dev/null) || return 1
    ((status < 500))
}

counted_processes() {
    printf '%s\n' nginx token-server url-signer "${docker_registries[@]/#/registry-}"
}

counted_servers_run() {
    local name
    for name in $(counted_processes); do
        process_pid "$name" >/dev/null || return 1
    done
}

stop_counted_servers() {
    local name
    for name in $(counted_processes); do
        process_stop "$name"
    done
}
