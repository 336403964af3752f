//! What the configuration says of single registries and their mirrors, as the registry client takes it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::{MirrorEntry, RegistryEntry, SecretText};
use crate::registry::{HostOptions, MirrorOptions, Secret};

/// The client's options for one `[registry."HOST"]`.
pub(super) fn host_options(entry: &RegistryEntry) -> HostOptions {
    HostOptions {
        plain_http: entry.plain_http.unwrap_or(false),
        insecure: entry.insecure,
        ca_files: entry.ca.clone().unwrap_or_default(),
        client_cert: entry.client_cert.clone(),
        client_key: entry.client_key.clone(),
        proxy: entry.proxy.as_ref().map(|proxy| Secret::new(proxy.expose())),
        connect_timeout: entry.connect_timeout_s.map(Duration::from_secs),
        headers: secrets(entry.header.as_ref()),
        credential: None,
        server: entry.server.clone(),
        mirrors: entry
            .mirror
            .as_ref()
            .map(|mirrors| mirrors.iter().map(mirror_options).collect()),
    }
}

fn mirror_options(entry: &MirrorEntry) -> MirrorOptions {
    MirrorOptions {
        url: entry.url.clone(),
        capabilities: entry.capabilities.clone().unwrap_or_default(),
        override_path: entry.override_path.unwrap_or(false),
        host: HostOptions {
            insecure: entry.insecure,
            ca_files: entry.ca.clone().unwrap_or_default(),
            client_cert: entry.client_cert.clone(),
            client_key: entry.client_key.clone(),
            proxy: entry.proxy.as_ref().map(|proxy| Secret::new(proxy.expose())),
            connect_timeout: entry.connect_timeout_s.map(Duration::from_secs),
            headers: secrets(entry.header.as_ref()),
            ..HostOptions::default()
        },
    }
}

fn secrets(headers: Option<&BTreeMap<String, SecretText>>) -> BTreeMap<String, Secret> {
    let headers = headers.into_iter().flatten();
    headers
        .map(|(name, value)| (name.clone(), Secret::new(value.expose())))
        .collect()
}
