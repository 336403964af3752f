//! Requests of the kernel as calls of [`Operations`], and the answers back.
//!
//! What is known at once is answered on the session's thread. What has to wait moves to the async runtime together
//! with its reply, so a slow registry never keeps a hit waiting. A panic below is one failed request, not the end of
//! the mount.

use std::any::Any;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tokio::sync::Semaphore;

use super::ahead::Ahead;
use super::attributes::{BLOCK_BYTES, errno, file_attr, no_inode};
use super::counters::{Op, Requests};
use super::interrupt::{Patience, Waiter};
use super::listing::{Listing, OwedForgets, PlainRows, PlusRows};
use super::session_end::SessionEnd;
use crate::error::{Error, Result};
use crate::fs::ops::{Access, Answer, Caller, FileType, Lookup, Operations};

/// The largest READ, in bytes: what the kernel allows by default (fs.fuse.max_pages_limit).
pub(super) const MAX_READ_BYTES: u32 = 1 << 20;
/// Background requests that the kernel may have in flight; further ones queue up in it unseen, hits among them. Every
/// buffered read is one of these, so this must lie far above the number of readers that wait for a registry. Fewer than
/// [`MAX_OUTSTANDING`], so that background requests alone never get there.
const MAX_BACKGROUND: u16 = 4096;
/// Requests that may wait at once. Every caller has at most one besides read-ahead, so only a machine gone wild gets
/// here; the answer beyond is ENOMEM, which unlike other errors detaches nothing in a path that is checked again.
const MAX_OUTSTANDING: usize = 8192;
/// The longest name that statfs(2) promises, in bytes.
const NAME_MAX_BYTES: u32 = 255;
/// What is asked of the kernel, as far as it offers it. READDIRPLUS_AUTO is left out on purpose: with it the kernel takes
/// attributes from the first part of a listing only, and a `find` over a large directory looks every other name up.
const WANTED: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_ASYNC_DIO)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_CACHE_SYMLINKS)
    .union(InitFlags::FUSE_AUTO_INVAL_DATA)
    .union(InitFlags::FUSE_MAX_PAGES)
    .union(InitFlags::FUSE_NO_OPEN_SUPPORT)
    .union(InitFlags::FUSE_NO_OPENDIR_SUPPORT);

/// Asked for besides where the kernel enforces permissions, which it does for everyone who asks for this.
const WANTED_ENFORCING: InitFlags = InitFlags::FUSE_POSIX_ACL;

/// The filesystem as fuser sees it.
pub(super) struct Adapter {
    core: Core,
    /// Whether the mount was made with `default_permissions`.
    enforces_permissions: bool,
    /// Whether the filesystem is told of opens.
    tells_opens: bool,
    /// Hands contents on that nobody has asked for yet.
    ahead: Ahead,
    no_open: bool,
    no_opendir: bool,
}

/// What a request needs that outlives the call it came in.
#[derive(Clone)]
pub(super) struct Core {
    pub(super) fs: Arc<dyn Operations>,
    pub(super) owed_forgets: Arc<OwedForgets>,
    requests: Arc<Requests>,
    runtime: tokio::runtime::Handle,
    outstanding: Arc<Semaphore>,
    end: Arc<SessionEnd>,
}

impl Core {
    /// Counts the request, makes the call and sees to it that its result is responded to exactly once, here or later.
    fn serve<T: Send + 'static>(
        &self,
        op: Op,
        waiter: Waiter,
        call: impl FnOnce(&dyn Operations) -> Answer<T>,
        respond: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        self.requests.count(op);
        let respond = move |result: Result<T>| {
            if let Err(error) = &result {
                tracing::debug!(operation = op.name(), %error, "request failed");
            }
            respond(result);
        };
        match caught(op, || call(&*self.fs)) {
            Ok(Answer::Now(result)) => respond(result),
            Ok(Answer::Later(work)) => self.run(op, waiter, work, respond),
            Err(error) => respond(Err(error)),
        }
    }

    /// Runs `work` on the runtime until it ends or its waiter was interrupted. Once the session has ended there is nobody
    /// to answer: what still waits is dropped, because every reply keeps the device open.
    pub(super) fn run<T: Send + 'static>(
        &self,
        op: Op,
        waiter: Waiter,
        work: impl Future<Output = Result<T>> + Send + 'static,
        respond: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        let Ok(permit) = self.outstanding.clone().try_acquire_owned() else {
            tracing::error!(operation = op.name(), "too many requests wait; refusing more");
            return respond(Err(Error::posix("a request beyond the limit", libc::ENOMEM)));
        };
        let work = waiter.hold(caught_later(op, work));
        let end = self.end.wait();
        self.runtime.spawn(async move {
            tokio::select! {
                biased;
                result = work => respond(result),
                () = end => {}
            }
            drop(permit);
        });
    }
}

