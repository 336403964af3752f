//! Directory reads in the tree of names, and what a bare name turns out to be when it is listed.
//!
//! A reader gets a listing page by page, so the first page fixes all of it: a cookie names the listing it belongs to, and
//! the last few of a directory are kept for those who are still reading them.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};
use crate::fs::grammar::{Meaning, meaning};
use crate::fs::nodes::{BareName, Bound, Kind, NameNode, STATE_INO};
use crate::fs::ops::{Answer, Caller, DirEntry, FileType, ROOT_INO};
use crate::fs::{Filesystem, READDIR_WAIT, within};
use crate::registry::reference::{Repository, is_component};

/// Listings of one directory that are kept for their readers. A listing that says nothing new takes no place.
const KEPT_MAX: usize = 4;
/// How long a registry is waited for where what is known can be listed without it, for each question.
const KNOWN_WAIT: Duration = Duration::from_secs(6);
/// The low bits of a cookie: the position in a listing. The high ones are the listing's number.
const POSITION_BITS: u32 = 32;
/// Listing numbers stay so small that a cookie is a positive offset.
const NUMBER_MAX: u64 = i32::MAX as u64;

/// The listings that readers of a directory are being given.
#[derive(Debug, Default)]
pub(super) struct Listings {
    /// Oldest first.
    kept: VecDeque<Snapshot>,
    taken: Option<SystemTime>,
    last_number: u64,
}

/// A directory listing as it was when a reader began.
#[derive(Debug)]
struct Snapshot {
    number: u64,
    entries: Arc<Vec<DirEntry>>,
}

impl Listings {
    /// When the newest one was taken.
    pub(super) fn taken(&self) -> Option<SystemTime> {
        self.taken
    }

    /// Takes a new listing in, whose entries have no cookies yet, and returns its first page.
    fn begin(&mut self, mut entries: Vec<DirEntry>, limit: usize) -> Vec<DirEntry> {
        let is_same = |known: &Snapshot| {
            let pairs = known.entries.iter().zip(&entries);
            let same = |(a, b): (&DirEntry, &DirEntry)| (&a.name, a.ino, a.kind) == (&b.name, b.ino, b.kind);
            known.entries.len() == entries.len() && pairs.into_iter().all(same)
        };
        self.taken = Some(SystemTime::now());
        if let Some(newest) = self.kept.back().filter(|newest| is_same(newest)) {
            return page(&newest.entries, 0, limit);
        }
        let number = self.last_number % NUMBER_MAX + 1;
        self.last_number = number;
        for (position, entry) in entries.iter_mut().enumerate() {
            entry.next = number << POSITION_BITS | (position as u64 + 1);
        }
        if self.kept.len() == KEPT_MAX {
            self.kept.pop_front();
        }
        let first = page(&entries, 0, limit);
        let entries = Arc::new(entries);
        self.kept.push_back(Snapshot { number, entries });
        first
    }

    /// The page behind `cookie`. Where its listing is gone, that of the newest one behind the same position; nothing
    /// where there is none.
    fn next_page(&self, cookie: u64, limit: usize) -> Option<Vec<DirEntry>> {
        let (number, position) = split(cookie);
        let own = self.kept.iter().find(|snapshot| snapshot.number == number);
        let snapshot = own.or(self.kept.back())?;
        Some(page(&snapshot.entries, position, limit))
    }
}

/// A cookie's listing number and position.
fn split(cookie: u64) -> (u64, usize) {
    let position = cookie & u64::from(u32::MAX);
    (
        cookie >> POSITION_BITS,
        usize::try_from(position).unwrap_or(usize::MAX),
    )
}

fn page(entries: &[DirEntry], position: usize, limit: usize) -> Vec<DirEntry> {
    entries
        .iter()
        .skip(position)
        .take(limit.max(1))
        .cloned()
        .collect()
}

fn dir_entry(name: &[u8], ino: u64) -> DirEntry {
    DirEntry {
        name: name.to_vec(),
        ino,
        kind: FileType::Dir,
        next: 0,
    }
}

impl Filesystem {
    pub(super) fn readdir_name(
        &self,
        caller: Caller,
        dir: &Arc<NameNode>,
        cookie: u64,
        limit: usize,
    ) -> Answer<Vec<DirEntry>> {
        if !dir.is_dir() {
            return Answer::Now(Err(Error::posix(dir.path.as_str(), libc::ENOTDIR)));
        }
        if cookie > 0
            && self.admit_now(caller, dir).is_ok()
            && let Some(page) = dir.listings.lock().next_page(cookie, limit)
        {
            return Answer::Now(Ok(page));
        }
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let path = dir.shown().to_owned();
        self.journaled("readdir", move || path, async move {
            let what = dir.shown().to_owned();
            let listed = within(READDIR_WAIT, || what, filesystem.list(&dir)).await;
            let listed = listed.map_err(|error| not_listable(&dir, error))?;
            match dir.image() {
                Some(at) => filesystem.admit(caller, &dir.path, &at).await?,
                None => filesystem.admit_now(caller, &dir)?,
            }
            let mut entries = vec![dir_entry(b".", dir.ino), dir_entry(b"..", dir.parent())];
            entries.extend(listed);
            let first = dir.listings.lock().begin(entries, limit);
            Ok(match split(cookie) {
                (_, 0) => first,
                _ => dir.listings.lock().next_page(cookie, limit).unwrap_or_default(),
            })
        })
    }

