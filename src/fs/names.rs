//! Lookups and listings in the tree of names, by the rules of `README.md`, "The tree".
//!
//! A bare name is not asked for when it is looked up: it is a directory, and what it is gets decided by the first listing
//! of it or the first of an image's own names in it. From then on it stays that for as long as the kernel holds it; a tag
//! that has moved is a new inode under the old name.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fs::grammar::{Meaning, OwnName, meaning};
use crate::fs::nodes::{BareName, Bound, ImageAt, Kind, NameNode, Nodes, STATE_INO, Snapshot};
use crate::fs::ops::{Answer, Caller, DirEntry, Entry, FOREVER, FileType, Lookup};
use crate::fs::{CHANGING_TTL, Filesystem, READDIR_WAIT, within};
use crate::image::resolve::ABSENT_TTL;
use crate::registry::reference::{Repository, Target, canonical_host, is_component, is_host};

impl Filesystem {
    pub(super) fn lookup_name(&self, caller: Caller, dir: &Arc<NameNode>, name: &[u8]) -> Answer<Lookup> {
        match &dir.kind {
            Kind::Root => Answer::Now(self.lookup_root(caller, dir, name)),
            Kind::State => Answer::Now(Ok(self.lookup_state(dir, name))),
            Kind::Registry { host } => self.lookup_below(dir, host, None, name),
            Kind::Bare(bare) => match meaning(name) {
                Meaning::Own(own) => self.lookup_own_of_bare(dir, own),
                _ => self.lookup_below(dir, &bare.host, Some(bare.path()), name),
            },
            Kind::Image(at) => match meaning(name) {
                Meaning::Own(own) => self.lookup_own(dir, Arc::clone(at), own),
                _ => Answer::Now(Ok(Lookup::Absent(FOREVER))),
            },
            Kind::Platforms(at) => self.lookup_platform(dir, at, name),
            Kind::Layers(at) => Answer::Now(Ok(self.lookup_layer(dir, at, name))),
            Kind::Layer { at, number } => self.lookup_layer_name(dir, Arc::clone(at), *number, name),
            Kind::Text(_) | Kind::Config { .. } | Kind::Blob(_) | Kind::Toc { .. } => {
                Answer::Now(Err(Error::posix(dir.path.as_str(), libc::ENOTDIR)))
            }
        }
    }

    /// Looks a registry up. No DNS, no connection: only the grammar and the configuration decide.
    fn lookup_root(&self, caller: Caller, dir: &NameNode, name: &[u8]) -> Result<Lookup> {
        if name == b".registryfs" {
            let attr = self.name_attr(&*self.nodes().get(STATE_INO)?);
            return Ok(Lookup::Found(Entry {
                attr,
                attr_ttl: FOREVER,
                entry_ttl: FOREVER,
            }));
        }
        let Some(host) = std::str::from_utf8(name).ok().filter(|name| is_host(name)) else {
            return Ok(Lookup::Absent(FOREVER));
        };
        // Docker Hub's other names lead to it, but only one name is one place.
        if canonical_host(host)? != host {
            return Ok(Lookup::Absent(FOREVER));
        }
        if !self.may_be_reached(caller, host) {
            let why = "the configuration does not allow this registry here: see allow, deny and [registry]";
            let error = Error::denied(host, why);
            self.journal().record("lookup", host, &error);
            return Err(error);
        }
        Ok(Lookup::Found(self.count_registry(dir, host)))
    }

    fn count_registry(&self, dir: &NameNode, host: &str) -> Entry {
        let kind = || Kind::Registry {
            host: host.to_owned(),
        };
        let node = self
            .nodes()
            .count(dir.ino, dir.child_path(host), None, |_| true, kind);
        Entry {
            attr: self.name_attr(&node),
            attr_ttl: self.name_attr_ttl(&node),
            entry_ttl: FOREVER,
        }
    }

    fn may_be_reached(&self, caller: Caller, host: &str) -> bool {
        let options = self.options();
        let named = |list: &[String]| list.iter().any(|pattern| matches(pattern, host));
        let allowed = (options.allow.is_empty() || named(&options.allow)) && !named(&options.deny);
        allowed && (caller.uid == options.owner_uid || self.is_configured(host))
    }

