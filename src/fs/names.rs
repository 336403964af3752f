//! Lookups and listings in the tree of names, by the rules of `README.md`, "The tree".
//!
//! A bare name is not asked for when it is looked up: it is a directory, and what it is gets decided by the first listing
//! of it or the first of an image's own names in it. From then on it stays that for as long as the kernel holds it; a tag
//! that has moved is a new inode under the old name.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fs::grammar::{Meaning, OwnName, meaning};
use crate::fs::nodes::{BareName, Bound, ImageAt, Kind, Likeness, NameNode, STATE_INO};
use crate::fs::ops::{Answer, Caller, Entry, FOREVER, Lookup, ROOT_INO};
use crate::fs::privacy::Privacy;
use crate::fs::{CHANGING_TTL, Filesystem, within};
use crate::image::Named;
use crate::image::manifest::choose;
use crate::registry::reference::{Repository, Target, canonical_host, is_component, is_host};

/// What is known now of the tag that a bare name may be.
#[derive(Debug, Clone, Copy)]
enum Tag {
    /// Nobody asked.
    Unchecked,
    /// The repository above has no such tag.
    Absent,
    /// It names this digest, and need not be asked for again for so long.
    Names(Digest, Duration),
}

impl Tag {
    /// Whether an inode for the bare name still means it.
    fn like(self, kind: &Kind) -> Likeness {
        let Kind::Bare(bare) = kind else {
            return Likeness::Different;
        };
        match (bare.bound(), self) {
            (Some(Bound::Image(_)), Self::Absent) => Likeness::Different,
            (Some(Bound::Image(at)), Self::Names(digest, _)) if *at.digest() != digest => Likeness::Different,
            (Some(_), _) => Likeness::Same,
            (None, _) => Likeness::Open,
        }
    }
}

impl Filesystem {
    pub(super) fn lookup_name(&self, caller: Caller, dir: &Arc<NameNode>, name: &[u8]) -> Answer<Lookup> {
        if dir.ino == ROOT_INO && name == b".registryfs" {
            return Answer::Now(self.state_entry());
        }
        if dir.image().is_some()
            && let Err(error) = self.admit_now(caller, dir)
        {
            return Answer::Now(Err(error));
        }
        match &dir.kind {
            Kind::Root => Answer::Now(self.lookup_root(caller, dir, name)),
            Kind::State => Answer::Now(self.lookup_state(caller, dir, name)),
            Kind::Registry { host } => self.lookup_below(caller, dir, host, None, name),
            Kind::Bare(bare) => match meaning(name) {
                Meaning::Own(own) => self.lookup_own_of_bare(caller, dir, own),
                _ => self.lookup_below(caller, dir, &bare.host, Some(bare.path()), name),
            },
            Kind::Image(at) => match meaning(name) {
                Meaning::Own(own) => self.lookup_own(caller, dir, Arc::clone(at), own),
                _ => Answer::Now(Ok(Lookup::Absent(FOREVER))),
            },
            Kind::Platforms(at) => self.lookup_platform(caller, dir, at, name),
            Kind::Layers(at) => Answer::Now(Ok(self.lookup_layer(dir, at, name))),
            Kind::Layer { at, number } => self.lookup_layer_name(caller, dir, Arc::clone(at), *number, name),
            Kind::Text(_) | Kind::Config { .. } | Kind::Blob(_) | Kind::Toc { .. } => {
                Answer::Now(Err(Error::posix(dir.path.as_str(), libc::ENOTDIR)))
            }
        }
    }

    fn state_entry(&self) -> Result<Lookup> {
        Ok(Lookup::Found(Entry {
            attr: self.name_attr(&*self.nodes().get(STATE_INO)?),
            attr_ttl: FOREVER,
            entry_ttl: FOREVER,
        }))
    }