    /// The names in a directory, without `.` and `..`.
    async fn list(&self, dir: &Arc<NameNode>) -> Result<Vec<DirEntry>> {
        if let Some(at) = dir.image() {
            return self.own_entries(dir, &at).await;
        }
        let names = match &dir.kind {
            Kind::Root => self.list_registries().await?,
            Kind::State => return Ok(self.state_entries()),
            Kind::Registry { host } => self.list_registry(host).await?,
            Kind::Bare(bare) => match self.decide(dir, bare).await? {
                Bound::Image(at) => return self.own_entries(dir, &at).await,
                Bound::Repository => self.list_repository(bare).await?,
            },
            Kind::Platforms(at) => return Ok(self.platform_entries(dir, at)),
            Kind::Layers(at) => return Ok(self.layer_entries(dir, at)),
            Kind::Layer { at, number } => return self.layer_name_entries(dir, at, *number).await,
            _ => return Err(Error::posix(dir.path.as_str(), libc::ENOTDIR)),
        };
        let entry = |name: String| {
            let ino = self.nodes().number_of(&dir.child_path(&name));
            dir_entry(name.as_bytes(), ino)
        };
        // A tag that has the name of one of an image's own is reached by `name:tag` only.
        let has_hosts = matches!(dir.kind, Kind::Root);
        let can_be_found = |name: &String| {
            has_hosts
                || matches!(
                    meaning(name.as_bytes()),
                    Meaning::Bare { .. } | Meaning::Digest(_)
                )
        };
        let entries = names.into_iter().filter(can_be_found).map(entry);
        let state = (dir.ino == ROOT_INO).then(|| dir_entry(b".registryfs", STATE_INO));
        Ok(state.into_iter().chain(entries).collect())
    }

    /// The first components of a registry's repositories. One without a catalog still has what was visited, and so has
    /// one that does not answer or refuses.
    async fn list_registry(&self, host: &str) -> Result<BTreeSet<String>> {
        let catalog = self.images().resolver().catalog(host).await;
        let mut names = self.children_known(host, "").await?;
        match catalog {
            Ok(listing) => names.extend(listing.names.iter().filter_map(|name| first_component(name))),
            Err(Error::NotFound { .. } | Error::Unsupported { .. }) => {}
            // Docker Hub, for one, shows its catalog to nobody: without credentials a refusal says only that.
            Err(error @ Error::Denied { .. }) if !self.has_credentials(host) => {
                self.journal().record("readdir", host, &error);
            }
            Err(error) if names.is_empty() => return Err(error),
            Err(error) => self.journal().record("readdir", host, &error),
        }
        Ok(names)
    }

    /// Whether credentials were sent to a registry.
    fn has_credentials(&self, host: &str) -> bool {
        let hosts = self.images().fetcher().client().health();
        hosts
            .iter()
            .any(|known| known.host == host && known.credentials.is_some())
    }