    /// Whether a registry is open to all users of the mount.
    pub(super) fn is_configured(&self, host: &str) -> bool {
        let options = self.options();
        options
            .configured
            .iter()
            .chain(&options.allow)
            .any(|pattern| matches(pattern, host))
    }

    /// Looks a name up below a registry (`parent` none) or a repository path, where it is none of an image's own.
    fn lookup_below(
        &self,
        dir: &Arc<NameNode>,
        host: &str,
        parent: Option<String>,
        name: &[u8],
    ) -> Answer<Lookup> {
        let path_of = |component: &str| match &parent {
            Some(parent) => format!("{parent}/{component}"),
            None => component.to_owned(),
        };
        // Below a name that can only be a tag there is nothing but the image's own names.
        let is_path = parent
            .as_ref()
            .is_none_or(|parent| parent.split('/').all(is_component));
        match meaning(name) {
            Meaning::Bare { name, tag, component } if is_path && (component || (tag && parent.is_some())) => {
                self.lookup_bare(dir, host, parent, name)
            }
            Meaning::Image { component, target } if is_path => {
                self.lookup_image(dir, host, &path_of(component), target, name)
            }
            Meaning::Digest(digest) if is_path => match &parent {
                Some(path) => self.lookup_image(dir, host, path, Target::Digest(digest), name),
                None => Answer::Now(Ok(Lookup::Absent(FOREVER))),
            },
            _ => Answer::Now(Ok(Lookup::Absent(FOREVER))),
        }
    }

    /// A bare name is a directory. Only if it is known to be a tag is its digest checked, when that is due.
    fn lookup_bare(
        &self,
        dir: &Arc<NameNode>,
        host: &str,
        parent: Option<String>,
        name: &str,
    ) -> Answer<Lookup> {
        let path = dir.child_path(name);
        let bound = self
            .nodes()
            .held(&path)
            .into_iter()
            .any(|node| node.image().is_some());
        let repository = parent
            .as_ref()
            .and_then(|parent| Repository::new(host, parent).ok());
        let (Some(repository), true) = (repository, bound) else {
            return Answer::Now(Ok(Lookup::Found(self.count_bare(dir, host, parent, name, None))));
        };
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let (host, name) = (host.to_owned(), name.to_owned());
        self.journaled("lookup", move || path, async move {
            let current = match filesystem.images().resolver().tag(&repository, &name).await {
                Ok(current) => Some((current.digest, current.valid_for)),
                Err(Error::NotFound { .. }) => None,
                Err(error) => return Err(error),
            };
            Ok(Lookup::Found(
                filesystem.count_bare(&dir, &host, parent, &name, current),
            ))
        })
    }

    /// Counts a lookup of a bare name whose tag has the digest `current` by now, if anybody knows.
    fn count_bare(
        &self,
        dir: &NameNode,
        host: &str,
        parent: Option<String>,
        name: &str,
        current: Option<(Digest, Duration)>,
    ) -> Entry {
        let same = |kind: &Kind| match kind {
            Kind::Bare(bare) => match bare.bound() {
                Some(Bound::Image(at)) => current.is_none_or(|(digest, _)| *at.digest() == digest),
                Some(Bound::Repository) | None => true,
            },
            _ => false,
        };
        let kind = || {
            let bound = parking_lot::Mutex::default();
            Kind::Bare(BareName {
                host: host.to_owned(),
                parent,
                name: name.to_owned(),
                bound,
            })
        };
        let node = self
            .nodes()
            .count(dir.ino, dir.child_path(name), None, same, kind);
        let entry_ttl = match (&node.kind, current) {
            (Kind::Bare(bare), current) => match (bare.bound(), current) {
                (Some(Bound::Image(_)), Some((_, valid_for))) => valid_for,
                (Some(Bound::Repository), _) => self.images().resolver().tag_ttl(),
                _ => CHANGING_TTL,
            },
            _ => CHANGING_TTL,
        };
        Entry {
            attr: self.name_attr(&node),
            attr_ttl: self.name_attr_ttl(&node),
            entry_ttl,
        }
    }

