//! `get`: files of an image, written below a directory as they are in the image.
//!
//! Whoever has the store says what there is to write (`plan`) and streams contents; this side only writes, so it works
//! the same with a daemon and without, and everything is made with the rights of whoever runs the command.
//!
//! - Directories come first, with rights that let us write in them, and get their own attributes last (`destination`).
//! - Contents come in batches, each some files of one layer in the order of its blob, several batches at a time
//!   (`contents`). Each batch has a thread that writes, and that no network keeps waiting (`writer`).
//! - A file has a temporary name until it is complete, verified and has its attributes; then a rename puts it in its
//!   place. Nothing is synced: as with tar and cp, a crash of the machine may lose what was just written, a crash or kill
//!   of the program leaves at most a file with a temporary name.
//! - Nothing is ever followed below the destination: every name is opened relative to its directory, which was opened
//!   the same way, so no symlink that lies or is put there leads out.

mod attributes;
mod contents;
mod destination;
mod plan;
mod writer;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use crate::daemon::{ImageName, Session};
use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::image::plan::{Item, Name, What};

pub use attributes::Spared;
use destination::Destination;
use plan::Plan;

/// The most failures that are kept word by word; the others are counted.
const FAILURES_KEPT: usize = 20;

/// What to get.
#[derive(Debug, Clone)]
pub struct Request {
    /// The image.
    pub image: ImageName,
    /// Which paths of it: see [`crate::image::select::Pattern`].
    pub patterns: Vec<Vec<u8>>,
    /// The directory below which the paths are made. If the only pattern is a path that leads to a regular file, and this
    /// is no directory, the file itself.
    pub destination: PathBuf,
    /// How often it goes on after a failure of the network without anything having come.
    pub retries: u32,
}

/// How far it is, for whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    total_bytes: AtomicU64,
    done_bytes: AtomicU64,
}

impl Progress {
    /// Bytes of all files, 0 until they are known.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that were written.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    fn done(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What was written is to be written again.
    fn undone(&self, bytes: u64) {
        self.done_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What was done.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The image by its digest.
    pub reference: String,
    /// Why the tag could not be checked, where that is so and this is its last known image.
    pub stale: Option<String>,
    /// Directories, those that only lead to others included.
    pub directories: u64,
    /// Regular files.
    pub files: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Further names of files.
    pub hard_links: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Devices and named pipes.
    pub special_files: u64,
    /// What the rights of this user, or the filesystem, did not allow.
    pub spared: Spared,
    /// What could not be got, and why; not all of it, if it is much.
    pub failures: Vec<Error>,
    /// How much could not be got.
    pub failure_count: u64,
}

/// What all that work on one request share.
#[derive(Debug)]
struct Shared {
    destination: Destination,
    progress: Arc<Progress>,
    counts: Mutex<Report>,
    /// The paths of what has further names and is not made yet. What lies there meanwhile is something else.
    awaited: Mutex<HashSet<Vec<u8>>>,
}

impl Shared {
    fn count(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.counts.lock());
    }

    fn fail(&self, error: Error) {
        self.counts.lock().fail(error);
    }

    /// Something that may have further names is in its place.
    fn made(&self, item: &Item) {
        self.awaited.lock().remove(&item.path.0);
    }
}

impl Report {
    fn fail(&mut self, error: Error) {
        self.failure_count += 1;
        if self.failures.len() < FAILURES_KEPT {
            self.failures.push(error);
        }
    }
}

/// Gets files. What can be got is, and the report says what cannot.
///
/// # Errors
/// What ends it before its end: a failure of the network that outlasts the retries, a refusal, a full disk.
pub async fn get(session: &Arc<Session>, request: &Request, progress: &Arc<Progress>) -> Result<Report> {
    let mut plan = Plan::ask(session, request).await?;
    progress.total_bytes.store(plan.head.bytes, Ordering::Relaxed);
    let mut report = Report {
        reference: plan.head.reference.clone(),
        stale: plan.head.stale.clone(),
        ..Report::default()
    };
    plan.head.unmatched.drain(..).for_each(|error| report.fail(error));
    if plan.items.is_empty() {
        return Ok(report);
    }
    let root = root(request, &mut plan)?;
    let awaited = with_further_names(&plan.items)?;
    let shared = Arc::new(Shared {
        destination: Destination::open(&root)?,
        progress: Arc::clone(progress),
        counts: Mutex::new(report),
        awaited: Mutex::new(awaited),
    });
    let items = Arc::new(plan.items);
    in_background(&shared, &items, directories).await?;
    let image = ImageName {
        reference: plan.head.reference,
        platform: request.image.platform.clone(),
    };
    tokio::try_join!(
        contents::get(session, &image, request.retries, &shared, &items),
        in_background(&shared, &items, small_things),
    )?;
    in_background(&shared, &items, hard_links).await?;
    in_background(&shared, &items, |shared, _| shared.destination.finish()).await?;
    let mut report = std::mem::take(&mut *shared.counts.lock());
    report.spared = shared.destination.spared();
    Ok(report)
}