/// Makes a panic of `call` an error.
pub(super) fn caught<T>(op: Op, call: impl FnOnce() -> T) -> Result<T> {
    // A panic may leave the filesystem's own state half changed; its locks are its business, and going on with other
    // requests is what the mount's users need.
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| panicked(op, panic.as_ref()))
}

/// Makes a panic of a future an error.
async fn caught_later<T>(op: Op, work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|context| {
        caught(op, || work.as_mut().poll(context)).unwrap_or_else(|error| Err(error).into())
    })
    .await
}

fn panicked(op: Op, panic: &(dyn Any + Send)) -> Error {
    let message = panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    tracing::error!(operation = op.name(), message, "panic in the filesystem");
    Error::posix(format!("{} (panic)", op.name()), libc::EIO)
}

fn caller(request: &Request) -> Caller {
    Caller {
        pid: request.pid(),
        uid: request.uid(),
        gid: request.gid(),
    }
}

fn waiter(request: &Request) -> Waiter {
    Waiter::new(request.pid(), Patience::Interruptible)
}

/// Answers by the size protocol of getxattr(2) and listxattr(2): 0 asks for the length.
fn respond_xattr(reply: ReplyXattr, buffer_bytes: u32, result: Result<Vec<u8>>) {
    match result.map(|value| (u32::try_from(value.len()), value)) {
        Ok((Ok(length), _)) if buffer_bytes == 0 => reply.size(length),
        Ok((Ok(length), value)) if length <= buffer_bytes => reply.data(&value),
        Ok(_) => reply.error(Errno::ERANGE),
        Err(error) => reply.error(errno(&error)),
    }
}

impl Adapter {
    /// An adapter that serves `fs`; work that waits runs on `runtime`. `enforces_permissions` says how it was mounted.
    pub(super) fn new(
        fs: Arc<dyn Operations>,
        enforces_permissions: bool,
        requests: Arc<Requests>,
        runtime: tokio::runtime::Handle,
        end: Arc<SessionEnd>,
        ahead: Ahead,
    ) -> Self {
        let tells_opens = fs.wants_opens();
        let core = Core {
            fs,
            owed_forgets: Arc::default(),
            requests,
            runtime,
            outstanding: Arc::new(Semaphore::new(MAX_OUTSTANDING)),
            end,
        };
        Self {
            core,
            enforces_permissions,
            tells_opens,
            ahead,
            no_open: false,
            no_opendir: false,
        }
    }