    /// `component:tag`, `component@digest` or a digest: an image, or nothing.
    fn lookup_image(
        &self,
        dir: &Arc<NameNode>,
        host: &str,
        path: &str,
        target: Target,
        name: &[u8],
    ) -> Answer<Lookup> {
        let Ok(repository) = Repository::new(host, path) else {
            return Answer::Now(Ok(Lookup::Absent(FOREVER)));
        };
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let path = dir.child_path(&String::from_utf8_lossy(name));
        let journal_path = path.clone();
        let wait = self.options().lookup_wait;
        self.journaled("lookup", move || journal_path, async move {
            let what = repository.to_string();
            let work = filesystem.open_image(&repository, &target);
            let (at, entry_ttl) = match within(wait, || what, work).await {
                Ok(opened) => opened,
                Err(error @ Error::NotFound { .. }) => {
                    filesystem.journal().record("lookup", &path, &error);
                    return Ok(Lookup::Absent(ABSENT_TTL));
                }
                Err(error) => return Err(error),
            };
            let digest = *at.digest();
            let same = |kind: &Kind| matches!(kind, Kind::Image(at) if *at.digest() == digest);
            let kind = || Kind::Image(at);
            let node = filesystem.nodes().count(dir.ino, path, None, same, kind);
            let attr = filesystem.name_attr(&node);
            Ok(Lookup::Found(Entry {
                attr,
                attr_ttl: FOREVER,
                entry_ttl,
            }))
        })
    }

    /// What a reference names now, and for how long.
    async fn open_image(&self, repository: &Repository, target: &Target) -> Result<(Arc<ImageAt>, Duration)> {
        let images = self.images();
        let (digest, valid_for) = match target {
            Target::Digest(digest) => (*digest, FOREVER),
            Target::Tag(tag) => {
                let current = images.resolver().tag(repository, tag).await?;
                (current.digest, current.valid_for)
            }
        };
        let named = images.named(repository, &digest).await?;
        let image = match images.image(repository, &digest, &self.options().platform).await {
            // An index without this platform still has the others.
            Err(error @ Error::NotFound { .. }) => Err(error),
            chosen => Ok(chosen?),
        };
        Ok((Arc::new(ImageAt { named, image }), valid_for))
    }

    /// One of an image's own names in a directory that may be one: this decides what the directory is.
    fn lookup_own_of_bare(&self, dir: &Arc<NameNode>, own: OwnName) -> Answer<Lookup> {
        if let Some(at) = dir.image() {
            return self.lookup_own(dir, at, own);
        }
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let path = dir.child_path(own.name());
        let wait = self.options().lookup_wait;
        self.journaled("lookup", move || path, async move {
            let what = dir.path.clone();
            let deciding = async {
                let at = filesystem.decide_image(&dir).await?;
                match filesystem.lookup_own(&dir, at, own) {
                    Answer::Now(result) => result,
                    Answer::Later(work) => work.await,
                }
            };
            match within(wait, || what, deciding).await {
                Err(error @ Error::NotFound { .. }) => {
                    filesystem
                        .journal()
                        .record("lookup", &dir.child_path(own.name()), &error);
                    Ok(Lookup::Absent(CHANGING_TTL))
                }
                answer => answer,
            }
        })
    }

    /// Reads a bare name as a tag, and binds the directory to the image if it is one.
    async fn decide_image(&self, dir: &NameNode) -> Result<Arc<ImageAt>> {
        let Kind::Bare(bare) = &dir.kind else {
            return Err(Error::posix(dir.path.as_str(), libc::ENOENT));
        };
        let absent = |why: &str| Error::not_found(dir.path.as_str(), why);
        if let Some(Bound::Repository) = bare.bound() {
            return Err(absent("it is a repository, not an image: add a tag"));
        }
        let Some(parent) = &bare.parent else {
            return Err(absent(
                "a registry's first level holds repositories, not images: add a tag",
            ));
        };
        let repository = Repository::new(&bare.host, parent)?;
        let target = Target::Tag(bare.name.clone());
        let at = match self.open_image(&repository, &target).await {
            Ok((at, _)) => at,
            Err(error @ Error::Denied { .. }) => {
                let known = self.images().resolver().known_tags(&repository).await?.is_some();
                return Err(if known {
                    error
                } else {
                    absent(&format!("absent or private: {error}"))
                });
            }
            Err(Error::NotFound { what, why }) => {
                return Err(absent(&format!("absent or private: {what}: {why}")));
            }
            Err(error) => return Err(error),
        };
        let mut bound = bare.bound.lock();
        // Two may decide at once; the first to bind it has decided for both.
        match bound.get_or_insert(Bound::Image(at)) {
            Bound::Image(at) => Ok(Arc::clone(at)),
            Bound::Repository => Err(absent("it is a repository, not an image: add a tag")),
        }
    }