    /// Decides what a bare name is: a tag if the repository above has that tag, else a repository or a prefix of some.
    async fn decide(&self, dir: &NameNode, bare: &BareName) -> Result<Bound> {
        if let Some(bound) = bare.bound() {
            return Ok(bound);
        }
        let (host, path) = (&bare.host, bare.path());
        let wait = self.wait_for(host, &path).await?;
        let is_known = wait < READDIR_WAIT;
        let mut refusals = Vec::new();
        if bare.parent.is_some() {
            match within(wait, || dir.path.clone(), self.decide_image(dir)).await {
                Ok(at) => return Ok(Bound::Image(at)),
                Err(error @ (Error::NotFound { .. } | Error::Denied { .. })) => {
                    refusals.push(error.to_string());
                }
                // What is known to be a repository is listed as one, but it may be a tag too: that stays open.
                Err(error) if error.is_network() && is_known => {
                    self.journal().record("readdir", &dir.path, &error);
                    return Ok(Bound::Repository);
                }
                Err(error) => return Err(error),
            }
        }
        if is_component(&bare.name) {
            let repository = Repository::new(host, &path)?;
            let tags = self.images().tags(&repository);
            let is_repository = match within(wait, || repository.to_string(), tags).await {
                Ok(_) => true,
                Err(error @ (Error::NotFound { .. } | Error::Denied { .. })) => {
                    refusals.push(error.to_string());
                    self.is_prefix(host, &path).await?
                }
                Err(error) if error.is_network() && is_known => true,
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

    /// How long the registry is asked about a path: not for long if anything was ever heard of a repository there, or of
    /// some below it.
    async fn wait_for(&self, host: &str, path: &str) -> Result<Duration> {
        let Ok(repository) = Repository::new(host, path) else {
            return Ok(READDIR_WAIT);
        };
        let tags = self.images().resolver().known_tags(&repository).await?;
        let is_known = tags.is_some() || !self.children_known(host, path).await?.is_empty();
        Ok(if is_known { KNOWN_WAIT } else { READDIR_WAIT })
    }

    /// Whether repositories begin with `path`, by what is known or else by the registry's catalog.
    async fn is_prefix(&self, host: &str, path: &str) -> Result<bool> {
        if !self.children_known(host, path).await?.is_empty() {
            return Ok(true);
        }
        if let Err(error) = self.images().resolver().catalog(host).await {
            tracing::debug!(host, path, %error, "no catalog says whether repositories begin with this");
        }
        Ok(!self.children_known(host, path).await?.is_empty())
    }

    async fn list_repository(&self, bare: &BareName) -> Result<BTreeSet<String>> {
        let repository = Repository::new(&bare.host, &bare.path())?;
        let mut names = self.children_known(&bare.host, &bare.path()).await?;
        let wait = if names.is_empty() {
            READDIR_WAIT
        } else {
            KNOWN_WAIT
        };
        let tags = self.images().tags(&repository);
        match within(wait, || repository.to_string(), tags).await {
            Ok(listing) => {
                names.extend(listing.names);
                let unnamed = self.images().fetcher().client().unnamed(&repository).await?;
                names.extend(unnamed.iter().map(ToString::to_string));
            }
            Err(Error::NotFound { .. } | Error::Denied { .. }) if !names.is_empty() => {}
            Err(error) if error.is_network() && !names.is_empty() => {
                self.journal().record("readdir", &repository.to_string(), &error);
            }
            Err(error) => return Err(error),
        }
        Ok(names)
    }

    /// The next components of all known repositories below a path (all of a registry's if it is empty): from the catalog
    /// as it was last heard, and visits.
    async fn children_known(&self, host: &str, path: &str) -> Result<BTreeSet<String>> {
        let resolver = self.images().resolver();
        let prefix = match path {
            "" => String::new(),
            path => format!("{path}/"),
        };
        let below = |name: &str| first_component(name.strip_prefix(&prefix)?);
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
}

fn first_component(path: &str) -> Option<String> {
    path.split('/').next().map(str::to_owned)
}

/// A directory read never fails with ENOENT, which glibc takes for the directory's end.
fn not_listable(dir: &NameNode, error: Error) -> Error {
    match error {
        Error::NotFound { what, why } => Error::NotListable {
            what: dir.shown().to_owned(),
            why: format!("{what}: {why}"),
        },
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(names: &[&str]) -> Vec<DirEntry> {
        names.iter().map(|name| dir_entry(name.as_bytes(), 7)).collect()
    }

    fn names(page: &[DirEntry]) -> Vec<&str> {
        page.iter()
            .map(|entry| std::str::from_utf8(&entry.name).unwrap())
            .collect()
    }

    #[test]
    fn a_reader_goes_on_in_the_listing_it_began() {
        let mut listings = Listings::default();
        let first = listings.begin(entries(&["a", "b", "c"]), 1);
        let second = listings.begin(entries(&["0", "a", "b", "c"]), 1);
        assert_eq!((names(&first), names(&second)), (vec!["a"], vec!["0"]));
        let rest = listings.next_page(first[0].next, 9).unwrap();
        assert_eq!(names(&rest), ["b", "c"]);
        assert_eq!(
            names(&listings.next_page(second[0].next, 9).unwrap()),
            ["a", "b", "c"]
        );
        assert!(listings.next_page(rest[1].next, 9).unwrap().is_empty());
    }

    #[test]
    fn the_same_listing_again_takes_no_place_and_others_only_a_few() {
        let mut listings = Listings::default();
        let first = listings.begin(entries(&["a", "b"]), 1);
        for _ in 0..2 * KEPT_MAX {
            assert_eq!(listings.begin(entries(&["a", "b"]), 1), first);
        }
        for number in 0..2 * KEPT_MAX {
            listings.begin(entries(&["a", "b", &number.to_string()]), 1);
        }
        assert_eq!(listings.kept.len(), KEPT_MAX);
        // Its listing is gone, so the newest one goes on at the position.
        assert_eq!(
            names(&listings.next_page(first[0].next, 9).unwrap()),
            ["b", &(2 * KEPT_MAX - 1).to_string()]
        );
    }

    #[test]
    fn cookies_are_positive_offsets_for_ever() {
        let mut listings = Listings {
            last_number: NUMBER_MAX - 1,
            ..Listings::default()
        };
        let last = listings.begin(entries(&["a"]), 1);
        assert!(i64::try_from(last[0].next).is_ok());
        let anew = listings.begin(entries(&["b"]), 1);
        assert_eq!(split(anew[0].next), (1, 1));
    }
}