    /// Looks a registry up. No DNS, no connection: only the grammar and the configuration decide.
    fn lookup_root(&self, caller: Caller, dir: &NameNode, name: &[u8]) -> Result<Lookup> {
        let Some(host) = std::str::from_utf8(name).ok().filter(|name| is_host(name)) else {
            return Ok(Lookup::Absent(FOREVER));
        };
        // Docker Hub's other names lead to it, but only one name is one place.
        if canonical_host(host)? != host {
            return Ok(Lookup::Absent(FOREVER));
        }
        // What is held already has a mode that keeps strangers out. An error would make the kernel throw out what is mounted
        // below, for those who may be there.
        let is_held = || !self.nodes().held(&dir.child_path(host)).is_empty();
        if !self.may_be_reached(caller, host) && !is_held() {
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
            .count(dir.ino, dir.child_path(host), None, |_| Likeness::Same, kind);
        Entry {
            attr: self.name_attr(&node),
            attr_ttl: self.name_attr_ttl(&node),
            entry_ttl: FOREVER,
        }
    }

    /// Looks a name up below a registry (`parent` none) or a repository path, where it is none of an image's own.
    fn lookup_below(
        &self,
        caller: Caller,
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
                self.lookup_image(caller, dir, host, &path_of(component), target, name)
            }
            Meaning::Digest(digest) if is_path => match &parent {
                Some(path) => self.lookup_image(caller, dir, host, path, Target::Digest(digest), name),
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
        let held = self.nodes().held(&path);
        let images: Vec<Arc<ImageAt>> = held.iter().filter_map(|node| node.image()).collect();
        let repository = parent
            .as_ref()
            .and_then(|parent| Repository::new(host, parent).ok());
        let (Some(repository), false) = (repository, images.is_empty()) else {
            return Answer::Now(Ok(Lookup::Found(self.count_bare(
                dir,
                host,
                parent,
                name,
                Tag::Unchecked,
            ))));
        };
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let (host, name) = (host.to_owned(), name.to_owned());
        let wait = self.options().lookup_wait;
        self.journaled("lookup", move || path, async move {
            let what = format!("{repository}:{name}");
            let check = filesystem.images().resolver().tag(&repository, &name);
            let tag = match within(wait, || what, check).await {
                Ok(current) => Tag::Names(current.digest, current.valid_for),
                Err(Error::NotFound { .. }) => Tag::Absent,
                Err(error @ Error::Denied { .. }) => return Err(error),
                Err(error) => {
                    let target = Target::Tag(name.clone());
                    match filesystem.still(&repository, &target, &images, &error).await {
                        Some(at) => Tag::Names(*at.digest(), CHANGING_TTL),
                        None => return Err(error),
                    }
                }
            };
            for at in &images {
                filesystem.settle(at).await;
            }
            Ok(Lookup::Found(
                filesystem.count_bare(&dir, &host, parent, &name, tag),
            ))
        })
    }

    /// What a reference names still, of the images that are held for it, where it cannot be checked for a reason that says
    /// nothing about it. An error would make the kernel throw out what is mounted below.
    async fn still(
        &self,
        repository: &Repository,
        target: &Target,
        held: &[Arc<ImageAt>],
        error: &Error,
    ) -> Option<Arc<ImageAt>> {
        let digest = match target {
            Target::Digest(digest) => Some(*digest),
            Target::Tag(tag) => match self.images().resolver().tag_record(repository, tag).await {
                // What was last heard may be that there is no such tag.
                Ok(record) => record?.digest,
                Err(_) => held.last().map(|at| *at.digest()),
            },
        };
        let still = held.iter().rev().find(|at| Some(*at.digest()) == digest)?;
        self.journal().record("lookup", &repository.to_string(), error);
        Some(Arc::clone(still))
    }

    /// Counts a lookup of a bare name.
    fn count_bare(&self, dir: &NameNode, host: &str, parent: Option<String>, name: &str, tag: Tag) -> Entry {
        let kind = || {
            let bound = parking_lot::Mutex::default();
            Kind::Bare(BareName {
                host: host.to_owned(),
                parent,
                name: name.to_owned(),
                bound,
                bound_since: OnceLock::new(),
            })
        };
        let node = self
            .nodes()
            .count(dir.ino, dir.child_path(name), None, |kind| tag.like(kind), kind);
        let bound = match &node.kind {
            Kind::Bare(bare) => bare.bound(),
            _ => None,
        };
        let entry_ttl = match (bound, tag) {
            (Some(Bound::Image(_)), Tag::Names(_, valid_for)) => valid_for,
            (Some(Bound::Repository), _) => self.images().resolver().tag_ttl(),
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
        caller: Caller,
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
                    let holds = filesystem.images().resolver().absent_ttl(repository.host());
                    return Ok(Lookup::Absent(holds));
                }
                Err(error @ Error::Denied { .. }) => return Err(error),
                Err(error) => {
                    let held = filesystem.nodes().held(&path);
                    let held: Vec<_> = held.iter().filter_map(|node| node.image()).collect();
                    match filesystem.still(&repository, &target, &held, &error).await {
                        Some(at) => (at, CHANGING_TTL),
                        None => return Err(error),
                    }
                }
            };
            let (digest, has_image) = (*at.digest(), at.image.is_ok());
            let like = |kind: &Kind| match kind {
                Kind::Image(held) if *held.digest() == digest && held.image.is_ok() == has_image => {
                    Likeness::Same
                }
                _ => Likeness::Different,
            };
            let kind = || Kind::Image(at);
            let node = filesystem.nodes().count(dir.ino, path, None, like, kind);
            Ok(Lookup::Found(
                filesystem.image_entry(caller, &node, entry_ttl).await,
            ))
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
        let platform = &self.options().platform;
        let is_offered = match &named {
            Named::Image(_) => true,
            Named::Index(index) => choose(&index.entries, platform).is_some(),
        };
        let image = match images.image(repository, &digest, platform).await {
            // An index without this platform still has the others.
            Err(error @ Error::NotFound { .. }) if !is_offered => Err(error),
            chosen => Ok(chosen.map_err(missing_of_index)?),
        };
        let privacy = Privacy::new(self.options().hides_private);
        Ok((
            Arc::new(ImageAt {
                named,
                image,
                privacy,
            }),
            valid_for,
        ))
    }