    pub(super) fn readdir_name(
        &self,
        dir: &Arc<NameNode>,
        offset: u64,
        limit: usize,
    ) -> Answer<Vec<DirEntry>> {
        if !dir.is_dir() {
            return Answer::Now(Err(Error::posix(dir.path.as_str(), libc::ENOTDIR)));
        }
        if offset > 0
            && let Some(snapshot) = &*dir.listing.lock()
        {
            return Answer::Now(Ok(page(&snapshot.entries, offset, limit)));
        }
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let path = dir.path.clone();
        self.journaled("readdir", move || path, async move {
            let what = dir.path.clone();
            let mut entries = vec![
                DirEntry {
                    name: b".".to_vec(),
                    ino: dir.ino,
                    kind: FileType::Dir,
                    next: 0,
                },
                DirEntry {
                    name: b"..".to_vec(),
                    ino: dir.parent,
                    kind: FileType::Dir,
                    next: 0,
                },
            ];
            entries.extend(within(READDIR_WAIT, || what, filesystem.list(&dir)).await?);
            for (position, entry) in entries.iter_mut().enumerate() {
                entry.next = position as u64 + 1;
            }
            let entries = Arc::new(entries);
            let taken = SystemTime::now();
            *dir.listing.lock() = Some(Snapshot {
                entries: Arc::clone(&entries),
                taken,
            });
            Ok(page(&entries, offset, limit))
        })
    }

    /// The names in a directory, without `.` and `..`.
    async fn list(&self, dir: &Arc<NameNode>) -> Result<Vec<DirEntry>> {
        if let Some(at) = dir.image() {
            return Ok(self.own_entries(dir, &at));
        }
        let names = match &dir.kind {
            Kind::Root => self.list_registries().await?,
            Kind::State => return Ok(self.state_entries()),
            Kind::Registry { host } => self.list_registry(host).await?,
            Kind::Bare(bare) => match self.decide(dir, bare).await? {
                Bound::Image(at) => return Ok(self.own_entries(dir, &at)),
                Bound::Repository => self.list_repository(dir, bare).await?,
            },
            Kind::Platforms(at) => return Ok(self.platform_entries(dir, at)),
            Kind::Layers(at) => return Ok(self.layer_entries(dir, at)),
            Kind::Layer { at, number } => return self.layer_name_entries(dir, at, *number).await,
            _ => return Err(Error::posix(dir.path.as_str(), libc::ENOTDIR)),
        };
        let entry = |name: String| {
            let ino = if name == ".registryfs" {
                STATE_INO
            } else {
                Nodes::number_of(&dir.child_path(&name))
            };
            DirEntry {
                name: name.into_bytes(),
                ino,
                kind: FileType::Dir,
                next: 0,
            }
        };
        // A tag that has the name of one of an image's own is reached by `name:tag` only.
        let is_root = matches!(dir.kind, Kind::Root);
        let can_be_found =
            |name: &String| is_root || matches!(meaning(name.as_bytes()), Meaning::Bare { .. });
        Ok(names.into_iter().filter(can_be_found).map(entry).collect())
    }

    async fn list_registries(&self) -> Result<BTreeSet<String>> {
        let visited = self.images().resolver().visited("").await?;
        let mut hosts: BTreeSet<String> = visited.iter().filter_map(|name| host_of(name)).collect();
        hosts.extend(
            self.options()
                .configured
                .iter()
                .filter(|name| is_host(name))
                .cloned(),
        );
        hosts.retain(|host| {
            let owner = Caller {
                pid: 0,
                uid: self.options().owner_uid,
                gid: 0,
            };
            self.may_be_reached(owner, host)
        });
        hosts.insert(".registryfs".to_owned());
        Ok(hosts)
    }

    async fn list_registry(&self, host: &str) -> Result<BTreeSet<String>> {
        // A registry without a catalog still has what was visited; one that cannot be reached too.
        let listing = match self.images().repos(host).await {
            Ok(listing) => listing.names,
            Err(error) if error.is_network() => return Err(error),
            Err(_) => Vec::new(),
        };
        Ok(listing
            .iter()
            .filter_map(|path| path.split('/').next())
            .map(str::to_owned)
            .collect())
    }