/// The directory to write below. Where the destination names the file itself, the plan is only about that.
fn root(request: &Request, plan: &mut Plan) -> Result<PathBuf> {
    let destination = &request.destination;
    let is_dir = destination.is_dir() || destination.as_os_str().as_bytes().ends_with(b"/");
    let (Some(node), Some(name), false) = (plan.head.file, destination.file_name(), is_dir) else {
        return Ok(destination.clone());
    };
    let is_it = |item: &Item| matches!(&item.what, What::File(file) if file.node == node);
    plan.items.retain(is_it);
    for item in &mut plan.items {
        item.path = Name(name.as_bytes().to_vec());
    }
    let parent = destination
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    if !parent.is_dir() {
        return Err(Error::posix(parent.display().to_string(), libc::ENOENT));
    }
    Ok(parent.to_owned())
}

/// Runs what waits for the disk on a thread for such work.
async fn in_background(
    shared: &Arc<Shared>,
    items: &Arc<Vec<Item>>,
    work: impl FnOnce(&Shared, &[Item]) -> Result<()> + Send + 'static,
) -> Result<()> {
    let (shared, items) = (Arc::clone(shared), Arc::clone(items));
    blocking(&tokio::runtime::Handle::current(), move || work(&shared, &items)).await
}

fn directories(shared: &Shared, items: &[Item]) -> Result<()> {
    for item in items {
        if let What::Dir { is_passage } = item.what {
            match shared.destination.make_dir(item, is_passage) {
                Ok(()) => shared.count(|report| report.directories += 1),
                Err(error) => each_its_own(shared, error)?,
            }
        }
    }
    Ok(())
}

/// What needs no content from anywhere.
fn small_things(shared: &Shared, items: &[Item]) -> Result<()> {
    for item in items {
        let made = match &item.what {
            What::Symlink { target } => shared.destination.make_symlink(item, &target.0).map(|()| {
                shared.made(item);
                shared.count(|report| report.symlinks += 1);
            }),
            What::Char { .. } | What::Block { .. } | What::Fifo => {
                shared.destination.make_special(item).map(|is_made| {
                    if is_made {
                        shared.made(item);
                    }
                    shared.count(|report| report.special_files += u64::from(is_made));
                })
            }
            What::File(file) if file.size == 0 => writer::empty(shared, item),
            What::File(_) | What::Dir { .. } | What::Link { .. } => Ok(()),
        };
        if let Err(error) = made {
            each_its_own(shared, error)?;
        }
    }
    Ok(())
}

/// The item that a link is another name of.
fn first_name<'a>(items: &'a [Item], item: &Item) -> Result<Option<&'a Item>> {
    let What::Link { to } = item.what else {
        return Ok(None);
    };
    let first = usize::try_from(to).ok().and_then(|to| items.get(to));
    first
        .map(Some)
        .ok_or_else(|| Error::malformed("plan", "a link to nothing"))
}

fn with_further_names(items: &[Item]) -> Result<HashSet<Vec<u8>>> {
    let mut paths = HashSet::new();
    for item in items {
        paths.extend(first_name(items, item)?.map(|first| first.path.0.clone()));
    }
    Ok(paths)
}

fn hard_links(shared: &Shared, items: &[Item]) -> Result<()> {
    for item in items {
        let Some(first) = first_name(items, item)? else {
            continue;
        };
        if shared.awaited.lock().contains(&first.path.0) {
            // It could not be made, which is told already; what lies there was there before.
            continue;
        }
        match shared.destination.make_link(item, first) {
            Ok(true) => shared.count(|report| report.hard_links += 1),
            // Somebody has taken it away.
            Ok(false) => {}
            Err(error) => each_its_own(shared, error)?,
        }
    }
    Ok(())
}

/// Notes a failure, if the next name may fare better.
fn each_its_own(shared: &Shared, error: Error) -> Result<()> {
    let ends_all = [
        libc::ENOSPC,
        libc::EDQUOT,
        libc::EROFS,
        libc::EIO,
        libc::EMFILE,
        libc::ENFILE,
    ];
    if matches!(&error, Error::Io { errno, .. } if ends_all.contains(errno)) {
        return Err(error);
    }
    shared.fail(error);
    Ok(())
}

/// A path of an image, for messages: on one line, whatever the image says.
fn shown(path: &[u8]) -> String {
    let text = OsStr::from_bytes(path).to_string_lossy();
    text.replace(char::is_control, "?")
}
