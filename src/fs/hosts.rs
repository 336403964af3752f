//! Which registries a mount shows, and to whom: `allow`, `deny` and `[registry]` of the configuration.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::fs::Filesystem;
use crate::fs::ops::Caller;
use crate::registry::HostPatterns;

/// What decides about registries.
#[derive(Debug)]
pub(super) struct Hosts {
    pub(super) allow: HostPatterns,
    pub(super) deny: HostPatterns,
    pub(super) configured: HostPatterns,
}

impl Filesystem {
    pub(super) fn may_be_reached(&self, caller: Caller, host: &str) -> bool {
        let hosts = self.hosts();
        // A layout on disk is there because the configuration, or whoever mounted it, names it.
        let is_layout = || self.images().fetcher().client().layout_path(host).is_some();
        let allowed = hosts.allow.is_empty() || hosts.allow.has(host) || is_layout();
        let allowed = allowed && !hosts.deny.has(host);
        allowed && (caller.uid == self.options().owner_uid || self.is_configured(host))
    }

    /// Whether a registry is open to all users of the mount.
    pub(super) fn is_configured(&self, host: &str) -> bool {
        self.hosts().configured.has(host) || self.hosts().allow.has(host)
    }

    /// The names at the top: what the configuration names and what was visited, as far as it may be reached.
    pub(super) async fn list_registries(&self) -> Result<BTreeSet<String>> {
        let visited = self.images().resolver().visited("").await?;
        let host_of = |repository: &String| repository.split_once('/').map(|(host, _)| host.to_owned());
        let mut names: BTreeSet<String> = visited.iter().filter_map(host_of).collect();
        let hosts = self.hosts();
        names.extend(hosts.configured.literals().chain(hosts.allow.literals()).cloned());
        let owner = Caller {
            pid: 0,
            uid: self.options().owner_uid,
            gid: 0,
        };
        names.retain(|host| self.may_be_reached(owner, host));
        Ok(names)
    }
}
