//! Merged trees that the kernel knows the root of before they are open, because a layer is still being read as a whole.
//!
//! While a LOOKUP is held, the kernel keeps everyone else who looks the same name up waiting for it, and nobody can be
//! interrupted there, not even by SIGKILL. So no LOOKUP of a tree's root waits for a pass. It is answered with the root's
//! number, which is known without the tree, and with attributes that hold for no time. The kernel then asks for the
//! attributes on every way through the directory, for each process in a request of its own, and there they wait.
//!
//! Where the kernel does not check permissions (an ordinary user's own mount) it asks for none, and looks the next name
//! up at once: the same trap one step further in. Who comes that way is told ESTALE, whereupon the kernel walks the whole
//! path again and asks whether each name on it still holds. That question about the root is a LOOKUP too, but of a name
//! that is there, for which nobody else is kept waiting: it may be held.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::fetch::Awaited;
use crate::fs::Filesystem;
use crate::fs::ino::in_slot;
use crate::fs::nodes::{ImageAt, NameNode};
use crate::fs::ops::{Answer, Attr, Caller, Entry, FOREVER, FileType, Lookup};
use crate::fs::slots::{Held, Slot};
use crate::image::tree::ROOT;
use crate::image::{Image, Rootfs};
use crate::layer::entry::Time;

/// How often a lookup of a tree's root looks whether it would wait for a pass. Small layers are read in less, and then all
/// is answered at once.
const LOOK_INTERVAL: Duration = Duration::from_millis(150);
/// Threads that may be on their way again at once; further ones wait where they are.
const SENT_BACK_MAX: usize = 1024;

/// What is to be opened.
#[derive(Debug)]
pub(super) struct Unopened {
    pub(super) image: Arc<Image>,
    /// The layer that is seen alone; the merge of all if none.
    pub(super) layer: Option<usize>,
}

impl Unopened {
    fn awaited(&self) -> Awaited {
        let sources = self.image.sources();
        match self.layer {
            Some(layer) => Awaited::of(sources.get(layer..).and_then(|rest| rest.get(..1)).unwrap_or(&[])),
            None => Awaited::of(sources),
        }
    }
}

/// A tree that is not open, under the number that the slot of its directories will have.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) number: u32,
    /// The path at which the tree's root is seen.
    pub(super) path: String,
    parent_ino: u64,
    unopened: Unopened,
    /// Threads that were told to walk the path again.
    sent_back: Mutex<HashSet<u32>>,
    pub(super) lookups: AtomicU64,
}

impl Pending {
    fn new(number: u32, path: String, parent_ino: u64, unopened: Unopened) -> Arc<Self> {
        Arc::new(Self {
            number,
            path,
            parent_ino,
            unopened,
            sent_back: Mutex::default(),
            lookups: AtomicU64::new(0),
        })
    }

    /// Whether a thread is to walk the path again: once, and if it is known. Not all who look names up walk paths.
    fn send_back(&self, caller: Caller) -> bool {
        let mut sent_back = self.sent_back.lock();
        if caller.pid == 0 || sent_back.remove(&caller.pid) || sent_back.len() >= SENT_BACK_MAX {
            return false;
        }
        sent_back.insert(caller.pid)
    }

    /// Whether a thread comes because it was sent.
    fn comes_again(&self, caller: Caller) -> bool {
        self.sent_back.lock().remove(&caller.pid)
    }

    /// What stands for the attributes until they are known. Nobody is let in by them, whatever the kernel makes of them.
    fn attr(&self) -> Attr {
        Attr {
            ino: in_slot(self.number, ROOT),
            size: 0,
            blocks: 0,
            mtime: Time { seconds: 0, nanos: 0 },
            kind: FileType::Dir,
            mode: 0,
            nlink: 2,
            uid: 0,
            gid: 0,
            rdev: 0,
        }
    }
}

/// The root of a tree, as a lookup finds it.
enum Root {
    /// The tree is open.
    Open(Arc<Slot>),
    /// It is not: what stands for it, counted.
    Pending(Entry),
}

