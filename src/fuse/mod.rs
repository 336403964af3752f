//! The FUSE adapter: carries [`crate::fs::ops::Operations`] to the kernel. It holds no filesystem logic, and nothing
//! outside of it knows fuser or `/dev/fuse`, so another transport can replace it.
//!
//! The daemon never touches a path of its own mount: a daemon that waits for itself hangs everyone who looks there.
//! Whatever must (mounting, checking, unmounting) is done by a short-lived helper process that holds no descriptor of
//! the session, started from this same binary ([`helper_main_if_asked`]) and killed after a deadline. One more of these
//! stays where contents are handed on unasked, to end the connection if the daemon dies in that and cannot go.

mod adapter;
mod ahead;
mod attributes;
mod autofs;
mod busy;
mod counters;
mod death_watch;
mod detached;
mod detached_helper;
mod erofs;
mod erofs_helper;
mod erofs_uuid;
mod fd_passing;
mod fusermount;
mod helper;
mod helper_process;
mod interrupt;
mod listing;
mod mount;
mod mount_attr;
mod mountinfo;
mod new_mount;
mod notify;
mod session;
mod session_end;
mod unmounting;
mod utab;

pub use autofs::{Guarded, unmount_guarded};
pub use counters::Counters;
pub use detached::DetachedMount;
pub use erofs::{Attachment, Detach, ErofsDevice, NewErofs, Place};
pub use helper::{Unmount, helper_main_if_asked, resolve_new_mountpoint};
pub use helper_process::Helper;
pub use mount::{Mount, MountOptions, unmount_all_dead, unmount_path};
pub use mountinfo::{MountTableWatch, mounted};