    /// One of an image's own names in a directory that may be one: this decides what the directory is.
    fn lookup_own_of_bare(&self, caller: Caller, dir: &Arc<NameNode>, own: OwnName) -> Answer<Lookup> {
        if let Some(at) = dir.image() {
            return self.lookup_own(caller, dir, at, own);
        }
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let wait = self.options().lookup_wait;
        Answer::later(async move {
            let what = dir.path.clone();
            let deciding = async {
                let at = filesystem.decide_image(&dir).await?;
                filesystem.admit(caller, &dir.path, &at).await?;
                Ok(at)
            };
            let at = match within(wait, || what, deciding).await {
                Ok(at) => at,
                Err(error) => {
                    let path = dir.child_path(own.name());
                    filesystem.journal().record("lookup", &path, &error);
                    return match error {
                        Error::NotFound { .. } => Ok(Lookup::Absent(CHANGING_TTL)),
                        error => Err(error),
                    };
                }
            };
            // Its deadlines are its own, and what goes wrong then it says itself.
            match filesystem.lookup_own(caller, &dir, at, own) {
                Answer::Now(result) => result,
                Answer::Later(work) => work.await,
            }
        })
    }

    /// Reads a bare name as a tag, and binds the directory to the image if it is one.
    pub(super) async fn decide_image(&self, dir: &NameNode) -> Result<Arc<ImageAt>> {
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
            Ok((at, _)) => {
                self.settle(&at).await;
                at
            }
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
            Bound::Image(at) => {
                bare.bound_since.get_or_init(Instant::now);
                Ok(Arc::clone(at))
            }
            Bound::Repository => Err(absent("it is a repository, not an image: add a tag")),
        }
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
                Some(self.count_bare(dir, host, None, text, Tag::Unchecked))
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
                Some(self.count_bare(dir, &bare.host, Some(bare.path()), text, Tag::Unchecked))
            }
            _ => None,
        }
    }
}

/// The error for an image that its index names and the registry does not have: the reference is there all the same.
pub(super) fn missing_of_index(error: Error) -> Error {
    match error {
        Error::NotFound { what, why } => Error::malformed(
            what,
            format!("the index names it, the registry does not have it: {why}"),
        ),
        error => error,
    }
}