impl Filesystem {
    /// The root of a merged tree under a name of its own. The slots that its numbers come from are the same each time.
    pub(super) fn lookup_tree(
        &self,
        caller: Caller,
        dir: &Arc<NameNode>,
        at: &Arc<ImageAt>,
        name: &str,
        unopened: Unopened,
    ) -> Answer<Lookup> {
        let (filesystem, dir, at) = (self.clone(), Arc::clone(dir), Arc::clone(at));
        let (name, path) = (name.to_owned(), dir.child_path(name));
        let journal_path = path.clone();
        self.journaled("lookup", move || journal_path, async move {
            let number = filesystem.slot(filesystem.view_key(&path, at.digest())).await?;
            let is_rootfs = unopened.layer.is_none();
            let held = filesystem.slots().held(number);
            let pending = match held {
                Ok(Held::Pending(pending)) => pending,
                _ => Pending::new(number, path, dir.ino, unopened),
            };
            let may_wait = pending.comes_again(caller);
            let own_ttl = filesystem.own_ttl(&dir, &at);
            let slot = match filesystem.opened_root(&pending, may_wait).await? {
                Root::Open(slot) => slot,
                Root::Pending(entry) => {
                    // Once it is open, whoever comes next sees it mounted over.
                    let is_covered = is_rootfs && filesystem.covers_roots();
                    let entry_ttl = if is_covered { Duration::ZERO } else { own_ttl };
                    return Ok(Lookup::Found(Entry { entry_ttl, ..entry }));
                }
            };
            // While a stranger may be on his way in, he must be refused at this name, and that would throw a mount out.
            let entry_ttl = match is_rootfs && own_ttl == FOREVER {
                true => filesystem.cover(&slot, &dir, &name).await,
                false => own_ttl,
            };
            let root = slot.rootfs.tree().node(ROOT)?;
            Ok(Lookup::Found(Entry {
                entry_ttl,
                ..filesystem.merged_entry(&slot, &root)
            }))
        })
    }

    /// Opens a tree for a lookup of its root, or counts one of what stands for it. It waits for a pass only if it may.
    async fn opened_root(&self, pending: &Arc<Pending>, may_wait: bool) -> Result<Root> {
        let awaited = pending.unopened.awaited();
        let mut opening = std::pin::pin!(self.opened(pending));
        loop {
            if let Ok(slot) = tokio::time::timeout(LOOK_INTERVAL, &mut opening).await {
                return slot.map(Root::Open);
            }
            let would_wait = self.images().fetcher().is_passing(&awaited);
            if would_wait && !may_wait && self.slots().count_pending(pending) {
                return Ok(Root::Pending(Entry {
                    attr: pending.attr(),
                    attr_ttl: Duration::ZERO,
                    entry_ttl: Duration::ZERO,
                }));
            }
        }
    }

    /// Opens a tree, however long the layers take that must be read as a whole, as long as they come. All who wait share
    /// the work.
    async fn opened(&self, pending: &Pending) -> Result<Arc<Slot>> {
        let Unopened { image, layer } = &pending.unopened;
        let images = self.images();
        let open = async {
            match layer {
                Some(layer) => images.layer_tree(image, *layer).await,
                None => images.rootfs(image).await,
            }
        };
        let wait = self.options().lookup_wait;
        let awaited = pending.unopened.awaited();
        let what = || pending.path.clone();
        let rootfs: Arc<Rootfs> = images.fetcher().within(wait, &awaited, what, open).await?;
        if layer.is_none() {
            self.touch(&rootfs);
        }
        let files = self.slot(format!("files {}", rootfs.key())).await?;
        let files = Slot::files(files, rootfs);
        let slot = Slot::view(pending.number, pending.path.clone(), pending.parent_ino, files);
        Ok(self.slots().open(slot))
    }

    /// Answers from the merged tree in a slot: at once if it is open, else when it is.
    pub(super) fn in_tree<T: Send + 'static>(
        &self,
        operation: &'static str,
        slot: u32,
        answer: impl FnOnce(&Self, &Arc<Slot>) -> Answer<T> + Send + 'static,
    ) -> Answer<T> {
        let pending = match self.slots().held(slot) {
            Ok(Held::Open(slot)) => return answer(self, &slot),
            Ok(Held::Pending(pending)) => pending,
            Err(error) => return Answer::Now(Err(error)),
        };
        let filesystem = self.clone();
        Answer::later(async move {
            let slot = match filesystem.opened(&pending).await {
                Ok(slot) => slot,
                Err(error) => {
                    filesystem.journal().record(operation, &pending.path, &error);
                    return Err(error);
                }
            };
            match answer(&filesystem, &slot) {
                Answer::Now(result) => result,
                Answer::Later(work) => work.await,
            }
        })
    }

    /// Looks a name up in a directory of a merged tree.
    pub(super) fn lookup_in_tree(&self, caller: Caller, slot: u32, node: u32, name: &[u8]) -> Answer<Lookup> {
        if let Ok(Held::Pending(pending)) = self.slots().held(slot)
            && pending.send_back(caller)
        {
            return Answer::Now(Err(Error::posix(pending.path.as_str(), libc::ESTALE)));
        }
        let name = name.to_vec();
        self.in_tree("lookup", slot, move |filesystem, slot| {
            Answer::Now(filesystem.lookup_merged(slot, node, &name))
        })
    }
}
