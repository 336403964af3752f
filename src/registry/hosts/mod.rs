//! From the name of a registry to its endpoints: the mirrors in order, then the server. What the user set for us wins
//! over containerd's `hosts.toml`, and that over the `certs.d` of docker and podman; authorities add up. Everything is
//! read from files here, so it does not belong on an async thread.

mod base;
mod directories;
mod file;
mod settings;

pub(super) use base::Base;
pub(super) use file::{Capabilities, HostsFile};
pub(super) use settings::{ClientCertificate, PemFile, Settings};

use super::host::Scheme;
use super::options::{ClientOptions, HostOptions, MirrorOptions};
use super::proxy::ProxyUrl;
use crate::error::{Error, Result};
use settings::{Said, add_header};

/// Mirrors of one registry. Each may cost a wait, so there is a bound.
const MIRRORS_MAX: usize = 16;

/// One endpoint of a registry, with everything that there is to know before it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EndpointSpec {
    /// Whose credentials are sent: the canonical name of the host that is asked.
    pub(super) name: String,
    pub(super) base: Base,
    /// It is the registry itself and not a substitute, which is told by `ns` whom it stands for.
    pub(super) is_registry: bool,
    pub(super) capabilities: Capabilities,
    pub(super) settings: Settings,
}

/// The endpoints of the registry with the canonical name `registry`: mirrors in order, the server last. There is at
/// least one.
///
/// # Errors
/// [`Error::Usage`] naming the file (and line) or key that cannot be meant.
pub(super) fn resolve(options: &ClientOptions, registry: &str) -> Result<Vec<EndpointSpec>> {
    let own = options.hosts.get(registry);
    let found = directories::hosts_file(&options.certs_dirs, registry)?;
    let (origin, file) = match found {
        Some((path, file)) => (path.display().to_string(), Some(file)),
        None => (format!("[registry.{registry:?}]"), None),
    };
    let (file_server, file_said, file_capabilities, file_hosts) = match file {
        Some(file) => (
            file.server,
            file.server_said,
            file.server_capabilities,
            file.hosts,
        ),
        None => (None, Said::default(), Capabilities::ALL, Vec::new()),
    };
    let mut specs = Vec::new();
    match own.and_then(|own| own.mirrors.as_ref()) {
        Some(mirrors) => {
            for mirror in mirrors {
                let (base, capabilities, said) = of_mirror(registry, mirror)?;
                specs.push(substitute(options, registry, base, capabilities, &said)?);
            }
        }
        None => {
            for host in file_hosts {
                specs.push(substitute(
                    options,
                    registry,
                    host.base,
                    host.capabilities,
                    &host.said,
                )?);
            }
        }
    }
    if specs.len() > MIRRORS_MAX {
        let why = format!("{origin}: {registry} has more than {MIRRORS_MAX} mirrors");
        return Err(Error::usage(why));
    }
    let own_server = own.and_then(|own| own.server.as_deref());
    let (mut base, capabilities) = match own_server {
        Some(server) => (parse_server(registry, server)?, Capabilities::ALL),
        None => (
            file_server.unwrap_or_else(|| Base::of_registry(registry)),
            file_capabilities,
        ),
    };
    if own_server.is_none() && own.is_some_and(|own| own.plain_http) {
        base.scheme = Some(Scheme::Http);
    }
    let own_said = own.map(|own| of_options(registry, own)).transpose()?;
    let settings = own_said.unwrap_or_default().load()?.over(file_said.load()?);
    let mut server = substitute(options, registry, base, capabilities, &Said::default())?;
    server.settings = settings.over(server.settings);
    // A file may name the registry itself as its last host.
    let is_named_already = specs.last().is_some_and(|last: &EndpointSpec| {
        (&last.name, &last.base.path) == (&server.name, &server.base.path)
            && last.capabilities == server.capabilities
    });
    match (is_named_already, specs.last_mut()) {
        (true, Some(last)) => last.settings = last.settings.clone().over(server.settings),
        _ => specs.push(server),
    }
    if options.anonymous {
        for spec in &mut specs {
            spec.settings = std::mem::take(&mut spec.settings).without_identity();
        }
    }
    Ok(specs)
}

/// The settings of a host that is met on the way, such as a token service or a blob store.
///
/// # Errors
/// As [`resolve`].
pub(super) fn of_peer(options: &ClientOptions, name: &str) -> Result<Settings> {
    let own = options
        .hosts
        .get(name)
        .map(|own| of_options(name, own))
        .transpose()?;
    let below = directories::certificates(&options.certs_dirs, name)?;
    let settings = own.unwrap_or_default().load()?.over(below);
    Ok(match options.anonymous {
        true => settings.without_identity(),
        false => settings,
    })
}

/// Checks what the options say of single registries, so that a mistake is found at the start.
///
/// # Errors
/// [`Error::Usage`] naming the registry and the key or file.
pub(super) fn validate(options: &ClientOptions) -> Result<()> {
    for (name, own) in &options.hosts {
        of_options(name, own)?.load()?;
        if let Some(server) = &own.server {
            parse_server(name, server)?;
        }
        for mirror in own.mirrors.iter().flatten() {
            of_mirror(name, mirror)?.2.load()?;
        }
    }
    Ok(())
}

fn parse_server(registry: &str, server: &str) -> Result<Base> {
    Base::parse(server, false).map_err(|why| Error::usage(format!("[registry.{registry:?}] server: {why}")))
}

fn substitute(
    options: &ClientOptions,
    registry: &str,
    base: Base,
    capabilities: Capabilities,
    said: &Said,
) -> Result<EndpointSpec> {
    let name = base.name(registry);
    let own = said.load()?;
    Ok(EndpointSpec {
        is_registry: name == registry,
        settings: own.over(of_peer(options, &name)?),
        name,
        base,
        capabilities,
    })
}

fn of_options(registry: &str, own: &HostOptions) -> Result<Said> {
    let wrong = |why: String| Error::usage(format!("[registry.{registry:?}]: {why}"));
    let mut said = Said {
        ca: own.ca_files.clone(),
        insecure: own.insecure,
        connect: own.connect_timeout,
        proxy: own
            .proxy
            .as_ref()
            .map(|proxy| ProxyUrl::parse(proxy.expose()))
            .transpose()
            .map_err(wrong)?,
        ..Said::default()
    };
    for (name, value) in &own.headers {
        add_header(&mut said.headers, name, value.expose()).map_err(wrong)?;
    }
    match (&own.client_cert, &own.client_key) {
        (Some(certificate), key) => said.client.push((certificate.clone(), key.clone())),
        (None, Some(_)) => return Err(wrong("client_key needs client_cert".to_owned())),
        (None, None) => {}
    }
    Ok(said)
}

fn of_mirror(registry: &str, mirror: &MirrorOptions) -> Result<(Base, Capabilities, Said)> {
    let wrong = |why: String| Error::usage(format!("[[registry.{registry:?}.mirror]]: {why}"));
    let base = Base::parse(&mirror.url, mirror.override_path).map_err(wrong)?;
    let capabilities = Capabilities::parse(&mirror.capabilities).map_err(wrong)?;
    Ok((base, capabilities, of_options(registry, &mirror.host)?))
}

#[cfg(test)]
mod tests;