    /// Decides what a bare name is: a tag if the repository above has that tag, else a repository or a prefix of some.
    async fn decide(&self, dir: &NameNode, bare: &BareName) -> Result<Bound> {
        if let Some(bound) = bare.bound() {
            return Ok(bound);
        }
        let mut refusals = Vec::new();
        if bare.parent.is_some() {
            match self.decide_image(dir).await {
                Ok(at) => return Ok(Bound::Image(at)),
                Err(error @ (Error::NotFound { .. } | Error::Denied { .. })) => {
                    refusals.push(error.to_string());
                }
                Err(error) => return Err(error),
            }
        }
        if is_component(&bare.name) {
            let repository = Repository::new(&bare.host, &bare.path())?;
            let is_repository = match self.images().tags(&repository).await {
                Ok(_) => true,
                Err(error @ (Error::NotFound { .. } | Error::Denied { .. })) => {
                    refusals.push(error.to_string());
                    !self.children_known(&bare.host, &bare.path()).await?.is_empty()
                }
                Err(error) => return Err(error),
            };
            if is_repository {
                return Ok(bare.bound.lock().get_or_insert(Bound::Repository).clone());
            }
        }
        Err(Error::NotListable {
            what: dir.path.clone(),
            why: refusals.join("; "),
        })
    }

    async fn list_repository(&self, dir: &NameNode, bare: &BareName) -> Result<BTreeSet<String>> {
        let repository = Repository::new(&bare.host, &bare.path())?;
        let mut names = self.children_known(&bare.host, &bare.path()).await?;
        match self.images().tags(&repository).await {
            Ok(listing) => names.extend(listing.names),
            Err(Error::NotFound { .. } | Error::Denied { .. }) if !names.is_empty() => {}
            Err(Error::NotFound { what, why }) => {
                return Err(Error::NotListable {
                    what: dir.path.clone(),
                    why: format!("{what}: {why}"),
                });
            }
            Err(error) => return Err(error),
        }
        Ok(names)
    }

    /// The next components of all known repositories below a path: from the catalog as it was last heard, and visits.
    async fn children_known(&self, host: &str, path: &str) -> Result<BTreeSet<String>> {
        let resolver = self.images().resolver();
        let prefix = format!("{path}/");
        let below = |name: &str| {
            let rest = name.strip_prefix(&prefix)?;
            rest.split('/').next().map(str::to_owned)
        };
        let mut children = BTreeSet::new();
        if let Some(catalog) = resolver.known_catalog(host).await? {
            children.extend(catalog.names.iter().filter_map(|name| below(name)));
        }
        let host_prefix = format!("{host}/");
        let visited = resolver.visited(host).await?;
        children.extend(
            visited
                .iter()
                .filter_map(|name| below(name.strip_prefix(&host_prefix)?)),
        );
        Ok(children)
    }

    /// What a lookup of a listed name would answer, where no waiting is needed.
    pub(super) fn remember_name(&self, dir: &Arc<NameNode>, name: &[u8]) -> Option<Entry> {
        let text = std::str::from_utf8(name).ok()?;
        match &dir.kind {
            Kind::Root if text != ".registryfs" => Some(self.count_registry(dir, text)),
            Kind::Registry { host } => {
                let Meaning::Bare { .. } = meaning(name) else {
                    return None;
                };
                Some(self.count_bare(dir, host, None, text, None))
            }
            Kind::Bare(bare) if dir.image().is_none() => {
                let Meaning::Bare { .. } = meaning(name) else {
                    return None;
                };
                // One that is known to be a tag may be due for a check.
                let held = self.nodes().held(&dir.child_path(text));
                if held.iter().any(|node| node.image().is_some()) {
                    return None;
                }
                Some(self.count_bare(dir, &bare.host, Some(bare.path()), text, None))
            }
            _ => None,
        }
    }
}

/// The registry in `HOST/PATH`.
fn host_of(repository: &str) -> Option<String> {
    repository.split_once('/').map(|(host, _)| host.to_owned())
}

/// Whether a host pattern of the configuration means `host`: the same name, or `*.DOMAIN`.
fn matches(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix("*.") {
        Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')),
        None => pattern == host || pattern == "*",
    }
}

fn page(entries: &[DirEntry], offset: u64, limit: usize) -> Vec<DirEntry> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    entries.iter().skip(start).take(limit.max(1)).cloned().collect()
}