    fn refuse_write(&self) -> Errno {
        self.core.requests.count(Op::Write);
        Errno::EROFS
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.capabilities();
        let wanted = match self.enforces_permissions {
            true => WANTED | WANTED_ENFORCING,
            false => WANTED,
        };
        let missing = wanted - offered;
        if !missing.is_empty() {
            tracing::debug!(?missing, "the kernel lacks some FUSE features");
        }
        // Both settings can only be refused for values out of fuser's own fixed bounds.
        let refused = config.add_capabilities(wanted & offered).is_err()
            | config.set_max_write(MAX_READ_BYTES).is_err()
            | config.set_max_background(MAX_BACKGROUND).is_err();
        if refused {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        self.no_open = offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT);
        self.no_opendir = offered.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        // The kernel leaves it to us, and asks for names up to a length of its own.
        if name.len() > NAME_MAX_BYTES as usize {
            return reply.error(Errno::ENAMETOOLONG);
        }
        self.core.serve(
            Op::Lookup,
            waiter(request),
            |fs| fs.lookup(caller(request), parent.0, name.as_bytes()),
            move |result| match result {
                Ok(Lookup::Found(entry)) => reply.entry_with_ttls(
                    &entry.attr_ttl,
                    &entry.entry_ttl,
                    &file_attr(&entry.attr),
                    Generation(0),
                ),
                Ok(Lookup::Absent(Duration::ZERO)) => reply.error(Errno::ENOENT),
                // An entry without an inode is a negative one, which the kernel keeps.
                Ok(Lookup::Absent(ttl)) => {
                    let absent = no_inode(FileType::File);
                    reply.entry_with_ttls(&Duration::ZERO, &ttl, &absent, Generation(0));
                }
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        self.core.requests.count(Op::Forget);
        let lookups = self.core.owed_forgets.settle(ino.0, lookups);
        if lookups > 0 {
            // Nobody waits for an answer, and a panic is already logged.
            let _ = caught(Op::Forget, || self.core.fs.forget(ino.0, lookups));
        }
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.core.serve(
            Op::Getattr,
            waiter(request),
            |fs| fs.getattr(ino.0),
            move |result| match result {
                Ok((attr, ttl)) => reply.attr(&ttl, &file_attr(&attr)),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        self.core.serve(
            Op::Readlink,
            waiter(request),
            |fs| fs.readlink(ino.0),
            move |result| match result {
                Ok(target) => reply.data(&target),
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    // Answered ENOSYS once, the kernel opens without asking from then on: that alone makes warm reads native. It then says
    // nothing of closes either, so where these are wanted each open is answered.
    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.core.requests.count(Op::Open);
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            reply.error(Errno::EROFS);
        } else if self.tells_opens {
            // Before the answer, which a close may follow at once.
            match caught(Op::Open, || self.core.fs.opened(ino.0)) {
                Ok(Access::Cached) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
                Ok(Access::Direct) => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
                Err(_) => reply.error(Errno::EIO),
            }
        } else if self.no_open {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
        }
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.core.requests.count(Op::Release);
        if self.tells_opens {
            // A panic is already logged, and nobody waits for the outcome.
            let _ = caught(Op::Release, || self.core.fs.closed(ino.0));
        }
        reply.ok();
    }

    fn opendir(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.core.requests.count(Op::Opendir);
        if self.no_opendir {
            reply.error(Errno::ENOSYS);
        } else {
            let keep = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
            reply.opened(FileHandle(0), keep);
        }
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.core.serve(
            Op::Read,
            Waiter::new(request.pid(), Patience::Killable),
            |fs| fs.read(caller(request), ino.0, offset, size),
            move |result| match result {
                // The kernel fails a request whose answer is longer than asked for.
                Ok(bytes) => reply.data(bytes.get(..size as usize).unwrap_or(&bytes)),
                Err(error) => reply.error(errno(&error)),
            },
        );
        if offset == 0 {
            self.ahead.follow(ino.0);
        }
    }

    fn readdir(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.core.requests.count(Op::Readdir);
        let rows = PlainRows::new(reply);
        Listing::new(self.core.clone(), caller(request), ino.0, offset, rows).start(waiter(request));
    }

    fn readdirplus(
        &self,
        request: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.core.requests.count(Op::Readdirplus);
        let rows = PlusRows::new(reply);
        Listing::new(self.core.clone(), caller(request), ino.0, offset, rows).start(waiter(request));
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.core.serve(
            Op::Statfs,
            waiter(request),
            Operations::statfs,
            move |result| match result {
                Ok(s) => {
                    let free = s.blocks_free;
                    reply.statfs(
                        s.blocks,
                        free,
                        free,
                        s.files,
                        0,
                        BLOCK_BYTES,
                        NAME_MAX_BYTES,
                        BLOCK_BYTES,
                    );
                }
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.core.serve(
            Op::Getxattr,
            waiter(request),
            |fs| fs.getxattr(ino.0, name.as_bytes()),
            move |result| respond_xattr(reply, size, result),
        );
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.core.serve(
            Op::Listxattr,
            waiter(request),
            |fs| fs.listxattr(ino.0),
            move |result| respond_xattr(reply, size, result),
        );
    }

    // ENOSYS is remembered by the kernel for these two, and it does the right thing by itself: nothing to flush, SEEK_DATA
    // and SEEK_HOLE as in a file without holes.

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.core.requests.count(Op::Flush);
        reply.error(Errno::ENOSYS);
    }

    // Asked by access(2) and chdir(2), and only where the kernel does not enforce permissions: all may be read, but what
    // has no x in its mode is no program, and the kernel executes none either.
    fn access(&self, request: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        self.core.serve(
            Op::Access,
            waiter(request),
            |fs| fs.getattr(ino.0),
            move |result| match result {
                Ok((attr, _)) => {
                    let is_program = attr.kind == FileType::Dir || attr.mode & 0o111 != 0;
                    match mask.contains(AccessFlags::X_OK) && !is_program {
                        true => reply.error(Errno::EACCES),
                        false => reply.ok(),
                    }
                }
                Err(error) => reply.error(errno(&error)),
            },
        );
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        self.core.requests.count(Op::Lseek);
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        self.core.requests.count(Op::Ioctl);
        reply.error(Errno::ENOTTY);
    }

    // The mount is read-only, so the kernel refuses all that follows itself; this is for one remounted read-write.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(self.refuse_write());
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(self.refuse_write());
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(self.refuse_write());
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refuse_write());
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refuse_write());
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(self.refuse_write());
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(self.refuse_write());
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(self.refuse_write());
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(self.refuse_write());
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(self.refuse_write());
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(self.refuse_write());
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(self.refuse_write());
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(self.refuse_write());
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(self.refuse_write());
    }
}
